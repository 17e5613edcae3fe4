"""The library on a GPU: every optimizer's steps, graphs, streams, no waiting; importance, training and files.

What tests of the kernels compare there is in their own files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import memory
import numpy as np
import pytest
import test_pages
import torch
from importance import test_exact
from optim.test_fused import CASES, fused
from optim.test_mixed_precision import plain_path, scaled_path
from oracles import naive_training
from oracles.product import SETTINGS, Array, Held, array, held, train
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import networks
from mas_ext import FusedMASPenalty, estimate_importance, methods, optim

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("one_thread")]

each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def torchs(name: str) -> Callable[[Any], Any]:
    return lambda p: SETTINGS[name].optimizer(p, **SETTINGS[name].options)


def ours(name: str) -> Callable[[Any], Any]:
    return lambda p: fused(SETTINGS[name], p)


# Each with its settings' name. torch's fused optimizers take a learning rate on the CPU as a number alone.
OPTIMIZERS = {f"torch {name}": (name, torchs(name)) for name in SETTINGS} | {
    f"ours {name}": (name, ours(name)) for name in CASES
}
each_optimizer = pytest.mark.parametrize(("name", "make"), OPTIMIZERS.values(), ids=[*OPTIMIZERS])


# -- steps -----------------------------------------------------------------------------------------


@each_optimizer
@each_mode
def test_each_step_is_the_formula(name: str, make: Any, mode: Any) -> None:
    case = held(device="cuda")
    expected = plain_path(case, SETTINGS[name], mode, ())
    optimizer = make(case.model.parameters())
    case.penalty.attach(optimizer, mode)
    np.testing.assert_allclose(train(case, [optimizer], case.loss, 7), expected, **CLOSE)


@each_optimizer
@each_mode
@pytest.mark.parametrize("overflows", [(1, 4, 5), (0, 1, 3)])
def test_a_skipped_step_applies_nothing_and_scaled_gradients_change_nothing(
    name: str, make: Any, mode: Any, overflows: Collection[int]
) -> None:
    if name == "sgd_fused" and 0 in overflows:  # torch leaves its momentum uninitialised then
        overflows = (1, 3)
    case = held(device="cuda")
    expected = plain_path(case, SETTINGS[name], mode, overflows)
    optimizer = make(case.model.parameters())
    case.penalty.attach(optimizer, mode)
    np.testing.assert_allclose(scaled_path(case, optimizer, overflows), expected, **CLOSE)


def in_loss(case: Held, optimizer: Any) -> None:
    optimizer.zero_grad()
    (case.loss() + case.penalty()).backward()
    optimizer.step()


def after_backward(case: Held, optimizer: Any) -> None:
    optimizer.zero_grad()
    case.loss().backward()
    case.penalty.add_grad_()
    optimizer.step()


def alone(case: Held, optimizer: Any) -> None:
    optimizer.zero_grad()
    case.loss().backward()
    optimizer.step()


# Form: the step, the optimizer, and the mode in which the penalty is attached.
FORMS: dict[str, tuple[Callable[[Held, Any], None], str, Callable[[Any], Any], str | None]] = {
    "penalty()": (in_loss, "sgd_momentum", torchs("sgd_momentum"), None),
    "add_grad_": (after_backward, "sgd_momentum", torchs("sgd_momentum"), None),
    "attach": (alone, "sgd_momentum", torchs("sgd_momentum"), "gradient"),
    "attach, proximal": (alone, "sgd_momentum", torchs("sgd_momentum"), "proximal"),
    "optim.SGD": (alone, "sgd_momentum", ours("sgd_momentum"), "gradient"),
    "optim.SGD, proximal": (alone, "sgd_momentum", ours("sgd_momentum"), "proximal"),
    "optim.Adam": (alone, "adam_decay", ours("adam_decay"), "gradient"),
    "optim.AdamW": (alone, "adamw", ours("adamw"), "gradient"),
    "optim.AdamW, proximal": (alone, "adamw", ours("adamw"), "proximal"),
}
each_form = pytest.mark.parametrize("form", FORMS)


def prepared(form: str) -> tuple[Held, Callable[[], None], Callable[[int], Array]]:
    """The model, its step, and the parameters after each of so many steps by the formula."""
    step, name, make, mode = FORMS[form]
    case = held(device="cuda")
    expected = plain_path(case, SETTINGS[name], mode or "gradient", ())
    optimizer = make(case.model.parameters())
    if mode is not None:
        case.penalty.attach(optimizer, mode)  # type: ignore[arg-type]
    return case, lambda: step(case, optimizer), lambda steps: expected[:steps]


@contextmanager
def another_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@each_form
def test_no_step_waits_for_the_gpu(form: str) -> None:
    case, step, expected = prepared(form)
    step()  # plans and states are made once
    with memory.waiting_is_an_error():
        for _ in range(6):
            step()
    np.testing.assert_allclose(array(case.model.theta()), expected(7)[-1], **CLOSE)


@each_form
def test_steps_on_another_stream(form: str) -> None:
    case, step, expected = prepared(form)
    with another_stream():
        for _ in range(7):
            torch.cuda._sleep(1_000_000)  # whatever ran on the default stream would come too early
            step()
        got = array(case.model.theta())
    np.testing.assert_allclose(got, expected(7)[-1], **CLOSE)


@each_form
def test_a_graph_of_a_step_replays_it(form: str) -> None:
    case, step, expected = prepared(form)
    with another_stream():
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        graph.replay()
    np.testing.assert_allclose(array(case.model.theta()), expected(7)[-1], **CLOSE)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_graph_follows_lam(mode: Any) -> None:
    case = held(device="cuda")
    optimizer = SGD(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer, mode)
    alone(case, optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        alone(case, optimizer)
    case.penalty.lam = 5.0
    start = array(case.model.theta())
    graph.replay()
    got = array(case.model.theta())
    slope, weight = case.slope(start), 2 * 5.0 * case.omega
    if mode == "gradient":
        expected = start - 0.1 * (slope + (weight * (start - case.anchor)).sum(0))
    else:
        free = start - 0.1 * slope
        expected = (free + 0.1 * (weight * case.anchor).sum(0)) / (1 + 0.1 * weight.sum(0))
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_the_penalty_inside_compiled_code(whole: bool) -> None:
    torch._dynamo.reset()
    case = held(device="cuda")
    compiled = torch.compile(lambda: case.loss() + case.penalty(), fullgraph=whole)
    theta = array(case.model.theta())
    expected = case.slope(theta) + (2 * case.penalty.lam * case.omega * (theta - case.anchor)).sum(
        0
    )
    compiled().backward()
    got = np.concatenate([array(p.grad).ravel() for p in case.model.parameters()])
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_the_page_on_gpus() -> None:
    names = test_pages.run("docs/how-to/gpu.md")
    assert names["device"] == "cuda"
    assert names["penalty"].lam == 0.5
    assert all(p.isfinite().all() for p in names["model"].parameters())


# -- importance ------------------------------------------------------------------------------------

# torch's own kernel takes the root of a norm in float32.
COARSE = {"weight norm": 1e-6}


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Which convolutions have by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(batch: Any) -> Any:
    return {k: on_gpu(x) for k, x in batch.items()} if isinstance(batch, dict) else batch.cuda()


@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", test_exact.CASES)
def test_every_model_gets_its_definition(name: str, dtype: torch.dtype) -> None:
    case, (model, batches) = test_exact.CASES[name], test_exact.prepared(name, dtype)
    with test_exact.fallback_warnings() as messages:
        omega = test_exact.run(case, model.cuda(), [on_gpu(batch) for batch in batches])
    assert {t.device.type for t in omega.values()} == {"cuda"}
    expected, _ = test_exact.expected(name)
    tolerance = max(test_exact.TOLERANCE[dtype], COARSE.get(name, 0.0))
    test_exact.assert_close({n: t.cpu() for n, t in omega.items()}, expected, tolerance, case.noise)
    test_exact.assert_goes_its_way(case, list(omega), messages)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 10),
    )


@pytest.mark.filterwarnings("error:importance of .* takes the fallback:UserWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_rounding_of_tensor_cores_is_no_reason_for_the_fallback(
    dtype: torch.dtype, tolerance: float
) -> None:
    """With TF32, as convolutions have by default, and in 16 bits: coarse, but the same importance."""
    model, x = convolutional().to(dtype), torch.randn(24, 3, 16, 16).to(dtype)
    expected, _ = test_exact.loop(convolutional_like(model), [x.double()], objective="l2")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        omega = estimate_importance(model.cuda(), [x.cuda()])
    finally:
        torch.set_float32_matmul_precision(before)
    test_exact.assert_close({n: t.cpu() for n, t in omega.items()}, expected, tolerance)


@pytest.mark.filterwarnings("error:importance of .* takes the fallback:UserWarning")
def test_nor_is_it_in_a_deep_network() -> None:
    """Whose errors of TF32 add up: ResNet-18."""
    model, x = networks.build(networks.IMPORTANCE["resnet18"], 6)
    expected, _ = test_exact.loop(copy.deepcopy(model).double(), [x.double()], objective="l2")
    omega = estimate_importance(model.cuda(), [x.cuda()])
    test_exact.assert_close({n: t.cpu() for n, t in omega.items()}, expected, 2e-2)


def convolutional_like(model: nn.Module) -> nn.Module:
    copied = convolutional().double()
    copied.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    return copied


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)[0][:, -1]
        return y


def test_recurrent_layers_without_their_dropout() -> None:
    """cuDNN has no backward pass of them in eval mode."""
    model, x = Recurrent().double(), torch.randn(6, 5, 3, dtype=torch.float64)
    expected, _ = test_exact.loop(model, [x], objective="l2")
    model.train().cuda()
    omega = estimate_importance(model, [x.cuda()])
    test_exact.assert_close({n: t.cpu() for n, t in omega.items()}, expected, 1e-9)
    assert model.layers.training
    assert model.layers.dropout == 0.5


def test_observing_and_consolidating() -> None:
    """As on the CPU, where the numbers are compared with loops."""
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    kept = []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        penalty = FusedMASPenalty(model.to(device), omega_dtype=torch.float64)
        for task in range(2):
            for batch in batches:
                penalty.observe((batch + task).to(device))
            penalty.consolidate()
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1
        kept.append(penalty)
    cpu, gpu = kept
    np.testing.assert_allclose(gpu().item(), cpu().item(), rtol=1e-10)
    for left, right in ((cpu.omega, gpu.omega), (cpu.anchor, gpu.anchor)):
        for name, t in left.items():
            np.testing.assert_allclose(array(right[name]), array(t), rtol=1e-10)


# -- training and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", methods.SETTINGS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_learns_what_it_learns_on_the_cpu(name: str, setting: str) -> None:
    # Each device draws labels of its own.
    options = {"labels": "true"} if name == "imm-mode" else {}
    found = []
    for device in ("cpu", "cuda"):
        method = methods.create(name, **options)
        learning = naive_training.start(method, setting, device=device)
        for _ in naive_training.steps(learning):
            pass
        found.append({n: t.cpu() for n, t in naive_training.weights(learning.model).items()})
    naive_training.assert_close(found[1], found[0])


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam, optim.AdamW, SGD])
def test_a_penalty_goes_to_a_file_and_to_the_cpu(optimizer: Any, tmp_path: Path) -> None:
    case, other = held(device="cuda"), held(seed=4)
    case.penalty.attach(optimizer(case.model.parameters(), lr=0.1))
    case.penalty.save(tmp_path / "penalty")
    other.model.load_state_dict(case.model.state_dict())
    loaded = FusedMASPenalty.load(tmp_path / "penalty", other.model)
    assert loaded.omega["a"].device.type == "cpu"
    np.testing.assert_allclose(loaded().item(), case.penalty().item(), rtol=1e-12)
    back = other.model.cuda()
    loaded.to("cuda")
    value: Tensor = loaded()
    value.backward()
    assert back.a.grad is not None
    np.testing.assert_allclose(value.item(), case.penalty().item(), rtol=1e-12)
