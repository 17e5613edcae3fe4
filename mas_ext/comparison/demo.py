"""The demo: five tasks of two classes each, learned one after another with and without a penalty."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mas_ext import metrics
from mas_ext._arguments import check_count
from mas_ext.comparison.charts import canvas, legend
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Method
from mas_ext.models import mlp
from mas_ext.scenarios import Scenario, datasets, split
from mas_ext.trainer import Trainer
from mas_ext.training.run import Epoch

HIDDEN = (100, 100)
LEARNING_RATE = 0.02  # of SGD with momentum 0.9
IMPORTANCE_SAMPLES = 1000  # per task; with all of them MAS gains less than it differs by seed
EPOCHS = {"digits": 20}  # of other data sets 3
BATCH_SIZE = 32

_ALPHA: dict[str, Any] = {"merge": "consistent", "anchor": "own"}

COMPARED: dict[str, Callable[[], Method]] = {
    "fine-tuning": Finetune,
    "MAS": partial(MAS, "auto", max_samples=IMPORTANCE_SAMPLES),
    "MAS-alpha": partial(MAS, "auto", **_ALPHA, max_samples=IMPORTANCE_SAMPLES),
    # The gradient form ends in NaN at a hundredth of this lam.
    "too strong, lam = 1000": partial(
        MAS, 1000.0, **_ALPHA, mode="proximal", max_samples=IMPORTANCE_SAMPLES
    ),
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: by method accuracy[t, k], (T, T), in [0, 1] and NaN for k > t."""

    accuracy: dict[str, Tensor]
    tasks: tuple[str, ...]
    figure: Path
    seconds: float

    def table(self) -> str:
        """The accuracies on every task after the last one, their average and the forgetting, by method."""
        width = max(map(len, self.accuracy)) + 2
        titles = [*self.tasks, "average", "forgetting"]
        lines = ["accuracy in % after the last task, and forgetting in % points"]
        lines += [" " * width + "".join(f"{title:>11}" for title in titles)]
        for name, matrix in self.accuracy.items():
            average, lost = metrics.average_accuracy(matrix), metrics.forgetting(matrix)
            cells = [*matrix[-1].tolist(), average, lost]
            lines += [f"{name:<{width}}" + "".join(f"{100 * cell:>11.1f}" for cell in cells)]
        return "\n".join(lines)


def run_demo(
    dataset: str = "digits",
    folder: str | Path | None = None,
    out: str | Path = "mas-ext-demo.png",
    seed: int = 0,
    epochs: int | None = None,
) -> DemoResult:
    """Learn the five tasks with every method, with progress on stderr, and draw the accuracies.

    Args:
        dataset, folder: of `mas_ext.scenarios.datasets.load_dataset`.
        out: the picture, a PNG file, which is overwritten.
        seed: of the initial weights and of the order of samples, the same for all methods.
        epochs: per task; None for what suits the data set.

    Raises:
        ValueError: an argument that can't be used.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"out: got {str(out)!r}, expected the name of a .png file")
    if not out.parent.is_dir():
        raise ValueError(f"out: got {str(out)!r}, expected a file in a folder that exists")
    if epochs is not None:
        check_count(epochs, "epochs")
    datasets.import_extra("matplotlib")  # better now than when everything has been learned
    scenario = split(*datasets.load_dataset(dataset, folder))
    epochs = epochs or EPOCHS.get(dataset, 3)

    start = time.perf_counter()
    accuracy = {}
    total = len(COMPARED) * len(scenario.tasks) * epochs
    with tqdm(total=total, unit="epoch") as progress:
        for name, method in COMPARED.items():
            progress.set_description(name)
            accuracy[name] = learn(scenario, method(), epochs, seed, progress.update)
    seconds = time.perf_counter() - start

    names = tuple(task.name for task in scenario.tasks)
    draw(accuracy, names, out)
    return DemoResult(accuracy, names, out, seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """With matrices this small, threads would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def learn(
    scenario: Scenario, method: Method, epochs: int, seed: int, epoch_done: Callable[[], object]
) -> Tensor:
    """Learn the tasks in turn with SGD; returns accuracy[t, k], (T, T), NaN for k > t."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp(scenario.shape, HIDDEN)
    trainer = Trainer(
        model,
        method,
        optimizer="sgd",
        lr=LEARNING_RATE,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
        callbacks=[lambda news: epoch_done() if isinstance(news, Epoch) else None],
    )
    return trainer.fit(scenario).accuracy


def draw(accuracy: Mapping[str, Tensor], tasks: tuple[str, ...], out: Path) -> None:
    """Draw how the accuracy on each task changed as later ones were learned, one panel per method."""
    figure, panels = canvas(len(accuracy), 2, 2.45, sharex=True, sharey=True)
    for panel, (name, matrix) in zip(panels, accuracy.items(), strict=True):
        for k, task in enumerate(tasks):
            panel.plot(range(k, len(tasks)), 100 * matrix[k:, k], marker="o", label=task)
        average, lost = metrics.average_accuracy(matrix), metrics.forgetting(matrix)
        summary = f"average {100 * average:.1f} %\nforgetting {100 * lost:.1f} %"
        panel.set_title(f"{name}\n{summary}", fontsize="medium")
        panel.set_xticks(range(len(tasks)), tasks)
    figure.supxlabel("tasks learned, one after another")
    figure.supylabel("accuracy on each task in %")
    legend(figure, panel, len(tasks))
    figure.savefig(out, dpi=180)
