"""MAS with the numbers of other codes, for those who move from one or compare with it.

What they have in common, and this library does not do by itself: the absolute value is taken of the gradient of
a whole batch's mean, in which positive and negative samples cancel, and every batch counts the same, a short
last one too. Read from the sources: the authors' code (github.com/rahafaljundi/MAS-Memory-Aware-Synapses),
Avalanche 0.6 (plugins/mas.py) and FACIL (approach/mas.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import Forward, ImportanceSum
from mas_ext.importance.evaluation import evaluating
from mas_ext.importance.model_state import Habits, ModelState
from mas_ext.importance.objectives import Objective, values
from mas_ext.kernels.backends import Backend
from mas_ext.penalty import FusedMASPenalty


class BatchMeans(ImportanceSum):
    """1/B sum over batches b of abs(d/d theta mean_{k in b} obj(F(x_k))): an estimator for FusedMASPenalty.

    `samples` counts batches. Where every batch has as many samples and the model is in eval mode, this is
    estimate_importance(method="batch").

    Args:
        objective, forward, exclude, max_outputs, backend: see estimate_importance.
        training: run the model in training mode: dropout drops, BatchNorm takes the batch's statistics and
            updates its running ones, as training does.
    """

    def __init__(
        self,
        objective: Objective = "l2",
        forward: Forward | None = None,
        exclude: Sequence[str] = (),
        training: bool = False,
        max_outputs: int = 64,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            "batch",
            objective,
            forward,
            exclude,
            max_outputs,
            backend,
            values=partial(_mean_values, objective=objective, max_outputs=max_outputs),
            mode=_training if training else evaluating,
        )
        self.training = training


def _mean_values(
    output: Tensor, labels: Tensor | None, samples: int, objective: Objective, max_outputs: int
) -> Tensor:
    """The mean of the objectives over a batch, which counts as one sample: shape (1, K)."""
    return values(output, labels, samples, objective, max_outputs).mean(0, keepdim=True)


@contextmanager
def _training(model: nn.Module, device: torch.device, habits: Habits) -> Iterator[ModelState]:
    """Training mode for a pass; buffers and random state then go on from where the pass left them."""
    cuda = device.type == "cuda"
    with evaluating(model, device, habits) as state:
        model.train()
        yield state
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
    torch.set_rng_state(random[0])
    if random[1] is not None:
        torch.cuda.set_rng_state(random[1], device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


class Averaged(FusedMASPenalty):
    """A penalty with W <- gamma W + (1 - gamma) Omega_t at the end of a task, and one anchor, theta*_t."""

    def consolidate(
        self,
        batches: Iterable[Any] | None = None,
        weight: float = 1.0,
        progress: bool = False,
        importance: Mapping[str, Tensor] | None = None,
        sweeps: int = 1,
    ) -> None:
        """End of a task: FusedMASPenalty.consolidate with Omega_t times weight (1 - gamma)."""
        share = 1 - self._state.rule.gamma
        super().consolidate(batches, weight * share, progress, importance, sweeps)


class AveragedFromFirst(FusedMASPenalty):
    """Averaged, but a parameter's first Omega_t is its W: at the first task, and where a head is new."""

    def _merged(self, importance: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        memory, share = self._state.memory, 1 - self._state.rule.gamma
        known = memory.names | memory.updates.keys()
        return {n: omega * share if n in known else omega for n, omega in importance.items()}


def official(
    model: nn.Module,
    lam: float = 1.0,
    objective: Objective = "l2",
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> FusedMASPenalty:
    """MAS as its authors' code has it.

        penalty = lam sum_i W_i (theta_i - theta*_i)^2,   W <- W + Omega_t,
        Omega_t = 1/B sum_b abs(d/d theta mean_{k in b} |F(x_k)|^2) in eval mode.

    Its batches have 200 samples, or one (b1=True), where Omega_t is exact. It gives every task a new head, that
    no importance holds: exclude the head.

    Args:
        lam: its reg_lambda, 1.
        objective: its norm: "l2", "vector", or "l1" for anything else.
        forward, exclude: see estimate_importance.
        model, options: see FusedMASPenalty.
    """
    importance = BatchMeans(objective, forward, exclude)
    return FusedMASPenalty(model, lam, importance, exclude=exclude, **options)


def avalanche(
    model: nn.Module,
    lambda_reg: float = 1.0,
    alpha: float = 0.5,
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> AveragedFromFirst:
    """MAS as Avalanche's MASPlugin has it.

        penalty = lambda_reg sum_i W_i (theta_i - theta*_i)^2,
        W = Omega_1, then W <- alpha W + (1 - alpha) Omega_t (a new head: W = Omega_t),
        Omega_t = 1/B sum_b abs(d/d theta mean_{k in b} |F(x_k)|^2) in training mode.

    It reads the experience in order, in batches of train_mb_size. See integrations.avalanche for the plugin.

    Args:
        lambda_reg: strength.
        alpha: share of the old importance that is kept, from 0 to 1.
        forward, exclude: see estimate_importance.
        model, options: see FusedMASPenalty.
    """
    importance = BatchMeans("l2", forward, exclude, training=True)
    return AveragedFromFirst(
        model, lambda_reg, importance, merge="decay", gamma=alpha, exclude=exclude, **options
    )


def facil(
    model: nn.Module,
    lamb: float = 1.0,
    alpha: float = 0.5,
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    **options: Any,
) -> Averaged:
    """MAS as FACIL has it.

        penalty = lamb/2 sum_i W_i (theta_i - theta*_i)^2,   W <- alpha W + (1 - alpha) Omega_t from W = 0,
        Omega_t = 1/B sum_b abs(d/d theta mean_{k in b} |F(x_k)|) in training mode: of the norm, not squared.

    F is all heads' outputs side by side, and no importance holds the heads: exclude them. It leaves out a short
    last batch: give `consolidate` a loader with drop_last=True. Its alpha = -1, which weighs tasks by their
    classes, is FusedMASPenalty(model, importance=BatchMeans(norm, training=True)) with
    consolidate(batches, weight=classes) and then penalty.lam = lamb / (2 * classes so far).

    Args:
        lamb: strength, of which half counts.
        alpha: share of the old importance that is kept, from 0 to 1.
        forward, exclude: see estimate_importance.
        model, options: see FusedMASPenalty.
    """
    importance = BatchMeans(norm, forward, exclude, training=True)
    return Averaged(
        model, lamb / 2, importance, merge="decay", gamma=alpha, exclude=exclude, **options
    )


def norm(output: Tensor) -> Tensor:
    """An objective: the norm of each sample's output, (N,)."""
    norms: Tensor = torch.linalg.vector_norm(output.flatten(1), dim=1)
    return norms
