"""Incremental Moment Matching: each task has its own weights, and their mean is what is tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext._arguments import check_positive
from mas_ext.importance.fisher import Labels
from mas_ext.methods.ewc import EWC
from mas_ext.methods.method import Method, Training
from mas_ext.methods.quadratic import Quadratic
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters


class UniformImportance(Quadratic):
    """A quadratic method in which all parameters are equally important."""

    def end_task(self, training: Training) -> None:
        assert self.penalty is not None
        theta = named_parameters(training.model, self.penalty.exclude)
        ones = {n: torch.ones_like(p) for n, p in theta.items() if p.requires_grad}
        self.penalty.consolidate(importance=ones, weight=self.weight)


class IMM(Method):
    """Weights of all tasks, theta_1 to theta_K, merged after each (Lee et al. 2017): MeanIMM and ModeIMM.

    The merged weights are what the model is tested with after a task. Training of the next one goes on from the
    last task's own weights (weight-transfer), to which the new weights may be pulled (L2-transfer:
    + lam |theta - theta_K-1|^2), or to which dropout goes back instead of to 0 (drop-transfer: the weights into
    a unit of the backbone are theta_K-1 where the unit is dropped, with probability p, and
    theta / (1 - p) - p / (1 - p) theta_K-1 where it is not; in the first task theta_0 = 0, ordinary dropout).
    The units are the outputs of linear layers and the channels of convolutions, except in layers whose weight
    is computed from other parameters.

    A parameter that came later, such as the head of a new class, is merged over the tasks since then. Running
    statistics of BatchNorm are no weights: the merged model is tested with the last task's.

    The anchor of `merging`, a mean over the tasks' own, are the merged weights; further arguments are those of
    MeanIMM.
    """

    def __init__(
        self,
        merging: Quadratic,
        alpha: Sequence[float] | None = None,
        lam: float = 0.0,
        dropout: float = 0.0,
        mode: Mode = "gradient",
    ) -> None:
        for each in alpha or ():
            check_positive(each, "alpha")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected from 0 to less than 1")
        self.merging, self.alpha, self.dropout = merging, alpha, dropout
        # Its anchor are the last task's own weights.
        self.transfer = UniformImportance(lam, mode, merge="decay", anchor="latest", gamma=0.0)

    def begin_task(self, training: Training) -> None:
        if self.alpha is not None and len(self.alpha) <= training.task:
            raise ValueError(f"alpha: got {len(self.alpha)} numbers, expected one for every task")
        self.merging.begin_task(training)
        self.transfer.begin_task(training)
        if not training.resumed:
            _write(training.model, _anchor(self.transfer))

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        if not self.dropout:
            return super().loss(training, x, y)
        with _drop_transfer(training.model, _anchor(self.transfer), self.dropout):
            return super().loss(training, x, y)

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        self.merging.after_step(training, x, y)

    def end_task(self, training: Training) -> None:
        self.merging.weight = 1.0 if self.alpha is None else self.alpha[training.task]
        self.transfer.end_task(training)
        self.merging.end_task(training)
        _write(training.model, _anchor(self.merging))

    def options(self) -> dict[str, Any]:
        parts = {"transfer": self.transfer.options(), "merging": self.merging.options()}
        return {"alpha": self.alpha, "dropout": self.dropout, **parts}

    def state_dict(self) -> dict[str, Any]:
        return {"transfer": self.transfer.state_dict(), "merging": self.merging.state_dict()}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        self.transfer.load_state_dict(state["transfer"], model)
        self.merging.load_state_dict(state["merging"], model)


@dataclass(eq=False)
class MeanIMM(IMM):
    """Merged weights sum_k alpha_k theta_k (mean-IMM).

    Args:
        alpha: alpha_k by task, > 0, divided by the sum of those of the tasks so far; None for all equal, 1/K.
        lam: lambda of L2-transfer; 0 for none.
        dropout: p of drop-transfer; 0 for none.
        mode: "gradient" or "proximal", how L2-transfer is applied, see FusedMASPenalty.attach.

    Raises:
        ValueError: alpha or dropout out of range; fewer alpha than tasks.
    """

    alpha: Sequence[float] | None = None
    lam: float = 0.0
    dropout: float = 0.0
    mode: Mode = "gradient"

    def __post_init__(self) -> None:
        merging = UniformImportance(0.0, merge="sum", anchor="own")
        super().__init__(merging, self.alpha, self.lam, self.dropout, self.mode)


@dataclass(eq=False)
class ModeIMM(IMM):
    """Merged weights (sum_k alpha_k F_k theta_k) / sum_k alpha_k F_k, F_k the diagonal Fisher (mode-IMM).

    Where no task's F_k is above 0, they are the last task's.

    Args:
        alpha: alpha_k by task, > 0; None for all equal.
        labels: "sampled" (the paper's: labels drawn from the model), "true", "predicted" or "all" for the cross
            entropy; "normal" for another task loss: see estimate_fisher.
        lam: lambda of L2-transfer; 0 for none.
        dropout: p of drop-transfer; 0 for none.
        mode: "gradient" or "proximal", how L2-transfer is applied, see FusedMASPenalty.attach.
        max_samples: the Fisher information from this many samples of a task, None for all.

    Raises:
        ValueError: alpha or dropout out of range; fewer alpha than tasks.
    """

    alpha: Sequence[float] | None = None
    labels: Labels = "sampled"
    lam: float = 0.0
    dropout: float = 0.0
    mode: Mode = "gradient"
    max_samples: int | None = None

    def __post_init__(self) -> None:
        merging = EWC(0.0, self.labels, max_samples=self.max_samples)
        super().__init__(merging, self.alpha, self.lam, self.dropout, self.mode)


def _anchor(method: Quadratic) -> dict[str, Tensor]:
    assert method.penalty is not None
    return method.penalty.anchor


@torch.no_grad()
def _write(model: MultiHead, weights: Mapping[str, Tensor]) -> None:
    """Give parameters these values."""
    theta = named_parameters(model)
    if weights:
        torch._foreach_copy_([theta[n] for n in weights], list(weights.values()))


@contextmanager
def _drop_transfer(model: MultiHead, old: Mapping[str, Tensor], p: float) -> Iterator[None]:
    """In this context, units of the backbone are dropped to their old weights; no hook is left behind.

    With V for the weights W of a unit that is dropped, and W / (1 - p) - p / (1 - p) V for those of one that is
    not, the output is V x plus what dropout makes of (W - V) x.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}

    def before(t: Tensor | None) -> Tensor | None:
        # A parameter that is not trained is its own old value.
        return None if t is None else old.get(names.get(id(t), ""), t.detach())

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        linear, base = isinstance(layer, nn.Linear), torch.zeros_like(output)
        if old:
            forward: Any = F.linear if linear else layer._conv_forward
            base = forward(inputs[0], before(layer.weight), before(layer.bias))
        return base + (F.dropout if linear else torch.feature_dropout)(output - base, p, True)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [
        layer.register_forward_hook(hook)
        for layer in model.backbone.modules()
        if isinstance(layer, kinds) and id(layer.weight) in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
