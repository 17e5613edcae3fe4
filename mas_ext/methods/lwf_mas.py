"""LwF and MAS together: outputs are held on the new data, and parameters by their importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mas_ext._arguments import check_factor
from mas_ext.methods.lwf import LwF
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Training
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MultiHead


@dataclass(eq=False)
class LwFMAS(MAS):
    """Task loss + distillation D + lam sum_i W_i (theta_i - theta*_i)^2: LwF's D, and the penalty of MAS.

    D is the distance from the outputs of the network as it was before the task, on the new task's samples
    (Li & Hoiem, ECCV 2016); the penalty is that of Aljundi et al., ECCV 2018.

    Args:
        lam: strength of the penalty; less than MAS needs, since the distillation holds, too.
        distillation: strength of the distillation, LwF's lam.
        temperature: of LwF.
        warm_up: epochs in which only the new head is trained, of LwF. The others are those of MAS.

    Raises:
        ValueError: an argument that can't be used.
    """

    lam: Lam = 0.1
    distillation: float = 1.0
    temperature: float = 2.0
    warm_up: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor(self.distillation, "distillation")
        self.lwf = LwF(self.distillation, self.temperature, self.warm_up)

    def begin_task(self, training: Training) -> None:
        self.lwf.begin_task(training)
        super().begin_task(training)

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        return self.lwf.loss(training, x, y)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lwf": self.lwf.state_dict()}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        super().load_state_dict(state, model)
        self.lwf.load_state_dict(state["lwf"], model)
