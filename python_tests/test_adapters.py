"""Low-rank adapters held in weight space, against the penalty's definition on whole updates in float64."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_lora
from interrupts import Stop
from snapshots import equal
from torch import Tensor, nn
from torch.nn import functional as F
from toy_lora import LAYERS, Definition, Net, batches, make, move

import mas_ext.optim
from mas_ext import FusedMASPenalty
from mas_ext.importance import FisherSum
from mas_ext.integrations.loading import penalty_of
from mas_ext.optim import fused
from mas_ext.parameters import adapters
from mas_ext.parameters.adapters import (
    AdaptedWeight,
    Factor,
    LowRankProduct,
    adapted_weights,
)
from mas_ext.state.low_rank import keys_of_updates
from mas_ext.training import lam as lam_module
from mas_ext.training.lam import choose_lam, read_pull

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
RULES = [("sum", 1.0), ("consistent", 1.0), ("decay", 0.5)]


def penalty_and_definition(
    model: Net, merge: Any = "sum", gamma: float = 1.0, **options: Any
) -> tuple[FusedMASPenalty, Definition]:
    options = {"omega_dtype": torch.float64, **options}
    penalty = FusedMASPenalty(model, lam=0.7, merge=merge, gamma=gamma, **options)
    return penalty, Definition(model, 0.7, merge, gamma)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(penalty: FusedMASPenalty, definition: Definition, rtol: float = 1e-9) -> None:
    """Value and gradients, as a loss and in one pass."""
    expected, grads = definition().detach(), definition.gradients()
    value = penalty()
    torch.testing.assert_close(value.detach().double(), expected, rtol=rtol, atol=1e-25)
    model = penalty.model
    model.zero_grad()
    value.backward()
    by_loss = gradients(model)
    torch.testing.assert_close(penalty.add_grad_().double(), expected, rtol=rtol, atol=1e-25)
    in_one_pass = gradients(model)
    assert by_loss.keys() == in_one_pass.keys() == grads.keys()
    for name, grad in grads.items():
        scale = float(grad.abs().max())
        for found in (by_loss[name], in_one_pass[name]):
            torch.testing.assert_close(found.to(grad), grad, rtol=0, atol=rtol * scale + 1e-15)


@pytest.mark.parametrize(("merge", "gamma"), RULES)
def test_is_the_definition_over_tasks(merge: str, gamma: float) -> None:
    model = make()
    penalty, definition = penalty_and_definition(model, merge, gamma)
    assert float(penalty().detach()) == 0
    for task in range(3):
        move(model, task)
        if definition.tasks:
            assert_same(penalty, definition)
        data = batches(seed=task)
        penalty.consolidate(data)
        definition.consolidate(data)
        assert_same(penalty, definition)
    move(model)
    assert_same(penalty, definition)
    assert penalty.omega.keys() == {*LAYERS, "first.base.bias", "second.base.bias"} | {
        "head.weight",
        "head.bias",
    }
    for name in LAYERS:
        weights = sum(
            a * t[name] for a, t in zip(definition.alpha(), definition.tasks, strict=True)
        )
        torch.testing.assert_close(penalty.omega[name] * penalty.scale, weights)
        torch.testing.assert_close(penalty.anchor[name].double(), definition.anchor[name])


@pytest.mark.parametrize("omega_dtype", [torch.bfloat16, torch.uint8])
def test_fewer_bits_of_omega(omega_dtype: torch.dtype) -> None:
    """W is rounded once a task: to one of two neighbours, 2^-8 or 2^-3 apart."""
    model = make()
    penalty, definition = penalty_and_definition(model, omega_dtype=omega_dtype)
    for task in range(2):
        move(model, task)
        penalty.consolidate(batches(seed=task))
        definition.consolidate(batches(seed=task))
    step = 2.0**-7 if omega_dtype == torch.bfloat16 else 2.0**-3
    for name in LAYERS:
        exact = definition.tasks[0][name] + definition.tasks[1][name]
        floor = 2.0**-30 * float(exact.max())
        error = (penalty.omega[name].double() - exact).abs()
        assert bool((error <= 2 * step * exact + floor).all())
        assert float(error.max()) > 0
        definition.tasks[0][name] = penalty.omega[name].double()
        definition.tasks[1][name] = torch.zeros_like(exact)
    for name in definition.tasks[0].keys() - LAYERS.keys():
        definition.tasks[0][name] = penalty.omega[name].double()
        definition.tasks[1][name] = torch.zeros_like(definition.tasks[0][name])
    move(model)
    assert_same(penalty, definition, rtol=1e-6)


def test_state_takes_a_byte_a_weight() -> None:
    big = toy_lora.LoRA(500, 400, bias=False)
    big.add("default", rank=4)
    penalty = FusedMASPenalty(big.float(), omega_dtype=torch.uint8)
    penalty.consolidate([torch.randn(3, 500)])
    state = penalty.state_dict()
    taken = sum(t.numel() * t.element_size() for t in state.values())
    assert 200_000 < taken < 200_000 + 4 * 4 * 900 + 2_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make(torch.float64)
    penalty, definition = penalty_and_definition(model.to(dtype), omega_dtype=torch.float32)
    importance = {n: t.float() for n, t in toy_lora.importance(model, batches()).items()}
    definition.consolidate(batches())
    for name in importance:
        definition.tasks[0][name] = importance[name].double()
    penalty.consolidate(importance=importance)
    move(model)
    # The factors as they were rounded, and all else in float64.
    twin = Definition(copy.deepcopy(model).double(), 0.7)
    twin.tasks = definition.tasks
    twin.anchor = {n: a.double() for n, a in penalty.anchor.items()}
    grads = twin.gradients()
    torch.testing.assert_close(penalty.add_grad_().double(), twin().detach(), rtol=1e-5, atol=0)
    eps = torch.finfo(dtype).eps
    for name, found in gradients(model).items():
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(
            found.double(), grads[name], rtol=0, atol=(2 * eps + 1e-5) * scale
        )


def test_optimizers_take_it(tmp_path: Path) -> None:
    """A step of SGD with the penalty attached, torch's and the fused one, is theta - lr gradient."""
    for make_optimizer in (torch.optim.SGD, mas_ext.optim.SGD):
        model = make()
        penalty, definition = penalty_and_definition(model)
        penalty.consolidate(batches())
        definition.consolidate(batches())
        move(model)
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        grads = definition.gradients()
        optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad), lr=0.01)
        handle = penalty.attach(optimizer)
        model.zero_grad()
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            expected = theta[name] - 0.01 * grads.get(name, torch.zeros_like(p))
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)
        handle.remove()


def test_a_frozen_factor_gets_no_gradient() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    move(model)
    first = model.first
    first.down["default"].requires_grad_(False)
    assert_same(penalty, definition)


def test_saved_copied_pickled(tmp_path: Path) -> None:
    model = make()
    penalty, definition = penalty_and_definition(model, omega_dtype=torch.uint8)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    move(model)
    expected = penalty().detach()
    assert float(expected) > 0
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = FusedMASPenalty.load(tmp_path / "penalty.safetensors", model)
    other = FusedMASPenalty(model, lam=3, omega_dtype=torch.uint8)
    other.load_state_dict(penalty.state_dict())
    copied_model, copied = copy.deepcopy((model, penalty))
    pickled = pickle.loads(pickle.dumps(penalty))
    for found in (loaded, other, copied, pickled):
        assert torch.equal(found().detach(), expected)
        assert found.adapters == "weights"
    move(copied_model, 3)
    assert not torch.equal(copied().detach(), expected)
    assert torch.equal(penalty().detach(), expected)


def test_a_merged_adapter_leaves_no_anchor() -> None:
    """The weight itself has the update then, and a new adapter starts from it."""
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    state = penalty.state_dict()
    for layer in LAYERS.values():
        model.get_submodule(layer).merge()
    assert float(penalty().detach()) == 0
    for layer in LAYERS.values():
        model.get_submodule(layer).add("default", std=0.2)
    for name in LAYERS:
        definition.anchor[name] = torch.zeros_like(definition.anchor[name])
    assert_same(penalty, definition)
    fresh = FusedMASPenalty(model, omega_dtype=torch.float64)
    fresh.load_state_dict(state)
    assert_same(fresh, definition)
    penalty.consolidate(batches(seed=1))
    definition.consolidate(batches(seed=1))
    move(model)
    assert_same(penalty, definition)


def test_an_adapter_made_anew_over_the_same_weight_keeps_the_anchor() -> None:
    """As when a checkpoint is loaded into a new adapter."""
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    for layer in LAYERS.values():
        model.get_submodule(layer).add("default")
    assert_same(penalty, definition)


def test_another_adapter_has_no_anchor_until_its_task_ends() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    anchor = dict(definition.anchor)
    for layer in LAYERS.values():
        model.get_submodule(layer).add("other")
    for name in LAYERS:
        definition.anchor[name] = torch.zeros_like(anchor[name])
    assert_same(penalty, definition)
    for layer in LAYERS.values():  # both together
        model.get_submodule(layer).active = ["default", "other"]
    definition.anchor.update(anchor)
    assert_same(penalty, definition)
    for layer in LAYERS.values():  # none
        model.get_submodule(layer).active = []
    for name in LAYERS:
        definition.anchor[name] = torch.zeros_like(anchor[name])
    assert float(penalty().detach()) == pytest.approx(float(definition().detach()))
    for layer in LAYERS.values():
        model.get_submodule(layer).active = ["default"]
    definition.anchor.update(anchor)
    assert_same(penalty, definition)


@pytest.mark.parametrize("active", [["other"], []])
def test_an_adapter_keeps_its_anchor_through_tasks_without_it(active: list[str]) -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    anchor = dict(definition.anchor)
    for layer in LAYERS.values():
        if active:
            model.get_submodule(layer).add("other")
        model.get_submodule(layer).active = active
    penalty.consolidate(batches(seed=1))
    definition.consolidate(batches(seed=1))
    for layer in LAYERS.values():
        model.get_submodule(layer).active = ["default"]
    definition.anchor.update({name: anchor[name] for name in LAYERS})
    move(model)
    assert_same(penalty, definition)


def test_an_adapter_that_is_merged_leaves_the_others_their_anchors() -> None:
    """Found at consolidate too, where nothing was computed between."""
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    anchor = dict(definition.anchor)
    for layer in LAYERS.values():
        model.get_submodule(layer).add("other", std=0.5)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    for layer in LAYERS.values():
        one = model.get_submodule(layer)
        one.base.weight.data += one.update().detach()
        one.add("third")
    penalty.consolidate(batches())
    definition.consolidate(batches())
    for name, layer in LAYERS.items():
        assert penalty._state.memory.updates[name].anchor.keys() == {"default", "third"}
        model.get_submodule(layer).active = ["default"]
        definition.anchor[name] = anchor[name]
    move(model)
    torch.testing.assert_close(penalty().detach(), definition().detach())


def test_a_model_that_is_wrapped_is_followed() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    move(model)
    expected = definition().detach()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(model.first, nn.Tanh())

    inner = Outer()
    model.first, first = inner.inner[0], model.first
    del model._modules["first"]
    model.renamed = first
    with pytest.warns(RuntimeWarning, match="under other names"):
        value = penalty().detach()
    torch.testing.assert_close(value, expected)
    assert "renamed.weight" in penalty.omega


def test_a_model_that_is_wrapped_is_followed_into_the_next_task() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    given = torch.rand(3, 6, dtype=torch.float64)
    penalty.consolidate(importance={"second.weight": given})
    model.renamed = model.second
    del model.second
    with pytest.warns(RuntimeWarning, match="adapted weights under other names"):
        penalty.consolidate(importance={"renamed.weight": given})
    assert penalty.omega.keys() == {"renamed.weight"}
    torch.testing.assert_close(penalty.omega["renamed.weight"], 2 * given)


def test_observed_batches_count_as_given_ones() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    for batch in batches():
        penalty.observe(batch)
    penalty.consolidate()
    definition.consolidate(batches())
    move(model)
    assert_same(penalty, definition)


@pytest.mark.parametrize("merge", ["sum", "consistent"])
def test_sweeps_find_what_one_pass_finds(merge: str) -> None:
    """Each measures a part of the parameters; bits of frozen ones, modes and flags stay."""
    model = make()
    once, definition = penalty_and_definition(model, merge)
    several, _ = penalty_and_definition(model, merge)
    for task in range(2):
        move(model, task)
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        once.consolidate(batches(seed=task))
        several.consolidate(batches(seed=task), sweeps=3)
        definition.consolidate(batches(seed=task))
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
        for name, omega in once.omega.items():
            torch.testing.assert_close(several.omega[name], omega, rtol=1e-12, atol=0)
    move(model)
    assert_same(several, definition)
    with pytest.raises(ValueError, match="batches: got generator, which can be read once"):
        once.consolidate((b for b in batches()), sweeps=2)
    with pytest.raises(ValueError, match="sweeps: got 0"):
        once.consolidate(batches(), sweeps=0)


def test_the_model_is_as_it_was() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    before = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    penalty.check(batches()[0])
    penalty.consolidate(batches())
    with pytest.raises(RuntimeError, match=r"shape|size"):
        penalty.consolidate([torch.randn(2, 9, dtype=torch.float64)])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (address, trained, values) in before.items():
        assert id(after[name]) == address
        assert after[name].requires_grad == trained
        assert torch.equal(after[name], values)


def test_adapters_can_be_held_by_parameter() -> None:
    model = make()
    penalty = FusedMASPenalty(model, adapters="parameters")
    penalty.consolidate(batches())
    assert "first.up.default" in penalty.omega
    assert "first.weight" not in penalty.omega
    state = penalty.state_dict()
    with pytest.raises(ValueError, match=r"state: got 'first\.up\.default', held by itself"):
        FusedMASPenalty(model).load_state_dict(state)


def test_products_are_not_held_by_parameter() -> None:
    model = make()
    penalty = FusedMASPenalty(model)
    penalty.consolidate(batches())
    with pytest.raises(
        ValueError, match=r"state: got 'first\.weight', whose low-rank update is held"
    ):
        FusedMASPenalty(model, adapters="parameters").load_state_dict(penalty.state_dict())


DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rows": ("left.first.weight.default", lambda t: t[1:]),
    "rank": ("right.first.weight.default", lambda t: t[1:]),
    "columns": ("right.first.weight.default", lambda t: t[:, 1:]),
    "dimensions": ("left.first.weight.default", lambda t: t[:, 0]),
    "infinite": ("left.first.weight.default", lambda t: t / 0),
    "integers": ("right.first.weight.default", lambda t: t.long()),
    "rows of omega": ("omega.first.weight", lambda t: t[1:]),
    "columns of omega": ("omega.first.weight", lambda t: t[:, 1:]),
    "integers in omega": ("omega.first.weight", lambda t: t.long()),
    "negative": ("omega.first.weight", lambda t: t - 1 - t.max()),
    "sample": ("sample.first.weight", lambda t: t[1:]),
    "longer sample": ("sample.first.weight", lambda t: torch.cat([t, t])),
    "dtype of the sample": ("sample.first.weight", lambda t: t.float()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_updates_are_refused_by_name(damage: str) -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    penalty.consolidate(batches())
    value, state = float(penalty().detach()), penalty.state_dict()
    key, change = DAMAGE[damage]
    state[f"update.{key}"] = change(state[f"update.{key}"])
    kind, _, name = key.partition(".")
    with pytest.raises(ValueError, match=rf"state, .*{kind}.*{name}.*: got .*, expected"):
        penalty.load_state_dict(state)
    assert float(penalty().detach()) == value


@pytest.mark.parametrize(
    "change",
    [
        *({"unit": -1.0}, {"unit": INF}, {"unit": "x"}, {"unit": None}, {"more": 1}),
        *({"shape": [-6, 5]}, {"shape": [6.0, 5.0]}, {"shape": 30}),
        *({"scales": {"default": NAN}}, {"scales": ["default"]}),
    ],
)
def test_a_wrong_description_of_updates_is_refused(change: dict[str, Any]) -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    penalty.consolidate(batches())
    state = penalty.state_dict()
    config = json.loads(bytes(state["config"].tolist()))
    about = config["updates"]["first.weight"]
    config["updates"]["first.weight"] = {k: v for k, v in (about | change).items() if v is not None}
    state["config"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="'config' with wrong updates"):
        penalty.load_state_dict(state)


def test_updates_of_a_weight_without_rows_are_described_as_others() -> None:
    told = {"w": {"shape": [0, 4], "unit": 1.0, "scales": {"default": 1.0}}}
    parts = ("omega.w", "sample.w", "left.w.default", "right.w.default")
    assert keys_of_updates(told) == {f"update.{part}" for part in parts}


@pytest.mark.parametrize(("zero", "other"), [("up", "down"), ("down", "up")])
def test_a_factor_hidden_by_one_that_is_zero_is_told_of(zero: str, other: str) -> None:
    model = make()
    nn.init.zeros_(getattr(model.first, zero)["default"])
    penalty = FusedMASPenalty(model, adapters="parameters")
    said = rf"importance of 'first\.{other}\.default': got zero, as 'first\.{zero}\.default' is"
    with pytest.warns(RuntimeWarning, match=said):
        penalty.consolidate(batches())
    assert not penalty.omega[f"first.{other}.default"].any()
    assert penalty.omega[f"first.{zero}.default"].any()
    FusedMASPenalty(model).consolidate(batches())  # without a warning: the whole weight counts


def test_excluded_adapters_are_not_held() -> None:
    model = make()
    penalty = FusedMASPenalty(model, exclude=["first.*"])
    penalty.consolidate(batches())
    assert {n for n in penalty.omega if n.startswith("first")} == set()
    assert "second.weight" in penalty.omega


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "own"}, "anchor: got 'own' for low-rank updates"),
        ({"store": "per_task"}, "store: got 'per_task' for low-rank updates"),
        ({"adapters": "both"}, "adapters: got 'both'"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedMASPenalty(make(), **options)


class ConvLoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, 4, 2, bias=False).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 3, 2, 2))
        self.up = nn.Parameter(torch.randn(4, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.conv2d(F.conv2d(x, self.down), self.up)


def test_gradients_that_lie_in_memory_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def finder(module: nn.Module) -> AdaptedWeight | None:
        if not isinstance(module, ConvLoRA):
            return None
        product = LowRankProduct("default", Factor(module.up), Factor(module.down), 1.0)
        return AdaptedWeight(module.base, "weight", [product])

    monkeypatch.setattr(adapters, "_finders", [finder])
    torch.manual_seed(0)
    layer = ConvLoRA().double()
    penalty = FusedMASPenalty(nn.Sequential(layer), lam=0.7, omega_dtype=torch.float64)
    penalty.consolidate([torch.randn(3, 3, 4, 4, dtype=torch.float64)])
    weight = penalty.omega["0.weight"].reshape(4, -1) * penalty.scale

    def update() -> Tensor:
        return layer.up.flatten(1) @ layer.down.flatten(1)

    anchor = update().detach()
    move(layer)
    expected = torch.autograd.grad(
        (weight * (update() - anchor).square()).sum(), [layer.up, layer.down]
    )
    for p in (layer.up, layer.down):
        p.grad = torch.ones_like(p).to(memory_format=torch.channels_last)
    penalty.add_grad_()
    for p, grad in zip((layer.up, layer.down), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 1 + grad)


@pytest.mark.parametrize("kind", [mas_ext.optim.SGD, mas_ext.optim.AdamW])
@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_a_fused_step_that_fails_leaves_nothing_in_the_gradients(
    kind: Any, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[Net, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = make()
        penalty, _ = penalty_and_definition(model)
        penalty.consolidate(batches())
        move(model)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
        penalty.attach(optimizer)
        model(batches()[0]).square().sum().backward()
        model.first.up["default"].grad = None
        return model, optimizer

    (model, optimizer), (twin, other) = made(), made()
    before = {n: p.grad if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    def fail(*args: Any, **named: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(fused, "sgd_" if kind is mas_ext.optim.SGD else "adamw_", fail)
        with pytest.raises(failure):
            optimizer.step()
    assert equal({n: p.grad for n, p in model.named_parameters()}, before)
    optimizer.step()
    other.step()
    assert equal(model.state_dict(), twin.state_dict())
    after = {n: p.grad for n, p in model.named_parameters()}
    assert equal(after, {n: p.grad for n, p in twin.named_parameters()})
    assert after["first.up.default"] is not None


def test_the_proximal_form_is_refused() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (torch.optim.SGD(trained, lr=0.1), mas_ext.optim.SGD(trained, lr=0.1)):
        with pytest.raises(ValueError, match="mode: got 'proximal' for low-rank updates"):
            penalty.attach(optimizer, "proximal")


def test_importance_of_a_factor_is_refused() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    given = {"first.up.default": torch.ones(6, 2)}
    with pytest.raises(KeyError, match="whose update is held"):
        penalty.consolidate(importance=given)


def test_a_weight_of_another_shape_is_refused() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    penalty.consolidate(batches())
    model.first = toy_lora.LoRA(5, 6).double()
    model.first.add("default")
    with (
        pytest.warns(RuntimeWarning, match=r"parameter 'first\.base\.bias': got a new module"),
        pytest.raises(ValueError, match=r"got shape \(6, 5\), expected \(6, 4\)"),
    ):
        penalty()


def test_an_error_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    move(model)
    bad = {"first.weight": torch.full((6, 4), float("nan"))}
    with pytest.raises(ValueError, match=r"importance of 'first\.weight'"):
        penalty.consolidate(importance=bad)
    assert_same(penalty, definition)
    assert penalty.num_tasks == 1


def test_factors_that_are_not_finite_are_refused() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    with torch.no_grad():
        model.first.up["default"][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"adapters of 'first\.weight': got NaN or Inf"):
        penalty.consolidate(importance={"first.weight": torch.ones(6, 4)})
    assert penalty.num_tasks == 0


@pytest.mark.parametrize("omega_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [1e39, 3e38])
def test_importance_that_overflows_omega_is_refused(omega_dtype: torch.dtype, large: float) -> None:
    penalty = FusedMASPenalty(make(torch.float32), omega_dtype=omega_dtype)
    given = {"first.weight": torch.full((6, 4), large, dtype=torch.float64)}
    penalty.consolidate(importance={"first.weight": torch.full((6, 4), 1e38)})
    with pytest.raises(FloatingPointError, match=r"of 'first\.weight': .* omega overflows"):
        penalty.consolidate(importance=given)
    assert penalty.num_tasks == 1
    assert float(penalty.omega["first.weight"].max()) < 1.1e38


@pytest.mark.parametrize(("merge", "gamma"), RULES)
def test_importance_stays_when_the_weight_itself_is_trained(merge: Any, gamma: float) -> None:
    """After a merge into it, from the next consolidation on."""
    layer = toy_lora.LoRA(4, 6).double()
    layer.add("default")
    penalty = FusedMASPenalty(
        layer, merge=merge, gamma=gamma, omega_dtype=torch.float64, exclude=["*bias"]
    )
    old, new = (torch.rand(6, 4, dtype=torch.float64) for _ in range(2))
    penalty.consolidate(importance={"weight": old})
    layer.merge()
    inner = layer.base
    plain = FusedMASPenalty(
        inner, merge=merge, gamma=gamma, omega_dtype=torch.float64, exclude=["*bias"]
    )
    plain.load_state_dict(penalty.state_dict())
    inner.weight.requires_grad_(True)
    before = inner.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="got no adapter and a gradient"):
        assert float(plain().detach()) == 0
    plain.consolidate(importance={"weight": new})
    move(inner)
    kept, added = plain.alpha
    expected = kept * old + added * new
    value = (expected * (inner.weight - before) ** 2).sum().detach()
    torch.testing.assert_close(plain().detach(), value)
    again = FusedMASPenalty(
        inner, merge=merge, gamma=gamma, omega_dtype=torch.float64, exclude=["*bias"]
    )
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again().detach(), value)
    torch.testing.assert_close(plain.omega["weight"] * plain.scale, expected)


def test_a_new_model_takes_the_state_over() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    other = copy.deepcopy(model)
    move(other)
    definition.model = other
    options = {"lam": 0.7, "omega_dtype": torch.float64, "process_group": None}
    assert_same(penalty_of(other, penalty, 1, options), definition)


@pytest.mark.parametrize("how", ["as before", "merged", "another adapter"])
def test_the_pull_of_updates(how: str) -> None:
    """h is the dense penalty's gradient by autograd; d is from the anchor's factors, or from 0 without any."""
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    starts = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if how != "as before":
        for layer in LAYERS.values():
            if how == "merged":
                model.get_submodule(layer).merge()
            model.get_submodule(layer).add("later")
        definition.anchor |= {n: torch.zeros_like(definition.anchor[n]) for n in LAYERS}
        starts = {n: p for n, p in starts.items() if ".up." not in n and ".down." not in n}
    move(model)
    active = {
        n: p
        for n, p in model.named_parameters()
        if p.requires_grad and (".default" not in n or how == "as before")
    }
    model.zero_grad()
    (model(batches(seed=3)[0]) ** 3).sum().backward()
    h = dict(zip(active, torch.autograd.grad(definition(), [*active.values()]), strict=True))
    g = {n: p.grad for n, p in active.items()}
    d = {n: p.detach() - starts.get(n, torch.zeros_like(p)) for n, p in active.items()}

    def product(a: Any, b: Any) -> float:
        return float(sum((a[n] * b[n]).sum() for n in active))

    found = read_pull(penalty)
    assert found.ratio == pytest.approx((product(h, h) / product(g, g)) ** 0.5, rel=1e-9)
    assert found.at_rest == pytest.approx(-penalty.lam * product(g, d) / product(h, d), rel=1e-9)


def test_lam_of_updates_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lam that is chosen, learning stops where it should, and with ten times that much earlier.

    Of every step on the way back, products are of the loss's gradient, without the penalty's.
    """
    torch.manual_seed(0)
    model = make()
    penalty, _ = penalty_and_definition(model)
    penalty.consolidate(batches())
    x = torch.randn(64, 4, dtype=torch.float64)
    y = x[:, :2].tanh() - 0.5

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    def learn(steps: int = 600) -> Any:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.005)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            yield optimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    products, calls = lam_module._products, []

    def checked(penalty: FusedMASPenalty) -> Tensor:
        if calls:  # the first one is of the way that was gone, between steps
            with torch.enable_grad():
                slopes = torch.autograd.grad(loss(), trained)
            for p, slope in zip(trained, slopes, strict=True):
                torch.testing.assert_close(p.grad, slope)
        calls.append(penalty.lam)
        return products(penalty)

    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(lam_module, "_products", checked)
        lam = choose_lam(penalty, learn, lambda: (float(loss().detach()), ()))
    assert len(calls) == 300
    assert penalty.lam == 0.7
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name

    def unlearned(lam: float) -> float:
        model.load_state_dict(before)
        penalty.lam = lam
        steps = learn(1500)
        penalty.attach(next(steps))
        for _ in steps:
            pass
        return float(loss().detach())

    first = float(loss().detach())
    least = unlearned(0.0)
    shares = [(unlearned(lam * k) - least) / (first - least) for k in (1.0, 10.0)]
    assert shares[0] < 0.12
    assert shares[1] > 0.05


def test_gradients_go_to_the_chosen_factors_times_a_number() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model)
    penalty.consolidate(batches())
    definition.consolidate(batches())
    move(model)
    grads = definition.gradients()
    model.zero_grad()
    chosen = "first.up.default"
    only = {id(dict(model.named_parameters())[chosen])}
    penalty.add_grad_to(only, torch.tensor(3.0, dtype=torch.float64))
    found = gradients(model)
    assert found.keys() == {chosen}
    torch.testing.assert_close(found[chosen], 3 * grads[chosen])


def test_factors_of_several_dtypes_at_one_weight_are_refused() -> None:
    model = make()
    penalty, _ = penalty_and_definition(model)
    penalty.consolidate(batches())
    model.first.up["default"].data = model.first.up["default"].data.float()
    with pytest.raises(ValueError, match=r"adapters of 'first\.weight': got torch\.float32 on cpu"):
        penalty()


def test_state_on_the_cpu_goes_weight_by_weight() -> None:
    model = make()
    penalty, definition = penalty_and_definition(model, state_device="cpu")
    for task in range(2):
        move(model, task)
        penalty.consolidate(batches(seed=task))
        definition.consolidate(batches(seed=task))
    move(model)
    assert_same(penalty, definition)
    assert len([*penalty.updates()]) == len(LAYERS)


class Decoded(torch.autograd.Function):
    """x W^T for a W that is read from codes, and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Coded) -> Tensor:
        ctx.layer = layer
        return x @ layer.decoded().to(x).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.layer.decoded().to(grad), None


class Coded(nn.Module):
    """A linear layer that keeps codes of 8 bits, in a row, as libraries for quantised models do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.bias = layer.bias
        self.encode(layer.weight.detach())
        self.differentiable = True

    def encode(self, weight: Tensor) -> None:
        self.step = float(weight.abs().max()) / 127
        codes = (weight / self.step).round().to(torch.int8).flatten()
        self.weight = nn.Parameter(codes, requires_grad=False)

    def decoded(self) -> Tensor:
        return self.step * self.weight.view(self.out_features, self.in_features).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Decoded.apply(x if self.differentiable else x.detach(), self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def coded() -> tuple[Any, Net]:
    """A network with codes in one layer, and the same with what they stand for."""
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    layer = model.first.base = Coded(model.first.base)  # type: ignore[assignment]
    plain.first.base.weight.data = layer.decoded()
    return model, plain


def test_a_quantised_weight_is_held_as_any_other() -> None:
    model, plain = coded()
    penalty, definition = penalty_and_definition(model)
    definition.model = plain
    codes = model.first.base.weight
    before = codes.clone()
    for task in range(2):
        for one in (model, plain):
            move(one, task)
        data = batches(seed=task)
        penalty.consolidate(data, sweeps=1 + task)
        definition.consolidate(data)
        for name in LAYERS:
            expected = sum(t[name] for t in definition.tasks)
            torch.testing.assert_close(penalty.omega[name], expected)
        for one in (model, plain):
            move(one, 3)
        assert_same(penalty, definition)
    assert model.first.base.weight is codes
    assert torch.equal(codes, before)
    assert not model.first.base._forward_hooks
    state = penalty.state_dict()
    for other in (model, plain):  # the names and shapes are those of the weight
        fresh = FusedMASPenalty(other, omega_dtype=torch.float64)
        fresh.load_state_dict(state)
        assert_same(fresh, definition)


@pytest.mark.parametrize("importance", ["batch", "fisher"])
def test_importance_of_a_quantised_weight_by_other_methods(importance: str) -> None:
    model, plain = coded()
    found = []
    for one in (model, plain):
        method: Any = importance
        data: list[Any] = batches()
        if importance == "fisher":
            method = FisherSum(labels="true")
            data = [(b, torch.tensor([0, 1, 1, 0])) for b in data]
        penalty = FusedMASPenalty(one, importance=method, omega_dtype=torch.float64)
        penalty.consolidate(data)
        found.append(penalty.omega)
    for name in LAYERS:
        assert float(found[1][name].min()) > 0
        torch.testing.assert_close(found[0][name], found[1][name])


def test_local_importance_of_a_quantised_weight_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r'importance of first\.base\..*: "local" is that of layers'
    ):
        FusedMASPenalty(coded()[0], importance="local").consolidate(batches())


def test_a_quantised_layer_without_a_gradient_is_refused() -> None:
    """What lies before it would have too little importance."""

    class Before(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.before(x))

    model = Before().double()
    model.before = nn.Linear(4, 4).double()
    model.first.add("default")
    model.first.base = Coded(model.first.base)  # type: ignore[assignment]
    model.first.base.bias.requires_grad_(False)
    FusedMASPenalty(model).consolidate(batches())
    model.first.base.differentiable = False
    with pytest.raises(ValueError, match="got a Coded whose output has no gradient of its input"):
        FusedMASPenalty(model).consolidate(batches())
    assert "adapted_weight" not in dict(model.first.base.named_parameters())


class Fused(toy_lora.LoRA):
    """Weight and adapter in one kernel, which has gradients of the input and the adapter alone."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight, up, down)
            return x @ (weight + up @ down).T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight, up, down = ctx.saved_tensors
            whole = grad.T @ x
            return grad @ (weight + up @ down), None, whole @ down.T, up.T @ whole

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        weight = base.decoded() if isinstance(base, Coded) else base.weight
        (name,) = self.active
        up = self.scale[name] * self.up[name]
        y: Tensor = self.Kernel.apply(x, weight, up, self.down[name])  # type: ignore[no-untyped-call]
        return y + base.bias


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_fused_adapter_is_refused(quantised: bool, sweeps: int) -> None:
    """Nothing would be known of the weight's importance, which would count as zero."""
    model: Any = coded()[0] if quantised else make()
    fused = Fused(4, 6).double()
    fused.add("default")
    fused.base, model.first = model.first.base, fused
    penalty = FusedMASPenalty(model)
    named = f"first.base, a {type(fused.base).__name__}"
    with pytest.raises(ValueError, match=f"model: {named}, gives no gradient of its weight"):
        penalty.consolidate(batches(), sweeps=sweeps)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "base.weight" in n)
    by_parameter = FusedMASPenalty(model, adapters="parameters", omega_dtype=torch.float64)
    by_parameter.consolidate(batches())
    assert float(by_parameter.omega["first.up.default"].min()) > 0


def test_a_model_of_fused_adapters_alone_is_refused() -> None:
    """No output of it depends on what would be measured."""
    fused = Fused(4, 6).double()
    fused.add("default")
    fused.base = Coded(fused.base)  # type: ignore[assignment]
    fused.base.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="a Coded, gives no gradient of its weight"):
        FusedMASPenalty(nn.Sequential(fused)).consolidate(batches())


def test_an_adapter_that_a_batch_does_not_need_is_none() -> None:
    """As of an expert that gets no rows: its importance is zero."""

    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x @ x.new_ones(4, 3)) if x.shape else self.second(x))

    model = Routed().double()
    for layer in LAYERS.values():
        model.get_submodule(layer).add("default")
    penalty = FusedMASPenalty(model, omega_dtype=torch.float64)
    penalty.consolidate(batches())
    assert not penalty.omega["first.weight"].any()
    assert penalty.omega["head.weight"].all()


def test_what_stands_in_for_a_quantised_weight_takes_no_memory() -> None:
    model = coded()[0]
    with adapters.measured(adapted_weights(model)) as weights:
        found = weights["first.weight"]
        assert found.shape == (6, 4)
        assert found.untyped_storage().nbytes() == found.itemsize


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_merge_is_told_from_rounding(seed: int, rounded: bool, merged: bool) -> None:
    """Of an update of a 16th of the codes' step, into what they were made of; of a whole step into them."""
    torch.manual_seed(seed)
    model = nn.Sequential(toy_lora.LoRA(96, 80, bias=False))
    original = model[0].base.weight.detach().clone()
    model[0].base = Coded(model[0].base)  # type: ignore[assignment]
    layer: Any = model[0].base
    down, up = torch.randn(1, 96).sign(), torch.randn(80, 1).sign() * layer.step / 16
    model[0].down["default"], model[0].up["default"] = nn.Parameter(down), nn.Parameter(up)
    model[0].scale["default"], model[0].active = 1.0, ["default"]
    update = up @ down
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(3, 96)])
    assert float(penalty().detach()) < 1e-12
    if rounded:
        layer.encode(layer.decoded() + (16 * update if merged else 0))
    else:
        layer = model[0].base = nn.Linear(96, 80, bias=False)
        layer.weight = nn.Parameter(original + (update if merged else 0), requires_grad=False)
    model[0].down["default"] = nn.Parameter(down.clone())  # another adapter's, as far as is known
    expected = float((penalty.omega["0.weight"] * update**2).sum()) if merged else 0.0
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_a_table_of_codes_is_held_by_parameter() -> None:
    """Quantised weights may be tensor subclasses that call themselves floating-point."""

    class Codes(Tensor):
        pass

    model = make()
    layer: Any = model.first
    layer.base = nn.Embedding(6, 4)
    layer.base.weight = nn.Parameter(torch.zeros(6, 4).as_subclass(Codes), requires_grad=False)
    assert adapted_weights(model).keys() == {"second.weight"}


def test_threads_that_consolidate_wait_for_each_other() -> None:
    """While one measures whole weights, these look like trained ones without adapters to hold."""
    model = make()
    penalty, definition = penalty_and_definition(model)
    other, _ = penalty_and_definition(model)
    started, found = threading.Event(), []

    def slow() -> Iterator[Tensor]:
        for batch in batches():
            started.set()
            thread.join(0.2)
            yield batch

    def consolidate() -> None:
        started.wait()
        other.consolidate(batches())
        found.append({*other.omega})

    thread = threading.Thread(target=consolidate)
    thread.start()
    penalty.consolidate(slow())
    thread.join()
    definition.consolidate(batches())
    move(model)
    assert found == [{*penalty.omega}]
    assert_same(penalty, definition)
    assert_same(other, definition)


def test_an_interruption_at_any_line_leaves_model_and_state() -> None:
    """Whole weights are measured for a while; all comes back, and the state is the old or the new."""
    made = coded()[0]
    first = FusedMASPenalty(made, lam=0.7, omega_dtype=torch.float64)
    first.consolidate(batches())
    move(made)

    def again() -> FusedMASPenalty:
        copied: FusedMASPenalty = copy.deepcopy((made, first))[1]
        return copied

    def seen(penalty: FusedMASPenalty) -> dict[str, Tensor]:
        return {n: w.clone() for n, w in penalty.omega.items()} | {"value": penalty().detach()}

    def act(penalty: FusedMASPenalty) -> None:
        penalty.consolidate(batches(1), sweeps=2)

    within = adapters.__file__
    count, done = Stop(None, KeyboardInterrupt, within), again()
    before = seen(again())
    count.run(lambda: act(done))
    after = seen(done)
    for at in range(1, count.lines + 1):
        penalty = again()
        kept = {n: (id(p), p.requires_grad) for n, p in penalty.model.named_parameters()}
        stop = Stop(at, KeyboardInterrupt, within)
        with suppress(KeyboardInterrupt):  # one that comes too late leaves the new state
            stop.run(lambda p=penalty: act(p))  # type: ignore[misc]
        now = {n: (id(p), p.requires_grad) for n, p in penalty.model.named_parameters()}
        assert now == kept, f"{stop.place}: line {at}"
        assert not any(module._forward_hooks for module in penalty.model.modules())
        found = seen(penalty)
        assert any(
            all(torch.equal(found[n], t) for n, t in state.items()) for state in (before, after)
        ), f"{stop.place}: line {at}"
