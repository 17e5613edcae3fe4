"""What an omega of fewer bits loses: errors over 1 to 1000 entries, and accuracy on split MNIST and CIFAR-100.

python -m benchmarks.omega errors
python -m benchmarks.omega split-mnist --seeds 8
python -m benchmarks.omega split-cifar100 --seeds 8

Each adds to results/omega_cpu.json, the accuracies seed by seed. Data are looked for in $MAS_EXT_DATA, ./data
and ~/data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.files import RESULTS, machine, save
from mas_ext import FusedMASPenalty, Trainer, models
from mas_ext.methods.mas import MAS
from mas_ext.scenarios import Scenario
from mas_ext.scenarios import named as catalogue

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
ENTRIES = (1, 10, 100, 1000)
PARAMETERS = 65536
LAM = {"split-mnist": 0.01, "split-cifar100": 0.1}
EPOCHS = {"split-mnist": 1, "split-cifar100": 2}


def relative_errors(omega_dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Relative errors of W (root mean square over elements), of the value and of the gradient (L2), by entries.

    Importance: exp(2 n) of a normal n for each parameter, times exp(n) of another for each entry. Parameters
    wander by 0.1 an entry; value and gradient are those 0.3 away.
    """
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(PARAMETERS, generator=generator, dtype=torch.float64)

    model = nn.ParameterList([normal().float()])
    penalty = FusedMASPenalty(model, omega_dtype=omega_dtype)
    (theta,) = model.parameters()
    base, weight = torch.exp(2 * normal()), torch.zeros(PARAMETERS, dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    found: dict[str, dict[str, float]] = {}
    for entry in range(1, ENTRIES[-1] + 1):
        with torch.no_grad():
            theta += 0.1 * normal()
        omega = (base * torch.exp(normal())).float()
        penalty.consolidate(importance={"0": omega})
        x, w = theta.detach().double(), omega.double()
        weight, first, second = weight + w, first + w * x, second + w * x * x
        if entry in ENTRIES:
            before = theta.detach().clone()
            with torch.no_grad():
                theta += 0.3 * normal()
            x = theta.detach().double()
            theta.grad = None
            value = penalty.add_grad_().double()
            gradient = 2 * (weight * x - first)
            assert theta.grad is not None
            found[str(entry)] = {
                "omega": float((penalty.omega["0"] / weight - 1).square().mean().sqrt()),
                "value": float((value / (weight * x * x - 2 * first * x + second).sum() - 1).abs()),
                "gradient": float((theta.grad - gradient).norm() / gradient.norm()),
            }
            with torch.no_grad():
                theta.copy_(before)
    return found


class Rounded(MAS):
    """MAS with an omega of some dtype."""

    def __init__(self, lam: float, omega_dtype: torch.dtype, max_samples: int) -> None:
        super().__init__(lam, max_samples=max_samples)
        self._arguments["omega_dtype"] = omega_dtype


def accuracy(name: str, scenario: Scenario, seed: int, omega_dtype: torch.dtype) -> float:
    """Average accuracy of an MLP after the last task, in per cent."""
    torch.manual_seed(seed + 2**32)
    model = models.mlp(scenario.shape, (400, 400))
    method = Rounded(LAM[name], omega_dtype, max_samples=1000)
    trainer = Trainer(model, method, epochs=EPOCHS[name], seed=seed)
    return 100 * float(trainer.fit(scenario).average_accuracy)


def main() -> None:
    """Measure one of them, and write it into the file that holds the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("errors", *LAM))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "omega_cpu.json")
    options = parser.parse_args()
    what, path = options.what, options.json
    known = json.loads(path.read_text()) if path.exists() else {}
    about: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    if what == "errors":
        errors = {name: relative_errors(dtype) for name, dtype in DTYPES.items()}
        print(json.dumps(errors, indent=1))
        found = {**about, "parameters": PARAMETERS, "relative_error": errors}
        save({**known, what: found}, path)
        return
    scenario = catalogue.make_scenario(what)
    by_dtype: dict[str, list[float]] = {"float32": [], "uint8": []}
    about |= {"lam": LAM[what], "epochs": EPOCHS[what], "samples_for_importance": 1000}
    for seed in range(options.seeds):
        for name, accuracies in by_dtype.items():
            accuracies.append(accuracy(what, scenario, seed, DTYPES[name]))
            print(seed, name, accuracies[-1], flush=True)
        save({**known, what: {**about, "average_accuracy": by_dtype}}, path)


if __name__ == "__main__":
    main()
