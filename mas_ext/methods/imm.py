"""Incremental Moment Matching: each task has weights of its own, and their mean is what is tested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext.importance.fisher import Labels
from mas_ext.methods.ewc import Fisher
from mas_ext.methods.method import Method, Training
from mas_ext.methods.quadratic import Quadratic
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class Alike(Quadratic):
    """A quadratic method for which all parameters are equally important."""

    def end_task(self, training: Training) -> None:
        """See Method.end_task."""
        assert self.penalty is not None
        theta = named_parameters(training.model, self.penalty.exclude)
        ones = {n: torch.ones_like(p) for n, p in theta.items() if p.requires_grad}
        self.penalty.consolidate(importance=ones, weight=self.weight)


class IMM(Method):
    """Weights of all tasks, theta_1 to theta_K, merged after each (Lee et al. 2017): see MeanIMM and ModeIMM.

    The merged weights are what the model is tested with after a task. Training of the next one goes on from the
    last task's own weights (weight-transfer), which may be a point that the new weights are held to
    (L2-transfer: + lam |theta - theta_K-1|^2) or that dropout goes back to instead of 0 (drop-transfer: the
    weights into a unit of the backbone are theta_K-1 where the unit is dropped, with probability p, and
    theta / (1 - p) - p / (1 - p) theta_K-1 where it is not; in the first task theta_0 = 0, ordinary dropout).
    The units are the outputs of linear layers and the channels of convolutions, but for layers whose weight
    is computed from other parameters.

    A parameter that came later, such as the head of a new class, is merged over the tasks since then. Running
    statistics of BatchNorm are no weights: the merged model is tested with the last task's.
    """

    def __init__(
        self,
        merging: Quadratic,
        alpha: Sequence[float] | None,
        lam: float,
        dropout: float,
        mode: Mode,
    ) -> None:
        """merging: its anchor, under merge "sum", are the merged weights; else see MeanIMM."""
        if alpha is not None and not all(0 < a < float("inf") for a in alpha):
            raise ValueError(f"alpha: got {alpha}, expected finite numbers above 0")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected from 0 to less than 1")
        self.merging, self.alpha, self.dropout = merging, alpha, dropout
        # Its anchor are the last task's own weights.
        self.transfer = Alike(lam, mode, merge="decay", gamma=0.0)
        self._hooks: list[tuple[nn.Module, Hook]] = []

    def begin_task(self, training: Training) -> None:
        """See Method.begin_task."""
        if self.alpha is not None and len(self.alpha) <= training.task:
            raise ValueError(f"alpha: got {len(self.alpha)} numbers, expected one for every task")
        self.transfer.begin_task(training)
        self.merging.begin_task(training)
        own = _anchor(self.transfer)
        if not training.resumed:
            _write(training.model, own)
        self._hooks = _drop_transfers(training.model, own, self.dropout) if self.dropout else []

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """See Method.loss."""
        with _hooked(self._hooks):
            return super().loss(training, x, y)

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        """See Method.after_step."""
        self.merging.after_step(training, x, y)

    def end_task(self, training: Training) -> None:
        """See Method.end_task."""
        self.merging.weight = 1.0 if self.alpha is None else self.alpha[training.task]
        self.transfer.end_task(training)
        self.merging.end_task(training)
        _write(training.model, _anchor(self.merging))

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        parts = {"transfer": self.transfer.options(), "merging": self.merging.options()}
        return {"alpha": self.alpha, "dropout": self.dropout, **parts}

    def state_dict(self) -> dict[str, Any]:
        """See Method.state_dict."""
        return {"transfer": self.transfer.state_dict(), "merging": self.merging.state_dict()}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        """See Method.load_state_dict."""
        self.transfer.load_state_dict(state["transfer"], model)
        self.merging.load_state_dict(state["merging"], model)


class MeanIMM(IMM):
    """Merged weights sum_k alpha_k theta_k (mean-IMM).

    Args:
        alpha: alpha_k by task, > 0, divided by the sum of those of the tasks so far; None for all alike, 1/K.
        lam: lambda of L2-transfer; 0 for none.
        dropout: p of drop-transfer; 0 for none.
        mode: "gradient" or "proximal", how L2-transfer is applied, see FusedMASPenalty.attach.

    Raises:
        ValueError: alpha or dropout out of range; fewer alpha than tasks.
    """

    def __init__(
        self,
        alpha: Sequence[float] | None = None,
        lam: float = 0.0,
        dropout: float = 0.0,
        mode: Mode = "gradient",
    ) -> None:
        """See the class."""
        super().__init__(Alike(0.0, merge="sum"), alpha, lam, dropout, mode)


class ModeIMM(IMM):
    """Merged weights (sum_k alpha_k F_k theta_k) / sum_k alpha_k F_k, F_k the diagonal Fisher (mode-IMM).

    Where no task's F_k is above 0, they are the last task's.

    Args:
        alpha: see MeanIMM.
        labels: "sampled" (the paper's: labels drawn from the model), "true", "predicted" or "all", see
            estimate_fisher.
        lam: see MeanIMM.
        dropout: see MeanIMM.
        mode: see MeanIMM.
        max_samples: the Fisher information from this many samples of a task, None for all.

    Raises:
        ValueError: see MeanIMM.
    """

    def __init__(
        self,
        alpha: Sequence[float] | None = None,
        labels: Labels = "sampled",
        lam: float = 0.0,
        dropout: float = 0.0,
        mode: Mode = "gradient",
        max_samples: int | None = None,
    ) -> None:
        """See the class."""
        merging = Fisher(0.0, labels, max_samples=max_samples, merge="sum")
        super().__init__(merging, alpha, lam, dropout, mode)


def _anchor(method: Quadratic) -> dict[str, Tensor]:
    assert method.penalty is not None
    return method.penalty.anchor


@torch.no_grad()
def _write(model: MultiHead, weights: Mapping[str, Tensor]) -> None:
    """Give parameters these values."""
    theta = named_parameters(model)
    if weights:
        torch._foreach_copy_([theta[n] for n in weights], list(weights.values()))


def _drop_transfers(
    model: MultiHead, old: Mapping[str, Tensor], p: float
) -> list[tuple[nn.Module, Hook]]:
    """The linear layers and convolutions of the backbone, and what drops their units; old: theta_K-1."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        (layer, _drop_transfer(layer, names, old, p))
        for layer in model.backbone.modules()
        if isinstance(layer, kinds) and id(layer.weight) in names
    ]


def _drop_transfer(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
    names: Mapping[int, str],
    old: Mapping[str, Tensor],
    p: float,
) -> Hook:
    drop = F.dropout if isinstance(layer, nn.Linear) else torch.feature_dropout
    forward = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward

    def before(t: Tensor) -> Tensor:
        return old.get(
            names.get(id(t), ""), t.detach()
        )  # one that is not trained is its own old value

    weight, bias = before(layer.weight), None if layer.bias is None else before(layer.bias)

    # With V for W where a unit is dropped, and W / (1 - p) - p / (1 - p) V where not, the output is V x
    # and what dropout makes of (W - V) x.
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        base = forward(inputs[0], weight, bias) if old else torch.zeros_like(output)
        return base + drop(output - base, p, True)

    return hook


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """With these forward hooks; none is left on the model, whatever happens."""
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
