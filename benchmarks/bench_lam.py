"""Accuracy over lam, gradient and proximal form, SGD and Adam, on split MNIST: writes JSON.

python -m benchmarks.bench_lam

Goes on where it was stopped. MNIST is looked for in $MAS_EXT_DATA, ./data and ~/data.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import RESULTS, machine
from mas_ext import Trainer, models
from mas_ext.methods import MAS
from mas_ext.scenarios import Scenario
from mas_ext.scenarios import named as catalogue
from mas_ext.training.run import Epoch, Result

MODES = ("gradient", "proximal")
# Momentum 0.9 with SGD, see settings.OPTIMIZERS.
RATES = {"sgd": 0.01, "adam": 0.001}
HIDDEN, EPOCHS, BATCH = (100, 100), 3, 128
LAMS = [10.0**n for n in range(-2, 9)]


def learn(scenario: Scenario, mode: str, optimizer: str, lam: float, seed: int) -> dict[str, Any]:
    """Average accuracy and forgetting of one run; where it diverged, the task, counted from 0, instead."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.mlp(scenario.shape, HIDDEN)
    tasks: list[Result] = []

    def count(news: Epoch | Result) -> None:
        if isinstance(news, Result):
            tasks.append(news)

    trainer = Trainer(
        model,
        MAS(lam, mode=mode),  # type: ignore[arg-type]
        setting="task",
        optimizer=optimizer,
        lr=RATES[optimizer],
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        callbacks=[count],
    )
    row = {"mode": mode, "optimizer": optimizer, "lam": lam, "seed": seed}
    try:
        result = trainer.fit(scenario)
    except FloatingPointError:
        return {**row, "accuracy": None, "forgetting": None, "diverged": len(tasks)}
    found = {"accuracy": result.average_accuracy, "forgetting": result.forgetting}
    return {**row, **found, "diverged": None}


def main() -> None:
    """Learn what is not in the file yet, writing after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lam", type=float, nargs="+", default=LAMS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "lam_split-mnist.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.json
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    done = {(r["mode"], r["optimizer"], r["lam"], r["seed"]) for r in runs}
    wanted = [
        ("gradient", *rest) for rest in itertools.product(RATES, [0.0], range(arguments.seeds))
    ]
    wanted += itertools.product(MODES, RATES, arguments.lam, range(arguments.seeds))
    protocol = {"hidden": HIDDEN, "epochs": EPOCHS, "batch": BATCH, "rates": RATES}
    missing = [job for job in wanted if job not in done]
    scenario = catalogue.make_scenario("split-mnist", arguments.data) if missing else None
    for job in missing:
        assert scenario is not None
        runs.append(learn(scenario, *job))
        print(runs[-1], flush=True)
        result = {**protocol, "threads": arguments.threads, "machine": machine(), "runs": runs}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
