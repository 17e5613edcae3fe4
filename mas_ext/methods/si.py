"""Synaptic Intelligence: importance is what a parameter's path through training did for the loss."""

from __future__ import annotations

from dataclasses import dataclass

from mas_ext._arguments import check_positive
from mas_ext.methods.method import Training
from mas_ext.methods.path import Integrated
from mas_ext.methods.quadratic import Lam
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters


@dataclass(eq=False)
class SI(Integrated):
    """Task loss + c sum_i W_i (theta_i - theta*_i)^2 with W from path integrals (Zenke et al. 2017).

        omega_i = sum over the task's steps of -g_i dtheta_i
        W_i <- max(0, W_i + omega_i / ((theta_i(end) - theta_i(start))^2 + xi))

    and theta* where the last task ended; the maximum is that of the authors' code. g is the gradient of the
    task loss alone, without the penalty, and dtheta the whole change of the step: omega_i is what the
    parameter's real path did for the task's loss, whatever moved it, the penalty (in the gradient, or as the
    proximal pull after the step) and weight decay included. Where gradients are clipped, g is the clipped one.
    A step that a GradScaler skips counts for nothing. Where `patience` goes back to earlier weights, theta(end)
    are those, and the integral is that of all steps.

    Args:
        lam: the paper's c; 1, as its split MNIST has it; "auto": chosen for every task after the first, see
            mas_ext.choose_lam.
        xi: the damping, > 0, that bounds the importance of parameters that hardly moved; 0.001, as the
            authors' code for split MNIST has it (0.1 for permuted MNIST).
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.

    Raises:
        ValueError: xi is no finite number above 0.
    """

    lam: Lam = 1.0
    xi: float = 1e-3
    mode: Mode | None = None

    def __post_init__(self) -> None:
        check_positive(self.xi, "xi")
        super().__init__(self.lam, self.mode, merge="sum", anchor="latest")

    def end_task(self, training: Training) -> None:
        theta = named_parameters(training.model, training.own_parameters)
        self.consolidate(self.path.importance(theta, self.xi))
