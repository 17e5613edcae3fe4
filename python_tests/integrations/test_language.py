"""The experiment on language models, with peft's adapters on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from experiments import EXPERIMENTS
from experiments.language import BASE, PLAIN, VARIANTS, Start, importance_at

QUICK: Any = replace(EXPERIMENTS["language"].quick(), steps=6, held=4, tested=4)
START = Start("tiny", QUICK.length, QUICK.held, QUICK.tested, QUICK.rank, 3)


def test_new_adapters_change_nothing_and_have_no_importance_of_a() -> None:
    """B is 0: the output does not depend on A."""
    omega = importance_at(START, "parameters", "mas")
    a, b = ([w for name, w in omega.items() if side in name] for side in ("lora_A", "lora_B"))
    assert len(a) == len(b) == 14
    assert all(float(w.abs().sum()) == 0 for w in a)
    assert all(float(w.abs().sum()) > 0 for w in b)
    assert importance_at(START, "parameters", "mas") is omega


@pytest.mark.parametrize("method", [name for name, v in VARIANTS.items() if name in QUICK.variants])
def test_a_penalty_holds_what_was_known(method: str) -> None:
    """Without one it is lost; with a large one all stays as it was, the new text included."""
    before, plain, held = (
        QUICK.measure(QUICK.cell(*given, seed=3))["perplexity"]
        for given in ((BASE,), (PLAIN,), (method, 1e4))
    )
    assert before["known"] < 3 < before["learned"]
    assert plain["learned"] < before["learned"] / 2
    assert plain["known"] > 1.2 * before["known"]
    assert held["known"] == pytest.approx(before["known"], rel=0.02)
    assert held["learned"] > 0.5 * before["learned"]


def test_the_same_cell_gives_the_same_bits() -> None:
    cell = QUICK.cell("MAS of A and B", 0.1, seed=3)
    assert QUICK.measure(cell) == QUICK.measure(cell) != QUICK.measure({**cell, "seed": 4})
