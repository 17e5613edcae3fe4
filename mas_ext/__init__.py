"""Memory Aware Synapses for PyTorch: learning one task after another without forgetting.

`FusedMASPenalty` holds a model's important parameters near their old values, and `TaskFree` tells it when where
nobody announces tasks; `Distillation` holds the model's outputs; `Replay` keeps a few old samples.
`estimate_importance` measures how important parameters are, without labels, and `check_importance` tells how
exactly. `Trainer` learns a scenario by one method, `compare` by many. `info` tells which kernels do the work.
"""

from mas_ext.comparison.compare import compare
from mas_ext.distillation import Distillation
from mas_ext.importance import FisherSum, estimate_fisher, estimate_importance
from mas_ext.importance.check import check_importance
from mas_ext.info import info
from mas_ext.penalty import FusedMASPenalty
from mas_ext.replay import Replay
from mas_ext.state.sharded_files import load_distributed
from mas_ext.task_free import TaskFree
from mas_ext.trainer import Trainer
from mas_ext.training.lam import choose_lam, read_pull
from mas_ext.training.scalars import ScalarCallback

__version__ = "0.1.0"

__all__ = [
    "Distillation",
    "FisherSum",
    "FusedMASPenalty",
    "Replay",
    "ScalarCallback",
    "TaskFree",
    "Trainer",
    "check_importance",
    "choose_lam",
    "compare",
    "estimate_fisher",
    "estimate_importance",
    "info",
    "load_distributed",
    "read_pull",
]
