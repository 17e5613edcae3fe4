"""FusedMASPenalty inside models and loops, against autograd over the plain sum of tasks in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import FusedMASPenalty, compat
from mas_ext.kernels import backends

Snapshot = tuple[dict[str, Tensor], dict[str, Tensor]]


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype) for n in (5, 3)]


def importance(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean over samples of |d ||F||^2 / d theta|, a sample at a time."""
    theta = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in theta.items()}
    samples = [x for batch in batches for x in batch]
    for x in samples:
        grads = torch.autograd.grad(model(x[None]).square().sum(), list(theta.values()))
        for name, grad in zip(theta, grads, strict=True):
            total[name] += grad.double().abs() / len(samples)
    return total


def snapshot(model: nn.Module, batches: list[Tensor]) -> Snapshot:
    anchor = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    return importance(model, batches), anchor


def shift(model: nn.Module, seed: int, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


MAS_ALPHA: dict[str, Any] = {"merge": "consistent", "anchor": "own"}


def expected_penalty(model: nn.Module, history: list[Snapshot], alpha: list[float]) -> Tensor:
    return sum(  # type: ignore[return-value]
        a * (omega[name] * (p.double() - anchor[name]) ** 2).sum()
        for a, (omega, anchor) in zip(alpha, history, strict=True)
        for name, p in model.named_parameters()
    )


def trained(
    tasks: int = 3, **arguments: Any
) -> tuple[nn.Sequential, FusedMASPenalty, list[Snapshot]]:
    model = make_model()
    given = {**MAS_ALPHA, **arguments}
    penalty = FusedMASPenalty(model, omega_dtype=torch.float64, **given)
    history = []
    for t in range(tasks):
        history.append(snapshot(model, data(t)))
        penalty.consolidate(data(t))
        shift(model, t)
    return model, penalty, history


def consistent_alpha(history: list[Snapshot], lam: float) -> list[float]:
    inverse = [1 / sum(float(w.sum()) for w in omega.values()) for omega, _ in history]
    return [lam * len(history) * r / sum(inverse) for r in inverse]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_value_and_gradient_in_the_loss(backend: str) -> None:
    model, penalty, history = trained(lam=0.5, backend=backend)
    alpha = consistent_alpha(history, 0.5)
    expected = expected_penalty(model, history, alpha)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    value = penalty()
    (3 * value).backward()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    for p, grad in zip(model.parameters(), expected_grads, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(penalty.alpha, torch.tensor(alpha, dtype=torch.float64))
    assert penalty.num_tasks == 3


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_add_grad_is_the_loss_form_without_autograd(backend: str) -> None:
    model, penalty, history = trained(lam=0.5, backend=backend)
    expected = expected_penalty(model, history, consistent_alpha(history, 0.5))
    grads = torch.autograd.grad(expected, list(model.parameters()))
    first, *rest = model.parameters()
    for p in rest:
        p.grad = torch.ones_like(p)
    value = penalty.add_grad_()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert not value.requires_grad
    torch.testing.assert_close(first.grad, grads[0], rtol=1e-9, atol=1e-12)
    for p, grad in zip(rest, grads[1:], strict=True):
        torch.testing.assert_close(p.grad, 1 + grad, rtol=1e-9, atol=1e-12)


def test_zero_before_the_first_task_and_differentiable() -> None:
    model = make_model(torch.float32)
    penalty = FusedMASPenalty(model)
    value = penalty()
    assert value.item() == 0
    assert value.dtype == torch.float32
    assert value.requires_grad
    (model(torch.ones(1, 4)).sum() + value).backward()
    assert penalty.add_grad_().item() == 0
    assert penalty.omega == {}
    assert penalty.alpha.shape == (0,)


def test_the_model_stays_put_under_a_strong_penalty() -> None:
    model, penalty, history = trained(tasks=1, lam=1e3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        important = history[0][0][name] > 1e-3
        gone = (p - history[0][1][name])[important].abs()
        assert gone.numel() > 0
        assert gone.max() < 2e-2


def test_omega_and_anchor_by_name_reproduce_the_value() -> None:
    model, penalty, _ = trained()
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def quadratic() -> float:
        return float(
            penalty.scale
            * sum((penalty.omega[n] * (p - penalty.anchor[n]) ** 2).sum() for n, p in theta.items())
        )

    before, was = quadratic(), penalty().item()
    shift(model, 9)
    assert quadratic() - before == pytest.approx(penalty().item() - was, rel=1e-9)
    assert set(penalty.omega) == set(theta)


def test_observing_is_consolidating_from_batches() -> None:
    _, penalty, history = trained(tasks=1)
    model = make_model()
    online = FusedMASPenalty(model, omega_dtype=torch.float64, **MAS_ALPHA)
    for batch in data(0):
        online.observe(batch)
    with pytest.raises(RuntimeError, match="got importance from batches and observed samples"):
        online.consolidate(data(0))
    online.consolidate()
    for name, omega in online.omega.items():
        torch.testing.assert_close(
            omega * online._state.memory.entries[0].total, history[0][0][name]
        )
        torch.testing.assert_close(omega, penalty.omega[name])
    with pytest.raises(RuntimeError, match="got importance from nowhere"):
        online.consolidate()


def test_importance_computed_elsewhere() -> None:
    model = make_model()
    penalty = FusedMASPenalty(model, omega_dtype=torch.float64, merge="sum", lam=0.3)
    history = [snapshot(model, data(0))]
    penalty.consolidate(importance=history[0][0])
    shift(model, 1)
    expected = expected_penalty(model, history, [0.3])
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-12)
    penalty.observe(data(1)[0])
    with pytest.raises(RuntimeError, match="from importance and observed samples"):
        penalty.consolidate(importance=history[0][0])


def test_an_estimator_of_its_own_makes_the_penalty_of_ewc(tmp_path: Path) -> None:
    def build(model: nn.Module, merge: Any) -> FusedMASPenalty:
        fisher = mas_ext.FisherSum("true")
        return FusedMASPenalty(model, importance=fisher, merge=merge, omega_dtype=torch.float64)

    batches = [(x, torch.arange(len(x)) % 3) for x in data(0)]
    for merge in ("sum", "consistent"):
        model = make_model()
        penalty, online = build(model, merge), build(model, merge)
        theta = dict(model.named_parameters())
        fisher = {name: torch.zeros_like(p) for name, p in theta.items()}
        for x, y in ((x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)):
            log_p = model(x[None]).log_softmax(1)[0, y]
            grads = torch.autograd.grad(log_p, list(theta.values()))
            for name, grad in zip(theta, grads, strict=True):
                fisher[name] += grad**2 / 8
        total = sum(float(f.sum()) for f in fisher.values()) if merge == "consistent" else 1.0
        penalty.consolidate(batches)
        for batch in batches:
            online.observe(batch)
        online.consolidate()
        for name, f in fisher.items():
            torch.testing.assert_close(penalty.omega[name], f / total)
            torch.testing.assert_close(online.omega[name], f / total)

        penalty.save(tmp_path / "ewc.safetensors")
        with pytest.raises(ValueError, match="importance: got none, expected the estimator"):
            FusedMASPenalty.load(tmp_path / "ewc.safetensors", model)
        again = FusedMASPenalty.load(
            tmp_path / "ewc.safetensors", model, importance=mas_ext.FisherSum("true")
        )
        again.consolidate(batches)
        assert torch.equal(again.alpha, penalty.alpha[[0, 0]])
    with pytest.raises(
        ValueError, match=r"exclude: got \('0.bias',\), expected \(\) as in importance"
    ):
        FusedMASPenalty(model, importance=mas_ext.FisherSum(), exclude=("0.bias",))


@pytest.mark.parametrize("merge", ["consistent", "sum", "decay"])
@pytest.mark.parametrize("rule", ["latest", "own"])
def test_adapting_adds_an_entry(merge: str, rule: str) -> None:
    model, penalty, history = trained(tasks=1, merge=merge, anchor=rule, lam=2.0)
    omega, anchor = snapshot(model, data(7))
    penalty.adapt(data(7), weight=0.5)
    shift(model, 8)
    if rule == "latest":
        anchor = history[0][1]
    if merge == "consistent":
        totals = [sum(float(w.sum()) for w in o.values()) for o in (history[0][0], omega)]
        scale = 2.0 * 1.5 / (1 / totals[0] + 0.5 / totals[1])
        alpha = [scale / totals[0], scale * 0.5 / totals[1]]
    else:
        alpha = [2.0, 1.0]
    expected = expected_penalty(model, [history[0], (omega, anchor)], alpha)
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-9)
    assert penalty.num_tasks == 2


@pytest.mark.parametrize("merge", ["sum", "decay"])
def test_every_task_moves_the_latest_anchor(merge: str) -> None:
    given = {"merge": merge, "anchor": "latest", "gamma": 0.5}
    model, penalty, history = trained(tasks=2, lam=2.0, **given)
    anchor = history[-1][1]
    faded = 1.0 if merge == "sum" else 0.5
    expected = expected_penalty(model, [(o, anchor) for o, _ in history], [2.0 * faded, 2.0])
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_weight_of_a_task() -> None:
    model, penalty, history = trained(tasks=1, merge="sum", lam=2.0)
    history.append(snapshot(model, data(1)))
    penalty.consolidate(data(1), weight=0.25)
    shift(model, 5)
    expected = expected_penalty(model, history, [2.0, 0.5])
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_renamed_layer_keeps_what_is_remembered() -> None:
    model, penalty, history = trained()
    expected = expected_penalty(model, history, consistent_alpha(history, 1.0))
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)
    model._modules["head"] = model._modules.pop("2")
    for kind in ("weight", "bias"):
        penalty.rename(f"2.{kind}", f"head.{kind}")
    assert set(penalty.omega) == {"0.weight", "0.bias", "head.weight", "head.bias"}
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)


def test_lam_can_change_at_any_time() -> None:
    model, penalty, history = trained(lam=0.5)
    address = penalty._state.memory.groups[0].state.alpha.data_ptr()
    penalty.lam = 4.0
    expected = expected_penalty(model, history, consistent_alpha(history, 4.0))
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)
    # In place, so that a captured graph sees it.
    assert penalty._state.memory.groups[0].state.alpha.data_ptr() == address
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam: got"):
            penalty.lam = bad
        with pytest.raises(ValueError, match="lam: got"):
            FusedMASPenalty(model, lam=bad)
    assert penalty.lam == 4.0


def test_per_task_entries_can_be_weighted_and_dropped() -> None:
    model, penalty, history = trained(store="per_task", merge="sum", lam=2.0)
    penalty.set_weight(1, 0.25)
    penalty.drop(0)
    expected = expected_penalty(model, history[1:], [0.5, 2.0])
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)
    for t in (2, -1):
        with pytest.raises(IndexError, match=f"t: got {t}"):
            penalty.drop(t)
    _, merged, _ = trained()
    with pytest.raises(RuntimeError, match="per_task"):
        merged.drop(0)


def test_importance_from_elsewhere_must_be_tensors() -> None:
    penalty = FusedMASPenalty(make_model())
    with pytest.raises(TypeError, match=r"importance of '0.bias': got ndarray, expected a tensor"):
        penalty.consolidate(importance={"0.bias": torch.ones(6).numpy()})  # type: ignore[dict-item]
    assert penalty.num_tasks == 0


def test_it_tells_what_it_is() -> None:
    penalty = FusedMASPenalty(make_model(), lam=0.5, merge="sum")
    penalty.consolidate(data(0))
    shown = "FusedMASPenalty(lam=0.5, merge='sum', anchor='latest', store='merged', num_tasks=1)"
    assert repr(penalty) == shown


def test_excluded_parameters_are_free() -> None:
    model, penalty, _ = trained(exclude=("2.*",))
    assert set(penalty.omega) == {"0.weight", "0.bias"}
    penalty().backward()
    assert model[2].weight.grad is None
    with pytest.raises(ValueError, match=r"exclude: got 'head.\*', which matches no parameter"):
        FusedMASPenalty(model, exclude=("head.*",))
    with pytest.raises(TypeError, match="exclude: got the string"):
        FusedMASPenalty(model, exclude="2.*")


# Of several patterns that match a name, the last one counts.
STRENGTH = {"*.weight": 0.25, "0.*": 3.0, "2.bias": 0}
FACTORS = {"0.weight": 3.0, "0.bias": 3.0, "2.weight": 0.25, "2.bias": 0.0}


@pytest.mark.parametrize("given", ["batches", "observed", "importance"])
@pytest.mark.parametrize("merge", ["sum", "consistent"])
def test_strength_multiplies_importance_before_its_sum(merge: Any, given: str) -> None:
    model, scaled = make_model(), []
    penalty = FusedMASPenalty(
        model, merge=merge, anchor="own", omega_dtype=torch.float64, strength=STRENGTH
    )
    for t in range(3):
        omega, anchor = snapshot(model, data(t))
        scaled.append(({name: FACTORS[name] * w for name, w in omega.items()}, anchor))
        if given == "importance":
            before = {name: w.clone() for name, w in omega.items()}
            penalty.consolidate(importance=omega)
            assert all(torch.equal(w, before[name]) for name, w in omega.items())
        elif given == "observed":
            for batch in data(t):
                penalty.observe(batch)
            penalty.consolidate()
        else:
            penalty.consolidate(data(t))
        shift(model, t)
    omega, anchor = snapshot(model, data(3))
    scaled.append(({name: FACTORS[name] * w for name, w in omega.items()}, anchor))
    penalty.adapt(data(3))
    shift(model, 3)
    alpha = consistent_alpha(scaled, 1.0) if merge == "consistent" else [1.0] * 4
    expected = expected_penalty(model, scaled, alpha).item()
    assert penalty().item() == pytest.approx(expected, rel=1e-10)
    assert torch.count_nonzero(penalty.omega["2.bias"]) == 0


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (
            {"0.*": 1, "head.*": 2},
            ValueError,
            r"strength: got 'head.\*', which matches no parameter",
        ),
        (
            {"0.*": -1.0},
            ValueError,
            r"strength of '0.\*': got -1.0, expected a finite number from 0",
        ),
        ({"*": float("inf")}, ValueError, r"strength of '\*': got inf, expected a finite number"),
        (["*"], TypeError, "strength: got list, expected a mapping from patterns to factors"),
    ],
)
def test_wrong_strengths_are_refused(strength: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedMASPenalty(make_model(), strength=strength)


def test_strength_is_saved(tmp_path: Path) -> None:
    model, penalty, _ = trained(strength=STRENGTH)
    penalty.save(tmp_path / "file")
    loaded = FusedMASPenalty.load(tmp_path / "file", model)
    for each in (penalty, loaded):
        each.consolidate(data(7))
    assert all(torch.equal(w, loaded.omega[name]) for name, w in penalty.omega.items())
    assert torch.count_nonzero(loaded.omega["2.bias"]) == 0


def half_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()


def test_three_bytes_per_parameter() -> None:
    model = half_model()
    penalty = FusedMASPenalty(model, omega_dtype=torch.uint8, anchor_dtype=torch.bfloat16)
    for t in range(2):
        penalty.consolidate([torch.randn(3, 64).bfloat16()])
        shift(model, t)
    (group,) = penalty._state.memory.groups
    held = {name: t.nbytes for name, t in group.state._asdict().items() if isinstance(t, Tensor)}
    parameters = sum(p.numel() for p in model.parameters())
    assert held["omega"] + held["anchor"] == 3.0 * parameters
    assert sum(held.values()) + group.remainders.nbytes <= 3.01 * parameters


@pytest.mark.parametrize("form", ["loss", "add_grad_", "gradient", "proximal"])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, partial(mas_ext.optim.AdamW, eps=0.01)], ids=["SGD", "AdamW"]
)
@pytest.mark.parametrize("options", [{}, {"store": "per_task"}, {"state_device": "cpu"}])
def test_anchors_of_16_bits_train_to_the_bits_of_float32(
    form: Any, optimizer: Any, options: Any
) -> None:
    results = []
    for anchor_dtype in (torch.bfloat16, None):
        model = half_model()
        penalty = FusedMASPenalty(
            model, 0.01, omega_dtype=torch.uint8, anchor_dtype=anchor_dtype, **options
        )
        stepped = optimizer(model.parameters(), lr=0.01)
        if form in ("gradient", "proximal"):
            penalty.attach(stepped, form)
        values = []
        for t in range(3):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(t)).bfloat16()
            for _ in range(3):
                stepped.zero_grad()
                loss = (model(x) - 1).square().mean()
                (loss + penalty() if form == "loss" else loss).backward()
                if form == "add_grad_":
                    penalty.add_grad_()
                stepped.step()
                values.append(penalty().detach())
            if t == 1:
                penalty.adapt([x])
            else:
                penalty.consolidate([x])
        anchors = penalty.anchor
        # Read task by task, anchors are their mean.
        kept = torch.float32 if options.get("store") else anchor_dtype or torch.float32
        assert {a.dtype for a in anchors.values()} == {kept}
        numbers = [*penalty.omega.values(), *(a.float() for a in anchors.values())]
        results.append([*(p.detach() for p in model.parameters()), *values, *numbers])
        assert values[-1] > 0
    for narrow, wide in zip(*results, strict=True):
        assert torch.equal(narrow, wide)


def test_parameters_of_other_dtypes_keep_their_anchors() -> None:
    dtypes = {"0": torch.bfloat16, "1": torch.float32, "2": torch.float16, "3": torch.float64}
    model = nn.Sequential(*(nn.Linear(3, 2, bias=False, dtype=d) for d in dtypes.values()))
    penalty = FusedMASPenalty(model, anchor_dtype=torch.bfloat16)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty.consolidate(importance={name: torch.ones(2, 3) for name in theta})
    found = {name.split(".")[0]: a.dtype for name, a in penalty.anchor.items()}
    assert found == {**dtypes, "2": torch.float32}
    model.bfloat16()
    for name, a in penalty.anchor.items():
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, theta[name].bfloat16())
    model.float()
    for name, a in penalty.anchor.items():
        assert a.dtype == torch.float32
        assert torch.equal(a, theta[name].bfloat16().float())


@pytest.mark.parametrize(
    ("anchor", "dtype", "message"),
    [
        (
            "own",
            torch.bfloat16,
            "anchor_dtype: got torch.bfloat16 with anchor 'own', expected None",
        ),
        (
            "latest",
            torch.float32,
            "anchor_dtype: got torch.float32, expected one of None, torch.bf",
        ),
    ],
)
def test_wrong_anchor_dtypes_are_refused(anchor: Any, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedMASPenalty(half_model(), anchor=anchor, anchor_dtype=dtype)


def test_frozen_parameters_count_in_the_value_and_get_no_gradient() -> None:
    model, penalty, history = trained()
    expected = expected_penalty(model, history, consistent_alpha(history, 1.0))
    model[0].weight.requires_grad_(False)
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-10)
    assert penalty.add_grad_().item() == pytest.approx(expected.item(), rel=1e-10)
    assert model[0].weight.grad is None
    (grad,) = torch.autograd.grad(expected, [model[0].bias])
    torch.testing.assert_close(model[0].bias.grad, grad, rtol=1e-9, atol=1e-12)


def test_a_replaced_head_is_noticed() -> None:
    model, penalty, history = trained()
    kept = [({k: v for k, v in o.items() if k[0] == "0"}, a) for o, a in history]
    model[2] = nn.Linear(6, 5).double()
    alpha = consistent_alpha(history, 1.0)
    with pytest.warns(RuntimeWarning, match=r"parameters '2\.weight', '2\.bias': got a new module"):
        value = penalty()
    # The old head's rows are the leading part of the wider one.
    leading = {
        name: p.detach()[:3] if name[0] == "2" else p.detach()
        for name, p in model.named_parameters()
    }
    expected = sum(
        a * float((omega[name] * (p - anchor[name]) ** 2).sum())
        for a, (omega, anchor) in zip(alpha, history, strict=True)
        for name, p in leading.items()
    )
    assert value.item() == pytest.approx(expected, rel=1e-9)
    model[2] = nn.Identity()
    expected = sum(
        a * float((omega[name] * (p.detach() - anchor[name]) ** 2).sum())
        for a, (omega, anchor) in zip(alpha, kept, strict=True)
        for name, p in model.named_parameters()
    )
    assert penalty().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [3, 5, 2])
@pytest.mark.parametrize("use", ["value", "consolidate"])
def test_a_fresh_head_under_the_old_name_is_told_of_once(rows: int, use: str) -> None:
    model, penalty, _ = trained(merge="sum")
    model[2] = nn.Linear(6, rows).double()
    with pytest.warns(RuntimeWarning, match=r"'2\.weight', '2\.bias': got a new module with"):
        penalty() if use == "value" else penalty.consolidate(data(5))
    penalty()
    penalty.consolidate(data(6))


def _widened(model: nn.Sequential) -> None:
    old, model[2] = model[2], nn.Linear(6, 5).double()
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias


def _widened_and_trained(model: nn.Sequential) -> None:
    """As where the penalty is first asked for behind an optimizer's step."""
    _widened(model)
    shift(model, 7)


def _in_float32(model: nn.Sequential) -> None:
    model[2] = copy.deepcopy(model[2]).float()
    model.double()


@pytest.mark.parametrize(
    "change",
    [
        _widened,
        _widened_and_trained,
        _in_float32,
        lambda m: m.load_state_dict(make_model().state_dict(), assign=True),
        lambda m: m.load_state_dict(make_model().state_dict()),
        lambda m: m.__setitem__(2, copy.deepcopy(m[2])),
        lambda m: m.__setitem__(2, nn.Sequential(m[2])),
        lambda m: m.to(torch.float32).to(torch.float64),
        lambda m: m.compile(backend="eager"),
        lambda m: shift(m, 7, 10.0),
    ],
)
def test_a_head_that_is_the_old_one_is_not_told_of(change: Callable[[nn.Module], Any]) -> None:
    model, penalty, _ = trained(merge="sum")
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(mas_ext.penalty, "warn", lambda message, _: told.append(message))
        change(model)
        penalty()
        model, penalty = copy.deepcopy((model, penalty))
        penalty()
        penalty.consolidate(data(6))
        assert [message for message in told if "new module" in message] == []


def test_tied_parameters_count_once() -> None:
    model = make_model()
    tied = nn.ModuleDict({"a": model[0], "b": model[0]})
    tied.forward = lambda x: tied["a"](x) + tied["b"](x)  # type: ignore[method-assign]
    penalty = FusedMASPenalty(tied, lam=1.0, merge="sum", omega_dtype=torch.float64)
    history = [snapshot(tied, data(0))]
    penalty.consolidate(data(0))
    shift(model, 1)
    assert set(penalty.omega) == {"a.weight", "a.bias"}
    assert penalty().item() == pytest.approx(
        expected_penalty(tied, history, [1.0]).item(), rel=1e-10
    )


def test_parameters_of_several_dtypes() -> None:
    model = nn.Sequential(make_model(torch.float32)[0], nn.Linear(6, 2).double())
    model.forward = lambda x: model[1](model[0](x.float()).double())  # type: ignore[method-assign]
    history = [snapshot(model, data(0))]
    penalty = FusedMASPenalty(model, merge="sum", omega_dtype=torch.float64)
    penalty.consolidate(data(0))
    shift(model, 1)
    value = penalty()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected_penalty(model, history, [1.0]).item(), rel=1e-5)
    value.backward()
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_small_importance(dtype: torch.dtype) -> None:
    model = make_model(torch.float32)
    penalty = FusedMASPenalty(model, merge="sum")
    penalty.consolidate(data(0, torch.float32))
    before = {name: w.clone() for name, w in penalty.omega.items()}
    penalty.to(dtype)
    model.to(dtype)
    penalty()
    for name, w in penalty.omega.items():
        assert w.dtype == torch.float32
        assert torch.equal(w, before[name])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    shift(model, 1, by=0.5)
    penalty.add_grad_()
    theta = dict(model.named_parameters())
    for name, a in penalty.anchor.items():
        expected = 2 * before[name] * (theta[name].detach().float() - a)
        torch.testing.assert_close(theta[name].grad.float(), expected, rtol=1e-2, atol=1e-6)


def test_wrapped_models_have_the_same_names() -> None:
    model = make_model()
    wrapped = torch.compile(model, backend="eager")
    penalty = FusedMASPenalty(nn.DataParallel(wrapped), exclude=("2.bias",))
    penalty.consolidate(data(0))
    assert set(penalty.omega) == {"0.weight", "0.bias", "2.weight"}


def normalised(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.normalize(model(x), dim=1)


def test_an_output_of_constant_norm_is_told_of() -> None:
    for dtype in (torch.float32, torch.float64):
        model = make_model(dtype)
        penalty = FusedMASPenalty(model, merge="consistent", forward=normalised)
        with pytest.raises(ValueError, match="constant norm"):
            penalty.consolidate(data(0, dtype))
        assert penalty.num_tasks == 0
        penalty = FusedMASPenalty(model, objective="l1", forward=normalised)
        penalty.consolidate(data(0, dtype))
        assert penalty.num_tasks == 1
        # "consistent" alone divides by the total importance, and would blow the noise up.
        penalty = FusedMASPenalty(model, forward=normalised)
        with pytest.warns(RuntimeWarning, match="constant norm"):
            penalty.consolidate(data(0, dtype))
        assert penalty.num_tasks == 1


def test_an_output_of_zero_is_called_zero() -> None:
    model = make_model()
    for p in model[2].parameters():
        nn.init.zeros_(p)
    with pytest.raises(ValueError, match="got outputs that are all zero"):
        FusedMASPenalty(model, merge="consistent").consolidate(data(0))
    with pytest.warns(RuntimeWarning, match="got outputs that are all zero") as told:
        FusedMASPenalty(model).consolidate(data(0))
    assert not any("constant norm" in str(each.message) for each in told)


def test_the_noise_of_one_float32_layer_is_that_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 6).double(), nn.Linear(6, 3))
    penalty = FusedMASPenalty(
        model, forward=lambda m, x: nn.functional.normalize(m[1](m[0](x).float()), dim=1)
    )
    with pytest.warns(RuntimeWarning, match="constant norm"):
        penalty.consolidate(data(0))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_an_output_of_any_size_counts(scale: float) -> None:
    model = make_model(torch.float32)
    penalty = FusedMASPenalty(model, forward=lambda m, x: scale * m(x))
    penalty.consolidate(data(0, torch.float32))
    assert penalty.num_tasks == 1


def test_parameters_that_are_zero_count() -> None:
    model = nn.Linear(4, 3)
    for p in model.parameters():
        nn.init.zeros_(p)
    penalty = FusedMASPenalty(model, merge="consistent", forward=lambda m, x: m(x) + 1)
    penalty.consolidate(data(0, torch.float32))
    assert penalty.omega["bias"].min() > 0


def test_no_trainable_parameter() -> None:
    for model in (nn.ReLU(), make_model().requires_grad_(False)):
        penalty = FusedMASPenalty(model)
        with pytest.warns(RuntimeWarning, match="nothing is consolidated"):
            penalty.consolidate(data(0))
        assert penalty.num_tasks == 0
        assert penalty().item() == 0


@pytest.mark.parametrize("message", ["of the strength", "any more", "nothing is consolidated"])
def test_warnings_name_the_line_of_the_caller(message: str) -> None:
    model, size = make_model(), [1.0]
    penalty = FusedMASPenalty(model, merge="consistent", forward=lambda m, x: size[0] * m(x))
    penalty.consolidate(data(0))
    if message == "of the strength":
        size[0] = 1e-2
    elif message == "any more":
        model[2] = nn.Identity()
    else:
        model.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        penalty.consolidate(data(1))
    assert [warning.filename for warning in caught] == [__file__]


def test_an_error_while_estimating_changes_nothing() -> None:
    model, penalty, _ = trained(tasks=1)
    before = penalty._state.memory

    def batches() -> Any:
        yield data(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        penalty.consolidate(batches())
    assert penalty._state.memory is before
    assert model.training
    with pytest.raises(ValueError, match="importance of"):
        penalty.consolidate([torch.full((2, 4), float("nan"), dtype=torch.float64)])
    assert penalty._state.memory is before


def test_the_reference_never_calls_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_C", None)
    model, penalty, history = trained(backend="reference")
    expected = expected_penalty(model, history, consistent_alpha(history, 1.0))
    penalty().backward()
    assert penalty.add_grad_().item() == pytest.approx(expected.item(), rel=1e-10)
    penalty.proximal_(list(model.parameters()), 0.1)
    with pytest.raises(AttributeError):
        trained(backend="native")


# -- told before training ---------------------------------------------------------------------------


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()


class Gives(NoForward):
    """An output made of that of a layer."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


CANT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no forward": (NoForward, None, r"got NoForward, .* \(NotImplementedError: "),
    "a loss": (
        lambda: Gives(Tensor.mean),
        None,
        r"got Gives, .* \(ValueError: output: got shape \(\)",
    ),
    "a dict": (
        lambda: Gives(lambda y: {"y": y}),
        None,
        r"got Gives, .* \(TypeError: output: got dict",
    ),
    "detached": (
        lambda: Gives(Tensor.detach),
        None,
        r"got Gives, .* \(ValueError: output: got one ",
    ),
    "a wrong forward": (
        make_model,
        lambda m, b: m(b["x"]),
        r"got Sequential, .* \((Index|Type)Error",
    ),
    "samples that interact": (
        lambda: Gives(lambda y: y - y.mean(0)),
        None,
        r"got Gives, .* \(ValueE",
    ),
}


@pytest.mark.parametrize("case", CANT)
def test_what_cant_be_measured_is_told_by_name_and_leaves_all_as_it_was(case: str) -> None:
    make, forward, words = CANT[case]
    model = make().train()
    penalty = FusedMASPenalty(model, forward=forward)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"model: {words}"):
        penalty.check(data(0)[0])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert penalty.num_tasks == 0
    assert penalty._pending.samples == 0


@pytest.mark.parametrize("importance", ["exact", "batch", "local", "training"])
def test_what_can_be_measured_is_checked_without_a_trace(importance: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model.double()[0].eval()
    own = compat.BatchMeans("l2", None, (), training=True)
    penalty = FusedMASPenalty(model, importance=own if importance == "training" else importance)
    penalty.observe(data(0)[0])
    before = copy.deepcopy({**model.state_dict(), **penalty.state_dict()})
    state = torch.get_rng_state()
    penalty.check(data(1)[0])
    for name, t in {**model.state_dict(), **penalty.state_dict()}.items():
        assert torch.equal(t, before[name]), name
    assert [m.training for m in model] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert importance == "training" or torch.equal(torch.get_rng_state(), state)


def test_two_samples_are_enough_and_values_are_no_matter() -> None:
    seen = []
    model = Gives(lambda y: seen.append(len(y)) or y / 0.0)  # type: ignore[func-returns-value]
    FusedMASPenalty(model).check(torch.randn(50, 4, dtype=torch.float64))
    assert max(seen) == 2


# -- copies and files ------------------------------------------------------------------------------


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("order", [("model", "penalty"), ("penalty", "model")])
def test_copied_together_they_rebind(copied: Callable[[Any], Any], order: tuple[str, str]) -> None:
    model, penalty, _ = trained()
    both = {"model": model, "penalty": penalty}
    new = copied({key: both[key] for key in order})
    assert new["penalty"].model is new["model"]
    assert new["penalty"]().item() == penalty().item()
    shift(new["model"], 5)
    assert new["penalty"]().item() != penalty().item()
    new["penalty"].lam = 9.0
    assert penalty.lam == 1.0


def test_copied_alone_it_keeps_the_model() -> None:
    model, penalty, _ = trained()
    new = copy.deepcopy(penalty)
    assert new.model is model
    assert new().item() == penalty().item()
    assert pickled(new)().item() == penalty().item()


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_state_dict_goes_on_to_the_same_bits(store: str) -> None:
    model, penalty, _ = trained(lam=0.3, store=store)
    penalty.observe(data(4)[0])
    state = {key: t.clone() for key, t in penalty.state_dict().items()}
    twin = copy.deepcopy(model)
    other = FusedMASPenalty(twin, omega_dtype=torch.float64, store=store, **MAS_ALPHA)
    other.load_state_dict(state)
    for p in (penalty, other):
        p.observe(data(4)[1])
        p.consolidate()
        shift(p.model, 6)
    assert other.lam == 0.3
    assert torch.equal(penalty(), other())
    assert torch.equal(penalty.alpha, other.alpha)


def test_a_state_of_other_parameters_of_the_same_shape() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    penalties = []
    for trained_layer, other in ((0, 1), (1, 0)):
        model[trained_layer].requires_grad_(True)
        model[other].requires_grad_(False)
        penalties.append(FusedMASPenalty(model, merge="sum"))
        penalties[-1].consolidate([torch.randn(4, 3)])
    shift(model, 1)
    first, second = penalties
    assert first().item() != second().item()
    first.load_state_dict(second.state_dict())
    assert first().item() == second().item()


def test_what_was_observed_keeps_its_numbers_when_cast() -> None:
    model = make_model(torch.float32)
    penalty = FusedMASPenalty(model)
    penalty.observe(1e-5 * data(0, torch.float32)[0])
    before = {key: t.clone() for key, t in penalty.state_dict().items()}
    penalty.half()
    for key, t in penalty.state_dict().items():
        assert t.dtype == before[key].dtype
        assert torch.equal(t, before[key])


def test_an_objective_given_to_load_is_the_one_that_counts(tmp_path: Path) -> None:
    model, penalty, _ = trained(tasks=1, objective="l2")
    penalty.save(tmp_path / "p")
    loaded = FusedMASPenalty.load(tmp_path / "p", model, objective="l1")
    loaded.consolidate(data(1))
    expected = mas_ext.estimate_importance(model, data(1), objective="l1")
    total = sum(float(omega.sum()) for omega in expected.values())
    assert loaded._state.memory.entries[1].total == pytest.approx(total, rel=1e-10)


def test_inside_another_module() -> None:
    class Learner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()
            self.penalty = FusedMASPenalty(self.body, omega_dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).sum() + self.penalty()

    learner = Learner()
    learner.penalty.consolidate(data(0))
    shift(learner.body, 1)
    assert [name for name, _ in learner.named_parameters()] == [
        f"body.{name}" for name, _ in make_model().named_parameters()
    ]
    other = Learner()
    other.load_state_dict(learner.state_dict())
    assert other.penalty.model is other.body
    assert torch.equal(other.penalty(), learner.penalty())
    missing = {k: t for k, t in learner.state_dict().items() if not k.startswith("penalty.")}
    with pytest.raises(RuntimeError, match=r"penalty\.config"):
        other.load_state_dict(missing)
    assert copy.deepcopy(learner).penalty().item() == learner.penalty().item()


def test_a_state_for_another_rule_is_refused() -> None:
    model, penalty, _ = trained()
    state = penalty.state_dict()
    other = FusedMASPenalty(model, merge="sum")
    with pytest.raises(ValueError, match="merge 'consistent', expected 'sum'"):
        other.load_state_dict(state)
    for name in ("omega.0.bias", "anchor.0.bias", "config"):
        broken = {key: t for key, t in state.items() if key != name}
        before = penalty._state.memory
        with pytest.raises((KeyError, ValueError), match="state"):
            penalty.load_state_dict(broken)
        assert penalty._state.memory is before


def test_the_public_names() -> None:
    assert mas_ext.FusedMASPenalty is FusedMASPenalty
    names = {
        "Distillation",
        "FisherSum",
        "FusedMASPenalty",
        "Replay",
        "ScalarCallback",
        "TaskFree",
        "Trainer",
        "check_importance",
        "choose_lam",
        "compare",
        "estimate_fisher",
        "estimate_importance",
        "info",
        "load_distributed",
        "read_pull",
    }
    assert set(mas_ext.__all__) == names


def test_bfloat16_omega_holds_six_bytes_a_parameter() -> None:
    model = nn.Linear(256, 256, bias=False)
    penalty = FusedMASPenalty(model, merge="sum", omega_dtype=torch.bfloat16)
    x = torch.randn(4, 256)
    penalty.consolidate([x])
    (group,) = penalty._state.memory.groups
    assert group.state.omega.nbytes + group.state.anchor.nbytes == 6 * 256 * 256
    expected = (2 * model(x).detach()[:, :, None] * x[:, None]).abs().mean(0)
    error = (penalty.omega["weight"].float() - expected).abs() / expected
    assert error.max() <= 2**-7
    # Rounded to either neighbour by chance, the errors cancel.
    mean = float(penalty.omega["weight"].double().sum() / expected.double().sum())
    assert mean == pytest.approx(1.0, abs=1e-4)
