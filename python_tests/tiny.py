"""Tiny tasks, trainings and penalties, for the tests of the surface, of old files and of equal bits."""

from __future__ import annotations

import json
import signal
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, Trainer, cli, models
from mas_ext.methods import Method
from mas_ext.scenarios import Scenario, Tensors, from_datasets

INPUTS, SAMPLES = 4, 20

# Merge, anchor and store, each with each.
FORMS = [*product(("sum", "consistent", "decay"), ("latest", "own"), ("merged", "per_task"))]

# A comparison in which lam is chosen: `mas-ext run` with --out.
RUN = [
    *("run", "--scenario", "split-digits", "--tasks", "2", "--hidden", "8", "--epochs", "2"),
    *("--lr", "0.01", "--batch-size", "32", "--methods", "finetune,mas", "--lam", "1,100"),
]


def scenario(setting: str = "task") -> Scenario:
    """Two tasks of two classes, which are the same classes in the domain-incremental setting."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for task in range(2):
        y = torch.arange(SAMPLES) % 2
        x = torch.randn(SAMPLES, INPUTS, generator=generator)
        x += 2 * torch.randn(2, INPUTS, generator=generator)[y]
        data = Tensors(x, y + (0 if setting == "domain" else 2 * task))
        pairs.append((data, data))
    return from_datasets(pairs)


def trainer(method: Method | str, setting: str = "task", **arguments: Any) -> Trainer:
    """Three epochs of three steps per task, on a network with one small hidden layer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.mlp((INPUTS,), (6,))
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.05, **arguments}
    return Trainer(model, method, setting=setting, **settings)


def interrupt(
    method: Method | str, checkpoint: Path, setting: str = "task", **arguments: Any
) -> None:
    """Leave a checkpoint in the middle of an epoch of the second task, as Ctrl-C does."""

    def follow(news: Any) -> None:
        if getattr(news, "task", None) == 1 and news.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    made = trainer(method, setting, checkpoint=checkpoint, callbacks=[follow], **arguments)
    with suppress(KeyboardInterrupt):
        made.fit(scenario(setting))


def parameters(size: int = 1) -> nn.ParameterDict:
    """A model that is nothing but parameters: of all dtypes, strided, 0-dim and without elements."""
    shapes = {"wide": (3, 2), "plain": (7, 2), "brain": (2, 3), "short": (1, 5)}
    dtypes = {"wide": torch.float64, "brain": torch.bfloat16, "short": torch.float16}
    made = {n: torch.zeros(a * size, b * size, dtype=dtypes.get(n)) for n, (a, b) in shapes.items()}
    image = torch.zeros(2 * size, 3, 2, 2).to(memory_format=torch.channels_last)
    other = {"image": image, "single": torch.zeros(()), "empty": torch.zeros(0, 2)}
    return nn.ParameterDict({**made, **other})


def consolidated(model: nn.Module, **settings: Any) -> FusedMASPenalty:
    """A penalty with two tasks, whose importance and parameters are random with a fixed seed."""
    penalty = FusedMASPenalty(model, lam=0.3, **settings)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        move(model, generator)
        penalty.consolidate(importance=importance(model, generator))
    return penalty


@torch.no_grad()
def move(model: nn.Module, generator: torch.Generator) -> None:
    """Add random numbers to the parameters."""
    for p in model.parameters():
        p += torch.randn(p.shape, generator=generator).to(p)


def importance(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random importance of the parameters, from 0 to 1."""
    return {
        name: torch.rand(p.shape, generator=generator).to(p.device)
        for name, p in model.named_parameters()
    }


def read_tree(path: Path) -> Any:
    """What is in a checkpoint of a Trainer: tensors, and a skeleton of JSON that says where they belong."""
    tensors = safetensors.torch.load_file(path)

    def grown(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: grown(value) for key, value in content}
        return [grown(value) for value in content]

    return grown(json.loads(bytes(tensors["tree"].tolist()))["tree"])


def command(*words: Any) -> int:
    """The exit status of `mas-ext`, which says nothing."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        return cli.main([str(word) for word in words])


def found_by_run(out: Path) -> dict[str, Any]:
    """The numbers in the directory of RUN that do not depend on how fast it was."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("result.json")):
        result = json.loads(file.read_text())
        kept = ("average_accuracy", "forgetting", "backward_transfer", "validation_accuracy")
        found[file.parent.name] = [result[name] for name in kept if result[name] is not None]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [line["loss"] for line in lines if line["epoch"] is not None]
    found["lam"] = json.loads((out / "lam.json").read_text())["mas"]["chosen"]
    rows = (out / "table.md").read_text().splitlines()[2:4]
    found["table"] = [[float(cell) for cell in row.split("|")[3:5]] for row in rows]
    return found
