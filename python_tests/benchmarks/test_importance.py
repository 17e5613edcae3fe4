"""The benchmark of importance: its structure, and those of its numbers that do not depend on the clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gradients, importance, networks, timing
from benchmarks.gradients import FORMS, Call

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    return importance.run("mlp", samples=6, repeats=2, memory=False)


@pytest.mark.parametrize(
    ("name", "parameters", "outputs"),
    [
        ("mlp", 478_410, 10),
        # By hand: 896 + 9,248 + 18,496 + 36,928 + 73,856 + 147,584 + 524,544 + 2,570.
        ("cnn", 814_122, 10),
        # Four times 789,760 (263,168 of attention, 525,568 behind it, 1,024 of norms), and the head.
        ("transformer", 4 * 789_760 + 2_570, 10),
        ("resnet18", 11_689_512, 1000),
    ],
)
def test_networks_are_of_the_published_sizes(name: str, parameters: int, outputs: int) -> None:
    model, x = networks.build(name, 2)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(x).shape == (2, outputs)
    assert not model.training
    again, same = networks.build(name, 2)
    assert torch.equal(x, same)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


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
    model, x = networks.build("mlp", 6)
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
    measured = importance.run(name, samples=2, repeats=1, memory=False)
    assert {"exact", "loop, one by one", "vmap(grad), chunks"} <= {
        row["name"] for row in measured["forms"]
    }


def test_chunks_of_vmap_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = networks.build("mlp", 5)
    whole = gradients.vmap(model, x)()
    monkeypatch.setattr(gradients, "CHUNK_BYTES", 2 * 4 * 478_410)
    chunks = gradients.vmap(model, x)()
    torch.testing.assert_close(chunks, whole)


def test_calls_may_be_repeated() -> None:
    """Nothing adds up from call to call."""
    model, x = networks.build("mlp", 3)
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
    if not importance.RESET_PEAK.exists():
        return
    many = importance.peak("mlp", 64, "cpu", "vmap(grad), chunks")
    one = importance.peak("mlp", 64, "cpu", "forward + backward")
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
    result = importance.run("mlp", samples=2, repeats=1, memory=False)
    assert result["skipped"]["BackPACK BatchGrad"] == "ImportError: no such package"
    assert len(result["skipped"]["vmap(grad), chunks"]) <= 160
    assert "BackPACK BatchGrad: left out, ImportError" in importance.table(result)


def test_this_librarys_own_form_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "exact", _raises(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        importance.run("mlp", samples=2, repeats=1, memory=False)


def test_a_wrong_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "exact", FORMS["batch approximation"])
    with pytest.raises(AssertionError, match="exact: got importance that is 0"):
        importance.run("mlp", samples=4, repeats=1, memory=False)


def test_table_has_a_line_for_every_form(result: Mapping[str, Any]) -> None:
    lines = importance.table(result).splitlines()
    assert "478,410 parameters, input 6 x 784" in lines[0]
    for row in result["forms"]:
        milliseconds = f"{1e3 * row['seconds']['median']:.2f} ("
        assert any(line.startswith(row["name"]) and milliseconds in line for line in lines)
    kept = f"keeps {100 * result['batch']['kept']:.0f} % of the importance"
    assert any(kept in line for line in lines)


@pytest.mark.parametrize(
    ("argument", "value"), [("model", "lenet"), ("device", "tpu"), ("samples", 0), ("repeats", 0)]
)
def test_bad_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        importance.run(**{argument: value})  # type: ignore[arg-type]


# -- the clock -------------------------------------------------------------------------------------


def test_median_and_its_interval_are_order_statistics() -> None:
    assert timing.median([3.0, 1.0, 2.0]) == {"median": 2, "low": 1, "high": 3}
    # Ranks 10 and 22 of 31: (31 - 1.96 sqrt(31)) / 2 = 10.04.
    shuffled = [float(7 * i % 31) for i in range(31)]
    assert timing.median(shuffled) == {"median": 15, "low": 9, "high": 21}


def test_calls_take_turns() -> None:
    """Every call in every repeat, after what comes before, and neither first every time."""
    log: list[str] = []
    taken = timing.in_turns(
        [lambda: log.append("a"), lambda: log.append("b")], 20, "cpu", lambda: log.append("."), 0.0
    )
    assert [len(samples) for samples in taken] == [20, 20]
    assert log[:6] == ["a"] * 3 + ["b"] * 3
    rounds = "".join(log[6:])
    assert {rounds[i : i + 4] for i in range(0, 80, 4)} == {".a.b", ".b.a"}


def test_slow_calls_are_tried_once_and_a_limit_ends_the_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[int] = []
    clock = iter(range(100))
    monkeypatch.setattr(timing, "seconds", lambda call, number, device: log.append(number) or 1.5)
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))
    taken = timing.in_turns([lambda: None], 9, "cpu", lambda: None, 0.02, limit=2.0)
    # The clock is read at the begin, 0, and before the fourth repeat, 1, the fifth, 2, and the sixth, 3.
    assert taken == [[1.5] * 5]
    assert log == [1] * 6
