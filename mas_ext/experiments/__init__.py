"""What is said of MAS and of other methods, measured: one file an experiment."""

from __future__ import annotations

from mas_ext.experiments.adaptivity import Adaptivity
from mas_ext.experiments.consistency import Consistency
from mas_ext.experiments.cost import Cost
from mas_ext.experiments.exactness import Exactness
from mas_ext.experiments.experiment import Experiment, Page, Results, draw, reproduce
from mas_ext.experiments.facts import Facts
from mas_ext.experiments.official_demo import OfficialDemo
from mas_ext.experiments.regression import Regression
from mas_ext.experiments.split_mnist import SplitMNIST

__all__ = ["EXPERIMENTS", "Experiment", "Page", "Results", "draw", "reproduce"]

# In the order in which they are told.
EXPERIMENTS: dict[str, Experiment] = {
    "split-mnist": SplitMNIST(),
    "official-demo": OfficialDemo(),
    "exactness": Exactness(),
    "consistency": Consistency(),
    "adaptivity": Adaptivity(),
    "facts": Facts(),
    "cost": Cost(),
    "regression": Regression(),
}
