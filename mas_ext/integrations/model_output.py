"""The part of a Hugging Face model's output that importance is of, for whatever such a model predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext.parameters.names import bare_model

Of = Literal["tokens", "logits", "hidden"]

_NO_LABEL = -100
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
# Parts of the names of classes, where shapes alone don't tell what logits are of.
_TEXT = re.compile("CausalLM|LMHead")
_NO_TEXT = re.compile("Classification|QuestionAnswering|CTC|Detection|Segmentation|PreTraining")


class ModelOutput:
    """A `forward` for FusedMASPenalty: the part of a model's output whose sensitivity is the importance.

    "tokens": of a language model, the logits of the tokens that follow in the text, (N, positions - 1, 1); of
        an encoder-decoder, in the decoder's text, (N, positions, 1) where there are labels; of a model that
        predicts something else (classes, spans, characters of speech), all its logits;
    "logits": the logits at every position, (N, positions, vocabulary);
    "hidden": the last hidden states, (N, positions, width), of models that return them; where a normalisation
        without learned scales is last, their norm is constant and says nothing.

    Positions that attention_mask leaves out count as 0; of an encoder-decoder, those that
    decoder_attention_mask or labels of -100 leave out. Of more positions than ids the last ones count: prompt
    tuning puts virtual tokens in front. Labels are needed only by an encoder-decoder without decoder_input_ids.
    Logits without positions (of classifiers) or with places in an image are taken as they are, start and end
    logits together. "tokens" kept a first corpus best where it was measured, with a small model:
    docs/how-to/language.md has the figures.

    Args:
        of: "tokens", "logits" or "hidden".
        last: only this many of a text's last positions count; all of them by default.
    """

    def __init__(self, of: Of = "tokens", last: int | None = None) -> None:
        if of not in ("tokens", "logits", "hidden"):
            raise ValueError(f"of: got {of!r}, expected 'tokens', 'logits' or 'hidden'")
        if last is not None and last < 1:
            raise ValueError(f"last: got {last}, expected at least 1")
        self.of, self.last = of, last

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The output for a batch, a mapping of the model's inputs.

        Raises:
            ValueError: several texts in a row; an output without logits or hidden states, or with fewer
                positions than ids; "tokens" of a masked language model, or without ids; an encoder-decoder
                without decoder ids and labels.
        """
        bare = _bare(model)
        _refuse_packed(batch)
        text = _text(bare, batch)
        hidden = {"output_hidden_states": True} if self.of == "hidden" else {}
        output = self._part(model(**text.inputs, **hidden), bare)
        if output.dim() == 2 and "ForPreTraining" in _name(bare):  # one number at each position
            output = output[:, :, None]
        if output.dim() != 3:
            return output

        output, counts = text.positions(output, bare)
        if self.of == "tokens" and (text.decoder or _writes_text(bare, text.ids, output.shape[-1])):
            if text.labels is not None:
                following = text.labels.clamp(min=0)
            elif text.ids is not None:
                following, output = text.ids[:, 1:], output[:, :-1]
                counts = counts[:, :-1] * counts[:, 1:]
            else:
                raise ValueError(
                    f"of: got 'tokens' for a batch of {_name(bare)} without {text.prefix}input_ids, expected "
                    "them, or 'logits'"
                )
            output = output.gather(-1, following.long()[..., None])
        if self.last is not None:
            # How many positions that count are still to come, this one included.
            left = counts.flip(1).cumsum(1).flip(1)
            counts = counts * (left <= self.last)
        return output * counts[..., None].to(output.dtype)

    def _part(self, found: Any, bare: nn.Module) -> Tensor:
        """The hidden states or logits among what the model returned."""
        if self.of != "hidden":
            return _logits(found, bare)
        states = getattr(found, "hidden_states", None)
        states = getattr(found, "decoder_hidden_states", None) if states is None else states
        if states is None:
            raise ValueError(f"of: got 'hidden' for {_name(bare)}, which returns no hidden states")
        last: Tensor = states[-1]
        return last


class LogitRows:
    """A `forward` for Distillation: a Hugging Face model's logits, one row for each place that has classes.

    Of a text, (positions that count, vocabulary): those that attention_mask leaves in; of an encoder-decoder
    those of the decoder's text. Of a classifier of texts or images, (N, classes).
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The rows for a batch, a mapping of the model's inputs."""
        bare = _bare(model)
        return self.of(model(**_text(bare, batch).inputs), model, batch)

    @staticmethod
    def of(found: Any, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The rows of what the model has returned for a batch already, labels included."""
        bare = _bare(model)
        output = _logits(found, bare)
        if output.dim() != 3:
            return output
        output, counts = _text(bare, batch).positions(output, bare)
        return output[counts != 0]


class _Text(NamedTuple):
    """A batch as a model takes it, without labels that it does not need, and the text that its logits are of.

    decoder: whether that is the decoder's. labels: of a decoder that makes its ids of them.
    """

    inputs: Mapping[str, Tensor]
    decoder: bool
    labels: Tensor | None

    @property
    def prefix(self) -> str:
        """What the names of the text's inputs begin with."""
        return "decoder_" if self.decoder else ""

    @property
    def ids(self) -> Tensor | None:
        """The text's ids, where the batch has them."""
        return self.inputs.get(f"{self.prefix}input_ids")

    def positions(self, output: Tensor, bare: nn.Module) -> tuple[Tensor, Tensor]:
        """The output at the text's positions, (N, positions, ...), and which of them count, (N, positions)."""
        mask, labels = self.inputs.get(f"{self.prefix}attention_mask"), self.labels
        output, counts = _at_inputs(output, self.ids if labels is None else labels, mask, bare)
        return output, counts if labels is None else counts * (labels != _NO_LABEL)


def _refuse_packed(batch: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for texts that follow each other in a row, of which each is a sample."""
    places = batch.get("position_ids")
    if "attention_mask" not in batch and places is not None and (places.diff(dim=-1) < 0).any():
        raise ValueError(
            "batch: got several texts in a row, whose position_ids begin anew, expected one in each row; use "
            "unpacked(batch) of mas_ext.integrations.loading, which once(loader) does"
        )


def _text(bare: nn.Module, batch: Mapping[str, Tensor]) -> _Text:
    inputs = {key: t for key, t in batch.items() if key not in ("labels", "label")}
    decoder = _is_encoder_decoder(bare)
    labels = batch.get("labels") if decoder else None
    if decoder and not any(key in inputs for key in _DECODER_INPUTS):
        if labels is None:
            raise ValueError(
                f"batch: got {', '.join(batch)} for the encoder-decoder {_name(bare)}, expected "
                "decoder_input_ids or labels"
            )
        inputs["labels"] = labels  # which the model shifts
    return _Text(inputs, decoder, labels)


def _logits(found: Any, bare: nn.Module) -> Tensor:
    """The logits among what a model returned, start and end logits together."""
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    spans = [getattr(found, key, None) for key in ("start_logits", "end_logits")]
    tensors = [t for t in spans if isinstance(t, Tensor)]
    if len(tensors) < len(spans):
        raise ValueError(
            f"model: got {type(found).__name__} from {_name(bare)}, expected an output with logits; pass "
            "forward= to say what importance is of"
        )
    return torch.stack(tensors, -1)


def _name(bare: nn.Module) -> str:
    return type(bare).__name__


def _bare(model: nn.Module) -> nn.Module:
    """The model inside wrappers by DistributedDataParallel, torch.compile and peft."""
    bare: Any = bare_model(model)
    found: nn.Module = bare
    return _bare(bare.get_base_model()) if hasattr(bare, "get_base_model") else found


def _is_encoder_decoder(bare: nn.Module) -> bool:
    """Whether the logits are at positions of a decoder, whose ids are not the encoder's."""
    config = getattr(bare, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and not _NO_TEXT.search(_name(bare))


def _writes_text(bare: nn.Module, ids: Tensor | None, width: int) -> bool:
    """Whether logits of this width at a position are of the token that follows there."""
    name, config = _name(bare), getattr(bare, "config", None)
    if "MaskedLM" in name or getattr(config, "causal", True) is False:
        raise ValueError(
            f"of: got 'tokens' for the masked language model {name}, whose logits are of the tokens at their "
            "own positions, expected 'logits' or 'hidden'"
        )
    if _TEXT.search(name) or config is None:
        return True
    if _NO_TEXT.search(name) or ids is None:
        return False
    owner: Any = bare
    embedding = owner.get_input_embeddings() if hasattr(bare, "get_input_embeddings") else None
    return width >= getattr(embedding, "num_embeddings", 0)


def _at_inputs(
    output: Tensor, ids: Tensor | None, mask: Tensor | None, bare: nn.Module
) -> tuple[Tensor, Tensor]:
    """The output at the positions of the ids, (N, positions, ...), and which of them count, (N, positions)."""
    got = output.shape[1]
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected (samples, positions)"
        )
    if ids is None and mask is not None and got < mask.shape[1]:
        # Of sound, a position of the output is many of the input.
        shortened = getattr(bare, "_get_feature_vector_attention_mask", None)
        mask = mask if shortened is None else shortened(got, mask)
    wanted = next((t.shape[1] for t in (ids, mask) if t is not None), got)
    if got < wanted or (mask is not None and mask.shape[1] < wanted):
        raise ValueError(
            f"output: got {got} positions from {_name(bare)} for {wanted} in the batch, expected as many; pass "
            "forward= to say what importance is of"
        )
    if mask is None:
        mask = output.new_ones(output.shape[:2])
    return output[:, got - wanted :], mask[:, mask.shape[1] - wanted :]
