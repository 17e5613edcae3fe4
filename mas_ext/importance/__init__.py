"""Importance (Omega) of a model's parameters, from unlabelled data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mas_ext.importance.accumulator import (
    ESTIMATORS,
    EstimatorName,
    ImportanceSum,
    estimate,
    gather,
)
from mas_ext.importance.evaluation import Forward
from mas_ext.importance.exact.rules import register_rule
from mas_ext.importance.fisher import FisherSum, estimate_fisher
from mas_ext.importance.objectives import Objective
from mas_ext.kernels.backends import Backend
from mas_ext.parameters.names import check_patterns

__all__ = [
    "ESTIMATORS",
    "EstimatorName",
    "FisherSum",
    "Forward",
    "ImportanceSum",
    "estimate_fisher",
    "estimate_importance",
    "gather",
    "register_rule",
]


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    method: EstimatorName = "exact",
    objective: Objective = "l2",
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: bool = False,
    exclude: Sequence[str] = (),
    max_outputs: int = 64,
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """Omega_i, how sensitive the model's output is to each parameter; no labels are needed.

    "exact": 1/N sum_k abs(d obj(F(x_k)) / d theta_i) (Aljundi et al. 2018, equation 2);
    "batch": 1/N sum_batches abs(sum_{k in batch} d obj(F(x_k)) / d theta_i); "local" (l-MAS): as "exact", with
    obj the squared norm of each layer's own output, after ReLU where that is next. The model runs in eval mode.

    "exact" runs a few samples alone too, to find out where in the model's tensors the samples are, and refuses
    models whose samples interact. That all samples are there is then proven: once for each way through the
    model and each size of batch, which takes the time of two to five batches more; or, where data may decide
    where rows go (routing, indices, numbers that Python reads), batch by batch, for about twice the time.
    What can't be proven takes the fallback, which runs samples alone, and a warning says so; check_importance
    tells why. Not found out: samples that interact, but not among those that were run alone.

    Args:
        model: any module. Parameters that require a gradient take part.
        batches: iterable of tensors, or of tuples, lists, dicts or dataclasses whose first item is the input.
            Samples are dimension 0 of every tensor; sequences as long as the batch (names, lengths, arrays)
            have one item for each sample, and anything else is the same for all. Batches are moved to the
            first parameter's device. Under torch.distributed they are this rank's, and so is the result; but
            under fully_shard, where all ranks call this together, it is that of all ranks' samples.
        method: "exact", "batch" or "local".
        objective: "l2", "l1", "vector" or a callable, output -> tensor (samples,).
        forward: forward(model, batch) -> output tensor with samples in dimension 0. By default the
            model is called with the batch's first item.
        max_samples: stop after this many.
        progress: show a progress bar.
        exclude: fnmatch patterns on the names of parameters to leave out.
        max_outputs: the most outputs that "vector" takes, one backward pass each.
        backend: "auto", "native" or "reference": compiled kernels where there are some, always, or never.

    Returns:
        Omega by parameter name, in the parameter's shape, units of objective per parameter; float64 for
        float64 parameters, else float32; sharded as the parameter is.

    Raises:
        ValueError: no samples, wrong shapes, or samples that can't be told apart. Its subclass Diverged,
            a FloatingPointError, too: outputs that are not finite.
        TypeError: an output that is no tensor, or a parameter of an unsupported kind.
    """
    check_patterns(model, exclude)
    total = ImportanceSum(method, objective, forward, exclude, max_outputs, backend)
    return estimate(total, model, batches, max_samples, progress)
