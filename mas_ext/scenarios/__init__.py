"""What is learned: tasks one after another, the data sets that they are made from, scenarios by name."""

from mas_ext.scenarios.tasks import Scenario, Task, Tensors, from_datasets, labels, split, targets

__all__ = ["Scenario", "Task", "Tensors", "from_datasets", "labels", "split", "targets"]
