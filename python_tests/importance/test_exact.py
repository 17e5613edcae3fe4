"""Exact importance of models that tempt an estimator to be fast and wrong, against a loop in float64."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo_derived  # noqa: F401  its cases join the zoo's
import zoo_paths  # noqa: F401
from definition import Omega, assert_close, cast, loop, waves
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ANY, BASIC, CASES, Case, Wired

from benchmarks.memory import peak
from mas_ext import estimate_importance
from mas_ext.importance import ImportanceSum
from mas_ext.importance.exact.precision import PRECISION_OF, differ, lowest_precision

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch says so once a process.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    """The model and its batches, the same on every call. (Scripted modules can't be copied.)"""
    case = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = case.make()
        batches = [case.inputs(size) for size in case.sizes]
    return model.to(dtype), [cast(batch, dtype) for batch in batches]


@functools.cache
def expected(name: str, objective: Any = waves) -> tuple[Omega, Omega]:
    return loop(*prepared(name, torch.float64), CASES[name].forward, objective)


TORCH_SAYS = ("padding='same' with even kernel", "projections is not supported with oneDNN")


@contextmanager
def fallback_warnings() -> Iterator[list[str]]:
    """The warnings that something takes the fallback; there may be no others."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        if any(text in str(warning.message) for text in TORCH_SAYS):
            continue
        assert issubclass(warning.category, UserWarning), warning
        assert "takes the fallback" in str(warning.message), warning
        messages.append(str(warning.message))


def named(message: str, names: Sequence[str]) -> set[str]:
    """Which of the names a message has, as whole words."""
    return {n for n in names if re.search(rf"(?<![\w.]){re.escape(n)}(?!\w|\.\w)", message)}


def run(
    case: Case,
    model: nn.Module,
    batches: Sequence[Any],
    objective: Any = waves,
    backend: Any = "auto",
) -> Omega:
    """Importance, by ImportanceSum."""
    total = ImportanceSum(
        objective=objective, forward=case.forward, backend=backend, max_outputs=200
    )
    for batch in batches:
        total.add(model, batch)
    return total.mean()


def test_what_tf32_may_change() -> None:
    """Gradients in another batch by as much as float16 does; nothing else more than float32 does."""
    coarse, fine = (
        lowest_precision([torch.float32, torch.int64], on_gpu) for on_gpu in (True, False)
    )
    x = torch.ones(5)
    assert differ(1.01 * x, x, fine)
    assert not differ(1.01 * x, x, coarse)
    assert differ(1.1 * x, x, coarse)
    assert (coarse.order, coarse.eps, coarse.reach) == (fine.order, fine.eps, fine.reach)
    for dtype in (torch.float16, torch.float64):
        on_either = [lowest_precision([torch.float64, dtype], on_gpu) for on_gpu in (True, False)]
        assert on_either == 2 * [PRECISION_OF[dtype]]


# -- the zoo ---------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@pytest.mark.parametrize(
    ("dtype", "backend", "name"),
    [
        *itertools.product((torch.float64, torch.float32), ["native"], CASES),
        *itertools.product([torch.float32], ["reference"], BASIC),  # it differs in sums alone
    ],
)
def test_every_model_gets_its_definition(dtype: torch.dtype, backend: Any, name: str) -> None:
    case, (model, batches) = CASES[name], prepared(name, dtype)
    with fallback_warnings() as messages:
        omega = run(case, model, batches, backend=backend)
    assert {t.dtype for t in omega.values()} == {dtype}
    assert_close(omega, expected(name)[0], TOLERANCE[dtype], case.noise)
    assert_goes_its_way(case, list(omega), messages)


def assert_goes_its_way(case: Case, names: list[str], messages: list[str]) -> None:
    """Some parameters may take the fallback, which is said once."""
    assert len(messages) <= 1, "one warning a model"
    assert messages or not case.must
    may = names if tuple(case.may) == ANY else case.may
    assert set(may) <= set(names)
    for message in messages:
        assert named(message, may)
        assert not named(message, [n for n in names if n not in may]), message


@pytest.mark.parametrize("name", [n for n in CASES if n != "embedding, one id a sample"])
def test_the_batch_approximation_would_be_found_out(name: str) -> None:
    """Samples cancel in every parameter of every model: no test above passes by it.

    Samples with the same single id are equal, and don't cancel.
    """
    exact, approximate = expected(name)
    for parameter, right in exact.items():
        if right.any() and parameter not in CASES[name].noise:
            assert float((approximate[parameter] - right).norm()) > 0.005 * float(right.norm())


OFTEN_USED = [
    "mlp",
    "conv2d, groups",
    "residual, in-place relu",
    "gpt2",
    "vit",
    "transformer by hand, sequence first, 5 positions",
    "rows by position, 5 positions",
    "autoencoder, W and its transpose",
    "one layer, different numbers of positions",
    "LSTM",
    "routed",
]


@pytest.mark.parametrize("objective", ["l2", "l1", "vector"])
@pytest.mark.parametrize("name", [*OFTEN_USED, "routed by a product with a matrix"])
def test_every_objective(name: str, objective: Any) -> None:
    case, (model, batches) = CASES[name], prepared(name, torch.float64)
    with fallback_warnings() as messages:
        omega = run(case, model, batches, objective)
    assert_close(omega, expected(name, objective)[0], 1e-10, case.noise)
    assert bool(messages) <= bool(case.may)


@pytest.mark.parametrize("sizes", [(1, 5, 3), (1, 1), (2, 7), (3, 0, 4), (8,)])
@pytest.mark.parametrize("name", [n for n in OFTEN_USED if "position" not in CASES[n].may])
def test_every_order_of_batch_sizes(name: str, sizes: Sequence[int]) -> None:
    """A first batch of one tells nothing about how samples lie in larger ones."""
    case, model = CASES[name], prepared(name, torch.float64)[0]
    batches = [cast(case.inputs(size), torch.float64) for size in sizes]
    with fallback_warnings():
        omega = run(case, model, batches)
    assert_close(
        omega, loop(model, [b for b in batches if len(b)], case.forward)[0], 1e-10, case.noise
    )


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "residual, in-place relu",
        "gpt2",
        "LSTM",
        "gate",
        "routed by a product with a matrix",
        "product, matmul per head",
    ],
)
def test_autocast(name: str) -> None:
    """bfloat16 has 8 bits: the importance is right to some percent, and no sample is lost."""
    case, (model, batches) = CASES[name], prepared(name)
    with fallback_warnings(), torch.autocast("cpu", torch.bfloat16):
        omega = run(case, model, batches, "l2")
    assert {t.dtype for t in omega.values()} == {torch.float32}
    assert_close(omega, expected(name, "l2")[0], 0.05, case.noise)


def test_autocast_of_inputs_of_other_16_bits() -> None:
    case, (model, batches) = CASES["conv2d, groups"], prepared("conv2d, groups")
    with torch.autocast("cpu", torch.bfloat16):
        omega = run(case, model, [batch.half() for batch in batches], "l2")
    assert_close(omega, expected("conv2d, groups", "l2")[0], 0.05)


def test_totals_of_a_derived_weight_have_float32s_range() -> None:
    """They may be larger than float16's numbers, of which the gradients are."""
    model = Wired(lambda m, x: x * m.w.exp(), w=torch.zeros(4))
    x = torch.full((64, 4), 100.0)
    omega = estimate_importance(model.half(), [x.half()])["w"]
    assert_close({"w": 64 * omega}, {"w": torch.full((4,), 64 * 2e4)}, 1e-3)


@pytest.mark.parametrize("name", ["mlp", "conv2d, groups", "layer norm, positions", "gpt2"])
def test_bfloat16_models(name: str) -> None:
    case, (model, batches) = CASES[name], prepared(name, torch.bfloat16)
    with fallback_warnings():
        omega = run(case, model, batches, "l2")
    assert {t.dtype for t in omega.values()} == {torch.float32}
    assert_close(omega, expected(name, "l2")[0], 0.05)


@pytest.mark.parametrize(("inner", "outer"), [(1e-3, 0.01), (300.0, 30.0)])
def test_batchnorm_of_a_float16_model_has_float32s_range(inner: float, outer: float) -> None:
    norm, last = nn.BatchNorm2d(8, momentum=1.0), nn.Linear(8 * 36, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), last)
    with torch.no_grad():
        for p in model[0].parameters():
            p *= inner
        last.weight *= outer
        x = torch.randn(6, 3, 8, 8).half()
        model(x.float())  # its running statistics
    model.eval().half()
    omega = estimate_importance(model, [x])
    precise = copy.deepcopy(model).double()
    wanted = {name: torch.zeros_like(p) for name, p in precise.named_parameters()}
    for sample in x.double():
        grads = torch.autograd.grad(precise(sample[None]).square().sum(), [*precise.parameters()])
        for total, g in zip(wanted.values(), grads, strict=True):
            total += g.abs() / len(x)
    for name, expected_omega in wanted.items():
        error = (omega[name] - expected_omega).norm() / expected_omega.norm()
        assert error < 3e-3, (name, error)


def test_public_function_is_the_same() -> None:
    model, batches = prepared("gpt2")
    with fallback_warnings():
        for backend in ("auto", "native", "reference"):
            omega = estimate_importance(model, batches, objective=waves, backend=backend)  # type: ignore[call-arg]
            assert_close(omega, expected("gpt2")[0], 1e-4)


def test_the_warning_comes_once_however_many_passes() -> None:
    """A training run estimates after every task; one warning for its model is enough, at this line."""
    model, batches = prepared("a function with its own backward")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            estimate_importance(model, batches)
    assert [warning.filename for warning in caught] == [__file__]


# -- how samples are told apart, once more ---------------------------------------------------------


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The batch sizes of the model's forward calls."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])))
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "linear, positions",
        "residual, in-place relu",
        "group norm",
        "embedding tied to the output layer",
        "encoder layer, samples first, norm first",
        "encoder layer, sequence first, norm last",
        "recurrent by hand",
    ],
)
def test_a_batch_takes_one_forward_pass(name: str) -> None:
    """No loop hides behind it: some calls to check the first batch, and then one a batch."""
    case, (model, _) = CASES[name], prepared(name)
    total = ImportanceSum(forward=case.forward)
    with counted(model) as sizes:
        total.add(model, case.inputs(64))
    assert sum(sizes) <= 3 * 64 + 16
    assert len(sizes) <= 10
    for samples in (64, 64):
        with counted(model) as sizes:
            total.add(model, case.inputs(samples))
        assert sizes == [samples]


@contextmanager
def backward_passes(model: Any) -> Iterator[list[Tensor]]:
    """The gradients that the model's output gets."""
    gradients: list[Tensor] = []

    def watch(module: nn.Module, x: Any, y: Any) -> None:
        (y if isinstance(y, Tensor) else y["logits"]).register_hook(gradients.append)

    handle = model.register_forward_hook(watch)
    try:
        yield gradients
    finally:
        handle.remove()


ORDINARY = [
    "mlp",
    "conv2d, groups",
    "residual, in-place relu",
    "u-net",
    "embedding tied to the output layer",
    "vit",
    "windows folded into the samples",
    "embedding, padding",
    "encoder layer, sequence first, norm last",
    "attention with padding, a dict for output",
    "positions looked up one by one",
    "index_select by keywords",
    "gpt2",  # as many positions as samples
    "positions by ids repeated",
    "relative bias added, its index kept in a cache",
    "token by expand",
    "adapter, DoRA",
    "adapter, unmerged, b zero",
    "gru, 2 layers, both directions, states given",
    "experts, all_experts, 6 positions",
    "Python reads positions",
    "Python reads equality",
    "checkpointed part",
    "checkpointed, merged inside",
    "checkpointed, token inside",
    "lstm, checkpointed",
    "slope of an energy, without its graph",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_a_batch_takes_one_backward_pass(name: str) -> None:
    """Nothing but the values differs from batch to batch, and for all values there is a proof."""
    case, (model, _) = CASES[name], prepared(name)
    total = ImportanceSum(forward=case.forward, max_outputs=200, objective=waves)
    with backward_passes(model) as passes:
        total.add(model, case.inputs(6))
        passes.clear()
        total.add(model, case.inputs(6))
    assert len(passes) == 1


def test_many_layers_without_data_are_tried_at_once() -> None:
    """Six positions could be rows of the samples that are tried, in each of these layers."""
    model = Wired(
        lambda m, x: x[:, None] + m.layers(m.table(torch.arange(6))),
        table=nn.Embedding(6, 4),
        layers=nn.Sequential(*(nn.Linear(width, width + 1) for width in range(4, 16))),
    )
    with counted(model) as sizes:
        estimate_importance(model, [torch.randn(64, 16)])
    assert len(sizes) <= 10


def test_deep_models_take_one_backward_pass() -> None:
    """Random numbers do not grow beyond all limits on their way."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(40)]
    model, total = nn.Sequential(*layers), ImportanceSum()
    with backward_passes(model) as passes:
        total.add(model, torch.randn(6, 64))
        passes.clear()
        total.add(model, torch.randn(6, 64))
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["routed by a product with a matrix", "in-place into a slice"])
def test_every_batch_is_proven_where_data_may_decide(name: str) -> None:
    """Once as it is, once with a factor for each sample, and once to count."""
    case, (model, _) = CASES[name], prepared(name)
    total = ImportanceSum()
    with backward_passes(model) as passes:
        total.add(model, case.inputs(6))
        passes.clear()
        total.add(model, case.inputs(6))
    assert len(passes) == 3


def test_parameters_in_the_fallback_do_not_take_the_others_along() -> None:
    """A parameter outside the rules costs its own gradients; the layers stay as fast as they were."""
    name = "a function with its own backward"
    case, (model, _) = CASES[name], prepared(name)
    total = ImportanceSum()
    with fallback_warnings() as messages:
        total.add(model, case.inputs(32))
    (message,) = messages
    theta = [name for name, _ in model.named_parameters()]
    assert 0 < len(named(message, theta)) < len(theta)
    with counted(model) as sizes:
        total.add(model, case.inputs(32))
    assert 32 in sizes
    assert sum(sizes) < 32 * 4


def test_max_samples_and_exclude() -> None:
    model, batches = prepared("conv2d, groups", torch.float64)
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(96, 2)).double()
    omega = estimate_importance(model, batches, objective=waves, max_samples=7, exclude=["2.*"])
    right = loop(model, [torch.cat(batches)[:7]])[0]
    assert_close(omega, {name: t for name, t in right.items() if name.startswith("0.")}, 1e-10)


@pytest.mark.parametrize("excluded", ["layer.weight_hh_l0", "layer.bias_ih_l0"])
def test_excluded_weights_of_a_layer_leave_the_others_fast(excluded: str) -> None:
    model, batches = prepared("LSTM", torch.float64)
    with fallback_warnings() as messages:
        omega = estimate_importance(model, batches, objective=waves, exclude=[excluded])
    right = {name: t for name, t in expected("LSTM")[0].items() if name != excluded}
    assert_close(omega, right, 1e-10)
    assert not messages


def test_parameters_may_change_between_batches() -> None:
    """Of w v, with w diagonal, every element of v is in one number; with another w, in all of them."""
    model = Wired(lambda m, x: x * (m.w @ m.v), w=torch.eye(4), v=torch.randn(4)).double()
    batches, total = torch.randn(2, 5, 4, dtype=torch.float64), ImportanceSum(objective=waves)
    right = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        total.add(model, batch)
        for name, t in loop(model, [batch])[0].items():
            right[name] += t / 2
        with torch.no_grad():
            model.w += torch.randn(4, 4)
    assert_close(total.mean(), right, 1e-10)


def test_a_proof_does_not_depend_on_parameters() -> None:
    """What a scale of zero hides in the first batch, another one shows in the second."""
    model = Wired(
        lambda m, x: m.b(torch.tanh(m.a(x)) + m.scale * (m.a(x) - m.a(x).mean(0)).square()),
        a=nn.Linear(4, 4), b=nn.Linear(4, 3), scale=torch.zeros(4),
    )  # fmt: skip
    total, x = ImportanceSum(), torch.randn(5, 4)
    with fallback_warnings():
        total.add(model, x)
    with torch.no_grad():
        model.scale += 1
    with pytest.raises(ValueError, match="samples interact"), fallback_warnings():
        total.add(model, x)


@settings(max_examples=80)
@given(data=st.data())
def test_convolutions_of_every_geometry(data: st.DataObject) -> None:
    draw = data.draw
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel, stride, padding, dilation, size = (
        tuple(draw(st.integers(low, high)) for _ in range(dimensions))
        for low, high in ((1, 3), (1, 3), (0, 2), (1, 2), (1, 5))
    )
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if transposed:
        shapes = [(s - 1) * t - 2 * p + d * (k - 1) + 1 for s, t, p, d, k in zip(
            size, stride, padding, dilation, kernel, strict=True)]  # fmt: skip
        padding = tuple(p if shape >= 1 else 0 for p, shape in zip(padding, shapes, strict=True))
        extra = tuple(
            draw(st.integers(0, max(t, d) - 1)) for t, d in zip(stride, dilation, strict=True)
        )
        options["output_padding"] = extra
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        size = tuple(max(s, r - 2 * p) for s, r, p in zip(size, reach, padding, strict=True))
        if all(t == 1 for t in stride) and draw(st.booleans()):
            padding = "same"  # type: ignore[assignment]
    kinds: Any = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    model = kinds[transposed][dimensions - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        padding=padding,
        bias=draw(st.booleans()),
        **options,
    ).double()
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=3).filter(any))
    batches = [torch.randn(n, model.in_channels, *size, dtype=torch.float64) for n in sizes]
    with fallback_warnings() as messages:
        omega = estimate_importance(model, batches, objective=waves)
        right = loop(model, [b for b in batches if len(b)])[0]
    assert_close(omega, right, 1e-10)
    assert not messages


@settings(max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=3).filter(any),
    shape=st.lists(st.sampled_from([1, 2, 5]), max_size=2),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    major=st.booleans(),
)
def test_linear_layers_of_every_shape(
    sizes: list[int], shape: list[int], inputs: int, outputs: int, major: bool
) -> None:
    """Samples in dimension 0 or 1, with as many positions, inputs or outputs as samples."""
    layer = nn.Linear(inputs, outputs)

    def wiring(m: Any, x: Tensor) -> Tensor:
        h = x.transpose(0, 1) if major and x.dim() > 2 else x
        y: Tensor = torch.tanh(m.a(h))
        return y.transpose(0, 1) if major and x.dim() > 2 else y

    model = Wired(wiring, a=layer).double()
    batches = [torch.randn(n, *shape, inputs, dtype=torch.float64) for n in sizes]
    with fallback_warnings():
        omega = estimate_importance(model, batches, objective=waves)
    assert_close(omega, loop(model, [b for b in batches if len(b)])[0], 1e-10)


# -- samples that interact -------------------------------------------------------------------------


class TrainingNorm(nn.BatchNorm1d):
    """Normalises over the batch whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class ForcedTraining(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.train()
        return super().forward(x)


def attend_over_the_batch(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b((h @ h.T).softmax(-1) @ h)


def late(m: Any, x: Tensor) -> Tensor:
    """Only large batches mix."""
    h = m.a(x)
    return m.b(h - h.mean(0) if len(x) > 4 else h)


def ab() -> dict[str, Any]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)}


INTERACTING: dict[str, Callable[[], nn.Module]] = {
    "batch statistics": lambda: nn.Sequential(nn.Linear(4, 4), TrainingNorm(4), nn.Linear(4, 3)),
    "train() inside": lambda: nn.Sequential(nn.Linear(4, 4), ForcedTraining(4), nn.Linear(4, 3)),
    "no running statistics": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ),
    "attention": lambda: Wired(attend_over_the_batch, **ab()),
    "attention in sequence-first layout": lambda: Wired(
        lambda m, x: m.c(x[None], x[None], x[None])[0][0],
        c=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "softmax": lambda: Wired(lambda m, x: m.b(m.a(x).softmax(0)), **ab()),
    "mean": lambda: Wired(lambda m, x: m.b(m.a(x) - m.a(x).mean(0)), **ab()),
    "largest": lambda: Wired(lambda m, x: m.b(m.a(x) / m.a(x).abs().amax()), **ab()),
    "neighbour": lambda: Wired(lambda m, x: m.b(m.a(x).roll(1, 0)), **ab()),
    "mirror": lambda: Wired(lambda m, x: m.b(torch.tanh(m.a(x)).flip(0)), **ab()),
    "running sum": lambda: Wired(lambda m, x: m.b(m.a(x).cumsum(0)), **ab()),
    "batch size": lambda: Wired(lambda m, x: m.b(m.a(x)) * len(x), **ab()),
    # `b` sees samples of their own; `a` mixes.
    "some parameters only": lambda: Wired(
        lambda m, x: torch.cat([m.b(x), m.a(x) - m.a(x).mean(0)], 1), **ab()
    ),
}


def kept(total: ImportanceSum) -> tuple[Omega, int, float]:
    return {name: t.clone() for name, t in total.sums.items()}, total.samples, total.objective_sum


@pytest.mark.parametrize("name", INTERACTING)
def test_samples_that_interact_are_refused(name: str) -> None:
    model, total = INTERACTING[name](), ImportanceSum()
    statistics = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"samples|over the batch"):
        total.add(model, torch.randn(6, 4))
    assert kept(total) == ({}, 0, 0.0)
    torch.testing.assert_close(model.state_dict(), statistics, rtol=0, atol=0)


def test_samples_that_interact_in_a_later_batch_are_refused() -> None:
    model, total = Wired(late, **ab()), ImportanceSum()
    total.add(model, torch.randn(3, 4))
    sums, samples, objective = kept(total)
    with pytest.raises(ValueError, match="samples"):
        total.add(model, torch.randn(8, 4))
    assert (total.samples, total.objective_sum) == (samples, objective)
    assert all(torch.equal(total.sums[key], t) for key, t in sums.items())


def test_a_last_sample_that_sees_the_first_is_no_silent_error() -> None:
    """Refused, or as the definition has it: each sample alone."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if len(x) > 1:
            h = torch.cat([h[:-1], h[-1:] + h[:1]])
        return m.b(torch.tanh(h))

    model = Wired(wiring, **ab()).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    try:
        with fallback_warnings():
            omega = estimate_importance(model, [x], objective=waves)
    except ValueError as error:
        assert "samples" in str(error)  # noqa: PT017
    else:
        assert_close(omega, loop(model, [x])[0], 1e-10)


@pytest.mark.parametrize("name", ["instance norm 2d", "instance norm, statistics", "batch norm 2d"])
def test_norms_within_samples_are_not_refused(name: str) -> None:
    model, batches = prepared(name)
    estimate_importance(model, batches)


def test_one_sample_at_a_time_needs_no_refusal() -> None:
    """Where every batch is of one sample, nothing can interact with it."""
    model = Wired(lambda m, x: m.b(m.a(x) - 0.5 * m.a(x).mean(0)), **ab()).double()
    batches = [torch.randn(1, 4, dtype=torch.float64) for _ in range(3)]
    with fallback_warnings():
        omega = estimate_importance(model, batches, objective=waves)
    assert_close(omega, loop(model, batches)[0], 1e-10)


# -- what is left alone ----------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an estimate may not change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {(n, h): len(getattr(m, h, ())) for n, m in modules.items() for h in hooks},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "gradients": {name: id(p.grad) for name, p in model.named_parameters()},
        "required": {name: p.requires_grad for name, p in model.named_parameters()},
        "tensor hooks": {name: p._backward_hooks for name, p in model.named_parameters()},
        "versions": {name: p._version for name, p in model.named_parameters()},
        "values": {
            key: t.tolist() for key, t in model.state_dict().items() if isinstance(t, Tensor)
        },
        "random": torch.get_rng_state().tolist(),
        "function modes": torch._C._len_torch_function_stack(),
        "gradient mode": torch.is_grad_enabled(),
        "functions": (F.linear, F.conv2d, F.layer_norm, torch.addmm, Tensor.__matmul__),
    }


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "residual, in-place relu",
        "vit",
        "gpt2",
        "LSTM",
        "weight norm",
        "checkpointed part",
        "embedding, sparse",
        "a frozen layer",
        "hooks that change inputs and outputs",
    ],
)
def test_the_model_is_left_as_it_was(name: str, failing: bool) -> None:
    case, (model, batches) = CASES[name], prepared(name)
    model.train()
    list(model.modules())[-1].eval()
    some = next(p for p in model.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    before = state(model)

    armed = []

    def objective(y: Tensor) -> Tensor:
        if armed:
            raise KeyboardInterrupt
        return y.flatten(1).square().sum(1)

    total = ImportanceSum(objective=objective, forward=case.forward)
    with fallback_warnings():
        total.add(model, batches[0])
        sums = kept(total)
        if failing:
            armed.append(True)
            with pytest.raises(KeyboardInterrupt):
                total.add(model, batches[1])
            assert kept(total)[1:] == sums[1:]
            assert all(torch.equal(total.sums[key], t) for key, t in sums[0].items())
        else:
            total.add(model, batches[1])
    assert state(model) == before
    assert float(some.grad.sum()) == some.numel()


class Fails(torch.autograd.Function):
    """Does nothing, until its backward pass is armed."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fails.armed:
            raise RuntimeError("in the middle")
        return grad


def test_an_error_in_a_backward_pass_leaves_the_sums_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last layer has been counted when it happens, the first one has not."""
    model, x = Wired(lambda m, x: m.b(Fails.apply(torch.tanh(m.a(x)))), **ab()), torch.randn(4, 4)
    total, before = ImportanceSum(), state(model)
    total.add(model, x)
    sums, samples, objective = kept(total)
    monkeypatch.setattr(Fails, "armed", True)
    with pytest.raises(RuntimeError, match="in the middle"):
        total.add(model, x)
    assert (total.samples, total.objective_sum) == (samples, objective)
    assert all(torch.equal(total.sums[key], t) for key, t in sums.items())
    assert state(model) == before


def test_a_refused_model_is_left_as_it_was() -> None:
    for make in INTERACTING.values():
        model, x = make().train(), torch.randn(6, 4)
        before = state(model)
        with pytest.raises(ValueError, match=r"samples|over the batch"):
            estimate_importance(model, [x])
        assert state(model) == before


def test_training_goes_on_as_without_an_estimate() -> None:
    """Gradients of the model afterwards are those of before: nothing stays between it and autograd."""
    model, (x, *_) = prepared("residual, in-place relu")

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    model.eval()
    before = gradients()
    estimate_importance(model, [x])
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_the_same_bits_on_every_run() -> None:
    first, second = (estimate_importance(*prepared("residual, in-place relu")) for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("name", ["mlp", "conv2d, groups", "gpt2", "embedding, padding"])
def test_several_threads(name: str) -> None:
    """Work is split by elements and by samples: nothing is counted twice, or not at all."""
    case, (model, _) = CASES[name], prepared(name, torch.float64)
    batch = cast(case.inputs(64), torch.float64)
    right = loop(model, [batch], case.forward)[0]
    torch.set_num_threads(3)
    with fallback_warnings():
        assert_close(run(case, model, [batch]), right, 1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_refused_whatever_the_check_of_samples_makes_of_them(bad: float) -> None:
    """NaN differs from NaN: no reason to say that samples interact."""
    model, (x, *_) = prepared("residual, in-place relu")
    x[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        estimate_importance(model, [x])


# -- memory ----------------------------------------------------------------------------------------


def ordinary(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x).square().sum(), [*model.parameters()])


@pytest.mark.parametrize(
    ("method", "objective", "tensors"), [("exact", "l2", 2), ("batch", "vector", 1)]
)
def test_tensors_a_parameter_in_a_first_batch(method: Any, objective: Any, tensors: int) -> None:
    """The sums, and for a check those of a few samples: never all gradients of a pass beside them."""
    model = nn.Sequential(*[nn.Linear(100, 100) for _ in range(24)], nn.Linear(100, 2))
    x = torch.randn(4, 100)
    size = sum(p.nbytes for p in model.parameters())
    assert size < peak(lambda: ordinary(model, x)) < 1.2 * size
    own = peak(lambda: ImportanceSum(method, objective).add(model, x))
    assert tensors * size < own < (tensors + 0.5) * size


def test_a_check_of_samples_finds_the_batch_gone() -> None:
    """What a pass of the batch remembered is freed before a few samples run alone."""
    model, x = nn.Sequential(*[nn.Linear(200, 200) for _ in range(24)]), torch.randn(5, 400, 200)
    assert peak(lambda: ImportanceSum().add(model, x)) < 1.35 * peak(lambda: ordinary(model, x))


def test_activations_take_the_memory_of_an_ordinary_pass() -> None:
    layers = (nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(8))
    model, x = nn.Sequential(*layers).eval(), torch.randn(16, 4, 256)
    own = peak(lambda: ImportanceSum().add(model, x))
    assert own < 1.3 * peak(lambda: ordinary(model, x))
