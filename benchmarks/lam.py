"""Accuracy over lam, gradient and proximal form, SGD and Adam, on split MNIST: writes JSON.

python -m benchmarks.lam

What is in the file is not learned again. MNIST is looked for in $MAS_EXT_DATA, ./data and ~/data.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from benchmarks.files import RESULTS, load, machine, save
from mas_ext import Trainer, models
from mas_ext.failures import Diverged
from mas_ext.methods import MAS
from mas_ext.scenarios import Scenario, named
from mas_ext.training.run import Epoch, Result

NAME = "lam_split-mnist"
MODES = ("gradient", "proximal")
# SGD has momentum 0.9.
RATES = {"sgd": 0.01, "adam": 0.001}
HIDDEN, EPOCHS, BATCH = (100, 100), 3, 128
LAMS = [10.0**n for n in range(-2, 9)]


def learn(scenario: Scenario, mode: str, optimizer: str, lam: float, seed: int) -> dict[str, Any]:
    """Average accuracy and forgetting; if training diverged, instead the task, counted from 0."""
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
    except Diverged:
        return {**row, "accuracy": None, "forgetting": None, "diverged": len(tasks)}
    found = {"accuracy": result.average_accuracy, "forgetting": result.forgetting}
    return {**row, **found, "diverged": None}


def main() -> None:
    """Learn what is not in the file yet, and write it after each training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path, seeds = RESULTS / f"{NAME}.json", range(arguments.seeds)
    runs = load(NAME)["runs"] if path.exists() else []
    known = {(r["mode"], r["optimizer"], r["lam"], r["seed"]) for r in runs}
    wanted = itertools.chain(
        itertools.product(["gradient"], RATES, [0.0], seeds),
        itertools.product(MODES, RATES, LAMS, seeds),
    )
    missing = [each for each in wanted if each not in known]
    scenario = named.make_scenario("split-mnist", arguments.data) if missing else None
    protocol = {"hidden": HIDDEN, "epochs": EPOCHS, "batch": BATCH, "rates": RATES}
    for each in missing:
        assert scenario is not None
        runs.append(learn(scenario, *each))
        print(runs[-1], flush=True)
        save({**protocol, "threads": 1, "machine": machine(), "runs": runs}, path)


if __name__ == "__main__":
    main()
