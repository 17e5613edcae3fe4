"""Whether two checkouts compute the same bits, seen through what users can call.

    python python_tests/same_bits.py OLD NEW

runs this program with the mas_ext of each, side by side, and prints every result that differs; the exit status
is then 1. With one checkout, which mas_ext must come from, it prints the SHA-256 of every result.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import FusedMASPenalty, compat, estimate_fisher, estimate_importance, methods, models
from mas_ext import optim as fused

# A name, and what was computed.
Results = Iterator[tuple[str, Any]]

BACKENDS = ("native", "reference")
SIZE = 40


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings() -> Iterator[dict[str, Any]]:
    """Of a penalty, each with each."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.uint8)
    for (merge, anchor, store), dtype, backend, device in itertools.product(
        tiny.FORMS, dtypes, BACKENDS, (None, "cpu")
    ):
        yield {
            "merge": merge,
            "anchor": anchor,
            "store": store,
            "omega_dtype": dtype,
            "backend": backend,
            "state_device": device,
            "gamma": 0.7 if merge == "decay" else 1.0,
        }


def penalties(device: str) -> Results:
    """State, value, gradient in the loss, gradient in place."""
    for given in settings():
        model = tiny.parameters(SIZE).to(device)
        penalty = tiny.consolidated(model, **given)
        name = f"penalty {' '.join(map(str, given.values()))}"
        yield f"{name}, state", [penalty.omega, penalty.anchor, penalty.scale, penalty.alpha]
        tiny.move(model, random(3))
        value = penalty()
        (3 * value).backward()
        yield f"{name}, in the loss", [value, [p.grad for p in model.values()]]
        yield f"{name}, in the gradient", [penalty.add_grad_(), [p.grad for p in model.values()]]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, 0.1, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "fused SGD": lambda p: fused.SGD(p, 0.1),
    "fused SGD with momentum": lambda p: fused.SGD(p, 0.1, 0.9, 0.1, weight_decay=0.01),
    "fused SGD, Nesterov": lambda p: fused.SGD(p, 0.1, 0.9, nesterov=True),
    "fused AdamW": lambda p: fused.AdamW(p, 0.1),
    "fused AdamW, AMSGrad": lambda p: fused.AdamW(p, 0.1, amsgrad=True),
}


def steps(device: str) -> Results:
    """Three steps of optimizers that a penalty is attached to."""
    for given in settings():
        for (what, make), mode in itertools.product(OPTIMIZERS.items(), ("gradient", "proximal")):
            model = tiny.parameters(SIZE).to(device)
            penalty = tiny.consolidated(model, **given)
            optimizer, generator = make(model.parameters()), random(4)
            penalty.attach(optimizer, mode)
            for _ in range(3):
                for p in model.values():
                    p.grad = torch.randn(p.shape, generator=generator).to(p)
                optimizer.step()
            yield f"{what}, {mode}, {' '.join(map(str, given.values()))}", dict(model)


class Transformer(nn.Module):
    """Tokens (N, 5) -> logits (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


def networks() -> Iterator[tuple[str, nn.Module, list[tuple[Tensor, Tensor]]]]:
    """A name, a model, and batches of inputs and labels; the last one is shorter."""
    labels = torch.arange(7) % 3
    images, tokens = torch.randn(7, 3, 8, 8), torch.randint(11, (7, 5))
    made: dict[str, tuple[nn.Module, Tensor]] = {"transformer": (Transformer(), tokens)}
    for name in ("cnn", "resnet20"):
        model = models.build(name, (3, 8, 8))
        model.add_head(3)
        made[name] = model, images
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = models.mlp((3, 8, 8), (16,)).to(dtype)
        model.add_head(3)
        made[f"mlp {dtype}"] = model, images.to(dtype)
    for name, (model, x) in made.items():
        batches = [(x[:3], labels[:3]), (x[3:6], labels[3:6]), (x[6:], labels[6:])]
        yield name, model, batches


def importances(device: str) -> Results:
    """All methods, objectives and choices of labels."""
    for name, model, batches in networks():
        model.to(device)
        for backend in BACKENDS:
            for method, objective in itertools.product(
                ("exact", "batch", "local"), ("l2", "l1", "vector")
            ):
                # The objective of "local" is its own.
                if (method, objective) not in (("local", "l1"), ("local", "vector")):
                    found = estimate_importance(model, batches, method, objective, backend=backend)
                    yield f"importance {method} {objective} {name} {backend}", found
            for labels in ("true", "predicted", "sampled", "all"):
                found = estimate_fisher(model, batches, labels, backend=backend)
                yield f"Fisher information {labels} {name} {backend}", found


def tasks(device: str) -> Results:
    """Consolidation from data, as this library does it and as others do."""
    makers = (FusedMASPenalty, compat.official, compat.avalanche, compat.facil)
    for (name, first, batches), make in itertools.product(networks(), makers):
        model = copy.deepcopy(first).to(device)
        penalty = make(model)
        penalty.consolidate(batches)
        for batch in batches:
            penalty.observe(batch)
        penalty.consolidate()
        if make is FusedMASPenalty:
            penalty.adapt(batches[:1], weight=0.5)
        tiny.move(model, random(5))
        yield f"{make.__name__} {name}", [penalty(), penalty.omega, penalty.anchor]


SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "schedule": "cosine", "clip": 0.1},
    {"optimizer": "adamw", "schedule": "linear", "balanced": True},
    {"validation": 0.2, "patience": 1},
    {"importance_epochs": 2},
    {"amp": "bfloat16"},
    {"deterministic": True, "seed": 1},
]


def trainings(device: str) -> Results:
    """Whole ones, and those that go on from a checkpoint."""
    names = [(name, setting, {}) for name in methods.METHODS for setting in methods.SETTINGS]
    for name, setting, given in [*names, *(("mas", "task", given) for given in SETTINGS)]:
        scenario, arguments = tiny.scenario(setting), {"device": device, **given}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            tiny.interrupt(name, checkpoint, setting, **arguments)
            for what, path in (("whole", None), ("resumed", checkpoint)):
                trainer = tiny.trainer(name, setting, checkpoint=path, **arguments)
                result = trainer.fit(scenario)
                found = [trainer.model.state_dict(), result.accuracy, result.validation]
                yield f"training {what} {name} {setting} {given or ''}", found


def comparison(device: str) -> Results:
    """`mas-ext run`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        assert tiny.command(*tiny.RUN, "--device", device, "--out", out) == 0
        yield "mas-ext run", tiny.found_by_run(out)


def first_weights(device: str) -> Results:
    """Of every network."""
    for name in models.MODELS:
        model = models.build(name, (3, 32, 32))
        model.add_head(3)
        yield f"first weights of {name}", model.state_dict()


PARTS = {
    part.__name__: part
    for part in (penalties, steps, importances, tasks, trainings, comparison, first_weights)
}


def digest(content: Any) -> str:
    """SHA-256 of tensors, numbers and strings in lists and dicts."""
    total = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, Tensor):
            total.update(f"{node.dtype} {tuple(node.shape)}".encode())
            flat = node.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(node, Mapping):
            add([part for pair in node.items() for part in pair])
        elif isinstance(node, (list, tuple)):
            for part in node:
                add(part)
        else:
            total.update(repr(node).encode())

    add(content)
    return total.hexdigest()


def results(checkout: Path, parts: list[str], device: str) -> Iterator[tuple[str, str]]:
    """Names and SHA-256 of what this checkout computes."""
    found = Path(mas_ext.__file__).resolve()
    if checkout.resolve() not in found.parents:
        sys.exit(f"mas_ext: got {found}, expected that in {checkout}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for part in parts:
        torch.manual_seed(0)
        for name, content in PARTS[part](device):
            yield name, digest(content)


def start(checkout: Path, python: str, options: list[str]) -> subprocess.Popen[str]:
    """This program with one checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout.resolve()),
        "OMP_NUM_THREADS": "1",
        "MAS_EXT_REQUIRE_NATIVE": "1",
    }
    words = [python, __file__, str(checkout.resolve()), *options]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def compare(checkouts: list[Path], pythons: list[str], options: list[str]) -> int:
    """The number of results that differ, which are printed."""
    processes = [start(*each, options) for each in zip(checkouts, pythons, strict=True)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("one of them failed")
    old, new = (dict(line.rsplit(" ", 1) for line in out.splitlines()) for out in outputs)
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    for name in different:
        print(f"different: {name}: {old.get(name, 'missing')} -> {new.get(name, 'missing')}")
    print(f"{len(old)} results, {len(different)} different")
    return len(different)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="same_bits.py OLD NEW, or same_bits.py CHECKOUT")
    parser.add_argument("checkouts", type=Path, nargs="+")
    parser.add_argument("--python", nargs=2, default=[sys.executable] * 2, help="of OLD and of NEW")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if len(given.checkouts) == 2:
        options = ["--device", given.device, "--parts", *given.parts]
        sys.exit(compare(given.checkouts, given.python, options) > 0)
    for name, sha in results(given.checkouts[0], given.parts, given.device):
        print(name, sha, flush=True)
