"""trl's SFTTrainer: padded, packed and padding-free texts are samples of their own, by a loop in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from definition import assert_close, loop
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from mas_ext import FusedMASPenalty
from mas_ext.integrations.loading import once, unpacked
from mas_ext.integrations.transformers import (
    LogitDistillation,
    MASCallback,
    MASTrainerMixin,
    ModelOutput,
)
from mas_ext.parameters.copying import independent_copy

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]


def tokenizer() -> Any:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    found = Tokenizer(words)
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(generator: torch.Generator, words: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(29, (words,), generator=generator).tolist())


def corpus(completions: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 9, (10,), generator=generator).tolist()
    if completions:
        pairs = [(text(generator, n) + " ", text(generator, 3)) for n in sizes]
        return Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs])
    return Dataset.from_list([{"text": text(generator, n)} for n in sizes])


def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, max_position_embeddings=64, **shape)
    return LlamaForCausalLM(config)


def arguments(folder: Path, **options: Any) -> SFTConfig:
    settled: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return SFTConfig(str(folder), **settled | options)


FORMS: dict[str, dict[str, Any]] = {
    "padding": {},
    "packing": {"packing": True},
    "without padding": {"padding_free": True, "max_length": None},
    "completions": {"completion_only_loss": True},
}


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_every_text_is_a_sample(form: str, lora: bool, tmp_path: Path) -> None:
    mas = MASCallback(lam=1.0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    data = corpus(form == "completions")
    trainer = SFTTrainer(
        llama(),
        arguments(tmp_path, **FORMS[form]),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[mas],
        peft_config=config if lora else None,
    )
    trainer.train()
    assert mas.penalty is not None
    read = tokenizer()
    written = [row.get("text") or row["prompt"] + row["completion"] for row in data]
    texts = [{"input_ids": read(t + "<eos>", return_tensors="pt").input_ids} for t in written]
    model = independent_copy(trainer.model)
    model = (model.merge_and_unload() if lora else model).double()
    model.requires_grad_(True)
    right, _ = loop(model, texts, ModelOutput(), "l2")
    found = mas.penalty.omega
    assert len(found) == 7 if lora else len(found) == len(right)
    assert_close(found, {name: right[name] for name in found}, 1e-4)


def test_the_mixin(tmp_path: Path) -> None:
    class Penalised(MASTrainerMixin, SFTTrainer):  # type: ignore[misc]
        pass

    moved = []
    for lam in (0.0, 1e3):
        model = llama()
        options = arguments(tmp_path, packing=True, optim="sgd", learning_rate=1e-3, max_steps=8)
        data = corpus()
        trainer = Penalised(model, options, train_dataset=data, processing_class=tokenizer())
        trainer.penalty = FusedMASPenalty(model, lam=lam, forward=ModelOutput())
        trainer.penalty.consolidate(once(trainer.get_train_dataloader()))
        before = [p.detach().clone() for p in model.parameters()]
        trainer.train()
        squares = [
            float((p - q).square().sum()) for p, q in zip(model.parameters(), before, strict=True)
        ]
        moved.append(sum(squares))
    assert 0 < moved[1] < 0.9 * moved[0]


def test_distillation_of_packed_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose Trainer computes its loss without logits, and whose model has a forward put in place of its own."""
    mas = MASCallback(lam=0.0, remember=True, distillation=1.0)
    trainer = SFTTrainer(
        llama(),
        arguments(tmp_path, packing=True),
        train_dataset=corpus(),
        processing_class=tokenizer(),
        callbacks=[mas],
    )
    terms = []
    compute = LogitDistillation.__call__

    def kept(self: LogitDistillation, *given: Any) -> Tensor:
        terms.append(compute(self, *given))
        return terms[-1]

    monkeypatch.setattr(LogitDistillation, "__call__", kept)
    with pytest.warns(
        FutureWarning, match="return_outputs=True"
    ):  # once, to find that they can't be used
        trainer.train()
    first, second = terms
    assert first.requires_grad
    assert abs(float(first)) < 1e-7
    assert float(second) > 1e-5
    assert second.requires_grad


def flat(texts: list[Tensor], **options: Any) -> Any:
    rows = [{"input_ids": ids.tolist()} for ids in texts]
    return DataCollatorWithFlattening(**options)(rows, return_tensors="pt")


@pytest.mark.parametrize(
    "options",
    [{}, {"position_ids_start": 2}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}],
)
def test_a_row_is_unpacked(options: dict[str, Any]) -> None:
    texts = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10], [11])]
    found = unpacked(flat(texts, **options))
    assert found.keys() == {"input_ids", "labels", "attention_mask"}
    assert found["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0], [11, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    none = -100
    assert found["labels"].tolist() == [
        [none, 6, 7],
        [none, none, none],
        [none, 10, none],
        [none, none, none],
    ]
    assert unpacked(found) is found


def test_texts_in_a_row_are_no_sample() -> None:
    batch = flat([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    with pytest.raises(ValueError, match="batch: got several texts in a row"):
        FusedMASPenalty(llama(), forward=ModelOutput()).consolidate([batch])
