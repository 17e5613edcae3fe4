"""The path integral of the gradient along a training: what each parameter's steps did for the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.methods.method import Training
from mas_ext.methods.quadratic import Lam, Quadratic
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters


class Integrated(Quadratic):
    """A quadratic method whose importance comes from the path integral of each task's training, `path`."""

    def __init__(self, lam: Lam, mode: Mode | None = None, **penalty: Any) -> None:
        super().__init__(lam, mode, **penalty)
        self.path = PathIntegral({})

    def begin_task(self, training: Training) -> None:
        if not training.resumed:
            self.path = PathIntegral(named_parameters(training.model, training.own_parameters))
        # Hooks run in the order in which they were registered: the gradient is seen before the penalty is in
        # it, and the parameters after the penalty moved them.
        training.optimizer.register_step_pre_hook(self.path.before_step)
        super().begin_task(training)
        training.optimizer.register_step_post_hook(self.path.after_step)

    def consolidate(self, importance: Mapping[str, Tensor]) -> None:
        """End of a task with this importance, and of its path."""
        assert self.penalty is not None
        self.penalty.consolidate(importance=importance, weight=self.weight)
        self.path = PathIntegral({})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "path": self.path.total, "start": self.path.start}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        super().load_state_dict(state, model)
        theta = named_parameters(model)
        self.path = PathIntegral({name: theta[name] for name in state["path"]})
        for name in state["path"]:
            self.path.total[name].copy_(state["path"][name])
            self.path.start[name].copy_(state["start"][name])


class PathIntegral:
    """The sum of -g dtheta over an optimizer's steps, `total`, from where parameters were, `start`, by name.

    Args:
        theta: the parameters by name, of which those that require a gradient count.
    """

    def __init__(self, theta: Mapping[str, nn.Parameter]) -> None:
        trained = {n: p for n, p in theta.items() if p.requires_grad}
        self.start = {n: _copy(p) for n, p in trained.items()}
        self.total = {n: torch.zeros_like(t) for n, t in self.start.items()}
        self._all = [(p, _copy(p), _copy(p), self.total[n]) for n, p in trained.items()]
        self._moving: list[list[Tensor]] = []

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step's pre-hook, registered before that of a penalty."""
        if getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "optimizer: got fused=True under a GradScaler, whose gradients are still scaled before the "
                "step, expected fused=False"
            )
        rows = [row for row in self._all if row[0].grad is not None]
        self._moving = [list(column) for column in zip(*rows, strict=True)]
        if rows:
            theta, old, gradient, _ = self._moving
            torch._foreach_copy_(old, theta)
            torch._foreach_copy_(gradient, [p.grad.to_dense() for p in theta if p.grad is not None])

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step's post-hook, registered after that of a penalty."""
        if self._moving:
            theta, old, gradient, total = self._moving
            torch._foreach_sub_(old, theta)
            torch._foreach_addcmul_(total, gradient, old)

    def importance(
        self, theta: Mapping[str, Tensor], xi: float, metric: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """total / (metric (theta - start)^2 + xi) by name, metric 1 by default; may be negative."""
        found = {}
        for name, total in self.total.items():
            distance = (theta[name].detach() - self.start[name]).square_()
            if metric is not None:
                distance *= metric[name]
            found[name] = total / distance.add_(xi)
        return found

    @torch.no_grad()
    def restart(self) -> None:
        """From now on, the integral is that from here."""
        for (parameter, *_, total), start in zip(self._all, self.start.values(), strict=True):
            start.copy_(parameter)
            total.zero_()


def _copy(parameter: Tensor) -> Tensor:
    """A copy in which small differences survive: float32 at least."""
    return parameter.detach().to(compute_dtype(parameter.dtype), copy=True)
