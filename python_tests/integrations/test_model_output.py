"""ModelOutput for each kind of Hugging Face model, beside its samples one by one and without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from mas_ext import estimate_importance
from mas_ext.integrations.transformers import ModelOutput

N, T, WORDS = 4, 7, 24
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Sample(NamedTuple):
    """What one sample's output is, given the model and the sample alone."""

    model: nn.Module
    batch: dict[str, Tensor]
    right: Callable[[Any, dict[str, Tensor]], Tensor]


def text(n: int = N, positions: int = T, masked: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (n, positions))
    mask = torch.ones_like(ids)
    if masked:
        for k in range(n):
            mask[k, positions - k % 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def unpadded(row: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = row["attention_mask"][0] == 1
    return {key: t[:, kept] for key, t in row.items() if t.dim() == 2 and t.shape[1] == len(kept)}


def following(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([logits[0, t, int(ids[0, t + 1])] for t in range(ids.shape[1] - 1)])


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, **more}))


def causal_right(model: Any, row: dict[str, Tensor]) -> Tensor:
    row = unpadded(row)
    return following(model(**row).logits, row["input_ids"])


def causal() -> Sample:
    return Sample(llama(), text(), causal_right)


def causal_of_another_name() -> Sample:
    config = hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=T)
    return Sample(hf.GPT2LMHeadModel(config), text(), causal_right)


def with_virtual_tokens(config: Any, number: int) -> Sample:
    """The logits of the virtual tokens, in front, are no part of the text's."""

    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        row = unpadded(row)
        ids = row["input_ids"]
        return following(model(**row).logits[:, number:], ids)

    return Sample(peft.get_peft_model(llama(), config), text(), right)


def prompt_tuning() -> Sample:
    return with_virtual_tokens(
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 3
    )


def p_tuning() -> Sample:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=6
    )
    return with_virtual_tokens(config, 4)


def prefix_tuning() -> Sample:
    return with_virtual_tokens(
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), 0
    )


def lora() -> Sample:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    return Sample(peft.get_peft_model(llama(), config), text(), causal_right)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=WORDS,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def answers(positions: int = 5) -> Tensor:
    labels = torch.randint(3, WORDS, (N, positions))
    for k in range(N):
        labels[k, positions - k % 3 :] = -100
    return labels


def teacher_forced(start: int) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """The logit of each label, given the ones before it."""

    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        labels = row["labels"][row["labels"] != -100]
        before = torch.cat([torch.tensor([start]), labels[:-1]])[None]
        kept = row["attention_mask"][0] == 1
        found = model(
            input_ids=row["input_ids"][:, kept],
            attention_mask=row["attention_mask"][:, kept],
            decoder_input_ids=before,
        )
        return torch.stack(
            [x[y] for x, y in zip(found.logits[0, -len(labels) :], labels, strict=True)]
        )

    return right


def encoder_decoder() -> Sample:
    labels = answers()
    before = torch.cat([torch.zeros(N, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], 1)
    return Sample(
        t5(), {**text(), "labels": labels, "decoder_input_ids": before}, teacher_forced(0)
    )


def encoder_decoder_with_labels_alone() -> Sample:
    return Sample(t5(), {**text(), "labels": answers()}, teacher_forced(0))


def encoder_decoder_of_as_many_positions() -> Sample:
    return Sample(t5(), {**text(), "labels": answers(T)}, teacher_forced(0))


def bart() -> Sample:
    model = hf.BartForConditionalGeneration(hf.BartConfig(**BART))
    return Sample(model, {**text(), "labels": answers()}, teacher_forced(2))


def encoder_decoder_without_labels() -> Sample:
    ids, mask = torch.randint(3, WORDS, (N, 5)), torch.ones(N, 5, dtype=torch.long)
    for k in range(N):
        mask[k, 5 - k % 3 :] = 0

    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        own = row["decoder_input_ids"][:, row["decoder_attention_mask"][0] == 1]
        source = unpadded({key: row[key] for key in ("input_ids", "attention_mask")})
        return following(model(**source, decoder_input_ids=own).logits, own)

    batch = {**text(), "decoder_input_ids": ids, "decoder_attention_mask": mask}
    return Sample(t5(), batch, right)


def encoder_decoder_with_prompt() -> Sample:
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(t5(), config)
    return Sample(model, {**text(masked=False), "labels": answers()}, teacher_forced(0))


def images_to_text() -> Sample:
    encoder = hf.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4
    )
    decoder = hf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 1
    model = hf.VisionEncoderDecoderModel(config)

    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        labels = row["labels"][row["labels"] != -100]
        before = torch.cat([torch.tensor([0]), labels[:-1]])[None]
        logits = model(pixel_values=row["pixel_values"], decoder_input_ids=before).logits
        return torch.stack([x[y] for x, y in zip(logits[0], labels, strict=True)])

    return Sample(model, {"pixel_values": torch.randn(N, 3, 8, 8), "labels": answers()}, right)


def whole_logits(model: Any, row: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**unpadded(row)).logits
    return logits


def token_classification() -> Sample:
    """With as many classes as words, too."""
    model = hf.BertForTokenClassification(hf.BertConfig(**SMALL, num_labels=WORDS))
    return Sample(model, {**text(), "labels": torch.randint(5, (N, T))}, whole_logits)


def token_classification_of_an_encoder_decoder() -> Sample:
    config = hf.T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    return Sample(hf.T5ForTokenClassification(config), text(), whole_logits)


def token_classification_with_prompt() -> Sample:
    config = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(hf.BertForTokenClassification(hf.BertConfig(**SMALL)), config)
    right = lambda m, row: m(**row).logits[:, 3:]  # noqa: E731
    return Sample(model, text(masked=False), right)


def question_answering() -> Sample:
    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        found = model(**unpadded(row))
        return torch.cat([found.start_logits, found.end_logits])

    model = hf.BertForQuestionAnswering(hf.BertConfig(**SMALL))
    return Sample(model, text(), right)


def replaced_tokens() -> Sample:
    config = hf.ElectraConfig(**SMALL, embedding_size=8)
    return Sample(hf.ElectraForPreTraining(config), text(), whole_logits)


def sequence_classification() -> Sample:
    model = hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3))
    return Sample(model, {**text(), "labels": torch.randint(3, (N,))}, whole_logits)


def sequence_classification_of_a_causal_model() -> Sample:
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0))
    batch = text()
    batch["input_ids"] *= batch["attention_mask"]
    return Sample(model, batch, whole_logits)


def sequence_classification_of_an_encoder_decoder() -> Sample:
    batch = text(masked=False)
    batch["input_ids"][:, -1] = 2
    return Sample(hf.BartForSequenceClassification(hf.BartConfig(**BART)), batch, whole_logits)


def image_classification() -> Sample:
    config = hf.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    right = lambda m, row: m(**row).logits  # noqa: E731
    return Sample(
        hf.ViTForImageClassification(config), {"pixel_values": torch.randn(N, 3, 8, 8)}, right
    )


def segmentation() -> Sample:
    config = hf.SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[1],
        hidden_sizes=[8],
        patch_sizes=[3],
        strides=[2],
        num_attention_heads=[1],
        mlp_ratios=[2],
        decoder_hidden_size=8,
        num_labels=3,
    )
    right = lambda m, row: m(pixel_values=row["pixel_values"]).logits  # noqa: E731
    batch = {
        "pixel_values": torch.randn(N, 3, 8, 8),
        "labels": torch.zeros(N, 8, 8, dtype=torch.long),
    }
    return Sample(hf.SegformerForSemanticSegmentation(config), batch, right)


def speech(masked: bool) -> Sample:
    config = hf.Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_stride=(3, 2),
        conv_kernel=(4, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = hf.Wav2Vec2ForCTC(config)
    mask = torch.ones(N, 60, dtype=torch.long)
    if masked:
        for k in range(N):
            mask[k, 60 - 12 * k :] = 0
    # Padding that is 0 in convolutions over positions is no padding in a sample alone: the sample stays padded.
    samples = torch.randn(N, 60) * mask

    def right(model: Any, row: dict[str, Tensor]) -> Tensor:
        length = int(model._get_feat_extract_output_lengths(row["attention_mask"].sum()))
        logits: Tensor = model(**row).logits[:, :length]
        return logits

    return Sample(model, {"input_values": samples, "attention_mask": mask}, right)


def connectionist() -> Sample:
    return speech(False)


def connectionist_with_silence() -> Sample:
    return speech(True)


KINDS = {
    f.__name__: f
    for f in (
        *(causal, causal_of_another_name, lora, prompt_tuning, p_tuning, prefix_tuning),
        *(encoder_decoder, encoder_decoder_with_labels_alone, encoder_decoder_of_as_many_positions),
        *(bart, encoder_decoder_without_labels, encoder_decoder_with_prompt, images_to_text),
        *(token_classification, token_classification_of_an_encoder_decoder),
        *(token_classification_with_prompt, question_answering, replaced_tokens),
        *(sequence_classification, sequence_classification_of_a_causal_model),
        *(sequence_classification_of_an_encoder_decoder, image_classification, segmentation),
        *(connectionist, connectionist_with_silence),
    )
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_counts_of_each_kind_of_model(kind: str) -> None:
    model, batch, right = KINDS[kind]()
    model.double().eval()
    if "pixel_values" in batch or "input_values" in batch:
        batch = {key: t.double() if t.is_floating_point() else t for key, t in batch.items()}
    output = ModelOutput()(model, batch)
    assert len(output) == N
    for k in range(N):
        expected = right(model, {key: t[k : k + 1] for key, t in batch.items()})
        found = output[k][output[k] != 0].flatten().sort().values
        torch.testing.assert_close(found, expected.flatten().sort().values, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["prompt_tuning", "encoder_decoder_with_labels_alone"])
def test_importance_of_it(kind: str) -> None:
    model, batch, right = KINDS[kind]()
    model.double().eval()
    theta = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: torch.zeros_like(p) for n, p in theta.items()}
    for k in range(N):
        value = right(model, {key: t[k : k + 1] for key, t in batch.items()}).square().sum()
        for n, g in zip(theta, torch.autograd.grad(value, [*theta.values()]), strict=True):
            expected[n] += g.abs() / N
    found = estimate_importance(model, [batch], forward=ModelOutput())
    for n, t in expected.items():
        torch.testing.assert_close(found[n], t, rtol=1e-7, atol=1e-10, msg=n)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "parallel"])
@pytest.mark.parametrize(
    "kind", ["prompt_tuning", "encoder_decoder_with_labels_alone", "question_answering"]
)
def test_a_wrapped_model_is_of_the_same_kind(kind: str, wrap: Any) -> None:
    model, batch, _ = KINDS[kind]()
    model.double().eval()
    wrapped = wrap(model, backend="eager") if wrap is torch.compile else wrap(model)
    torch.testing.assert_close(ModelOutput()(wrapped, batch), ModelOutput()(model, batch))


@pytest.mark.parametrize(
    "kind", ["prompt_tuning", "encoder_decoder", "bart", "token_classification"]
)
def test_hidden_states(kind: str) -> None:
    """Of the decoder, and without virtual tokens."""
    model, batch, _ = KINDS[kind]()
    model.double().eval()
    output = ModelOutput("hidden")(model, batch)
    inputs = {key: t for key, t in batch.items() if kind == "bart" or key != "labels"}
    found = model(**inputs, output_hidden_states=True)
    states = found.get("decoder_hidden_states", found.get("hidden_states"))[-1]
    labelled = "labels" in batch and kind != "token_classification"
    counts = batch["labels"] != -100 if labelled else batch["attention_mask"] == 1
    expected = states[:, states.shape[1] - counts.shape[1] :] * counts[..., None]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("of", ["logits", "hidden"])
def test_a_masked_language_model_is_refused_for_tokens_alone(of: Any) -> None:
    """Which its logits are no prediction of."""
    model, batch = hf.BertForMaskedLM(hf.BertConfig(**SMALL)).eval(), text()
    with pytest.raises(ValueError, match=r"of: got 'tokens' for the masked .* BertForMaskedLM"):
        ModelOutput()(model, batch)
    found = model(**batch, output_hidden_states=True)
    expected = found.logits if of == "logits" else found.hidden_states[-1]
    torch.testing.assert_close(
        ModelOutput(of)(model, batch), expected * batch["attention_mask"][..., None]
    )


class Returns(nn.Module):
    """A model of one's own, whose output has these entries."""

    def __init__(self, **entries: Any) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, **inputs: Tensor) -> Any:
        return type("Output", (), self.entries)()


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], str]] = {
    "nothing of the kind": (
        lambda: hf.BertModel(hf.BertConfig(**SMALL)),
        text(),
        r"model: got BaseModelOutput\w+ from BertModel, expected an output with logits; pass forw",
    ),
    "a loss": (
        lambda: Returns(loss=torch.zeros(())),
        text(),
        "model: got Output from Returns, exp",
    ),
    "a list": (
        lambda: Returns(logits=[torch.zeros(N, 2)]),
        text(),
        "model: got Output from Returns",
    ),
    "fewer positions": (
        lambda: Returns(logits=torch.zeros(N, T - 2, WORDS)),
        text(),
        rf"output: got {T - 2} positions from Returns for {T} in the batch, expected as many",
    ),
    "a mask of pairs": (
        lambda: Returns(logits=torch.zeros(N, T, WORDS)),
        {**text(), "attention_mask": torch.ones(N, 1, T, T)},
        r"attention_mask: got shape \(4, 1, 7, 7\), expected \(samples, positions\)",
    ),
    "no ids": (
        llama,
        {"inputs_embeds": torch.randn(N, T, 8, dtype=torch.float32)},
        "of: got 'tokens' for a batch of LlamaForCausalLM without input_ids, expected them, or",
    ),
    "no ids of the decoder": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
        text(),
        "batch: got input_ids, attention_mask for the encoder-decoder BartForCond.*, expected decod",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    make, batch, words = REFUSED[case]
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match=words):
        ModelOutput()(make(), batch)


def test_a_model_without_hidden_states() -> None:
    with pytest.raises(
        ValueError, match="of: got 'hidden' for Returns, which returns no hidden st"
    ):
        ModelOutput("hidden")(Returns(logits=torch.zeros(N, T, WORDS)), text())


@pytest.mark.parametrize("last", [1, 3])
def test_the_last_positions_of_a_decoders_text(last: int) -> None:
    model, batch, right = encoder_decoder_with_labels_alone()
    model.double().eval()
    output = ModelOutput(last=last)(model, batch)
    for k in range(N):
        expected = right(model, {key: t[k : k + 1] for key, t in batch.items()})[-last:]
        torch.testing.assert_close(output[k][output[k] != 0], expected, rtol=1e-9, atol=1e-11)
