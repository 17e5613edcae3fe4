"""The benchmark of importance: its structure, and those of its numbers that do not depend on the clock."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import importance, memory
from benchmarks.importance import FORMS, Call
from benchmarks.networks import IMPORTANCE, build

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    return importance.run("mlp", samples=6, repeats=2, with_memory=False)


def test_every_form_is_measured_or_says_why_not(result: Mapping[str, Any]) -> None:
    names = [row["name"] for row in result["forms"]]
    assert names[:5] == [*FORMS][:5]
    assert {*names, *result["skipped"]} == {*FORMS}
    for row in result["forms"]:
        for key in ("seconds", "to_batch", "to_training"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert row["memory"] is None
    ratios = {row["name"]: (row["to_batch"], row["to_training"]) for row in result["forms"]}
    assert ratios["batch approximation"][0] == {"median": 1, "low": 1, "high": 1}
    assert ratios["forward + backward"][1] == {"median": 1, "low": 1, "high": 1}


def test_errors_are_those_of_rounding_but_for_the_approximation(result: Mapping[str, Any]) -> None:
    errors = {row["name"]: row["error"] for row in result["forms"]}
    assert errors.pop("forward + backward") is None
    assert 0.1 < errors.pop("batch approximation") < 1
    assert all(0 < error < 1e-5 for error in errors.values())


def test_what_the_approximation_keeps(result: Mapping[str, Any]) -> None:
    """sum |sum of gradients| / sum of |gradients|, from both."""
    model, x = build(IMPORTANCE["mlp"], 6)
    kept = whole = 0.0
    for p in model.parameters():
        singles = [torch.autograd.grad(model(sample).square().sum(), p)[0] for sample in x.split(1)]
        kept += float(torch.stack(singles).sum(0).abs().sum())
        whole += float(torch.stack(singles).abs().sum())
    assert result["batch"]["kept"] == pytest.approx(kept / whole, rel=1e-4)
    assert 0 < result["batch"]["rank_correlation"] < 1


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_forms_agree_on_other_networks(
    name: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "FIRST_CALLS", 1)
    measured = importance.run(name, samples=2, repeats=1, with_memory=False)
    assert {"exact", "loop, one by one", "vmap(grad), chunks"} <= {
        row["name"] for row in measured["forms"]
    }


def test_chunks_of_vmap_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(IMPORTANCE["mlp"], 5)
    whole = importance.vmap(model, x)()
    monkeypatch.setattr(importance, "CHUNK_BYTES", 2 * 4 * 478_410)
    chunks = importance.vmap(model, x)()
    torch.testing.assert_close(chunks, whole)


def test_calls_may_be_repeated() -> None:
    """Nothing adds up from call to call."""
    model, x = build(IMPORTANCE["mlp"], 3)
    for name, form in FORMS.items():
        try:
            call = form(model, x)
        except ImportError:
            continue
        first = {key: t.clone() for key, t in call().items()}
        torch.testing.assert_close(call(), first, msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_seen() -> None:
    """vmap holds 64 gradients of 1.9 MB each, a training pass one."""
    if not memory.RESET_PEAK.exists():
        return
    make = partial(build, IMPORTANCE["mlp"], 64)
    many = importance.peak(make, "cpu", "vmap(grad), chunks")
    one = importance.peak(make, "cpu", "forward + backward")
    one_gradient = 4 * 478_410
    assert 64 * one_gradient < many < 4 * 64 * one_gradient
    assert one_gradient < one < 20 * one_gradient


def _raises(error: Exception) -> Any:
    def form(model: nn.Module, x: Tensor) -> Call:
        raise error

    return form


def test_a_form_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "BackPACK BatchGrad", _raises(ImportError("no such package")))
    monkeypatch.setitem(FORMS, "vmap(grad), chunks", _raises(RuntimeError("can't\n" * 99)))
    result = importance.run("mlp", samples=2, repeats=1, with_memory=False)
    assert result["skipped"]["BackPACK BatchGrad"] == "ImportError: no such package"
    assert len(result["skipped"]["vmap(grad), chunks"]) <= 160
    assert "BackPACK BatchGrad: left out, ImportError" in importance.table(result)


def test_this_librarys_own_form_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "exact", _raises(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        importance.run("mlp", samples=2, repeats=1, with_memory=False)


def test_a_wrong_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "exact", FORMS["batch approximation"])
    with pytest.raises(AssertionError, match="exact: got importance that is 0"):
        importance.run("mlp", samples=4, repeats=1, with_memory=False)


def test_table_has_a_line_for_every_form(result: Mapping[str, Any]) -> None:
    lines = importance.table(result).splitlines()
    assert "478,410 parameters" in lines[0]
    assert lines[1] == "batch of 6 x 784"
    for row in result["forms"]:
        milliseconds = f"{1e3 * row['seconds']['median']:.2f} ("
        assert any(line.startswith(row["name"]) and milliseconds in line for line in lines)
    kept = f"keeps {100 * result['batch']['kept']:.0f} % of the importance"
    assert any(kept in line for line in lines)
