"""A penalty whose state comes to the parameters block by block, against the sum of tasks in NumPy's float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory import largest_allocation, waiting_is_an_error
from oracles import naive
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.penalty import add_grad_
from mas_ext.state import offloading

LAM = 0.7
ALPHA = np.full(2, LAM)
# Elements of a block: many for a parameter, many parameters for one, all in one.
BLOCKS = (64, 448, 1 << 22)


class Parameters(nn.Module):
    """Sizes on both sides of a block's, one empty, one scalar, one that is not in the order of its indices."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.long = nn.Parameter(torch.randn(5, 61, dtype=dtype))
        self.empty = nn.Parameter(torch.randn(0, 3, dtype=dtype))
        self.one = nn.Parameter(torch.randn((), dtype=dtype))
        image = torch.randn(4, 3, 5, 2, dtype=dtype)
        self.image = nn.Parameter(image.to(memory_format=torch.channels_last))
        self.last = nn.Parameter(torch.randn(64, dtype=dtype))


def flat(tensors: Any) -> naive.Array:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors]).numpy()


class Case:
    """Parameters after two tasks, and what is remembered of them."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", **more: Any
    ) -> None:
        torch.manual_seed(1)
        self.model = Parameters(dtype).to(device)
        arguments = {"anchor": "own", "omega_dtype": torch.float64, "state_device": "cpu", **more}
        self.penalty = FusedMASPenalty(self.model, LAM, **arguments)
        omega, anchor = [], []
        for _ in range(2):
            wide = torch.promote_types(dtype, torch.float32)
            importance = {
                name: torch.rand_like(p, dtype=wide) for name, p in self.model.named_parameters()
            }
            omega.append(flat(importance.values()))
            anchor.append(self.theta())
            self.penalty.consolidate(importance=importance)
            with torch.no_grad():
                for p in self.model.parameters():
                    p += torch.randn_like(p)
        self.omega, self.anchor = np.stack(omega), np.stack(anchor)

    def theta(self) -> naive.Array:
        return flat(self.model.parameters())

    def value(self) -> float:
        return naive.penalty(self.theta(), self.omega, self.anchor, ALPHA)

    def gradient(self) -> naive.Array:
        return naive.gradient(self.theta(), self.omega, self.anchor, ALPHA)

    def grad(self) -> naive.Array:
        return flat(p.grad for p in self.model.parameters())


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(offloading, "BLOCK", request.param)
    return int(request.param)


STORES = ["merged", "per_task"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, backend: str, store: str
) -> None:
    case = Case(dtype, backend=backend, store=store)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    value = case.penalty()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    value_near = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(value.item(), case.value(), rtol=value_near)
    (3 * value).backward()
    np.testing.assert_allclose(case.grad(), 3 * case.gradient(), **near)

    case.model.zero_grad()
    np.testing.assert_allclose(case.penalty.add_grad_().item(), case.value(), rtol=value_near)
    np.testing.assert_allclose(case.grad(), case.gradient(), **near)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_proximal_step_is_that_of_the_formula(store: str, adaptive: bool) -> None:
    case = Case(store=store)
    parameters = list(case.model.parameters())
    # In another memory order than their parameters.
    v = [torch.rand(p.shape, dtype=p.dtype) for p in parameters]
    eta = 0.3 / (np.sqrt(flat(v) * 2) + 0.1) if adaptive else np.full(case.theta().shape, 0.3)
    expected = naive.proximal(case.theta(), case.omega, case.anchor, ALPHA, eta)
    moments = {id(p): m for p, m in zip(parameters, v, strict=True)} if adaptive else None
    case.penalty.proximal_(parameters, 0.3, moments, 2.0, 0.1)
    np.testing.assert_allclose(case.theta(), expected, rtol=1e-12)


@pytest.mark.usefixtures("block")
def test_only_the_chosen_parameters_are_touched() -> None:
    case = Case()
    before, expected = case.theta(), case.gradient()
    optimizer = torch.optim.SGD([case.model.long, case.model.last], lr=0.1)
    case.penalty.attach(optimizer)
    optimizer.zero_grad()
    for p in (case.model.long, case.model.last):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    chosen = np.r_[0:305, len(before) - 64 : len(before)]
    after = before.copy()
    after[chosen] -= 0.1 * expected[chosen]
    np.testing.assert_allclose(case.theta(), after, rtol=1e-12)


@pytest.mark.usefixtures("block")
def test_a_gradient_may_lie_in_another_order_than_its_parameter() -> None:
    case = Case()
    for p in case.model.parameters():
        p.grad = torch.ones(p.shape, dtype=p.dtype)
    assert case.model.image.grad is not None
    assert case.model.image.grad.stride() != case.model.image.stride()
    case.penalty.add_grad_()
    np.testing.assert_allclose(case.grad(), 1 + case.gradient(), rtol=1e-12)


def test_a_frozen_parameter_counts_and_gets_no_gradient() -> None:
    case = Case()
    case.model.long.requires_grad_(False)
    value = case.penalty.add_grad_()
    np.testing.assert_allclose(value.item(), case.value(), rtol=1e-12)
    assert case.model.long.grad is None
    value = case.penalty()
    value.backward()
    np.testing.assert_allclose(value.item(), case.value(), rtol=1e-12)
    assert case.model.long.grad is None


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("omega_dtype", [torch.bfloat16, torch.uint8])
def test_a_rounded_omega_is_streamed_as_it_is(omega_dtype: torch.dtype) -> None:
    case = Case(torch.float32, omega_dtype=omega_dtype)
    omega, anchor = flat(case.penalty.omega.values()), flat(case.penalty.anchor.values())
    assert np.abs(omega - case.omega.sum(0)).max() > 1e-3
    case.penalty.add_grad_()
    expected = naive.gradient(case.theta(), omega[None], anchor[None], ALPHA[:1])
    np.testing.assert_allclose(case.grad(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_empty_parameters() -> None:
    model = nn.ParameterList([torch.zeros(0)])
    penalty = FusedMASPenalty(model, anchor="own", state_device="cpu")
    penalty.consolidate(importance={"0": torch.zeros(0)})
    assert penalty().item() == 0
    assert penalty.add_grad_().item() == 0


def test_no_kernel_sees_more_than_a_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    seen: list[int] = []
    elements: list[int] = []

    def watched(theta: list[Tensor], grad: list[Tensor], state: State) -> Tensor:
        seen.append(state.omega.shape[1])
        elements.append(sum(t.numel() for t in theta))
        return add_grad_(theta, grad, state)

    monkeypatch.setattr("mas_ext.penalty.add_grad_", watched)
    case.penalty.add_grad_()
    assert max(seen) <= block
    assert sum(elements) == len(case.theta())
    # The state spans 320 + 64 + 128 + 64 elements: every parameter begins at a multiple of 64.
    assert len(seen) == -(-576 // block)


def test_memory_is_that_of_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "BLOCK", 256)
    model = nn.Linear(300, 200)
    penalty = FusedMASPenalty(model, state_device="cpu")
    penalty.consolidate([torch.randn(2, 300)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(2, 300)).sum().backward()
    assert largest_allocation(penalty.add_grad_) <= 4 * 256
    assert largest_allocation(lambda: penalty.proximal_(list(model.parameters()), 0.1)) <= 4 * 256
    penalty.attach(optimizer)
    assert largest_allocation(optimizer.step) <= 4 * 256


@pytest.mark.parametrize("saved", [None, "cpu"])
@pytest.mark.parametrize("loaded", [None, "cpu"])
def test_files_do_not_say_where_the_state_was(tmp_path: Path, saved: Any, loaded: Any) -> None:
    case = Case(state_device=saved)
    case.penalty.save(tmp_path / "penalty")
    penalty = FusedMASPenalty.load(tmp_path / "penalty", case.model, state_device=loaded)
    np.testing.assert_allclose(penalty().item(), case.value(), rtol=1e-12)
    other = copy.deepcopy(penalty)
    np.testing.assert_allclose(other().item(), case.value(), rtol=1e-12)


# torch's compiler warns of itself when a graph that broke is resumed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_may_call_it() -> None:
    case = Case()

    def loss() -> Tensor:
        return 2 * case.penalty()

    compiled = torch.compile(loss, backend="eager")
    np.testing.assert_allclose(compiled().item(), 2 * case.value(), rtol=1e-12)


def test_double_backward_is_refused() -> None:
    case = Case()
    with pytest.raises(NotImplementedError, match="can't be differentiated again"):
        torch.autograd.grad(case.penalty(), [case.model.long], create_graph=True)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="state_device: got 'cuda', expected one of None, 'cpu'"):
        FusedMASPenalty(nn.Linear(2, 2), state_device="cuda")  # type: ignore[arg-type]


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("store", STORES)
def test_from_pinned_memory_to_a_gpu(store: str) -> None:
    case = Case(torch.float32, "cuda", store=store, omega_dtype=torch.float32)
    (group,) = case.penalty._state.memory.groups
    assert group.state.omega.is_pinned()
    assert group.state.anchor.is_pinned()
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)
    case.penalty.add_grad_()  # whatever is made once is there
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for p in case.model.parameters():
                p.grad = torch.zeros_like(p)
            with waiting_is_an_error():
                value = case.penalty.add_grad_()
            np.testing.assert_allclose(value.item(), case.value(), rtol=1e-5)
            np.testing.assert_allclose(case.grad(), case.gradient(), rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_a_gpu_holds_the_buffers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "BLOCK", 1 << 16)
    model = nn.Linear(2048, 2048, device="cuda")
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    penalty = FusedMASPenalty(model, anchor="own", state_device="cpu")
    before = torch.cuda.memory_allocated()
    penalty.consolidate(importance=importance)
    assert torch.cuda.memory_allocated() - before < 1 << 16
    model(torch.ones(1, 2048, device="cuda")).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    penalty.add_grad_()
    assert torch.cuda.max_memory_allocated() - before < 5 * 4 * (1 << 16)
