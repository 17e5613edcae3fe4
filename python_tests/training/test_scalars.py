"""What a writer of scalars is given by a Trainer of one's own, from its start or from where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

import mas_ext
from mas_ext.training.run import Epoch

pytestmark = pytest.mark.usefixtures("one_thread")

Seen = list[tuple[str, float, int]]


class Writer:
    """Keeps what it is given; of the protocol, and nothing more."""

    def __init__(self) -> None:
        self.seen: Seen = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))

    def close(self) -> None:
        raise AssertionError("whoever made it closes it")


def expected(told: list[Any], epochs: list[int]) -> Seen:
    """By hand, from what callbacks were given."""
    found: Seen = []
    task = 0
    for news in told:
        if isinstance(news, Epoch):
            step = sum(epochs[: news.task]) + news.epoch
            found += [("loss", news.loss, step), ("validation", news.validation, step)]  # type: ignore[list-item]
        else:
            row = news.accuracy[task].tolist()
            mean, step = sum(row[: task + 1]) / (task + 1), sum(epochs[: task + 1])
            found.append(("accuracy/average", mean, step))
            found += [(f"accuracy/task {k}", a, step) for k, a in enumerate(row) if a == a]
            task += 1
    return found


@pytest.mark.parametrize("setting", ["task", "domain"])
@pytest.mark.parametrize("epochs", [3, [1, 2]])
def test_scalars_of_a_trainer(setting: str, epochs: Any) -> None:
    writer, told = Writer(), []  # type: ignore[var-annotated]
    callbacks = [lambda news: told.append(news), mas_ext.ScalarCallback(writer, epochs)]
    tiny.trainer("mas", setting, epochs=epochs, validation=0.25, callbacks=callbacks).fit(
        tiny.scenario(setting)
    )
    each = [3, 3] if epochs == 3 else epochs
    # The Result goes on being filled: the rows of the tasks so far stay.
    right = expected(told, each)
    assert [(name, step) for name, _, step in writer.seen] == [
        (name, step) for name, _, step in right
    ]
    assert [v for _, v, _ in writer.seen] == pytest.approx([v for _, v, _ in right], rel=1e-12)


def test_what_goes_on_has_the_steps_that_are_left(tmp_path: Path) -> None:
    whole, rest = Writer(), Writer()
    tiny.trainer("mas", callbacks=[mas_ext.ScalarCallback(whole, 3)]).fit(tiny.scenario())
    tiny.interrupt("mas", tmp_path / "run")
    callbacks = [mas_ext.ScalarCallback(rest, 3)]
    tiny.trainer("mas", checkpoint=tmp_path / "run", callbacks=callbacks).fit(tiny.scenario())
    steps = [step for _, _, step in rest.seen]
    assert steps == sorted(steps)
    assert set(steps) == {5, 6}
    assert rest.seen == whole.seen[-len(rest.seen) :]
