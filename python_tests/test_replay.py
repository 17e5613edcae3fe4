"""Replay: how often each sample is kept, against the definition; structures, resuming, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from interrupts import all_or_nothing
from torch import Tensor

from mas_ext import Replay


def numbers(first: int, last: int) -> Tensor:
    return torch.arange(first, last)


def kept(replay: Replay) -> list[int]:
    found: list[int] = replay.draw(10**6).tolist()
    return sorted(found)


def test_all_samples_are_kept_until_it_is_full() -> None:
    replay = Replay(7)
    for part in (numbers(0, 3), numbers(3, 7)):
        replay.add(part)
    assert len(replay) == 7
    assert kept(replay) == [*range(7)]


@pytest.mark.parametrize("size", [1, 4, 30])
def test_every_sample_is_as_likely_to_be_kept(size: int) -> None:
    """10 of 30 in 900 trials: each 300 times, with a standard deviation of 14."""
    found: Counter[int] = Counter()
    for seed in range(900):
        replay = Replay(10, seed=seed)
        for part in numbers(0, 30).split(size):
            replay.add(part)
        assert len(replay) == len(set(kept(replay))) == 10
        found.update(kept(replay))
    assert len(found) == 30
    assert max(abs(count - 300) for count in found.values()) < 5 * 14
    # The first ten are the memory's first: 3000 times, with a standard deviation of 37.
    assert abs(sum(found[i] for i in range(10)) - 3000) < 4 * 37


def test_classes_have_equal_shares_and_each_is_a_uniform_sample() -> None:
    """80, 20, 4 and 36 samples of four classes, the first of which comes back: 24 places are 7, 7, 4 and 6."""
    found: Counter[int] = Counter()
    counts = [(0, 40), (1, 20), (2, 4), (3, 36), (0, 40)]
    label = torch.cat([torch.full((count,), k) for k, count in counts])
    for seed in range(500):
        replay = Replay(24, labels=lambda batch: label[batch], seed=seed)
        for part in numbers(0, 140).split(5):
            replay.add(part)
        shares = Counter(label[kept(replay)].tolist())
        assert shares[2] == 4, "all of a class that has few"
        assert sorted(shares.values()) == [4, 6, 7, 7]
        found.update(kept(replay))
    for k in range(4):
        each = torch.tensor([found[i] for i in range(140) if label[i] == k], dtype=torch.float64)
        share = each.mean() / 500
        deviation = (500 * share * (1 - share)).sqrt()
        assert (each - each.mean()).abs().max() <= 5 * deviation
        half = len(each) // 2
        assert (each[:half].mean() - each.mean()).abs() <= 4 * deviation / half**0.5


class Pair(NamedTuple):
    x: Tensor
    name: list[str]


BATCHES: dict[str, Any] = {
    "tensor": torch.arange(12.0).view(4, 3),
    "tuple": (torch.arange(12.0).view(4, 3), torch.arange(4)),
    "dict": {"ids": torch.arange(8).view(4, 2), "more": {"mask": torch.arange(4) % 2}},
    "with a list": (torch.arange(4), ["a", "b", "c", "d"], "same"),
    "named": Pair(torch.arange(4), ["a", "b", "c", "d"]),
}


def rows(batch: Any) -> list[str]:
    """What belongs to each of four samples, in words."""
    if isinstance(batch, Tensor):
        return [str(t.tolist()) for t in batch]
    if isinstance(batch, str):
        return [batch] * 4
    if isinstance(batch, list):
        return batch
    parts = batch.values() if isinstance(batch, dict) else batch
    return [" ".join(each) for each in zip(*map(rows, parts), strict=True)]


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_comes_back_in_its_structure(name: str) -> None:
    batch, replay = BATCHES[name], Replay(4)
    replay.add(batch)
    found = replay.draw(4)
    assert type(found) is type(batch)
    assert sorted(rows(found)) == sorted(rows(batch))


def test_what_is_kept_and_drawn_is_a_copy() -> None:
    x, replay = torch.zeros(3, 2), Replay(3)
    replay.add(x)
    x += 1
    replay.draw(3).add_(2)
    assert not replay.draw(3).any()


def test_draws_are_without_replacement_and_leave_the_random_state() -> None:
    replay, before = Replay(20), torch.get_rng_state()
    replay.add(numbers(0, 20))
    draws = [replay.draw(5).tolist() for _ in range(200)]
    assert all(len(set(each)) == 5 for each in draws)
    assert {i for each in draws for i in each} == {*range(20)}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_resumed_memory_goes_on_to_the_same_bits(balanced: bool, tmp_path: Any) -> None:
    labels = (lambda batch: batch % 3) if balanced else None
    replay = Replay(10, labels)
    replay.add(numbers(0, 50))
    torch.save(replay.state_dict(), tmp_path / "memory")
    again = Replay(10, labels, seed=5)
    again.load_state_dict(torch.load(tmp_path / "memory", weights_only=True))
    for each in (replay, again):
        each.add(numbers(50, 90))
    assert replay.draw(4).tolist() == again.draw(4).tolist()
    assert kept(replay) == kept(again)


CALLS: dict[str, Callable[[Replay], Any]] = {
    "add": lambda replay: replay.add(numbers(50, 56)),
    "draw": lambda replay: replay.draw(3),
    "load": lambda replay: replay.load_state_dict(Replay(10).state_dict()),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interruption_at_any_line_leaves_all_or_nothing(name: str) -> None:
    def make() -> Replay:
        replay = Replay(10, lambda batch: batch % 3)
        replay.add(numbers(0, 50))
        return replay

    assert all_or_nothing(make, CALLS[name], Replay.state_dict) > 3


def test_what_can_not_be_is_refused_and_changes_nothing() -> None:
    for value in (0, 2.5, True, "x"):
        with pytest.raises(ValueError, match=f"samples: got {value!r}, expected a whole number"):
            Replay(value)  # type: ignore[arg-type]
    replay = Replay(3, labels=lambda batch: batch[1])
    with pytest.raises(ValueError, match="draw: got an empty memory"):
        replay.draw(1)
    good = (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    replay.add(good)
    before = replay.state_dict()
    for bad, message in (
        ((torch.zeros(4, 2), torch.zeros(4)), r"labels: got torch.float32 of shape \(4,\)"),
        ((torch.zeros(4, 2), torch.zeros(3).long()), "samples"),
        ("text", "got a batch of str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            replay.add(bad)
    after = replay.state_dict()
    assert (before["seen"], before["classes"]) == (after["seen"], after["classes"])
    for count in (0, -1):
        with pytest.raises(
            ValueError, match=f"count: got {count}, expected a whole number from 1 up"
        ):
            replay.draw(count)
    other = Replay(8)
    other.add(torch.zeros(4, 2))
    other.add(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="expected all of one shape and dtype"):
        other.draw(8)
    with pytest.raises(ValueError, match="state: got 8 samples, expected at most 3"):
        replay.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state: got 3 of 4 samples, a full memory, expected 4"):
        Replay(4).load_state_dict(after)
    with pytest.raises(ValueError, match=r"state: got \['kept'\], expected"):
        replay.load_state_dict({"kept": []})
