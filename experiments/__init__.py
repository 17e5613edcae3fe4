"""What is said of MAS and of other methods, measured: one file an experiment."""

from __future__ import annotations

from mas_ext.experiments.adaptivity import Adaptivity
from mas_ext.experiments.consistency import Consistency
from mas_ext.experiments.cost import Cost
from mas_ext.experiments.datasets import Datasets
from mas_ext.experiments.exactness import Exactness
from mas_ext.experiments.experiment import Experiment, Page, Results, draw, reproduce
from mas_ext.experiments.facts import Facts
from mas_ext.experiments.official_demo import OfficialDemo
from mas_ext.experiments.on_pretrained import OnPretrained
from mas_ext.experiments.permuted_mnist import PermutedMNIST
from mas_ext.experiments.properties import Properties
from mas_ext.experiments.regression import Regression
from mas_ext.experiments.split_mnist import SplitMNIST

__all__ = ["EXPERIMENTS", "Experiment", "Page", "Results", "draw", "reproduce"]

# In the order in which they are told.
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
}
