"""How a model is run: in eval mode, on batches that it may change, up to the numbers that importance is of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.parameters.names import PARALLEL

# The forward pass that a user may give: (model, batch) -> output, samples in dimension 0.
Forward = Callable[[Any, Any], Tensor]
# (output, labels, samples) -> the objectives, shape (rows, K). Each row counts as one sample.
Values = Callable[[Tensor, Tensor | None, int], Tensor]
# (model, device) -> the state in which the model is run, and afterwards back to the state before.
RunMode = Callable[[nn.Module, torch.device], AbstractContextManager[None]]

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)


class Labelled(NamedTuple):
    """A batch as the user gave it, and labels for the objective, which are cut into samples with it."""

    batch: Any
    labels: Tensor | None = None


class Evaluate(NamedTuple):
    """From a batch to the numbers that importance is the sensitivity of."""

    model: nn.Module
    forward: Forward
    values: Values

    def output(self, batch: Labelled) -> Tensor:
        """The model's output."""
        # A model that changes its input would see it changed again on every pass, and so would the caller.
        return self.forward(self.model, batches.copied(batch.batch))

    def constants(self, batch: Labelled) -> Hashable:
        """What `forward` gets that is no tensor: of two batches for which this is equal it does the same."""
        whole = batches.plain(batch.batch)
        return batches.constants(batches.first(whole) if self.forward is default_forward else whole)

    def __call__(self, batch: Labelled) -> tuple[Tensor, Tensor]:
        """The output, and the objectives of shape (rows, K)."""
        output = self.output(batch)
        return output, self.values(output, batch.labels, batches.size(batch))


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """The model called with the first item of the batch."""
    output: Tensor = model(batches.first(batch))
    return output


class _SavedBuffers:
    """Copies of buffers of one dtype and device, in one tensor: a single wait tells whether one changed."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._before = self._now()

    def _now(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._buffers])

    def restore(self) -> None:
        """Write back the buffers that changed."""
        if torch.equal(self._now(), self._before):
            return
        parts = self._before.split([b.numel() for b in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            if not torch.equal(buffer, part.view_as(buffer)):
                buffer.copy_(part.view_as(buffer))


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """eval() with gradients on; modes, running statistics and random state are put back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    # A forward pass may put a normalisation back to training, and is then refused.
    buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for b in module.buffers(recurse=False):
                buffers.setdefault((b.dtype, b.device), []).append(b)
    statistics = [_SavedBuffers(same) for same in buffers.values()]
    # What runs a model in parallel would wait for other ranks, whose passes have other lengths.
    parallel = [module for module in modes if isinstance(module, PARALLEL)]
    devices = [device] if device.type == "cuda" else []
    # cuDNN has a backward pass of recurrent layers in training mode alone; without dropout that is the same
    # function. A subclass may be another one.
    recurrent = [
        (module, module.dropout)
        for module in modes
        if devices and isinstance(module, nn.RNNBase) and type(module) in _RECURRENT
    ]
    # Autocast keeps rounded weights; those that a pass without gradients left behind would have none.
    cached = torch.is_autocast_cache_enabled()
    # Compiled parts run as they were written, so that what they compute can be followed. Nothing is compiled
    # where the compiler was never imported, which takes seconds.
    compiled = "torch._dynamo" in sys.modules
    as_written = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        as_written,
    ):
        try:
            torch.set_autocast_cache_enabled(False)
            if any(modes.values()):  # modules take long to set attributes
                model.eval()
            for layer, _ in recurrent:
                layer.training = True
                layer.dropout = 0.0
            for wrapper in parallel:
                wrapper.__dict__["forward"] = wrapper.module
            yield
        finally:
            for wrapper in parallel:
                del wrapper.__dict__["forward"]
            for layer, dropout in recurrent:
                layer.dropout = dropout
            torch.set_autocast_cache_enabled(cached)
            for module, training in modes.items():
                if module.training != training:
                    module.training = training
            for saved in statistics:
                saved.restore()
