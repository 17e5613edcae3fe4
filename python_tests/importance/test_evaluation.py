"""A model is after its importance was measured as it was before, and every pass starts from there."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from mas_ext import FusedMASPenalty, estimate_fisher, estimate_importance
from mas_ext.importance import ImportanceSum

pytestmark = pytest.mark.filterwarnings("ignore:importance of .* takes the fallback")

Omega = dict[str, Tensor]


def loop(model: nn.Module, x: Tensor) -> Omega:
    """Mean over samples of |gradient|, every sample from the model as it is."""
    omega = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(x)):
        alone = copy.deepcopy(model)
        for module in alone.modules():
            module.training = False
        theta = dict(alone.named_parameters())
        y = alone(x[k : k + 1]).pow(2).sum()
        grads = torch.autograd.grad(y, [*theta.values()], allow_unused=True)
        for name, g in zip(theta, grads, strict=True):
            omega[name] += 0 if g is None else g.abs() / len(x)
    return {name: t.detach() for name, t in omega.items()}


def assert_right(got: Omega, expected: Omega) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-9, atol=1e-12)
        assert t.sum() > 0


def everything(value: Any, path: str = "model") -> Iterator[tuple[str, Any]]:
    """All that hangs on a model: identities of objects and values of tensors, by where they are."""
    yield path, id(value) if not isinstance(value, (tuple, set)) else len(value)
    if isinstance(value, Tensor):
        yield f"{path} data", value.detach().numpy().tobytes()
        yield f"{path} memory", (value.data_ptr(), value.shape, value.stride(), value.dtype)
        yield f"{path} requires_grad", value.requires_grad
        yield f"{path} hooks", [*(value._backward_hooks or {}).values()]
        if value.is_leaf and value.grad is not None:
            yield from everything(value.grad, f"{path}.grad")
        if vars(value):
            yield from everything(vars(value), path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from everything(item, f"{path}[{key!r}]")
        yield f"{path} keys", [*value]
    elif isinstance(value, (list, tuple, deque)):
        for i, item in enumerate(value):
            yield from everything(item, f"{path}[{i}]")
    elif isinstance(value, (nn.Module, SimpleNamespace)):
        yield from everything(vars(value), path)


class AsBefore:
    """with AsBefore(model): the model, and all random states, are afterwards as before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _now(self) -> list[Any]:
        drawn = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
        return [*everything(self._model), *drawn]

    def __enter__(self) -> None:
        self._before = self._now()

    def __exit__(self, *error: object) -> None:
        for now, before in zip(self._now(), self._before, strict=True):
            assert now == before


class Moving(nn.Module):
    """Two linear maps; between them, `move` does something to the model, of which y may depend."""

    def __init__(self, move: Callable[[Any, Tensor], Tensor | None], **kept: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.linspace(-1, 1, 5))
        self.register_buffer("steps", torch.tensor(2))
        self.register_buffer("large", torch.linspace(-1, 1, 400 * 400).view(400, 400))
        self.register_buffer("undefined", torch.tensor([float("nan"), -0.0, float("inf")]))
        self.kept, self.count = None, 0
        self.items, self.table, self.last = [], {}, deque([torch.ones(5)], maxlen=2)  # type: ignore[var-annotated]
        self.state = SimpleNamespace(h=torch.ones(5), layers=[], deep=SimpleNamespace(h=None))
        self.__dict__.update(kept)
        self.double()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        scale = self.move(self, y)
        output: Tensor = self.second(y if scale is None else y * scale)
        return output


def replaced(m: Any, y: Tensor) -> Tensor:
    before, m.mean = m.mean, 0.9 * m.mean + 0.1 * y.detach().mean(0)
    return before


def in_place(m: Any, y: Tensor) -> Tensor:
    before = m.mean.clone()
    m.mean.mul_(0.5).add_(y.detach().mean(0))
    return before


def counted(m: Any, y: Tensor) -> Tensor:
    """Used after it moved, and kept for the backward pass."""
    m.mean += 1
    return m.mean


def through_data(m: Any, y: Tensor) -> Tensor:
    before = m.mean.clone()
    m.mean.data.copy_(y.detach().mean(0))
    return before


def large(m: Any, y: Tensor) -> Tensor:
    before = m.large[7, :5].clone()
    m.large[7] += 1
    return before


def large_through_data(m: Any, y: Tensor) -> Tensor:
    before = m.large[7, :5].clone()
    m.large.data[7] = 5.0
    return before


def large_replaced(m: Any, y: Tensor) -> Tensor:
    m.large = m.large * 0.9
    return m.large[7, :5]


def number(m: Any, y: Tensor) -> Tensor:
    m.steps += 1
    return 0.9 ** m.steps.double()


def python_number(m: Any, y: Tensor) -> Tensor:
    m.count += 1
    return y.new_tensor(0.9**m.count)


def first_only(m: Any, y: Tensor) -> Tensor:
    """A hidden state that the first pass begins."""
    if m.kept is None:
        m.kept = torch.full_like(m.mean, 0.5)
    before, m.kept = m.kept, m.kept + y.detach().mean(0)
    return before


def with_a_graph(m: Any, y: Tensor) -> Tensor:
    """A hidden state that is not detached."""
    before = 1.0 if m.kept is None else m.kept
    m.kept = y.mean(0)
    return y.new_ones(5) * before


def listed(m: Any, y: Tensor) -> Tensor:
    m.items.append(y.detach().mean(0))
    return y.new_tensor(float(len(m.items)))


def in_a_dictionary(m: Any, y: Tensor) -> Tensor:
    m.table["seen"] = m.table.get("seen", 1.0) + y.detach().mean(0)
    return m.table["seen"] if len(m.items) else y.new_ones(5)


def in_a_deque(m: Any, y: Tensor) -> Tensor:
    before = m.last[-1].double()
    m.last.append(y.detach().mean(0))
    return before


def in_an_object(m: Any, y: Tensor) -> Tensor:
    before, m.state.h = m.state.h.double(), y.detach().mean(0)
    m.state.layers.append(SimpleNamespace(keys=y.detach()))
    m.state.deep.h = y.detach()
    m.state.new = y.detach()
    return before * len(m.state.layers)


def attribute_taken_away(m: Any, y: Tensor) -> Tensor:
    before = m.state.h.double() if hasattr(m, "kept") else y.new_zeros(5)
    del m.kept
    return before


def buffer_in_place_of_attribute(m: Any, y: Tensor) -> None:
    if "kept" in vars(m):
        del m.kept
        m.register_buffer("kept", y.detach())


def module_hook(m: Any, y: Tensor) -> None:
    m.second.register_forward_hook(lambda module, x, output: output * 1.5)


def parameter_hook(m: Any, y: Tensor) -> None:
    if m.second.bias._backward_hooks is None:
        m.first.bias.register_hook(lambda grad: grad)


def attribute_of_a_tensor(m: Any, y: Tensor) -> None:
    m.mode = "other"
    m.first.training = True


def random_numbers(m: Any, y: Tensor) -> None:
    random.random()
    np.random.rand()
    torch.rand(1)


MOVES = [
    *(replaced, in_place, counted, through_data, large, large_through_data, large_replaced, number),
    *(python_number, first_only, with_a_graph, listed, in_a_dictionary, in_a_deque, in_an_object),
    *(attribute_taken_away, buffer_in_place_of_attribute, module_hook, attribute_of_a_tensor),
    random_numbers,
]
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_every_pass_starts_from_the_model_as_it_was_and_leaves_it_so(
    move: Any, training: bool
) -> None:
    model = Moving(move).train(training)
    model.first.bias.grad = torch.ones(5, dtype=torch.float64)
    expected = loop(model, X)
    with AsBefore(model):
        omega = estimate_importance(model, [X[:4], X[4:]])
    assert_right(omega, expected)
    for method in ("batch", "local"):
        with AsBefore(model):
            try:
                estimate_importance(model, [X[:4], X[4:]], method)
            except ValueError as error:
                assert method == "local"
                assert "another way" in str(error)  # noqa: PT017
    with AsBefore(model):
        estimate_fisher(model, [X[:4], X[4:]], labels="predicted")
    assert_right(estimate_importance(model, [X[:4], X[4:]]), expected)


class Stop(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("passes", range(1, 9))
@pytest.mark.parametrize("move", [in_place, replaced, large, listed, module_hook])
def test_an_error_in_any_pass_leaves_the_model_as_it_was(
    move: Any, passes: int, error: type[BaseException]
) -> None:
    ran = 0

    def stopped(m: Any, y: Tensor) -> Any:
        nonlocal ran
        ran += 1
        scale = move(m, y)
        if ran == passes:
            raise error
        return scale

    model = Moving(stopped).train()
    with AsBefore(model):
        for _ in range(4):  # more batches than it takes
            try:
                estimate_importance(model, [X[:4], X[4:]])
            except error:
                break
    assert ran >= passes


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        raise Stop


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_an_error_on_the_way_back_leaves_the_model_as_it_was(method: Any) -> None:
    def move(m: Any, y: Tensor) -> Tensor:
        listed(m, y)
        in_place(m, y)
        return Raises.apply(y)  # type: ignore[no-any-return, no-untyped-call]

    model = Moving(move).train()
    with AsBefore(model), pytest.raises(Stop):
        estimate_importance(model, [X], method)


# -- parameters ------------------------------------------------------------------------------------


def clamped(m: Any, y: Tensor) -> None:
    m.second.weight.data.clamp_(-0.2, 0.2)


def clamped_with_version(m: Any, y: Tensor) -> None:
    with torch.no_grad():
        m.second.weight.clamp_(-0.2, 0.2)


def clamped_anew(m: Any, y: Tensor) -> None:
    m.second.weight.data = m.second.weight.data.clamp(-0.2, 0.2)


def unfrozen(m: Any, y: Tensor) -> None:
    m.second.bias.requires_grad_(False)


def with_gradients(m: Any, y: Tensor) -> None:
    with torch.enable_grad():
        m.second(torch.ones_like(y)).sum().backward()


@pytest.mark.parametrize("move", [clamped, clamped_anew, parameter_hook, with_gradients])
def test_what_a_pass_does_to_parameters_is_undone(move: Any) -> None:
    model = Moving(move).train()
    model.first.bias.grad = torch.ones(5, dtype=torch.float64)
    model.second.weight.grad = torch.ones(3, 5, dtype=torch.float64)
    expected = loop(model, X)
    total = ImportanceSum()
    for part in (X[:4], X[4:5], X[5:]):
        with AsBefore(model):
            total.add(model, part)
    assert_right(total.mean(), expected)


def test_rows_that_an_embedding_renormalises_are_put_back() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 2)).double()
    ids = torch.tensor([[0, 1, 2], [1, 1, 3], [4, 5, 6], [0, 3, 5]])
    expected = loop(model, ids)
    with AsBefore(model):
        omega = estimate_importance(model, [ids[:3], ids[3:]])
    assert_right(omega, expected)


def test_a_parameter_frozen_by_a_pass_requires_a_gradient_again() -> None:
    model = Moving(unfrozen).train()
    with AsBefore(model), pytest.raises(RuntimeError, match="require grad"):
        estimate_importance(model, [X], "batch")
    model = Moving(clamped_with_version).train()
    for part in (X[:4], X[4:]):
        with AsBefore(model):
            estimate_importance(model, [part], "batch")


def test_a_large_buffer_that_only_a_later_pass_writes_is_refused_by_name() -> None:
    class Late(Moving):
        late = False

    model = Late(lambda m, y: large(m, y) if m.late else None)
    total = ImportanceSum("batch")
    total.add(model, X)
    Late.late = True
    with pytest.raises(ValueError, match=r"wrote large of shape \(400, 400\) in place"):
        total.add(model, X)
    with AsBefore(model):
        total.add(model, X)


def test_large_statistics_that_a_normalisation_moves_are_put_back() -> None:
    """The schema of batch_norm says nothing of them."""

    def move(m: Any, y: Tensor) -> None:
        F.batch_norm(torch.ones(2, 300_000), m.means, m.variances, training=True)

    model = Moving(move)
    model.register_buffer("means", torch.zeros(300_000))
    model.register_buffer("variances", torch.ones(300_000))
    with AsBefore(model):
        estimate_importance(model, [X[:4], X[4:]], "batch")


def test_shared_memory_is_put_back() -> None:
    """A view of a buffer, kept beside it; and a tied one."""

    def move(m: Any, y: Tensor) -> None:
        m.view.add_(1)
        m.rows.add_(1)

    model = Moving(move)
    model.register_buffer("view", model.mean[1:3])
    model.register_buffer("rows", model.large[3])
    model.tied = model.view
    with AsBefore(model):
        estimate_importance(model, [X[:4], X[4:]], "batch")


# -- modes -----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A weight that has its scale beside its numbers, until a first pass takes it from there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.weight.scale = torch.tensor(1.5, dtype=torch.float64)
        self.state = SimpleNamespace(scale=None)

    def forward(self, x: Tensor) -> Tensor:
        if self.state.scale is None:
            self.state.scale, self.weight.scale = self.weight.scale, None
        return x @ (self.state.scale * self.weight).T


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_what_a_parameter_has_beside_its_numbers_is_put_back(method: Any) -> None:
    model = Scaled()
    with AsBefore(model):
        omega = estimate_importance(model, [X[:4], X[4:]], method)
    assert float(omega["weight"].min()) > 0
    assert float(model.weight.scale) == 1.5


class Adapter(nn.Module):
    """A linear map with a low-rank update, which eval() merges into the weight, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.a = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(5, 2, dtype=torch.float64))
        self.how, self.merged = how, False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            update = (self.b @ self.a).detach() * (-1 if mode else 1)
            if self.how == "in place":
                self.weight.data += update
            elif self.how == "no_grad":
                with torch.no_grad():
                    self.weight.add_(update)
            elif self.how == "data":
                self.weight.data = self.weight.data + update
            elif self.how == "parameter":
                self.weight = nn.Parameter(self.weight.detach() + update)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.merged else y + x @ self.a.T @ self.b.T


def adapted(how: str) -> nn.Module:
    return nn.Sequential(Adapter(how), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("how", ["in place", "no_grad", "data"])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_adapters_that_eval_merges_are_measured_and_left_as_they_were(mode: str, how: str) -> None:
    model = adapted(how).train()
    expected = loop(model, X)
    if mode != "train":
        (model if mode == "eval" else model[0]).eval()
    total = ImportanceSum()
    for part in (X[:4], X[4:5], X[5:]):
        with AsBefore(model):
            total.add(model, part)
    assert model[0].merged == (mode != "train")  # type: ignore[union-attr]
    assert_right(total.mean(), expected)


def test_a_weight_that_eval_replaces_stays_the_same_object() -> None:
    model = adapted("parameter").train()
    expected = loop(model, X)
    with AsBefore(model):
        assert_right(estimate_importance(model, [X]), expected)


class Table(nn.Module):
    """Looks a table up, and keeps what it found while it is in eval mode."""

    def __init__(self, lazy: bool, kept: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.index = torch.tensor([[0, 1, 2, 1], [1, 0, 3, 4], [4, 2, 0, 0]])
        self.lazy, self.how = lazy, kept
        self.kept: Any = None
        self.cache: dict[str, Tensor] = {}

    def _look_up(self) -> Tensor:
        return self.table[self.index]

    def _keep(self) -> None:
        found = self._look_up()
        if self.how == "attribute":
            self.kept = found.detach()
        elif self.how == "buffer":
            del self.kept
            self.register_buffer("kept", found.detach())
        else:
            self.cache["cpu"] = found

    def train(self, mode: bool = True) -> Table:
        super().train(mode)
        if mode:
            if "kept" in self._buffers:
                del self.kept
            self.kept = None
            self.cache.clear()
        elif not self.lazy:
            with torch.no_grad():
                self._keep()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.lazy and not self.training and self.kept is None and not self.cache:
            self._keep()
        kept = self.cache.get("cpu", self.kept)
        return x @ (self._look_up() if kept is None else kept).T


@pytest.mark.parametrize("kept", ["attribute", "buffer", "dictionary"])
@pytest.mark.parametrize("mode", ["train", "eval", "used in eval"])
@pytest.mark.parametrize("lazy", [False, True])
def test_tables_that_eval_keeps_without_gradients_have_one(
    lazy: bool, mode: str, kept: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Table(lazy, kept)).double().train()
    x = X.tanh()
    reference = copy.deepcopy(model)
    reference[2].lazy = False  # type: ignore[union-attr]
    expected = loop(reference, x)
    if mode != "train":
        model.eval()
    if mode == "used in eval":
        with torch.no_grad():
            model(x)
    if lazy and kept != "dictionary":
        # The pass itself makes a table without a gradient.
        for method in ("exact", "batch"):
            with (
                AsBefore(model),
                pytest.raises(ValueError, match=r"importance of 2\.table: .* by 2, a Table"),
            ):
                estimate_importance(model, [x[:4], x[4:]], method)  # type: ignore[arg-type]
        return
    with AsBefore(model):
        omega = estimate_importance(model, [x[:4], x[4:]])
    assert_right(omega, expected)


class NoisyGates(nn.Module):
    """Uses a parameter in training mode alone, keeps tensors, and has another one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.noise, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.kept = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = self.frozen(x)
        y: Tensor = self.gates(x) + shift
        if self.training:
            y = y + self.noise(x) * torch.randn_like(y)
        return y.softmax(-1) * self.kept.mul_(1)


def test_a_parameter_that_eval_mode_does_not_use_is_of_no_importance() -> None:
    model = NoisyGates().double().train()
    expected = loop(model, X)
    with AsBefore(model):
        omega = estimate_importance(model, [X])
    for name, t in omega.items():
        torch.testing.assert_close(t, expected[name])
        assert bool(t.any()) == name.startswith("gates")


class Halved(nn.Linear):
    """Another model in eval mode, by what its own eval() does."""

    scale = 1.0

    def train(self, mode: bool = True) -> Halved:
        self.scale = 1.0 if mode else 0.5
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class HalvedByEval(Halved):
    def train(self, mode: bool = True) -> Halved:
        return nn.Linear.train(self, mode)  # type: ignore[return-value]

    def eval(self) -> Halved:
        self.scale = 0.5
        return self.train(False)


class StaysNoisy(nn.Dropout):
    """Drops in eval mode, too."""

    def train(self, mode: bool = True) -> StaysNoisy:
        super().train(True)
        return self


def halved_instance() -> nn.Module:
    """A train() of the instance's own."""
    layer = nn.Linear(4, 5)
    layer.scale = torch.tensor(1.0)  # type: ignore[assignment]
    layer.register_forward_hook(lambda module, x, y: y * module.scale)

    def train(mode: bool = True) -> nn.Module:
        layer.scale = torch.tensor(1.0 if mode else 0.5)  # type: ignore[assignment]
        return nn.Module.train(layer, mode)

    layer.train = train  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Halved(4, 5),
        lambda: HalvedByEval(4, 5),
        lambda: nn.Sequential(nn.Linear(4, 5), StaysNoisy()),
        halved_instance,
    ],
    ids=["train", "eval", "dropout", "instance"],
)
def test_a_module_whose_eval_computes_something_else_is_refused_by_name(
    make: Callable[[], nn.Module], mode: bool
) -> None:
    model = nn.Sequential(Frozen(), make(), nn.Linear(5, 2)).double()
    model.train(mode)  # of which HalvedByEval knows nothing
    if isinstance(model[1], HalvedByEval) and not mode:
        model[1].scale = 1.0
    named = r"model: 1(\.1)?, a (Halved|HalvedByEval|StaysNoisy|Linear), computes something else"
    for method in ("exact", "batch"):
        with AsBefore(model), pytest.raises(ValueError, match=named):
            estimate_importance(model, [X], method)  # type: ignore[arg-type]
    penalty = FusedMASPenalty(model)
    with AsBefore(model), pytest.raises(ValueError, match=named):
        penalty.consolidate([X])
    assert penalty.num_tasks == 0


class Frozen(nn.BatchNorm1d):
    """Keeps its statistics whatever the model does."""

    def __init__(self) -> None:
        super().__init__(4)

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


class FrozenBackbone(nn.Module):
    """Keeps a part of it in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout())
        self.head = nn.Linear(5, 3)
        self.trained = 0

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone.eval()
        self.trained += 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.backbone(x).tanh())
        return output


@pytest.mark.parametrize("mode", [True, False])
def test_harmless_train_methods_pass(mode: bool) -> None:
    model = nn.Sequential(Frozen(), FrozenBackbone()).double().train(mode)
    model[1].backbone[0].train()  # type: ignore[union-attr, index]
    expected = loop(model, X)
    with AsBefore(model):
        omega = estimate_importance(model, [X[:4], X[4:]])
    assert_right(omega, expected)


def test_own_eval_is_tried_once_for_each_model() -> None:
    calls = []

    class Counted(nn.Linear):
        def eval(self) -> Counted:
            calls.append(self)
            return super().eval()

    model, other = Counted(4, 2).double(), Counted(4, 2).double()
    total = ImportanceSum()
    for _ in range(3):
        total.add(model, X)
    assert len(calls) == 1
    total.empty().add(model, X)
    assert len(calls) == 1
    total.add(other, X)
    assert len(calls) == 2
    copy.deepcopy(total).add(other, X)
    assert len(calls) == 3


def test_a_model_that_takes_whole_batches_alone_is_compared_by_one() -> None:
    class Whole(Halved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(6, 4))

    with pytest.raises(ValueError, match="model: it, a Whole, computes something else"):
        estimate_importance(Whole(4, 2).double(), [X], "batch")


# -- other caches ----------------------------------------------------------------------------------


def test_inside_a_cache_of_parametrizations() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    parametrizations.weight_norm(model[0])
    expected = loop(model, X)
    with parametrize.cached():
        with torch.no_grad():
            model(X)
        kept = dict(parametrize._cache)
        omega = estimate_importance(model, [X[:4], X[4:]])
        assert parametrize._cache_enabled
        assert parametrize._cache == kept
        assert kept
    assert_right(omega, expected)


def test_scripted_modules_are_left_as_they_were() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x - self.mean)
            self.mean.add_(x.mean(0))
            return y

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        scripted = torch.jit.script(Written().double())
    model = nn.Sequential(scripted, nn.Tanh(), nn.Linear(3, 2)).double().train()
    state = copy.deepcopy(model.state_dict())
    estimate_importance(model, [X[:4], X[4:]], "batch")
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])
    assert all(module.training for module in model.modules())
