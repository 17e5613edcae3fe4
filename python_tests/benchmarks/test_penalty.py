"""The benchmark of the penalty: its structure, and those of its numbers that do not depend on the clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import penalty
from mas_ext.comparison.bench import after_tasks, parameters_of


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    return penalty.run("mlp", tasks=(2,), repeats=2)


def test_every_form_is_measured(result: Mapping[str, Any]) -> None:
    names = [(row["name"], row["tasks"]) for row in result["forms"]]
    assert names[0] == ("add_grad_", 1)
    assert {
        ("add_grad_", 2),
        ("penalty() + backward", 1),
        ("penalty(), value only", 1),
        ("proximal_", 1),
        ("eager autograd", 1),
        ("eager autograd", 2),
        ("official code, gradient only", 1),
        ("torch._foreach", 1),
        ("torch._foreach, gradient only", 1),
    } <= set(names)
    compiled = {name for name, _ in names} | set(result["skipped"])
    assert {"torch.compile", "torch.compile, gradient only"} <= compiled
    for part in (result, result["cold"]):
        assert [(row["name"], row["tasks"]) for row in part["forms"]] == names
        for row in part["forms"]:
            for key in ("seconds", "ratio"):
                assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]


def test_state_of_merged_tasks_is_8_bytes_a_parameter(result: Mapping[str, Any]) -> None:
    held = {(row["name"], row["tasks"]): row["held"] for row in result["forms"]}
    # Every tensor's part starts at a multiple of 64 elements.
    padding = 6 * 63 * 8 / result["parameters"]
    assert 8 <= held["add_grad_", 1] <= 8 + padding
    assert held["add_grad_", 2] == held["add_grad_", 1]
    assert held["eager autograd", 2] == 16


def test_fraction_is_bytes_over_time_over_bandwidth(result: Mapping[str, Any]) -> None:
    moved = {row["name"]: row["moved"] for row in result["forms"] if row["moved"]}
    assert moved == {
        "add_grad_": 20,
        "penalty() + backward": 40,
        "penalty(), value only": 12,
        "proximal_": 16,
    }
    best = max(result["bandwidth"].values())
    for row in result["forms"]:
        if row["moved"]:
            bandwidth = row["moved"] * result["parameters"] / row["seconds"]["median"]
            assert row["fraction"] == pytest.approx(bandwidth / best)
        else:
            assert row["fraction"] is None


def test_table_has_a_line_for_every_form(result: Mapping[str, Any]) -> None:
    lines = penalty.table(result).splitlines()
    assert "478,410 parameters" in lines[0]
    for row in result["forms"]:
        assert any(line.startswith(row["name"]) and f"{row['held']:.1f}" in line for line in lines)


def test_a_wrong_form_is_refused() -> None:
    network = parameters_of("mlp", "cpu", "float32")
    penalties, history = after_tasks(network, [1])
    form = next(penalty.every_form(network, penalties, history))
    parameters = penalty.Parameters(network)
    penalty.check(form, parameters, history[0])
    history[0][0][0][0, 0] = 2
    with pytest.raises(AssertionError, match="add_grad_, 1 tasks: got a result that is 0"):
        penalty.check(form, parameters, history[0])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_forms_agree_in_every_dtype(dtype: str) -> None:
    network = parameters_of("mlp", "cpu", dtype)
    penalties, history = after_tasks(network, [1, 3])
    parameters = penalty.Parameters(network)
    for form in penalty.every_form(network, penalties, history):
        if not form.name.startswith(penalty.COMPILED):
            penalty.check(form, parameters, history[0])
