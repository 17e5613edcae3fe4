"""The fallback against loops in float64: awkward samples, vmap or not, interacting samples, hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import estimate_fisher, estimate_importance
from mas_ext.importance import ImportanceSum, batches, objectives
from mas_ext.importance.evaluation import Evaluate, Labelled, evaluating
from mas_ext.importance.exact.fallback import Fallback, one_by_one, outputs_differ
from mas_ext.importance.exact.precision import PRECISION_OF
from mas_ext.importance.gradients import Summation

pytestmark = pytest.mark.filterwarnings("ignore:importance of .* takes the fallback")

Omega = dict[str, Tensor]
HOW = Summation("auto")
X = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loop(model: nn.Module, rows: Callable[[int], Tensor], samples: int = len(X)) -> Omega:
    """Sum over samples of |d rows(k)^2 / d theta|, with the parameters' hooks."""
    theta = dict(model.named_parameters())
    omega = {name: torch.zeros_like(p) for name, p in theta.items()}
    for k in range(samples):
        model.zero_grad()
        rows(k).pow(2).sum().backward()
        for name, p in theta.items():
            omega[name] += 0 if p.grad is None else p.grad.abs()
    model.zero_grad()
    return {name: t.detach() for name, t in omega.items()}


def assert_right(got: Mapping[str, Tensor], expected: Omega, samples: int = 1) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t / samples, rtol=1e-9, atol=1e-12)
        assert t.sum() > 0 or name == "key.bias"


@contextmanager
def prepared(
    model: nn.Module, forward: Any = lambda model, x: model(x), objective: Any = "l2"
) -> Iterator[Evaluate]:
    values = partial(objectives.values, objective=objective, max_outputs=64)
    with evaluating(model, torch.device("cpu")) as state:
        yield Evaluate(model, forward, values, state)


class Counted:
    """Counts the passes of a model: how many, and of how many samples in all."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: list[int] = []
        model.register_forward_pre_hook(lambda module, args: self.sizes.append(len(args[0])))


# -- samples that can't be run alone ---------------------------------------------------------------


class Awkward(nn.Module):
    """Takes no batch of one; `rows` says what it computes of one sample."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], outputs: int = 1) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, outputs), nn.Parameter(torch.ones(()))
        self.how = how
        self.double()

    def rows(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).tanh() * self.scale.exp()
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def squeezed(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.rows(x).squeeze()
    return y


def squeezed_inside(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.linear(x).squeeze()
    return torch.stack([y[k] for k in range(len(x))]).tanh()[:, None] * m.scale.exp()


def checked(m: Any, x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError("Expected more than 1 value per channel")
    y: Tensor = m.rows(x)
    return y


def asserted(m: Any, x: Tensor) -> Tensor:
    assert len(x) > 1
    y: Tensor = m.rows(x)
    return y


def paired(m: Any, x: Tensor) -> Tensor:
    """Fails in torch where the second row is missing."""
    y: Tensor = m.rows(x)
    return y + 0 * x[1, 0].detach()


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (6, 1), (1, 6)])
@pytest.mark.parametrize("how", [squeezed, squeezed_inside, checked, asserted, paired])
def test_a_sample_that_can_not_be_run_alone_is_run_as_itself_twice(how: Any, sizes: Any) -> None:
    model = Awkward(how)
    expected = loop(model, lambda k: model.rows(X[k]))
    assert_right(estimate_importance(model, X.split(sizes)), expected, len(X))


def test_a_squeezed_output_of_several_numbers() -> None:
    """(1, 3) becomes (3,), which could be taken for three samples."""
    model = Awkward(squeezed, outputs=3)
    expected = loop(model, lambda k: model.rows(X[k]))
    assert_right(estimate_importance(model, [X[:6], X[6:]]), expected, len(X))


def test_fisher_information_of_samples_that_can_not_be_run_alone() -> None:
    model, labels = Awkward(checked, outputs=3), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    omega = estimate_fisher(model, [(X[:6], labels[:6]), (X[6:], labels[6:])])
    for name, p in model.named_parameters():
        total = torch.zeros_like(p)
        for k in range(len(X)):
            (g,) = torch.autograd.grad(model.rows(X[k]).log_softmax(-1)[labels[k]], p)
            total += g.square() / len(X)
        torch.testing.assert_close(omega[name], total)


def test_entries_of_a_sample_are_doubled_with_it() -> None:
    names = ["a", "b", "a", "a", "b", "b", "a"]

    class Named(Awkward):
        def forward(self, x: Tensor, names: Any = None, k: Any = None) -> Tensor:  # type: ignore[override]
            assert len(x) == len(names) == len(k) > 1
            signs = torch.tensor([1.0 if name == "a" else 2.0 for name in names])
            return self.rows(x) * signs[:, None] + torch.tensor([*k])[:, None]

    model = Named(checked)
    numbers = torch.arange(7.0)
    expected = loop(
        model, lambda k: model.rows(X[k]) * (1 if names[k] == "a" else 2) + float(numbers[k])
    )
    for sequence in (tuple, list, lambda items: torch.tensor(items).numpy()):
        batch = X, names, sequence(numbers.tolist())
        omega = estimate_importance(model, [batch], forward=lambda model, batch: model(*batch))
        assert_right(omega, expected, len(X))


def test_what_is_wrong_with_a_sample_is_said_as_it_is() -> None:
    class Wrong(Awkward):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) <= 2:
                raise KeyError(f"no table for {len(x)}")
            return self.rows(x)

    with pytest.raises(KeyError, match="no table for 1"):
        estimate_importance(Wrong(checked), [X])


# -- at once or one by one -------------------------------------------------------------------------


class Attention(nn.Module):
    """Fused attention, which vmap has no rule for; the bias of its keys has no gradient but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(4, 16)
        self.output = nn.Linear(16, 3)
        self.double()

    def maps(self) -> list[nn.Linear]:
        return [self.query, self.key, self.value]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in self.maps())
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        output: Tensor = self.output(y.flatten(2).tanh().mean(1))
        return output


@pytest.mark.parametrize("objective", ["l2", "vector"])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Attention, torch.randn(9, 5, 4, dtype=torch.float64)),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), X),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten()).double(),
            torch.randn(6, 2, 4, dtype=torch.float64),
        ),
    ],
    ids=["attention", "mlp", "convolution"],
)
def test_small_gradients_are_computed_at_once(make: Any, inputs: Tensor, objective: Any) -> None:
    model = make()
    counted = Counted(model)
    theta = dict(model.named_parameters())
    with prepared(model, objective=objective) as evaluate:
        outputs, values = evaluate(Labelled(inputs))
        fallback = Fallback(HOW)
        fallback(evaluate, Labelled(inputs), theta, outputs.detach())
        counted.sizes.clear()
        got = fallback(evaluate, Labelled(inputs), theta, outputs.detach())
        columns = values.shape[1]
        assert len(counted.sizes) == columns  # one pass for each, of all samples
    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    for k in range(len(inputs)):
        y = model(inputs[k : k + 1]).flatten()
        for value in y if objective == "vector" else [y.pow(2).sum()]:
            grads = torch.autograd.grad(value, [*theta.values()], retain_graph=True)
            for name, g in zip(theta, grads, strict=True):
                expected[name] += g.abs()
    assert_right(got, {name: t.detach() for name, t in expected.items()})


def test_large_gradients_are_computed_one_by_one() -> None:
    """Several of them leave the caches: a loop is faster."""
    model = nn.Sequential(nn.Linear(4, 70_000), nn.Tanh(), nn.Linear(70_000, 12)).double()
    theta, counted = dict(model.named_parameters()), Counted(model)
    with prepared(model) as evaluate:
        got = Fallback(HOW)(evaluate, Labelled(X), theta)
        assert counted.sizes == [1] * len(X)
        # A few parameters of a large model are few numbers.
        few = {"2.bias": theta["2.bias"]}
        fallback = Fallback(HOW)
        fallback(evaluate, Labelled(X), few)
        counted.sizes.clear()
        fallback(evaluate, Labelled(X), few)
        assert len(counted.sizes) == 1
    assert_right(got, loop(model, lambda k: model(X[k : k + 1])))


class DeadTensors(nn.Module):
    """Keeps tensors of the pass, of which vmap's are dead after it; the next pass must not meet them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.items: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,io->bo", x - self.mean, self.w.exp())
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.items.append(y)
        return y


def test_tensors_that_vmap_leaves_on_a_model_are_taken_away() -> None:
    model = DeadTensors()
    mean = model.mean
    with prepared(model) as evaluate:
        fallback = Fallback(HOW)
        outputs = evaluate.output(Labelled(X)).detach()
        for _ in range(2):
            got = fallback(evaluate, Labelled(X), {"w": model.w}, outputs)
        assert fallback._vmap
    assert model.items == []
    assert model.mean is mean
    assert_right(got, loop(model, lambda k: X[k] @ model.w.exp()))


@pytest.mark.parametrize("vmap", [True, False])
@pytest.mark.parametrize("number", range(7))
def test_every_sample_is_compared_with_the_batch(number: int, vmap: bool) -> None:
    model = nn.Linear(4, 3).double()
    theta = dict(model.named_parameters())
    with prepared(model) as evaluate:
        outputs = evaluate.output(Labelled(X)).detach()
        fallback = Fallback(HOW)
        fallback._vmap = vmap
        fallback(evaluate, Labelled(X), theta, outputs)
        outputs[number, 0] += 1e-5
        with pytest.raises(ValueError, match="model: samples interact: an output changes by up to"):
            fallback(evaluate, Labelled(X), theta, outputs)
        fallback(evaluate, Labelled(X), theta, outputs, PRECISION_OF[torch.float32])
        fallback(evaluate, Labelled(X), theta)


class Interacting(nn.Module):
    """Samples see one another from the fifth on; its parameter is used in a way that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,io->bo", x, F.normalize(self.w, dim=0).exp())
        y[4:] = y[4:] - 0.01 * y[4:].mean(0)
        return y


def test_samples_that_interact_beyond_those_that_are_checked_are_refused() -> None:
    with pytest.raises(ValueError, match="samples interact"):
        estimate_importance(Interacting(), [X])


class Branching(nn.Module):
    """Takes another way in the second batch, in which vmap is wrong or fails."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.how, self.second = how, False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,io->bo", x, F.normalize(self.w, dim=0).exp())
        inside = torch._C._functorch.peek_interpreter_stack() is not None
        if self.second and inside and self.how == "fails":
            raise RuntimeError("vmap")
        return y + float(self.second and inside)


@pytest.mark.parametrize("how", ["fails", "is wrong"])
def test_where_vmap_is_wrong_in_a_later_batch_the_loop_takes_over(how: str) -> None:
    model = Branching(how)
    expected = loop(model, lambda k: X[k] @ F.normalize(model.w, dim=0).exp())
    with prepared(model) as evaluate:
        fallback = Fallback(HOW)
        outputs = evaluate.output(Labelled(X)).detach()
        assert_right(fallback(evaluate, Labelled(X), {"w": model.w}, outputs), expected)
        assert fallback._vmap
    model.second = True
    with prepared(model) as evaluate:
        assert_right(fallback(evaluate, Labelled(X), {"w": model.w}, outputs), expected)
    assert fallback._vmap == (how != "fails")


class Inside(nn.Module):
    """Knows whether vmap runs it; `how` says what it makes of that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), how

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,io->bo", x, self.w.exp())
        if self.how == "draws random numbers":
            return y + 0 * torch.rand(len(x), 1)
        if self.how == "has a function that vmap runs one by one":
            return y + torch.stack([F.pdist(row[:, None] * self.w).sum()[None] for row in x])
        if torch._C._functorch.peek_interpreter_stack() is None:
            return y
        return y + 1 if self.how == "another output" else 2 * y - y.detach()


@pytest.mark.parametrize(
    ("how", "at_once"),
    [
        ("draws random numbers", True),
        ("has a function that vmap runs one by one", False),
        ("another output", False),
        ("another gradient", False),
    ],
)
def test_vmap_must_agree_and_be_fast(how: str, at_once: bool) -> None:
    model = Inside(how)
    with (
        prepared(model, objective="vector") as evaluate,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        fallback = Fallback(HOW)
        got = fallback(evaluate, Labelled(X), {"w": model.w})
    assert fallback._vmap == at_once
    assert not caught
    expected = torch.zeros_like(model.w)
    for x in X:
        for value in model(x[None])[0]:
            expected += torch.autograd.grad(value, model.w, retain_graph=True)[0].abs()
    assert_right(got, {"w": expected.detach()})


def test_sums_at_once_need_no_gradient_where_other_parameters_do() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with prepared(model) as evaluate:
        fallback = Fallback(HOW)
        got = fallback(evaluate, Labelled(X), {"0.bias": model[0].bias})
    assert fallback._vmap
    assert not got["0.bias"].requires_grad


@pytest.mark.parametrize(
    ("alone", "together", "differ"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], False),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.1]], True),
        ([[1e-12, 0.0], [3.0, 4.0]], [[0.0, 0.0], [3.0, 4.0]], False),
        ([[1e-6, 0.0], [3.0, 4.0]], [[0.0, 0.0], [3.0, 4.0]], True),
        ([[1.0], [3.0]], [[1.0, 1.0], [3.0, 3.0]], True),
        ([float("nan"), 1.0], [float("nan"), 1.0], True),
        ([2.0, 1.0], [2.0, 1.0], False),
        ([2.0, 1.0], [1.0, 2.0], True),
    ],
)
def test_outputs_differ_by_more_than_rounding(alone: Any, together: Any, differ: bool) -> None:
    precision = PRECISION_OF[torch.float64]
    assert outputs_differ(torch.tensor(alone), torch.tensor(together), precision) == differ


def test_entries_that_each_sample_has_of_its_own_are_not_computed_at_once() -> None:
    """They would all be taken for those of the first, which the samples that are compared share."""
    model, names = DeadTensors(), ["a", "a", "a", "b", "b", "a", "b"]

    def forward(model: Any, batch: Any) -> Tensor:
        x, names = batch
        signs = [1.0 if name == "a" else 3.0 for name, _ in zip(names, x, strict=False)]
        y: Tensor = model(x) * torch.tensor(signs)[:, None]
        return y

    expected = loop(model, lambda k: X[k] @ model.w.exp() * (1 if names[k] == "a" else 3))
    with prepared(model, forward) as evaluate:
        batch = batches.told(Labelled((X, names)))
        assert_right(Fallback(HOW)(evaluate, batch, {"w": model.w}), expected)


def test_a_loop_gives_outputs_and_objectives() -> None:
    model = nn.Linear(4, 3).double()
    with prepared(model) as evaluate:
        totals, outputs, values = one_by_one(
            evaluate, batches.told(Labelled(X)), dict(model.named_parameters()), HOW
        )
    torch.testing.assert_close(outputs, model(X).detach())
    torch.testing.assert_close(values, model(X).detach().pow(2).sum(1, keepdim=True))
    assert_right(totals, loop(model, lambda k: model(X[k])))


# -- hooks of parameters ---------------------------------------------------------------------------


def mask(grad: Tensor) -> Tensor:
    return grad * (torch.arange(grad.numel()).view(grad.shape) % 2)


def clip(grad: Tensor) -> Tensor:
    """Not linear: of a batch it would be another one than of its samples."""
    return grad.clamp(-0.1, 0.1)


def seen_only(grad: Tensor) -> None:
    assert grad.isfinite().all()


@pytest.mark.parametrize("hook", [mask, clip, seen_only])
@pytest.mark.parametrize(
    ("make", "inputs", "names"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
            X,
            ["0.weight", "2.bias"],
        ),
        (
            lambda: nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2)),
            torch.randint(10, (6, 3), generator=torch.Generator().manual_seed(1)),
            ["0.weight"],
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(9)),
            torch.randn(6, 2, 4, dtype=torch.float64),
            ["0.weight", "3.weight"],
        ),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_hooks_of_parameters_apply_to_the_gradient_of_each_sample(
    make: Any, inputs: Tensor, names: list[str], hook: Any
) -> None:
    model = make().double()
    model.requires_grad_(True)
    handles = [dict(model.named_parameters())[name].register_hook(hook) for name in names]
    expected = loop(model, lambda k: model(inputs[k : k + 1]), len(inputs))
    assert_right(estimate_importance(model, [inputs[:4], inputs[4:]]), expected, len(inputs))
    plain = loop(model, lambda k: model(inputs[k : k + 1]), len(inputs))
    assert_right(estimate_importance(model, inputs.split(1)), plain, len(inputs))
    for handle in handles:
        handle.remove()
    expected = loop(model, lambda k: model(inputs[k : k + 1]), len(inputs))
    assert_right(estimate_importance(model, [inputs]), expected, len(inputs))


def test_a_hook_that_comes_after_the_first_batch() -> None:
    model, total = nn.Linear(4, 3).double(), ImportanceSum()
    total.add(model, X)
    expected = loop(model, lambda k: model(X[k]))
    handle = model.weight.register_hook(clip)
    total.add(model, X)
    for name, t in loop(model, lambda k: model(X[k])).items():
        expected[name] += t
    handle.remove()
    total.add(model, X)
    for name, t in loop(model, lambda k: model(X[k])).items():
        expected[name] += t
    assert_right(total.mean(), expected, 3 * len(X))


def test_a_hook_that_comes_after_vmap_was_found_right() -> None:
    model = DeadTensors()
    with prepared(model) as evaluate:
        fallback = Fallback(HOW)
        fallback(evaluate, Labelled(X), {"w": model.w})
        assert fallback._vmap
    model.w.register_hook(clip)
    expected = loop(model, lambda k: X[k] @ model.w.exp())
    with prepared(model) as evaluate:
        assert_right(fallback(evaluate, Labelled(X), {"w": model.w}), expected)


@pytest.mark.parametrize("samples", [1, 7])
def test_hooks_after_a_gradient_is_accumulated_are_refused(samples: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"importance of 0\.weight: got a parameter with a hook"):
        estimate_importance(model, [X[:samples]])
    handle.remove()
    expected = loop(model, lambda k: model(X[k]))
    assert_right(estimate_importance(model, [X]), expected, len(X))
