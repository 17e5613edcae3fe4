"""Importance against naive float64 loops, one sample at a time, and against closed forms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mas_ext import FusedMASPenalty, estimate_importance
from mas_ext.importance import ImportanceSum

Omega = dict[str, Tensor]


def softplus_of_first(output: Tensor) -> Tensor:
    return nn.functional.softplus(output[:, 0]) * output[:, 1]


# Each objective, and the same as a list of numbers from the output of one sample.
NAIVE: dict[Any, Callable[[Tensor], Sequence[Tensor]]] = {
    "l2": lambda y: [(y * y).sum()],
    "l1": lambda y: [torch.where(y > 0, y, -y).sum()],
    "vector": lambda y: list(y.flatten()),
    softplus_of_first: lambda y: [(1 + y[0].exp()).log() * y[1]],
}


class ConvNet(nn.Module):
    """One layer of every usual kind; its BatchNorm has statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 3))
        self.features(torch.randn(16, 1, 4, 4) * 3 + 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.features(x))
        return output


def images(samples: int) -> Tensor:
    return torch.randn(samples, 1, 4, 4)


def naive(
    model: nn.Module, batches: Sequence[Tensor], objective: Any = "l2", exact: bool = True
) -> Omega:
    """The definition: gradients of single samples in float64, abs before or after the batch's sum."""
    model = copy.deepcopy(model).double().eval()
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    omega = {name: torch.zeros_like(p) for name, p in theta.items()}
    for batch in batches:
        sums: dict[int, Omega] = {}
        for x in batch:
            for k, value in enumerate(NAIVE[objective](model(x[None].to(torch.float64))[0])):
                grads = torch.autograd.grad(
                    value, list(theta.values()), retain_graph=True, allow_unused=True
                )
                total = sums.setdefault(k, {name: torch.zeros_like(p) for name, p in theta.items()})
                for name, g in zip(theta, grads, strict=True):
                    if g is not None:
                        total[name] += g.abs() if exact else g
        for total in sums.values():
            for name, t in total.items():
                omega[name] += t.abs()
    samples = sum(len(batch) for batch in batches)
    return {name: t.detach() / samples for name, t in omega.items()}


def assert_importance(got: Omega, expected: Omega, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    assert got.keys() == expected.keys()
    for name, t in got.items():
        torch.testing.assert_close(
            t.double(), expected[name], rtol=rtol, atol=atol * float(expected[name].max() + 1)
        )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", NAIVE)
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_importance_is_its_definition(
    method: Any, objective: Any, dtype: torch.dtype, backend: Any
) -> None:
    model = ConvNet().to(dtype)
    batches = [images(4).to(dtype), images(4).to(dtype), images(1).to(dtype)]
    total = ImportanceSum(method, objective, backend=backend)
    for batch in batches:
        total.add(model, batch)
    omega = total.mean()
    assert {t.dtype for t in omega.values()} == {dtype}
    tolerance = (1e-5, 1e-6) if dtype == torch.float32 else (1e-12, 1e-13)
    assert_importance(omega, naive(model, batches, objective, method == "exact"), *tolerance)
    assert all(float(t.max()) > 0 for t in omega.values())


def test_linear_layer_is_the_closed_form() -> None:
    """Omega_ij = mean 2 |y_i x_j|, and 2 |y_i| for the bias."""
    model = nn.Linear(5, 3).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    y = (x @ model.weight.T + model.bias).detach()
    closed = {
        "weight": 2 * torch.einsum("ni,nj->ij", y.abs(), x.abs()) / 7,
        "bias": 2 * y.abs().mean(0),
    }
    assert_importance(estimate_importance(model, [x[:4], x[4:]]), closed, 1e-13, 1e-15)


def test_exact_keeps_what_cancels_in_a_batch() -> None:
    """d y / d w = x for y = w x: +3 and -1 and -2 cancel in the batch, and mean |x| = 2 does not."""
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[3.0], [-1.0], [-2.0]])
    exact = estimate_importance(model, [x], "exact", objective="vector")
    batch = estimate_importance(model, [x], "batch", objective="vector")
    assert exact["weight"].item() == 2
    assert batch["weight"].item() == 0


def test_batch_is_weighted_by_samples_not_by_batches() -> None:
    """(|3 - 1| + |-5|) / 3, not (|3 - 1| / 2 + |-5|) / 2."""
    model = nn.Linear(1, 1, bias=False)
    batches = [torch.tensor([[3.0], [-1.0]]), torch.tensor([[-5.0]])]
    omega = estimate_importance(model, batches, "batch", objective="vector")
    torch.testing.assert_close(omega["weight"], torch.tensor([[7 / 3]]))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    inputs=st.integers(0, 3),
    outputs=st.integers(1, 3),
)
def test_exact_does_not_depend_on_how_samples_are_batched(
    sizes: list[int], inputs: int, outputs: int
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = nn.Linear(inputs, outputs).double()
    batches = [torch.randn(n, inputs, dtype=torch.float64) for n in sizes]
    x = torch.cat(batches)
    y = (x @ model.weight.T + model.bias).detach()
    closed = {
        "weight": 2 * torch.einsum("ni,nj->ij", y.abs(), x.abs()) / len(x),
        "bias": 2 * y.abs().mean(0),
    }
    omega = estimate_importance(model, batches)
    for name, t in omega.items():
        torch.testing.assert_close(t, closed[name], rtol=1e-12, atol=1e-14)


# -- batches and outputs ---------------------------------------------------------------------------


class Labelled(NamedTuple):
    x: Tensor
    y: Any


LABELS = torch.full((6,), float("nan"))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: (x, LABELS),
        lambda x: [x, LABELS],
        lambda x: {"x": x, "y": LABELS},
        lambda x: Labelled(x, LABELS),
        lambda x: ((x, LABELS), {"y": LABELS}),
        lambda x: (x, "no tensor", None),
    ],
    ids=["tensor", "alone", "tuple", "list", "dict", "namedtuple", "nested", "others"],
)
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_the_first_item_of_a_batch_is_the_input_and_labels_are_not_looked_at(
    wrapped: Callable[[Tensor], Any], method: Any
) -> None:
    model, x = ConvNet(), images(6)
    omega = estimate_importance(model, [wrapped(x)], method)
    assert_importance(omega, naive(model, [x], exact=method == "exact"), atol=1e-6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return a, {"sum": self.left(a) + self.right(b)}


def test_forward_gets_the_whole_batch_and_chooses_the_output() -> None:
    model = TwoInputs()
    a, b = torch.randn(5, 2), torch.randn(5, 4)
    omega = estimate_importance(
        model,
        [{"b": b[:3], "a": a[:3]}, {"b": b[3:], "a": a[3:]}],
        forward=lambda model, batch: model(batch["a"], batch["b"])[1]["sum"],
    )
    y = (model.left(a) + model.right(b)).detach().double().abs()
    closed = {
        "left.weight": 2 * torch.einsum("ni,nj->ij", y, a.double().abs()) / 5,
        "left.bias": 2 * y.mean(0),
        "right.weight": 2 * torch.einsum("ni,nj->ij", y, b.double().abs()) / 5,
        "right.bias": 2 * y.mean(0),
    }
    assert_importance(omega, closed)


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_forward_gets_a_namedtuple_as_such(method: Any) -> None:
    model, x = ConvNet(), images(3)
    omega = estimate_importance(
        model, [Labelled(x, LABELS[:3])], method, forward=lambda model, batch: model(batch.x)
    )
    assert_importance(omega, naive(model, [x], exact=method == "exact"), atol=1e-6)


def test_max_samples_counts_the_first_ones_only_and_asks_for_no_more() -> None:
    model, batches = ConvNet(), [images(4), images(4), images(4)]
    drawn = []

    def source() -> Iterator[Tensor]:
        for batch in batches:
            drawn.append(len(batch))
            yield batch

    omega = estimate_importance(model, source(), max_samples=6)
    assert drawn == [4, 4]
    assert_importance(omega, naive(model, [batches[0], batches[1][:2]]), atol=1e-6)
    drawn.clear()
    estimate_importance(model, source(), max_samples=4)
    assert drawn == [4]


@pytest.mark.parametrize("batches", [[], iter(()), [torch.zeros(0, 2), torch.zeros(0, 2)]])
def test_no_samples_is_an_error(batches: Any) -> None:
    with pytest.raises(ValueError, match="batches: got no samples, expected at least one"):
        estimate_importance(nn.Linear(2, 1), batches)


def test_an_empty_batch_among_others_changes_nothing() -> None:
    model, x = ConvNet(), images(3)
    omega = estimate_importance(model, [images(0), x, images(0)])
    assert_importance(omega, naive(model, [x]), atol=1e-6)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.zeros(4, 2), TypeError, "batches: got a single Tensor"),
        ({"x": torch.zeros(4, 2)}, TypeError, "batches: got a single dict"),
        (["text"], TypeError, "starting with str"),
        ([()], TypeError, "starting with NoneType"),
        ([{}], TypeError, "starting with NoneType"),
        ([torch.tensor(1.0)], TypeError, "samples in dimension 0"),
        ([(torch.zeros(4, 2), torch.zeros(3))], ValueError, r"shape \(3,\) in a batch of 4"),
        ([(torch.zeros(4, 2), torch.tensor(1.0))], ValueError, r"shape \(\) in a batch of 4"),
    ],
)
def test_what_is_no_batch_of_samples_is_refused(
    batches: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        estimate_importance(nn.Linear(2, 1), batches)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda y: (y, y), TypeError, "output: got tuple, expected a tensor; pass forward="),
        (lambda y: {"y": y}, TypeError, "output: got dict, expected a tensor; pass forward="),
        (lambda y: y.sum(), ValueError, r"output: got shape \(\), expected \d samples"),
        (lambda y: y.T, ValueError, r"output: got shape \(3, \d\), expected \d samples"),
        (lambda y: y.detach(), ValueError, "output: got one that depends on no parameter"),
        (lambda y: y.argmax(1), ValueError, "output: got one that depends on no parameter"),
    ],
)
@pytest.mark.parametrize("method", ["exact", "batch"])
def test_an_output_without_one_row_per_sample_is_refused(
    output: Callable[[Tensor], Any], error: type[Exception], message: str, method: Any
) -> None:
    with pytest.raises(error, match=message):
        estimate_importance(
            nn.Linear(2, 3),
            [torch.randn(4, 2)],
            method,
            forward=lambda model, x: output(model(x)),
        )


@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda y: y.square().sum(), r"\(\)"),
        (lambda y: y.square(), r"\(\d, 3\)"),
        (lambda y: y.square().sum(1, keepdim=True), r"\(\d, 1\)"),
        (lambda y: 1.0, "float"),
    ],
)
def test_an_objective_without_one_number_per_sample_is_refused(
    objective: Callable[[Tensor], Any], got: str
) -> None:
    for method in ("exact", "batch"):
        with pytest.raises(
            ValueError, match=rf"objective: got {got}, expected a tensor of shape \(\d,\)"
        ):
            estimate_importance(nn.Linear(2, 3), [torch.randn(2, 2)], method, objective)


def test_wrong_settings_are_refused_by_name() -> None:
    model, x = nn.Linear(2, 3), [torch.randn(4, 2)]
    with pytest.raises(ValueError, match="method: got 'fast', expected one of"):
        estimate_importance(model, x, "fast")
    with pytest.raises(ValueError, match="objective: got 'l3', expected one of"):
        estimate_importance(model, x, objective="l3")
    with pytest.raises(ValueError, match="max_samples: got 0, expected a whole number"):
        estimate_importance(model, x, max_samples=0)


def test_vector_is_refused_above_max_outputs() -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="got 3 outputs, expected at most max_outputs=2"):
        estimate_importance(model, [x], objective="vector", max_outputs=2)
    with pytest.raises(ValueError, match="got 65 outputs, expected at most max_outputs=64"):
        estimate_importance(nn.Linear(2, 65), [x], objective="vector")
    omega = estimate_importance(model, [x], objective="vector", max_outputs=3)
    assert_importance(omega, naive(model, [x], "vector"))


# -- parameters ------------------------------------------------------------------------------------


class Partly(nn.Module):
    """One parameter is used, one is not, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_unused_parameters_get_zero_and_tied_ones_the_sum_of_their_uses(method: Any) -> None:
    model, x = Partly(), torch.randn(5, 3)
    omega = estimate_importance(model, [x], method)
    assert not omega["unused.weight"].any()
    assert not omega["unused.bias"].any()
    assert "second.weight" not in omega
    assert_importance(omega, naive(model, [x], exact=method == "exact"), atol=1e-6)


def test_frozen_parameters_are_left_out_until_they_are_unfrozen() -> None:
    model, x = ConvNet(), images(5)
    model.features.requires_grad_(False)
    omega = estimate_importance(model, [x])
    assert sorted(omega) == ["head.2.bias", "head.2.weight", "head.3.bias", "head.3.weight"]
    assert_importance(omega, naive(model, [x]), atol=1e-6)
    model.features.requires_grad_(True)
    assert_importance(estimate_importance(model, [x]), naive(model, [x]), atol=1e-6)


@pytest.mark.parametrize("parameters", ["frozen", "none"])
def test_a_model_without_trainable_parameters_has_no_importance(parameters: str) -> None:
    model = nn.Linear(2, 1).requires_grad_(False) if parameters == "frozen" else nn.Flatten()
    assert estimate_importance(model, [torch.randn(3, 2)]) == {}
    penalty = FusedMASPenalty(model)
    with pytest.warns(RuntimeWarning, match="no parameter requires a gradient"):
        penalty.consolidate([torch.randn(3, 2)])
    assert penalty.num_tasks == 0


def test_excluded_parameters_are_left_out() -> None:
    model, x = ConvNet(), images(5)
    omega = estimate_importance(model, [x], exclude=("head.*", "*.bias"))
    expected = naive(model, [x])
    kept = ("features.0.weight", "features.1.weight")
    assert_importance(omega, {name: expected[name] for name in kept}, atol=1e-6)


def test_a_pattern_that_excludes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exclude: got 'haed\.\*', which matches no parameter"):
        estimate_importance(ConvNet(), [images(2)], exclude=("haed.*",))
    with pytest.raises(TypeError, match="exclude: got the string"):
        estimate_importance(ConvNet(), [images(2)], exclude="head.*")


def test_channels_last_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())
    x = torch.randn(4, 2, 3, 3)
    expected = naive(model, [x])
    model = model.to(memory_format=torch.channels_last)
    assert_importance(estimate_importance(model, [x]), expected, atol=1e-6)


class Summed(nn.Module):
    """y = x sum_i theta_i, whose gradient autograd gives as one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.theta.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_expanded_gradients_count_like_dense_ones(backend: Any, dtype: torch.dtype) -> None:
    model = Summed().to(dtype)
    nn.init.constant_(model.theta, 0.25)
    total = ImportanceSum(backend=backend)
    total.add(model, torch.tensor([[1.0], [-2.0]], dtype=dtype))
    # y = 1.5 x, and 2 y x is 3 and 12.
    assert total.mean()["theta"].tolist() == [[7.5] * 3] * 2


def test_sparse_gradients_count_like_dense_ones() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    x = torch.tensor([[0, 1], [1, 1], [3, 0]])
    y, hidden = model(x).detach().double(), model[:2](x).detach().double()
    embedding = torch.zeros(5, 3, dtype=torch.float64)
    for sample in range(3):
        grads = (2 * y[sample] @ model[2].weight.detach().double()).reshape(2, 3)
        alone = torch.zeros(5, 3, dtype=torch.float64)
        for position in range(2):
            alone[x[sample, position]] += grads[position]
        embedding += alone.abs() / 3
    closed = {
        "0.weight": embedding,
        "2.weight": 2 * torch.einsum("ni,nj->ij", y.abs(), hidden.abs()) / 3,
        "2.bias": 2 * y.abs().mean(0),
    }
    assert_importance(estimate_importance(model, [x]), closed)


def test_a_parameter_that_changes_shape_between_batches_is_refused() -> None:
    model = nn.Linear(2, 1)
    total = ImportanceSum()
    total.add(model, torch.randn(3, 2))
    model.weight = nn.Parameter(torch.randn(2, 2))
    model.bias = nn.Parameter(torch.randn(2))
    with pytest.raises(ValueError, match=r"'weight': got shape \(2, 2\), expected \(1, 2\)"):
        total.add(model, torch.randn(3, 2))


# -- nothing else changes --------------------------------------------------------------------------


def test_dropout_is_off_and_batchnorm_uses_and_keeps_its_running_statistics() -> None:
    model, x = ConvNet(), images(6)
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert model.training
    for method in ("exact", "batch"):
        omega = estimate_importance(model, [x], method)
        assert_importance(omega, naive(model, [x], exact=method == "exact"), atol=1e-6)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in before.items())
    assert int(before["features.1.num_batches_tracked"]) == 1


def test_statistics_that_a_forward_pass_changed_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[3].register_buffer("empty", torch.zeros(0))
    before = {name: b.clone() for name, b in model.named_buffers()}

    def forward(model: Any, x: Tensor) -> Tensor:
        model[3].train()
        output: Tensor = model(x)
        return output

    estimate_importance(model, [torch.randn(5, 4)], "batch", forward=forward)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_modes_are_put_back_module_by_module_also_after_an_error(error: Any) -> None:
    model = ConvNet()
    model.features[1].eval()
    model.head[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen: set[bool] = set()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        seen.update(module.training for module in model.modules())
        if error is not None:
            raise error
        output: Tensor = model(x)
        return output

    if error is None:
        estimate_importance(model, [images(2)], forward=forward)
    else:
        with pytest.raises(error):
            estimate_importance(model, [images(2)], forward=forward)
    assert seen == {False}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2


def test_gradients_parameters_and_optimizer_state_are_untouched() -> None:
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters())
    model(images(4)).sum().backward()
    optimizer.step()
    model.head.zero_grad()
    kept = {name: p.grad for name, p in model.named_parameters()}
    before = copy.deepcopy([optimizer.state_dict(), model.state_dict(), kept])
    estimate_importance(model, [images(3)])
    assert all(p.grad is kept[name] for name, p in model.named_parameters())
    assert kept["head.3.weight"] is None
    now = [optimizer.state_dict(), model.state_dict(), kept]
    torch.testing.assert_close(now, before, rtol=0, atol=0)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(x.shape[0], 1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_random_state_is_untouched(shuffled: bool) -> None:
    """Neither by the model, nor by a loader that draws its order while it is read."""
    samples = [torch.randn(2) for _ in range(6)]
    batches = (
        DataLoader(samples, batch_size=3, shuffle=True) if shuffled else [torch.stack(samples)]
    )
    model, penalty = Noisy(2, 1), FusedMASPenalty(Noisy(2, 1))
    before = torch.get_rng_state()
    estimate_importance(model, batches)
    penalty.observe(samples[0][None])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    model, x = ConvNet(), images(3)
    with context():
        omega = estimate_importance(model, [x])
        assert not torch.is_grad_enabled()
    assert_importance(omega, naive(model, [x]), atol=1e-6)


def test_an_error_leaves_the_sums_as_they_were() -> None:
    model, x = nn.Linear(2, 1), torch.randn(3, 2)
    stop = False

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if stop:
            raise KeyboardInterrupt
        output: Tensor = model(x)
        return output

    total = ImportanceSum(forward=forward)
    total.add(model, x)
    before, stop = torch.get_rng_state(), True
    with pytest.raises(KeyboardInterrupt):
        total.add(model, torch.ones(3, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert total.samples == 3
    assert_importance(total.mean(), naive(model, [x]))


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_accumulate_in_float32(dtype: torch.dtype, backend: Any) -> None:
    """Each sample adds 2 |y x| = 1: a sum in bfloat16 stops at 256, one in float16 at 2048."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(model.weight, 0.5)
    samples = 600 if dtype == torch.bfloat16 else 2100
    total = ImportanceSum(backend=backend)
    total.add(model, torch.ones(samples, 1, dtype=dtype))
    assert total.sums["weight"].dtype == torch.float32
    assert total.sums["weight"].item() == samples
    assert total.mean()["weight"].item() == 1


def test_the_mean_may_take_the_memory_of_the_sums() -> None:
    model, total, x = ConvNet(), ImportanceSum(), images(4)
    total.add(model, x)
    before = {name: t.data_ptr() for name, t in total.sums.items()}
    omega = total.into_mean()
    assert {name: t.data_ptr() for name, t in omega.items()} == before
    assert_importance(omega, naive(model, [x]))
    assert (total.sums, total.samples, total.objective_sum) == ({}, 0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_squared_in_float32(dtype: torch.dtype) -> None:
    """y = 300, of which float16 can't hold the square; 2 y x = 600."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(model.weight, 300.0)
    omega = estimate_importance(model, [torch.ones(2, 1, dtype=dtype)])
    assert omega["weight"].item() == 600


def test_parameters_of_different_dtypes() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).double())

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        first, second = model.children()
        output: Tensor = second(first(x).double())
        return output

    x = torch.randn(4, 2)
    omega = estimate_importance(model, [x], forward=forward)
    assert [omega[f"{i}.weight"].dtype for i in (0, 1)] == [torch.float32, torch.float64]
    assert_importance(omega, naive(model, [x]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_are_refused_when_they_are_consolidated(bad: float) -> None:
    model = nn.Linear(2, 1)
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(3, 2)])
    omega = {name: t.clone() for name, t in penalty.omega.items()}
    x = torch.randn(3, 2)
    x[1, 0] = bad
    with pytest.raises(ValueError, match=r"got .*, expected finite"):
        penalty.consolidate([x])
    assert penalty.num_tasks == 1
    assert all(torch.equal(penalty.omega[name], t) for name, t in omega.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_observation_is_refused_and_the_good_ones_are_kept(bad: float) -> None:
    model = nn.Linear(2, 1)
    penalty, good = FusedMASPenalty(model, anchor="own"), torch.randn(3, 2)
    penalty.observe(good)
    with pytest.raises(ValueError, match=r"got .*, expected finite"):
        penalty.observe(torch.tensor([[1.0, 2.0], [bad, 1.0]]))
    penalty.consolidate()
    assert_importance(penalty.omega, naive(model, [good]))


def test_samples_that_batchnorm_mixes_are_refused_for_exact_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    model = model.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="model: 1 normalises over the batch even in eval mode"):
        estimate_importance(model, [x])
    omega = estimate_importance(model, [x], "batch", objective="vector")
    y, theta = model(x), list(model.parameters())
    closed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(4):
        grads = torch.autograd.grad(y[:, k].sum(), theta, retain_graph=True)
        for name, g in zip(closed, grads, strict=True):
            closed[name] += g.abs() / 5
    assert_importance(omega, closed, 1e-10, 1e-14)


def test_progress_goes_to_stderr_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = ConvNet(), [images(2), images(3)]
    omega = estimate_importance(model, batches, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "importance" in shown.err
    assert "2/2" in shown.err
    assert_importance(omega, naive(model, batches), atol=1e-6)
