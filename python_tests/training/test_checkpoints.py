"""A checkpoint that says what no run saved, with a checksum that fits, is refused by name, or right."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from times import TIMES
from torch import Tensor

from mas_ext.failures import Diverged
from mas_ext.state import files as checkpoint
from mas_ext.training.checkpoints import load_optimizer, refuse_unlike

STRANGE: list[Any] = [
    *(None, True, -1, 2, 1.5, float("nan"), 10**400, 2**63, "x", "", [], [1], {}, {"a": 1}),
    *({"tensor": "/nothing"}, {"dict": []}, {"dict": [["a", 1]]}, {"list": [1]}, {"tuple": []}),
]
OTHERS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[None],
    lambda t: t.reshape(-1)[:1],
    lambda t: torch.zeros(0),
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.half(),
]


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON, the whole included."""
    yield place
    keys = node if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0)
    for key in keys:
        yield from places(node[key], (*place, key))


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "sgd", "schedule": "cosine"}, {"validation": 0.2, "patience": 2}],
)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:state. got one from a penalty with:RuntimeWarning")
def test_anything_anywhere_in_a_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    """Never an error of another kind, after which nobody knows what to do with the run."""
    path = tmp_path / "run"
    tiny.interrupt("mas", path, **settings)
    whole, draw = checkpoint.load(path), random.Random(0)
    tree = json.loads(bytes(whole["tree"].tolist()))
    known, refused = [*places(tree)], 0
    for _ in range(60 * TIMES):
        if draw.random() < 0.7:
            text = json.dumps(put(tree, draw.choice(known), draw.choice(STRANGE))).encode()
            spoiled = {**whole, "tree": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        else:
            name = draw.choice(sorted(whole.keys() - {"tree"}))
            spoiled = {**whole, name: draw.choice(OTHERS)(whole[name])}
        checkpoint.save(spoiled, path)
        with suppress(Diverged):  # parameters may be anything
            refused += is_refused(path, settings)
    assert refused > 30 * TIMES


@pytest.mark.parametrize("own", [1, 0.5])
def test_an_integer_beyond_64_bits_is_refused(own: float) -> None:
    refuse_unlike("lr", 2**63 - 1, own)
    for number in (2**63, -(2**63), 10**400):
        with pytest.raises(ValueError, match=f"checkpoint, lr: got {str(number)[:100]}"):
            refuse_unlike("lr", number, own)


@pytest.mark.parametrize("step", [-1.0, float("nan")])
def test_a_step_of_an_optimizer_that_is_none_is_refused(step: float) -> None:
    theta = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([theta])
    theta.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    load_optimizer(optimizer, state)
    state["state"][0]["step"] = torch.tensor(step)
    with pytest.raises(ValueError, match="checkpoint, optimizer, step: got"):
        load_optimizer(optimizer, state)


def is_refused(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a run can't go on from the checkpoint, which the error names."""
    try:
        tiny.trainer("mas", checkpoint=path, **settings).fit(tiny.scenario())
    except Diverged:
        raise
    except ValueError as error:
        return str(path) in str(error) or pytest.fail(f"not named: {error}")
    return False
