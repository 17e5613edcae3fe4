"""What is said of MAS and of other methods, measured: one experiment per file."""

from __future__ import annotations

from experiments.adaptivity import Adaptivity
from experiments.automatic import Automatic
from experiments.class_incremental import ClassIncremental
from experiments.consistency import Consistency
from experiments.cost import Cost
from experiments.datasets import Datasets
from experiments.exactness import Exactness
from experiments.experiment import Experiment, Page, Results, draw, reproduce
from experiments.facts import Facts
from experiments.importance_data import ImportanceData
from experiments.language import Language
from experiments.official_demo import OfficialDemo
from experiments.on_pretrained import OnPretrained
from experiments.permuted_mnist import PermutedMNIST
from experiments.properties import Properties
from experiments.regression import Regression
from experiments.split_mnist import SplitMNIST
from experiments.task_free import TaskFreeStreams

__all__ = ["EXPERIMENTS", "Experiment", "Page", "Results", "draw", "reproduce"]

# In the order of docs/RESULTS.md.
EXPERIMENTS: dict[str, Experiment] = {
    "split-mnist": SplitMNIST(),
    "official-demo": OfficialDemo(),
    "permuted-mnist": PermutedMNIST(),
    "exactness": Exactness(),
    "consistency": Consistency(),
    "adaptivity": Adaptivity(),
    "on-pretrained": OnPretrained(),
    "datasets": Datasets(),
    "facts": Facts(),
    "properties": Properties(),
    "cost": Cost(),
    "regression": Regression(),
    "class-incremental": ClassIncremental(),
    "task-free": TaskFreeStreams(),
    "automatic": Automatic(),
    "language": Language(),
    "importance-data": ImportanceData(),
}
