"""Proven passes of batches on a GPU, captured as CUDA graphs and replayed for further batches.

A replay runs no Python: kernels read a batch where the captured one lay, and the parameters where they are.
What the model does with numbers that it reads from a batch, or with other shapes, is another pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.gradients import Totals

# Sums by name, and objectives.
Sums = tuple[Totals, Tensor]
# From a batch: these, and whatever they were computed with.
Pass = Callable[[Labelled], tuple[Totals, Tensor, Any]]


def batch_key(evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Hashable:
    """What a captured pass holds for: sizes of the batch, its entries that are no tensors, and parameters."""
    sizes = tuple((t.shape, t.dtype, t.stride()) for t in batches.tensors(batch))
    where = tuple((name, p.data_ptr()) for name, p in theta.items())
    return sizes, evaluate.constants(batch), where


def possible(theta: Mapping[str, Tensor]) -> bool:
    """Whether passes can be captured at all: on a GPU."""
    return all(p.is_cuda for p in theta.values())


class CapturedPass:
    """A pass of one batch, captured; called with another batch of the same look, it gives that one's sums.

    Raises:
        Exception: of any kind, where the pass can't be captured, as one that reads a number back can't.
    """

    def __init__(self, run: Pass, batch: Labelled) -> None:
        self._batch = batches.mapped(batch, torch.clone)
        self._replay, (self._totals, self._values, self._kept) = capture(lambda: run(self._batch))

    def __call__(self, batch: Labelled) -> Sums:
        """The sums by name, and the objectives."""
        for mine, given in zip(batches.tensors(self._batch), batches.tensors(batch), strict=True):
            mine.copy_(given)
        self._replay()
        totals = {name: total.clone() for name, total in self._totals.items()}
        return totals, self._values.clone()


class CapturedPasses:
    """Captured passes for as long as nothing but the batch changes.

    failure: why the last pass that was to be captured could not be; "" if none was refused.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._seen: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, CapturedPass] = {}

    def __call__(
        self,
        evaluate: Evaluate,
        batch: Labelled,
        theta: Mapping[str, Tensor],
        eager: Callable[[], Sums],
        run: Pass,
    ) -> Sums:
        """A batch replayed, or summed by `eager`; after the second of a look, `run` is captured."""
        key = batch_key(evaluate, batch, theta)
        if key in self._captured:
            return self._captured[key](batch)
        found = eager()
        self._seen[key] += 1
        if self._seen[key] == 2:  # others may follow
            try:
                if evaluate.state.touched():
                    raise RuntimeError("the model writes what it keeps")
                self._captured[key] = CapturedPass(run, batch)
            except Exception as error:  # of any kind: batches go on without
                self.failure = f"{type(error).__name__}: {error}"
        return found


def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A function that runs these kernels again, and what `run` returned, which it writes anew each time."""
    graph = torch.cuda.CUDAGraph()
    # Loaders of batches may pin memory in threads of their own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result
