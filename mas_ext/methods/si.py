"""Synaptic Intelligence: importance is what a parameter's way through training did for the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.methods.method import Training
from mas_ext.methods.quadratic import Quadratic
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters


class SI(Quadratic):
    """Cross entropy + c sum_i W_i (theta_i - theta*_i)^2 with W from path integrals (Zenke et al. 2017).

        omega_i = sum over the task's steps of -g_i dtheta_i
        W_i <- max(0, W_i + omega_i / ((theta_i(end) - theta_i(start))^2 + xi))

    and theta* where the last task ended; the maximum is that of the authors' code. g is the gradient of the
    cross entropy alone, without the penalty, and dtheta the whole change of the step: omega_i is what the
    parameter's real way did for the task's loss, whoever moved it, the penalty (in the gradient, or as the
    proximal pull after the step) and weight decay included. Where gradients are clipped, g is the clipped one.
    A step that a GradScaler skips counts for nothing. Where `patience` goes back to earlier weights, theta(end)
    are those, and the integral is that of all steps.

    Args:
        lam: the paper's c; 1, as its split MNIST has it.
        xi: the damping, > 0, that bounds the importance of parameters that hardly moved; 0.001, as the
            authors' code for split MNIST has it (0.1 for permuted MNIST).
        mode: "gradient" or "proximal", see FusedMASPenalty.attach.

    Raises:
        ValueError: xi is not above 0.
    """

    def __init__(self, lam: float = 1.0, xi: float = 1e-3, mode: Mode = "gradient") -> None:
        """See the class."""
        if not xi > 0:
            raise ValueError(f"xi: got {xi}, expected more than 0")
        super().__init__(lam, mode, merge="latest")
        self.xi = xi
        self._path = Path({})

    def begin_task(self, training: Training) -> None:
        """See Method.begin_task."""
        theta = named_parameters(training.model, training.own_parameters)
        if not training.resumed:
            self._path = Path(theta)
        steps = self._path.steps(theta)
        # Hooks run in the order in which they were registered: the gradient is seen before the penalty is in
        # it, and the parameters after the penalty moved them.
        training.optimizer.register_step_pre_hook(steps.before)
        super().begin_task(training)
        training.optimizer.register_step_post_hook(steps.after)

    def end_task(self, training: Training) -> None:
        """See Method.end_task."""
        assert self.penalty is not None
        theta = named_parameters(training.model, training.own_parameters)
        importance = self._path.importance(theta, self.xi)
        self.penalty.consolidate(importance=importance, weight=self.weight)
        self._path = Path({})

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        return {**super().options(), "xi": self.xi}

    def state_dict(self) -> dict[str, Any]:
        """See Method.state_dict."""
        return {**super().state_dict(), "path": self._path.total, "start": self._path.start}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        """See Method.load_state_dict."""
        penalty = {key: value for key, value in state.items() if key not in ("path", "start")}
        super().load_state_dict(penalty, model)
        theta = named_parameters(model)
        self._path.total, self._path.start = (
            {n: t.to(theta[n].device, copy=True) for n, t in state[key].items()}
            for key in ("path", "start")
        )


class Path:
    """The way of parameters through a task: where it started, and `total`, the sum of -g dtheta so far."""

    def __init__(self, theta: Mapping[str, nn.Parameter]) -> None:
        """theta: the parameters by name, of which those that require a gradient count."""
        self.start = {n: _copy(p) for n, p in theta.items() if p.requires_grad}
        self.total = {n: torch.zeros_like(t) for n, t in self.start.items()}

    def steps(self, theta: Mapping[str, nn.Parameter]) -> Steps:
        """What an optimizer of these parameters has to call before and after every step."""
        return Steps({n: theta[n] for n in self.total}, self.total)

    def importance(self, theta: Mapping[str, Tensor], xi: float) -> dict[str, Tensor]:
        """total / ((theta - start)^2 + xi) by name; may be negative."""
        return {
            n: total / ((theta[n].detach() - self.start[n]).square_() + xi)
            for n, total in self.total.items()
        }


class Steps:
    """Adds -g dtheta of every step of an optimizer to `path`, for the parameters that have a gradient."""

    def __init__(self, theta: Mapping[str, nn.Parameter], path: Mapping[str, Tensor]) -> None:
        """theta: the parameters by name; path: where the sums are, by the same names."""
        self._all = [(p, _copy(p), _copy(p), path[n]) for n, p in theta.items()]
        self._moving: list[list[Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
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
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """A step's post-hook, registered after that of a penalty."""
        if self._moving:
            theta, old, gradient, path = self._moving
            torch._foreach_sub_(old, theta)
            torch._foreach_addcmul_(path, gradient, old)


def _copy(parameter: Tensor) -> Tensor:
    """A copy in which small differences survive: float32 at least."""
    return parameter.detach().to(compute_dtype(parameter.dtype), copy=True)
