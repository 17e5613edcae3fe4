"""Distillation against formulas written out in NumPy's float64, and a teacher that stays what it was."""

from __future__ import annotations

import copy
import pickle
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from interrupts import all_or_nothing
from torch import Tensor, nn

from mas_ext import Distillation, check_importance

Array = npt.NDArray[np.float64]


def probabilities(z: Array, temperature: float) -> Array:
    powers = np.exp(z / temperature - (z / temperature).max(-1, keepdims=True))
    found: Array = powers / powers.sum(-1, keepdims=True)
    return found


def divergence(z: Array, target: Array, temperature: float) -> Array:
    """KL(q* || q) over the last dimension."""
    q, old = probabilities(z, temperature), probabilities(target, temperature)
    found: Array = (old * (np.log(old) - np.log(q))).sum(-1)
    return found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def shift(model: nn.Module, by: float = 0.3) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += by * torch.randn_like(p)


def array(t: Tensor) -> Array:
    return t.detach().numpy()


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("distance", ["classes", "squared"])
@pytest.mark.parametrize("given", [False, True])
def test_value_and_gradient_are_those_of_the_formula(distance: Any, given: bool) -> None:
    model = network().eval()
    old = array(model(X))
    distill = Distillation(model, temperature=3.0, distance=distance)
    assert distill(X).item() == pytest.approx(0.0, abs=1e-15)
    shift(model)
    output = model(X)
    value = distill(X, output) if given else distill(X)
    new = array(output)
    if distance == "classes":
        expected = divergence(new, old, 3.0).mean()
        slope = (probabilities(new, 3.0) - probabilities(old, 3.0)) / 3.0 / len(X)
    else:
        expected, slope = ((new - old) ** 2).mean(), 2 * (new - old) / new.size
    assert expected > 1e-3
    assert value.item() == pytest.approx(expected, rel=1e-12)
    theta = [*model.parameters()]
    got = torch.autograd.grad(value, theta)
    right = torch.autograd.grad(model(X), theta, torch.from_numpy(slope))
    for g, r in zip(got, right, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-9, atol=1e-13)


def test_places_of_an_image_have_classes_in_dimension_1() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    old, distill = array(model(x)), Distillation(model)
    shift(model)
    new = array(model(x))
    expected = divergence(np.moveaxis(new, 1, -1), np.moveaxis(old, 1, -1), 2.0).mean()
    assert distill(x).item() == pytest.approx(expected, rel=1e-12)


class Text(nn.Module):
    """A causal model's interface: logits (N, positions, 7), after some virtual tokens."""

    def __init__(self, virtual: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.virtual = nn.Embedding(7, 7).double(), virtual

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        ids = nn.functional.pad(input_ids, (self.virtual, 0))
        return SimpleNamespace(logits=self.table(ids))


@pytest.mark.parametrize("virtual", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_count_where_the_mask_leaves_them_in(virtual: int, masked: bool) -> None:
    model = Text(virtual)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [2, 2, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": ids, "labels": ids}
    if masked:
        batch["attention_mask"] = mask
    old, distill = array(model(ids).logits), Distillation(model, distance="tokens")
    shift(model)
    each = divergence(array(model(ids).logits), old, 2.0)
    counts = np.pad(array(mask), ((0, 0), (virtual, 0))) if masked else np.ones_like(each)
    expected = (each * counts).sum() / counts.sum()
    assert distill(batch).item() == pytest.approx(expected, rel=1e-12)


def test_the_teacher_stays_while_the_model_trains() -> None:
    model = network()
    distill = Distillation(model)
    right = copy.deepcopy(model).eval()(X)
    before = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(X)
        (output.square().sum() + distill(X, output)).backward()
        optimizer.step()
    assert torch.equal(distill.teacher(X), right)
    assert all(p.grad is None for p in distill.teacher.parameters())
    assert all(module.training for module in model.modules())
    torch.set_rng_state(before)
    distill(X, output.detach())  # the teacher draws no random numbers
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_models_own_pass_is_differentiated() -> None:
    model = network().eval()
    distill = Distillation(model, distance="squared")
    assert not any(p.requires_grad for p in distill.teacher.parameters())
    shift(model)
    x = X.clone().requires_grad_()
    output = model(x)
    slope = 2 * (output - distill.teacher(X)).detach() / output.numel()
    (right,) = torch.autograd.grad(output, x, slope)
    (got,) = torch.autograd.grad(distill(x), x)
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-13)


class Adapted(nn.Module):
    """A frozen layer and a low-rank update, which eval() of its own would merge."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(4, 3).double().requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))

    def train(self, mode: bool = True) -> Adapted:
        if not mode:
            with torch.no_grad():
                self.base.weight += self.b @ self.a
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return found


def test_frozen_parameters_are_shared_and_adapters_copied() -> None:
    model = Adapted()
    base, old = model.base.weight.clone(), array(model(X))
    distill = Distillation(model, distance="squared")
    assert distill.teacher.base.weight is model.base.weight
    assert distill.teacher.a.data_ptr() != model.a.data_ptr()
    shift(model)
    expected = ((array(model(X)) - old) ** 2).mean()
    assert distill(X).item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(model.base.weight, base)
    assert [*distill.state_dict()] == ["a", "b"]


def test_what_is_thawed_is_copied_before_it_learns() -> None:
    model = Adapted()
    old, distill = array(model(X)), Distillation(model, distance="squared")
    model.base.requires_grad_(True)
    assert distill(X).item() == 0
    shift(model)
    expected = ((array(model(X)) - old) ** 2).mean()
    assert distill(X).item() == pytest.approx(expected, rel=1e-12)


def test_a_shared_parameter_that_was_changed_is_refused() -> None:
    model = Adapted()
    distill = Distillation(model)
    with torch.no_grad():
        model.base.weight += 1
    with pytest.raises(RuntimeError, match=r"parameter 'base\.weight': got other values"):
        distill(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copy_has_its_own_frozen_parameters(copied: Any) -> None:
    """Their values are those of the original, whatever was written to that before, and changes are refused."""
    model = network()
    model[0].requires_grad_(False)
    distill = Distillation(model)
    shift(model)
    again = copied(distill)
    distill.model.eval(), again.model.eval()
    assert again(X).item() == distill(X).item() > 0
    with torch.no_grad():
        again.model[0].weight += 1
    distill(X)
    for changed in (lambda: again(X), lambda: copied(again)):
        with pytest.raises(RuntimeError, match=r"parameter '0\.weight': got other values"):
            changed()


def test_an_adapter_that_is_merged_into_a_shared_weight_is_refused() -> None:
    model = Adapted()
    model.merged = False  # type: ignore[assignment]
    distill = Distillation(nn.Sequential(model))
    model.base.weight.data += 1  # unseen by autograd
    model.merged = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"layer '0': got its adapter merged, expected unmerged"):
        distill(X)


def test_new_classes_beside_the_old_ones_count_for_nothing() -> None:
    model = network().eval()
    old, distill = array(model(X)), Distillation(model)
    wide = nn.Linear(6, 5).double()
    with torch.no_grad():
        wide.weight[:3], wide.bias[:3] = model[3].weight + 0.5, model[3].bias
    model[3] = wide
    expected = divergence(array(model(X))[:, :3], old, 2.0).mean()
    assert distill(X).item() == pytest.approx(expected, rel=1e-12)


def test_in_16_bits_it_is_computed_in_32() -> None:
    model = network().eval()
    distill = Distillation(model.bfloat16())
    shift(model)
    x = X.bfloat16()
    new, old = (array(each(x).double()) for each in (model, distill.teacher))
    assert distill(x).dtype == torch.float32
    assert distill(x).item() == pytest.approx(divergence(new, old, 2.0).mean(), rel=1e-4)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_has_a_bare_teacher(wrap: Any) -> None:
    model = network().eval()
    distill = Distillation(wrap(model))
    assert type(distill.teacher) is nn.Sequential
    assert distill(X).item() == pytest.approx(0.0, abs=1e-15)


def test_a_resumed_training_has_its_teacher_again() -> None:
    model = network()
    distill = Distillation(model)
    model(X)  # moves running statistics
    shift(model)
    again = Distillation(copy.deepcopy(model))
    assert again(X).item() != distill(X).item()
    again.load_state_dict({name: t.clone() for name, t in distill.state_dict().items()})
    model.eval(), again.model.eval()
    assert again(X).item() == distill(X).item()
    before = distill.state_dict()
    for wrong, message in (
        ({}, r"state, '0.bias': got no tensor, expected \(6,\)"),
        ({**before, "0.bias": torch.ones(2)}, r"state, '0.bias': got \(2,\), expected \(6,\)"),
        ({**before, "more": torch.ones(2)}, r"state, 'more': got \(2,\), expected no tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(wrong)
    assert again(X).item() == distill(X).item()


@pytest.mark.parametrize("thawed", [False, True])
def test_an_interruption_at_any_line_leaves_the_old_teacher_or_the_new_one(thawed: bool) -> None:
    learned = network()
    shift(learned)
    other = Distillation(learned).state_dict()

    def make() -> Distillation:
        model = network()
        model[0].requires_grad_(False)
        made = Distillation(model)
        if thawed:
            model[0].requires_grad_(True)
            made(X)  # copies what will be trained
        return made

    def load(distill: Distillation) -> None:
        distill.load_state_dict({name: other[name] for name in distill.state_dict()})

    def held(distill: Distillation) -> Any:
        with torch.no_grad():
            shared = [p.detach().clone() for p in distill.model.parameters()]
            return distill(X, torch.zeros(5, 3)), distill.teacher(X), shared

    assert all_or_nothing(make, load, held) > 3


def test_a_forward_that_was_replaced_runs_the_teacher() -> None:
    """By a function that calls the model's own one, which a deep copy shares with it."""
    model = network().eval()
    own = model.forward

    def doubled(self: nn.Module, x: Tensor, again: bool = True) -> Tensor:
        return 2 * own(x) if again else doubled(self, x)

    model.forward = MethodType(doubled, model)  # type: ignore[method-assign]
    old = array(model(X))
    distill = Distillation(model, temperature=2.0)
    shift(model)
    expected = divergence(array(model(X)), old, 2.0).mean()
    assert expected > 1e-3
    assert float(distill(X).detach()) == pytest.approx(expected)
    assert model.forward.__func__ is doubled  # type: ignore[attr-defined]
    report = check_importance(model, X)
    assert max(row.error for row in report.rows) < 1e-12


def test_what_can_not_be_is_refused() -> None:
    model = network().eval()
    for value in (0.0, -1.0, float("nan"), float("inf"), "x", None):
        with pytest.raises(ValueError, match="temperature: got"):
            Distillation(model, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distance: got 'l2', expected one of"):
        Distillation(model, distance="l2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output: got list, expected a tensor"):
        Distillation(model, forward=lambda m, x: [m(x)])(X)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"output: got shape \(4, 3\), expected \(5, 3\)"):
        Distillation(model)(X, model(X[:4]))
    with pytest.raises(ValueError, match=r"with classes in dimension 1"):
        Distillation(model, forward=lambda m, x: m(x)[:, 0])(X)
    with pytest.raises(TypeError, match="batch: got Tensor, expected a mapping"):
        Distillation(model, distance="tokens")(X)
    text = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 4\)"):
        Distillation(Text(), distance="tokens")(text)
