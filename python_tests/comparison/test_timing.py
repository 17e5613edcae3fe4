"""The clock of what is compared."""

from __future__ import annotations

import pytest

from mas_ext.comparison import timing


def test_median_and_its_interval_are_order_statistics() -> None:
    assert timing.median([3.0, 1.0, 2.0]) == {"median": 2, "low": 1, "high": 3}
    # Ranks 10 and 22 of 31: (31 - 1.96 sqrt(31)) / 2 = 10.04.
    shuffled = [float(7 * i % 31) for i in range(31)]
    assert timing.median(shuffled) == {"median": 15, "low": 9, "high": 21}


def test_ratios_are_paired() -> None:
    assert timing.paired([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2, "low": 1, "high": 3}


def test_words() -> None:
    value = {"median": 0.0015, "low": 0.001, "high": 0.00249}
    assert timing.spread(value, 2, 1e3) == "1.50 (1.00 to 2.49)"


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


def test_samples_last_and_slow_calls_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int] = []

    def seconds(call: object, number: int, device: str) -> float:
        log.append(number)
        return 0.004 if call == 0 else 1.5

    monkeypatch.setattr(timing, "seconds", seconds)
    taken = timing.in_turns([0, 1], 2, "cpu")  # type: ignore[list-item]
    assert taken == [[0.004] * 2, [1.5] * 2]
    assert log[:4] == [1] * 4
    assert sorted(log[4:]) == [1, 1, 5, 5]


def test_seconds_are_those_of_one_call() -> None:
    calls: list[None] = []
    assert 0 < timing.seconds(lambda: calls.append(None), 1000, "cpu") < 1e-3
    assert len(calls) == 1000


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats: got 0, expected a whole number from 1 up"):
        timing.in_turns([], 0, "cpu")
