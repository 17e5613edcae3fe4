"""The table of memory: the bytes that it is computed from are those of a penalty's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy_lora
from torch import nn

from benchmarks import large_models
from benchmarks.large_models import RANK, SETTINGS, SHAPES, Shape
from mas_ext import FusedMASPenalty

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Shape(hidden=256, inner=640, blocks=2, keys=64, vocabulary=500)
FULL = "all trained, float32, or bfloat16 without `anchor_dtype`"
NARROW = "all trained, bfloat16, `anchor_dtype=torch.bfloat16`"
CODES = "the same, `omega_dtype=torch.uint8`"


def all_trained(dtype: torch.dtype) -> FusedMASPenalty:
    sizes: list[tuple[int, ...]] = [*SMALL.linear, *[(SMALL.vocabulary, SMALL.hidden)] * 2]
    sizes += [(SMALL.hidden,)] * (2 * SMALL.blocks + 1)
    model = nn.ParameterList([nn.Parameter(torch.randn(s, dtype=dtype)) for s in sizes])
    options: dict[str, Any] = {} if dtype == torch.float32 else {"anchor_dtype": dtype}
    return FusedMASPenalty(model, **options)


def in_codes(make: Callable[[], FusedMASPenalty]) -> FusedMASPenalty:
    made = make()
    kept = {"omega_dtype": torch.uint8, "anchor_dtype": made._state.rule.anchor_dtype}
    return FusedMASPenalty(made.model, **kept)  # type: ignore[arg-type]


def adapted() -> FusedMASPenalty:
    layers = [toy_lora.LoRA(inputs, outputs, bias=False) for outputs, inputs in SMALL.linear]
    for layer in layers:
        layer.add("default", rank=RANK)
    return FusedMASPenalty(nn.ModuleList(layers))


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        (FULL, lambda: all_trained(torch.float32)),
        (NARROW, lambda: all_trained(torch.bfloat16)),
        (CODES, lambda: in_codes(lambda: all_trained(torch.bfloat16))),
        ("LoRA", adapted),
        ("LoRA, `omega_dtype=torch.uint8`", lambda: in_codes(adapted)),
    ],
)
def test_bytes_are_those_of_the_state(setting: str, make: Callable[[], FusedMASPenalty]) -> None:
    penalty = make()
    shapes: dict[str, Any] = {n: p.shape for n, p in penalty.model.named_parameters()}
    if setting.startswith("LoRA"):
        shapes = {f"{i}.weight": sizes for i, sizes in enumerate(SMALL.linear)}
    penalty.consolidate(importance={n: torch.ones(s) for n, s in shapes.items()})
    memory = penalty._state.memory
    held = [t for g in memory.groups for t in (g.state.omega, g.state.anchor)]
    for w in memory.updates.values():
        held += [w.omega, w.sample, *(t for a in w.anchor.values() for t in (a.left, a.right))]
    computed = SETTINGS[setting](SMALL)
    assert computed <= sum(t.nbytes for t in held) < 1.02 * computed


def test_shapes_are_those_of_the_models() -> None:
    millions = [round(shape.parameters / 1e6) for shape in SHAPES.values()]
    assert millions == [1236, 6738, 68977]
    assert SHAPES["7 B"].adapted == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert SHAPES["7 B"].factors == 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_the_page_is_as_computed() -> None:
    text = large_models.PAGE.read_text()
    assert f"<!-- large models -->\n{large_models.page()}\n<!-- /large models -->" in text
