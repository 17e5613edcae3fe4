"""The benchmark's structure, and those of its numbers that do not depend on the clock."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks import penalty
from mas_ext.compare import bench as forms


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    return penalty.run("mlp", tasks=(1, 2), repeats=2)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("mlp", 6, 478_410),
        ("resnet18", 62, 11_689_512),
        ("vit_b", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
    ],
)
def test_shapes_are_the_published_ones(model: str, tensors: int, parameters: int) -> None:
    shapes = forms.MODELS[model]()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == parameters


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
    } <= set(names)
    compiled = {name for name, _ in names} | set(result["skipped"])
    assert {"torch.compile", "torch.compile, gradient only"} <= compiled
    for row in result["forms"]:
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


def test_table_has_a_line_for_every_form(result: Mapping[str, Any]) -> None:
    lines = penalty.table(result).splitlines()
    assert "478,410 parameters in 6 tensors" in lines[0]
    for row in result["forms"]:
        assert any(line.startswith(row["name"]) and f"{row['held']:.1f}" in line for line in lines)


def test_a_wrong_form_is_refused() -> None:
    case = forms.build("mlp", "cpu", torch.float32, [1])
    form = next(forms.own_forms(case))
    exact = forms.exact_results(case)["gradient", 1]
    exact[0][0, 0] *= 2
    with pytest.raises(AssertionError, match="add_grad_, 1 tasks: got a gradient"):
        penalty._check(case, form, exact)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_forms_agree_in_every_dtype(dtype: str) -> None:
    case = forms.build("mlp", "cpu", getattr(torch, dtype), [1, 3])
    exact = forms.exact_results(case)
    for form in [*forms.own_forms(case), *forms.other_forms(case)]:
        if not form.compiled:
            penalty._check(case, form, exact[form.kind, form.tasks])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("model", "lenet"), ("device", "tpu"), ("dtype", "int8"), ("tasks", (0,)), ("repeats", 0)],
)
def test_bad_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        penalty.run(**{argument: value})  # type: ignore[arg-type]
