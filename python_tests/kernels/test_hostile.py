"""Calls of the compiled kernels with what is no tensor, or another one: an error each time, or a right call.

Under the sanitizers (`make tests`) a byte that is read or written outside would end the process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from backends import EMULATED
from times import TIMES
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mas_ext.kernels.dtypes import DTYPES, OMEGA_DTYPES, compute_dtype
from mas_ext.kernels.flat_state import State

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


class Loud(Tensor):
    """A subclass that would change what is asked of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("code of the caller ran while tensors were read")


def resized(t: Tensor, bytes: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(max(0, bytes))
    return t


def pointed_elsewhere(t: Tensor) -> Tensor:
    t = nn.Parameter(t.clone()) if t.is_floating_point() else t.clone()
    t.data = torch.zeros(1, dtype=t.dtype)
    return t


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(t)


def functional(t: Tensor) -> Tensor:
    return torch._to_functional_tensor(t)


def shape_only(t: Tensor) -> Tensor:
    return t.new_empty([]).expand(t.shape) if t.dim() else t


# What may take the place of a tensor. Some of these are as good as the tensor itself.
OTHERS: list[Callable[[Tensor], Any]] = [
    lambda t: None,
    lambda t: 7,
    lambda t: "tensor",
    lambda t: [t],
    lambda t: t.numpy(),
    lambda t: resized(t, 0),
    lambda t: resized(t, t.nbytes - 1),
    lambda t: resized(t, t.nbytes // 2),
    pointed_elsewhere,
    fake,
    functional,
    shape_only,
    lambda t: t.to("meta"),
    lambda t: t.double() if t.dtype == torch.float32 else t.float(),
    lambda t: t.half(),
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.cfloat(),
    lambda t: t.to_sparse(),
    lambda t: t.to_mkldnn() if t.dtype == torch.float32 and t.dim() else t.to("meta"),
    lambda t: torch.nested.nested_tensor([t]) if t.dim() else None,
    lambda t: torch._efficientzerotensor(t.shape),
    lambda t: torch._neg_view(t) if t.is_floating_point() else None,
    lambda t: t.flatten()[:-1],
    lambda t: t[None],
    lambda t: torch.cat([t.flatten(), t.flatten()]),
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.as_subclass(Loud),
    lambda t: t.requires_grad_() if t.is_floating_point() else t,
    lambda t: t + 100,
    lambda t: t.new_empty([]).expand(2**62),
    lambda t: t.new_empty([]).expand(2**31, 2**31),
    lambda t: t.new_empty([]).expand(2**40, 2**40),
    lambda t: t.new_empty([]).expand(2**63 - 1),
    lambda t: t.new_empty(2**40, 0),
    lambda t: t.new_empty(0, *t.shape),
    lambda t: t[..., :0] if t.dim() else t,
    lambda t: t.clone().uniform_(-1e38, 1e38) if t.is_floating_point() else t,
    lambda t: t * float("nan") if t.is_floating_point() else t,
    lambda t: t.flatten()[:1].expand(2**40, *t.shape[1:]) if t.dim() else t,
]
NUMBERS = [-1, 0, 1, 3, 2**31, 2**62, 2**63, -(2**63), 1.5, float("nan"), None, "x"]


class Right:
    """A right call of each entry, without its last argument, for parameters and omega of some dtypes."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        omega_dtype: torch.dtype = torch.float32,
        rows: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.dtype, self.wide, self.omega_dtype = dtype, compute_dtype(dtype), omega_dtype
        self.theta = [torch.randn(s, dtype=dtype) for s in ((5,), (3, 4), ())]
        self.state, self.one = self.state_of(rows), torch.ones((), dtype=torch.float64)
        self.scratch, self.value = torch.empty(3).double(), torch.empty((), dtype=self.wide)
        self.scalar = torch.ones(())

    def like(self, kind: torch.dtype | None = None) -> list[Tensor]:
        return [torch.rand(t.shape).to(kind or self.dtype) for t in self.theta]

    def matrices(self, *sizes: tuple[int, int]) -> list[Tensor]:
        return [torch.randn(size).to(self.dtype) for size in sizes]

    def state_of(self, rows: int) -> State:
        omega = (2 * torch.rand(rows, 64)).to(self.omega_dtype)
        alpha, r = torch.ones(rows).double(), torch.ones(()).double()
        return State([0, 16, 32], omega, torch.rand(rows, 64, dtype=self.wide), alpha, r, True)

    def penalty(self) -> list[Any]:
        return [self.theta, self.like(), 2, self.state, self.one, self.scratch, self.value]

    def proximal(self) -> list[Any]:
        return [self.theta, self.like(), self.state, 0.1, 1.0, 1e-8]

    def sgd(self) -> list[Any]:
        moments, rules = [("momentum_buffer", self.like())], [0.1, 0.9, 0.0, 0.0, 1.0, 0.0, 0.0]
        amp = [self.scalar, self.scalar.clone()]
        return [self.theta, self.like(), moments, self.state, 2 * rules, [1, 2], True, *amp]

    def adamw(self) -> list[Any]:
        moments = [("exp_avg", self.like()), ("exp_avg_sq", self.like())]
        steps, rules = [torch.ones(()) for _ in self.theta], [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0]
        like, amp = self.like(), [self.scalar, self.scalar.clone()]
        return [self.theta, like, moments, steps, self.state, 2 * rules, [2, 1], False, *amp]

    def accumulate(self) -> list[Any]:
        return [self.like(self.wide), self.theta, 0.5]

    def merge(self) -> list[Any]:
        numbers = [1.0, 0.5, 0, 1, 0, self.scratch, self.scratch.clone()]
        return [self.state_of(1), self.theta, self.like(self.wide), *numbers]

    def low_rank(self) -> list[Any]:
        sizes: Any = [((5, 2), (50, 3)), ((2, 7), (3, 4))]
        weights = [(2 * torch.rand(size)).to(self.omega_dtype) for size in ((5, 7), (50, 4))]
        anchor = [self.matrices((50, 1)), self.matrices((1, 4)), [0, 1], [0.5]]
        return [
            *(self.matrices(*each) for each in 2 * sizes),
            *(2, weights, [1.0, 2.0], [1, 1], [1.0, 0.5], *anchor),
            *(self.one, self.scratch, self.value),
        ]

    def per_sample(self) -> list[Any]:
        grad, x = torch.rand(4, 5, 2).to(self.dtype), torch.rand(4, 6, 3).to(self.dtype)
        table = torch.arange(-1, 9, dtype=torch.int32).view(2, 5) % 6
        omega, partial = torch.rand(1, 2, 2, 3).to(self.wide), torch.zeros(24, dtype=self.wide)
        return [omega, grad, x, table, (0, -1), partial, 2, False]


ENTRIES = ["accumulate", "adamw", "low_rank", "merge", "penalty", "per_sample", "proximal", "sgd"]


def test_every_entry_is_attacked() -> None:
    entries = {name for name in dir(EMULATED.cpu) if not name.startswith("_")}
    assert entries == set(ENTRIES)


# Of parameters, of omega, and the number of rows.
FORMS = [
    (dtype, omega, rows)
    for dtype in DTYPES
    for omega in OMEGA_DTYPES
    for rows in (1, 2)
    if omega != torch.float64 or dtype == torch.float64
]


def changed(value: Any, draw: random.Random) -> Any:
    """A value with something in it that is another one, or of another length."""
    if isinstance(value, Tensor):
        return draw.choice(OTHERS)(value)
    if isinstance(value, State):
        i = draw.randrange(5)
        return State(*value[:i], changed(value[i], draw), *value[i + 1 :])
    if isinstance(value, (list, tuple)):
        if draw.random() < 0.2:
            return draw.choice([[], [*value, value[0]], value[:-1], None, 3, iter(value)])
        places = [i for i, each in enumerate(value) if not isinstance(each, str)]
        i = draw.choice(places)
        return type(value)([*value[:i], changed(value[i], draw), *value[i + 1 :]])
    return draw.choice(NUMBERS)


def is_converted(value: Any) -> bool:
    """Whether it is no tensor, list of tensors or state: numbers, and what is named."""
    if isinstance(value, list):
        return not all(isinstance(item, Tensor) for item in value)
    return not isinstance(value, (Tensor, State))


def attack(entry: str, extension: str, count: int, seed: int) -> tuple[int, int]:
    """How many of so many calls were refused, and how many ran."""
    draw, refused, ran = random.Random(seed), 0, 0
    run = getattr(getattr(EMULATED, extension), entry)
    # A stream is an address, which nothing can check.
    where = [1, 1, 1, 2, 0, -1, 100_000] if extension == "cpu" else [0]
    for _ in range(count):
        arguments = getattr(Right(*draw.choice(FORMS)), entry)()
        places = draw.sample(range(len(arguments)), draw.choice([1, 1, 2]))
        # What pybind11 converts is wrong alone: its error shows all arguments, but can't show a freed tensor.
        converted = [i for i in places if is_converted(arguments[i])]
        for i in converted[:1] or places:
            with suppress(RuntimeError, TypeError, IndexError, AttributeError):  # no such tensor
                arguments[i] = changed(arguments[i], draw)
        try:
            run(*arguments, draw.choice(where))
            ran += 1
        except (ValueError, TypeError, RuntimeError, OverflowError, EMULATED.OtherStrides):
            refused += 1
    return refused, ran


@pytest.mark.parametrize("extension", ["cpu", "cuda"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_hostile_calls_end_in_an_error(entry: str, extension: str) -> None:
    refused, ran = attack(entry, extension, 400 * TIMES, seed=1)
    assert refused > 100
    assert ran > 10  # what stands for a tensor may be one


@pytest.mark.parametrize("entry", ["chunks", "layout_key"])
def test_hostile_lists_of_which_only_the_layout_is_read(entry: str) -> None:
    draw, run = random.Random(1), getattr(EMULATED, entry)
    for _ in range(400 * TIMES):
        tensors: Any = Right(*draw.choice(FORMS)).theta
        with suppress(RuntimeError, TypeError, IndexError, AttributeError):  # no such tensor
            tensors = changed(tensors, draw)
        with suppress(ValueError, TypeError):
            run(tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_right_call_runs(form: Any) -> None:
    for entry in ENTRIES:
        for extension in ("cpu", "cuda"):
            getattr(getattr(EMULATED, extension), entry)(*getattr(Right(*form), entry)(), 1)
