"""The experiment on language models, with peft's adapters on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments import EXPERIMENTS
from experiments.language import BASE, PLAIN, VARIANTS, Start, importance_at
from mas_ext import estimate_importance
from mas_ext.integrations.model_output import ModelOutput

QUICK: Any = replace(EXPERIMENTS["language"].quick(), variants=VARIANTS, steps=6, held=4, tested=4)
START = Start("tiny", QUICK.length, QUICK.held, QUICK.tested, QUICK.rank, 3)


def test_new_adapters_change_nothing_and_have_no_importance_of_a() -> None:
    """B is 0: the output does not depend on A."""
    omega = importance_at(START, "parameters", "mas")
    a, b = ([w for name, w in omega.items() if side in name] for side in ("lora_A", "lora_B"))
    assert len(a) == len(b) == 14
    assert all(float(w.abs().sum()) == 0 for w in a)
    assert all(float(w.abs().sum()) > 0 for w in b)
    assert importance_at(START, "parameters", "mas") is omega


def test_importance_of_weights_is_that_of_the_base() -> None:
    """No adapter has a part in it yet: it is that of the model without."""
    omega = importance_at(START, "weights", "mas")
    base = START.make()
    expected = estimate_importance(
        base.model, [{"input_ids": rows} for rows in base.held.split(4)], forward=ModelOutput()
    )
    assert len(omega) == 14
    for name, found in omega.items():
        torch.testing.assert_close(found, expected[name].float(), rtol=1e-4, atol=1e-6)


def measured(method: str, lam: float | None = None, seed: int = 0) -> Any:
    return QUICK.measure({"method": method, "lam": lam, "seed": seed})["perplexity"]


@pytest.mark.parametrize("method", VARIANTS)
def test_a_penalty_holds_what_was_known(method: str) -> None:
    """Without one it is lost; with a large one all stays as it was, the new text included."""
    before, plain, held = measured(BASE), measured(PLAIN), measured(method, 1e4)
    assert before["known"] < 3 < before["learned"]
    assert plain["learned"] < before["learned"] / 2
    assert plain["known"] > 1.2 * before["known"]
    assert held["known"] == pytest.approx(before["known"], rel=0.05)
    assert held["learned"] > 0.5 * before["learned"]


def test_the_same_cell_gives_the_same_bits() -> None:
    found = measured("MAS of s B A", 0.1)
    assert found == measured("MAS of s B A", 0.1) != measured("MAS of s B A", 0.1, seed=1)
