"""The merge rules against a list of every task's omega and anchor, summed term by term in float64."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from oracles import naive
from torch import Tensor

from benchmarks.memory import peak
from mas_ext.failures import Vanished
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.penalty import penalty
from mas_ext.state import quadratic as consolidation
from mas_ext.state.merge_rules import Anchor, Merge, MergeRule, Store
from mas_ext.state.quadratic import Consolidation

SHAPES = {"w": (7, 5), "b": (7,), "s": (), "empty": (0, 3)}


class Task(NamedTuple):
    """One task, flat and in float64."""

    omega: naive.Array
    anchor: naive.Array
    weight: float


def flat(tensors: dict[str, Tensor]) -> naive.Array:
    return np.concatenate([t.double().numpy().reshape(-1) for t in tensors.values()])


def random(scale: float = 1.0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}


def consolidated(
    rule: MergeRule,
    tasks: int,
    lam: float = 0.7,
    weights: list[float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Consolidation, list[Task]]:
    torch.manual_seed(0)
    state, history = Consolidation(rule, lam), []
    for t in range(tasks):
        theta = random(dtype=dtype)
        omega = {name: x.abs() * 10 ** (t % 3) for name, x in random(dtype=dtype).items()}
        weight = weights[t] if weights else 1.0
        state.add_task(theta, dict(omega), weight)
        history.append(Task(flat(omega), flat(theta), weight))
    return state, history


def measured(state: Consolidation, theta: dict[str, Tensor]) -> tuple[float, naive.Array]:
    """Value and gradient, through the operator."""
    (g,) = state.memory.groups
    x = [theta[name].clone().requires_grad_() for name in g.names]
    value = penalty(x, g.state)
    grads = torch.autograd.grad(value, x)
    return float(value.detach()), np.concatenate([t.double().numpy().reshape(-1) for t in grads])


def alphas(rule: MergeRule, lam: float, history: list[Task]) -> list[float]:
    """The definition: alpha_t S_t proportional to the weight, adding up to lam T or lam; or lam, faded."""
    if rule.merge != "consistent":
        keep = rule.gamma if rule.merge == "decay" else 1.0
        ages = range(len(history) - 1, -1, -1)
        return [lam * task.weight * keep**k for k, task in zip(ages, history, strict=True)]
    raw = [task.weight / task.omega.sum() for task in history]
    tasks = sum(task.weight for task in history) if rule.alpha_sum == "tasks" else 1.0
    # sum_t alpha_t, with a weight of w counting as w entries.
    return [lam * tasks * r / sum(raw) for r in raw]


def rows(rule: MergeRule, history: list[Task]) -> tuple[naive.Array, naive.Array]:
    """Omega and anchor of every task, (T, n)."""
    omega, anchor = (np.stack([task[k] for task in history]) for k in (0, 1))
    return omega, anchor if rule.anchor == "own" else np.broadcast_to(anchor[-1], anchor.shape)


WIDE = torch.float64
MERGES = (("sum", "tasks"), ("consistent", "tasks"), ("consistent", "lam"), ("decay", "tasks"))
RULES = [
    MergeRule(merge, anchor, store, alpha_sum, gamma=0.6, omega_dtype=WIDE)
    for merge, alpha_sum in MERGES
    for anchor in ("latest", "own")
    for store in ("merged", "per_task")
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0, 0.0, 2.0]])
def test_the_penalty_is_the_sum_over_tasks(rule: MergeRule, weights: list[float] | None) -> None:
    state, history = consolidated(rule, 5, weights=weights)
    alpha = alphas(rule, 0.7, history)
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-12)
    theta = random()
    omega, anchor = rows(rule, history)
    value, gradient = measured(state, theta)
    assert value == pytest.approx(
        naive.penalty(flat(theta), omega, anchor, np.array(alpha)), rel=1e-12
    )
    expected = naive.gradient(flat(theta), omega, anchor, np.array(alpha))
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10)
    held = flat({name: a for name, (_, a) in state.quadratic().items()})
    weight = np.einsum("t,tn->n", alpha, omega)
    mean = np.einsum("t,tn->n", alpha, omega * anchor) / weight
    np.testing.assert_allclose(held, mean, rtol=1e-10, atol=1e-10)


def test_consistent_equalises_total_importance() -> None:
    state, history = consolidated(MergeRule("consistent"), 6, lam=2.0)
    shares = [a * task.omega.sum() for a, task in zip(state.alpha, history, strict=True)]
    np.testing.assert_allclose(shares, shares[0], rtol=1e-6)
    assert sum(state.alpha) == pytest.approx(2.0 * 6, rel=1e-12)


def test_importance_of_16_bits_is_multiplied_in_32() -> None:
    state = Consolidation(MergeRule("sum", store="per_task", omega_dtype=torch.bfloat16), 1.0)
    state.add_task({"w": torch.zeros(())}, {"w": torch.tensor(1.0)}, weight=1 + 2.0**-12)
    assert float(state.quadratic()["w"][0]) == 1 + 2.0**-12


def test_importance_is_added_up_in_64_bits() -> None:
    """2^24 + 1 is no number of float32."""
    state = Consolidation(MergeRule("consistent"), 1.0)
    importance = torch.tensor([2.0**24, 1.0])
    state.add_task({"w": torch.zeros(2)}, {"w": importance})
    assert state.memory.entries[0].total == 2**24 + 1


@pytest.mark.filterwarnings("ignore:consolidate. task:RuntimeWarning")
def test_consistent_does_not_depend_on_the_order_of_tasks() -> None:
    torch.manual_seed(3)
    tasks = [(random(), {k: v.abs() * 10**t for k, v in random().items()}) for t in range(4)]
    theta = random()
    values = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        state = Consolidation(MergeRule("consistent", "own", omega_dtype=WIDE), 1.0)
        for t in order:
            anchor, omega = tasks[t]
            state.add_task(anchor, dict(omega))
        values.append(measured(state, theta)[0])
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def weakened(caught: list[warnings.WarningMessage]) -> list[str]:
    return re.findall(
        r"task \d+ is held with \S+ of", " ".join(str(each.message) for each in caught)
    )


@pytest.mark.parametrize("anchor", ["latest", "own"])
@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_an_old_task_that_loses_its_strength_is_told_of(anchor: Anchor, store: Store) -> None:
    """S of 10, 1, 1, 1, 0.01: alpha of the first is lam times 1, 2 / 11, 3 / 21, 4 / 31, 5 / 1031."""
    state, told = Consolidation(MergeRule("consistent", anchor, store), 0.7), []
    for total in (10.0, 1.0, 1.0, 1.0, 0.01):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state.add_task({"w": row(1, 0.0)}, {"w": row(1, total)})
        told.append(weakened(caught))
    # 0.18 and 0.14 are below a third, 0.129 too; 0.0048 is below 3^-4. The second task had 2 / 1.1 lam.
    first = [[], ["task 0 is held with 0.18 of"], [], [], ["task 0 is held with 0.0048 of"]]
    assert told == first
    assert state.alpha[0] == pytest.approx(0.7 * 5 / 1031 * 10 / 10, rel=1e-6)


def test_the_weakest_task_is_named_by_its_own_first_strength() -> None:
    """S of 1, 10 and 0.01: alpha_t S_t / lam began at 1 and 2 / 1.1, and is 3 / 101.1 for both."""
    state = Consolidation(MergeRule("consistent"), 0.7)
    for total in (1.0, 10.0):
        state.add_task({"w": row(1, 0.0)}, {"w": row(1, total)})
    with pytest.warns(RuntimeWarning, match="task 1 is held with 0.016 of"):
        state.add_task({"w": row(1, 0.0)}, {"w": row(1, 0.01)})


@pytest.mark.parametrize(
    "rule", [r for r in RULES if (r.merge, r.anchor, r.store) != ("sum", "latest", "merged")]
)
def test_negative_importance_is_refused_where_no_sum_clamps_it(rule: MergeRule) -> None:
    state = Consolidation(rule, 1.0)
    with pytest.raises(ValueError, match="importance of 'w': got values with minimum -1"):
        state.add_task({"w": row(1, 1.0)}, {"w": row(1, -1.0)})


@pytest.mark.parametrize("rule", [r for r in RULES if r.merge != "consistent"])
def test_other_merges_leave_old_tasks_their_strength(rule: MergeRule) -> None:
    state = Consolidation(rule, 0.7)
    for total in (10.0, 1.0, 0.01):  # a warning is an error
        state.add_task({"w": row(1, 0.0)}, {"w": row(1, total)})
    assert state.alpha == pytest.approx([0.7 * rule.keep**2, 0.7 * rule.keep, 0.7])


def test_a_weight_that_takes_another_task_its_strength_is_told_of() -> None:
    state = Consolidation(MergeRule("consistent", store="per_task"), 0.7)
    state.add_task({"w": row(1, 0.0)}, {"w": row(1, 10.0)})
    state.add_task({"w": row(1, 0.0)}, {"w": row(1, 1.0)}, weight=0.01)
    with pytest.warns(RuntimeWarning, match="task 0 is held with 0.18 of"):
        state.set_weight(1, 1.0)


@pytest.mark.parametrize("rule", [r for r in RULES if r.anchor == "latest"])
def test_the_anchor_may_stay(rule: MergeRule) -> None:
    state, history = consolidated(rule, 2)
    theta, omega = random(), {name: x.abs() for name, x in random().items()}
    state.add_task(theta, dict(omega), move_anchor=False)
    history.append(Task(flat(omega), history[-1].anchor, 1.0))
    expected = naive.penalty(
        flat(theta), *rows(rule, history), np.array(alphas(rule, 0.7, history))
    )
    assert measured(state, theta)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("anchor", ["latest", "own"])
def test_a_thousand_tasks_in_float32(anchor: Anchor) -> None:
    state, history = consolidated(MergeRule(anchor=anchor), 1000, dtype=torch.float32)
    theta = random(dtype=torch.float32)
    terms = (*rows(state.rule, history), np.full(1000, 0.7))
    value, gradient = measured(state, theta)
    assert value == pytest.approx(naive.penalty(flat(theta), *terms), rel=1e-6)
    expected = naive.gradient(flat(theta), *terms)
    assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected)


def test_any_number_of_tasks_in_constant_memory() -> None:
    held = []
    for tasks in (1, 50):
        state, _ = consolidated(MergeRule(), tasks, dtype=torch.float32)
        (g,) = state.memory.groups
        held.append(
            sum(t.nbytes for t in (g.state.omega, g.state.anchor, g.state.alpha, g.remainders))
        )
    assert held[0] == held[1]


EACH = [rule for rule in RULES if rule.store == "per_task"]


@pytest.mark.parametrize("rule", EACH)
def test_weights_and_dropping_as_if_the_task_had_always_been_so(rule: MergeRule) -> None:
    state, history = consolidated(rule, 4)
    theta = random()
    state.set_weight(2, 0.5)
    state.drop(0)
    state.fit(theta)
    kept = [history[1], history[2]._replace(weight=0.5), history[3]]
    alpha = np.array(alphas(rule, 0.7, kept))
    expected = naive.penalty(flat(theta), *rows(rule, kept), alpha)
    assert measured(state, theta)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in EACH if rule.anchor == "latest"])
def test_the_latest_anchor_outlives_its_task(rule: MergeRule) -> None:
    state, history = consolidated(rule, 3)
    theta = random()
    state.drop(2)
    state.fit(theta)
    kept = [history[0], history[1]._replace(anchor=history[2].anchor)]
    expected = naive.penalty(flat(theta), *rows(rule, kept), np.array(alphas(rule, 0.7, kept)))
    assert measured(state, theta)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", EACH)
def test_a_weight_counts_at_once_and_in_place(rule: MergeRule) -> None:
    state, history = consolidated(rule, 3)
    theta = random()
    address = state.memory.groups[0].state.alpha.data_ptr()
    state.set_weight(1, 0.25)
    history[1] = history[1]._replace(weight=0.25)
    alpha = np.array(alphas(rule, 0.7, history))
    expected = naive.penalty(flat(theta), *rows(rule, history), alpha)
    assert measured(state, theta)[0] == pytest.approx(expected, rel=1e-12)
    assert state.memory.groups[0].state.alpha.data_ptr() == address


@pytest.mark.parametrize("rule", RULES)
def test_tasks_without_weight_pull_nothing(rule: MergeRule) -> None:
    state, _ = consolidated(rule, 2, weights=[0.0, 0.0])
    assert state.alpha == [0.0, 0.0]
    assert state.scale == (0.0 if rule.merge == "consistent" else 0.7)
    value, gradient = measured(state, random())
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("merge", ["consistent", "sum"])
@pytest.mark.parametrize("anchor", ["latest", "own"])
def test_only_decay_fades(merge: Merge, anchor: Anchor) -> None:
    theta, results = random(), []
    for gamma in (0.0, 0.5, 1.0):
        state, _ = consolidated(MergeRule(merge, anchor, gamma=gamma, omega_dtype=WIDE), 3)
        results.append((measured(state, theta)[0], state.alpha))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("anchor", ["latest", "own"])
def test_gamma_zero_forgets_all_but_the_last_task(anchor: Anchor) -> None:
    state, history = consolidated(MergeRule("decay", anchor, gamma=0.0, omega_dtype=WIDE), 3)
    theta = random()
    _, (omega, anchor, _) = history[-2], history[-1]
    expected = naive.penalty(flat(theta), omega[None], anchor[None], np.array([0.7]))
    assert measured(state, theta)[0] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(state.alpha, [0, 0, 0.7])


def test_no_strength_no_pull() -> None:
    state, _ = consolidated(MergeRule(omega_dtype=WIDE), 2)
    state.set_lam(0.0)
    assert measured(state, random())[0] == 0


@pytest.mark.parametrize("omega_dtype", [torch.bfloat16, torch.uint8])
def test_every_entry_is_rounded_by_numbers_of_its_own(omega_dtype: torch.dtype) -> None:
    state = Consolidation(MergeRule("sum", omega_dtype=omega_dtype), 1.0)
    theta = {"w": torch.zeros(4096)}
    state.add_task(theta, {"w": torch.full((4096,), 8.0)})
    for _ in range(100):
        state.add_task(theta, {"w": torch.full((4096,), 0.02)})
    omega = state.quadratic()["w"][0].double()
    assert omega.mean() == pytest.approx(10.0, rel=0.005)
    # By the same numbers each time, some elements would always be rounded up and the rest never.
    assert omega.std() < (0.5 if omega_dtype == torch.bfloat16 else 2.0)


def small_multiples(exponent: int = 0) -> dict[str, Tensor]:
    """Importance whose sum is a power of two, so that four times it needs no rounding to 8 bits."""
    unit = 2.0**exponent
    half = torch.tensor([0.5] * 20 + [1.0] * 15).view(SHAPES["w"])
    ones, nothing = torch.ones(SHAPES["b"]), torch.zeros(SHAPES["empty"])
    return {"w": half * unit, "b": ones * unit, "s": torch.zeros(()), "empty": nothing}


@pytest.mark.parametrize("store", ["merged", "per_task"])
@pytest.mark.parametrize("anchor", ["latest", "own"])
@pytest.mark.parametrize("merge", ["sum", "consistent"])
@pytest.mark.parametrize("exponent", [-60, 0, 60])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_8_bits_of_whatever_size(
    merge: Merge,
    anchor: Anchor,
    store: Store,
    exponent: int,
    backend: Literal["native", "reference"],
) -> None:
    rule = MergeRule(merge, anchor, store, omega_dtype=torch.uint8, backend=backend)
    state, history = Consolidation(rule, 0.7), []
    for _ in range(4):
        theta, omega = random(dtype=torch.float32), small_multiples(exponent)
        state.add_task(theta, dict(omega))
        history.append(Task(flat(omega), flat(theta), 1.0))
    (group,) = state.memory.groups
    assert group.state.omega.dtype == torch.uint8
    theta = random(dtype=torch.float32)
    alpha = np.array(alphas(rule, 0.7, history))
    omegas, anchors = rows(rule, history)
    value, gradient = measured(state, theta)
    expected = naive.penalty(flat(theta), omegas, anchors, alpha)
    assert value == pytest.approx(expected, rel=1e-5)
    slope = naive.gradient(flat(theta), omegas, anchors, alpha)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


def test_8_bits_follow_what_grows() -> None:
    state = Consolidation(MergeRule("sum", omega_dtype=torch.uint8), 1.0)
    theta, omega = random(dtype=torch.float32), small_multiples()
    state.add_task(theta, dict(omega))
    for t in range(1, 6):
        state.add_task(theta, {"b": torch.full((7,), 32.0**t)})
        w, b = (state.quadratic()[name][0] for name in ("w", "b"))
        assert torch.equal(w, omega["w"])
        total = 1 + sum(32.0**s for s in range(1, t + 1))
        np.testing.assert_allclose(b, total, rtol=0.15)
        state.load_tensors(state.tensors(), theta)
        assert torch.equal(state.quadratic()["w"][0], w)
        assert torch.equal(state.quadratic()["b"][0], b)


def test_8_bits_keep_the_least_beside_the_largest() -> None:
    state = Consolidation(MergeRule("sum", omega_dtype=torch.uint8), 1.0)
    theta = {"w": torch.zeros(3)}
    omega = torch.tensor([1.875 * 2.0**16, 1.125 * 2.0**-15, 0.0])
    state.add_task(theta, {"w": omega})
    for change in (state.fit, lambda known: state.load_tensors(state.tensors(), known)):
        change(theta)
        assert torch.equal(state.quadratic()["w"][0], omega)


def test_8_bits_are_of_a_size_that_shrinks() -> None:
    rule = MergeRule("decay", gamma=0.25, omega_dtype=torch.uint8)
    state, theta = Consolidation(rule, 1.0), random(dtype=torch.float32)
    state.add_task(theta, small_multiples())
    for _ in range(30):
        state.add_task(theta, {"s": torch.tensor(1e-30)})
    np.testing.assert_array_equal(state.quadratic()["b"][0], np.full(7, 0.25**30))


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_without_importance_the_anchor_is_the_latest(store: Store) -> None:
    state = Consolidation(MergeRule("sum", "own", store, omega_dtype=WIDE), 1.0)
    for t in (1.0, 2.0, 3.0):
        omega = torch.tensor([0.0, 2.0, 2.0 * (t == 1)], dtype=torch.float64)
        state.add_task({"w": torch.full((3,), t, dtype=torch.float64)}, {"w": omega})
    weight, anchor = state.quadratic()["w"]
    np.testing.assert_allclose(weight, [0, 6, 2], rtol=1e-12)
    np.testing.assert_allclose(anchor, [3, 2, 1], rtol=1e-12)


def test_dropping_every_task_leaves_nothing() -> None:
    state, _ = consolidated(MergeRule(store="per_task"), 2)
    state.drop(1)
    state.drop(0)
    state.fit(random())
    assert state.memory.groups == []
    assert state.alpha == []


@pytest.mark.parametrize("rule", RULES)
def test_the_stored_quadratic_reproduces_the_value(rule: MergeRule) -> None:
    state, _ = consolidated(rule, 3)
    theta, other = random(), random()
    quadratic = state.quadratic()

    def value(x: dict[str, Tensor]) -> float:
        return state.scale * sum(
            float((w * (x[name] - a) ** 2).sum()) for name, (w, a) in quadratic.items()
        )

    # Equal up to the constant r.
    expected = measured(state, theta)[0] - measured(state, other)[0]
    assert value(theta) - value(other) == pytest.approx(expected, rel=1e-10)


# -- parameters that come and go -------------------------------------------------------------------


def stepwise(state: Consolidation, *tasks: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    for theta, omega in tasks:
        state.add_task(theta, dict(omega))


def row(n: int, value: float) -> Tensor:
    return torch.full((n, 2), value, dtype=torch.float64)


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_a_widened_head_keeps_its_leading_part(store: Store) -> None:
    state = Consolidation(MergeRule("sum", "own", store, omega_dtype=WIDE), 1.0)
    stepwise(
        state, ({"h": row(2, 1.0)}, {"h": row(2, 3.0)}), ({"h": row(4, 2.0)}, {"h": row(4, 5.0)})
    )
    value, gradient = measured(state, {"h": row(4, 0.0)})
    # Two rows saw both tasks, two rows only the second.
    assert value == pytest.approx(4 * (3 * 1 + 5 * 4) + 4 * (5 * 4), rel=1e-12)
    np.testing.assert_allclose(gradient, [-2 * (3 + 10)] * 4 + [-2 * 10] * 4, rtol=1e-12)


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_a_frozen_parameter_is_remembered_and_an_unknown_one_left_out(store: Store) -> None:
    state = Consolidation(MergeRule("sum", "own", store, omega_dtype=WIDE), 1.0)
    theta = {"body": row(1, 1.0), "head": row(1, 1.0), "never": row(1, 1.0)}
    state.add_task(theta, {"body": row(1, 2.0), "head": row(1, 3.0)})
    state.add_task({k: 2 * x for k, x in theta.items()}, {"head": row(1, 5.0)})
    assert set(state.memory.parts()) == {"body", "head"}
    value, gradient = measured(state, {k: 0 * x for k, x in theta.items()})
    assert value == pytest.approx(2 * (2 * 1 + 3 * 1 + 5 * 4), rel=1e-12)
    np.testing.assert_allclose(gradient, [-4, -4, -26, -26], rtol=1e-12)


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_a_narrowed_head_keeps_its_leading_part(store: Store) -> None:
    state = Consolidation(MergeRule("sum", "own", store, omega_dtype=WIDE), 1.0)
    wide = torch.arange(8.0, dtype=torch.float64).view(4, 2)
    stepwise(state, ({"h": wide}, {"h": wide + 1}))
    state.fit({"h": row(3, 0.0)})
    (p,) = state.memory.parts().values()
    assert torch.equal(p.omega[0], wide[:3] + 1)
    assert torch.equal(p.anchor[0], wide[:3])


@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_a_new_head_enters_without_importance_for_old_tasks(store: Store) -> None:
    state = Consolidation(MergeRule("sum", "own", store, omega_dtype=WIDE), 1.0)
    body, head = {"b": row(1, 1.0)}, {"h": row(1, 4.0)}
    stepwise(
        state,
        (body, {"b": row(1, 2.0)}),
        ({**body, **head}, {"b": row(1, 2.0), "h": row(1, 3.0)}),
    )
    value, _ = measured(state, {"b": row(1, 1.0), "h": row(1, 5.0)})
    assert value == pytest.approx(2 * 3 * 1.0, rel=1e-12)


def test_the_anchor_of_a_new_head_is_where_it_is_also_where_anchors_stay() -> None:
    state = Consolidation(MergeRule(omega_dtype=WIDE), 1.0)
    state.add_task({"b": row(1, 1.0)}, {"b": row(1, 2.0)})
    both = {"b": row(1, 2.0), "h": row(1, 4.0)}
    state.add_task(both, {"b": row(1, 2.0), "h": row(1, 3.0)}, move_anchor=False)
    assert measured(state, both)[0] == pytest.approx(2 * 4 * 1.0, rel=1e-12)


def test_a_removed_head_takes_its_share_of_the_value_along() -> None:
    torch.manual_seed(0)
    both = [
        ({"b": row(1, t), "h": row(1, -t)}, {"b": row(1, 2.0), "h": row(1, 7.0)})
        for t in (1.0, 3.0)
    ]
    state = Consolidation(MergeRule("sum", "own", omega_dtype=WIDE), 1.0)
    stepwise(state, *both)
    state.fit({"b": row(1, 0.0)})
    assert measured(state, {"b": row(1, 0.0)})[0] == pytest.approx(2 * 2 * (1 + 9), rel=1e-12)
    # It comes back as it was.
    state.fit({"b": row(1, 0.0), "h": row(1, 0.0)})
    expected = 2 * 2 * (1 + 9) + 2 * 7 * (1 + 9)
    assert measured(state, {"b": row(1, 0.0), "h": row(1, 0.0)})[0] == pytest.approx(expected)


def test_what_is_gone_at_the_end_of_a_task_is_dropped_aloud() -> None:
    state = Consolidation(MergeRule("sum"), 1.0)
    state.add_task({"b": row(1, 1.0), "h": row(1, 1.0)}, {"b": row(1, 1.0), "h": row(1, 1.0)})
    with pytest.warns(RuntimeWarning, match="no parameter 'h' any more"):
        state.add_task({"b": row(1, 1.0)}, {"b": row(1, 1.0)})
    assert set(state.memory.parts()) == {"b"}


def test_a_renamed_parameter_keeps_what_is_known() -> None:
    state = Consolidation(MergeRule("sum", omega_dtype=WIDE), 1.0)
    state.add_task({"old": row(1, 1.0)}, {"old": row(1, 3.0)})
    state.rename("old", "new")
    state.fit({"new": row(1, 0.0)})
    assert measured(state, {"new": row(1, 0.0)})[0] == pytest.approx(2 * 3)
    with pytest.raises(KeyError, match="old: got 'old'"):
        state.rename("old", "other")
    with pytest.raises(KeyError, match="new: got 'new'"):
        state.rename("new", "new")


def test_a_parameter_with_other_dimensions_is_refused() -> None:
    state = Consolidation(MergeRule("sum"), 1.0)
    state.add_task({"b": row(1, 1.0)}, {"b": row(1, 1.0)})
    with pytest.raises(ValueError, match=r"parameter 'b': got shape \(2,\), expected 2 dim"):
        state.fit({"b": torch.ones(2)})
    assert set(state.memory.parts()) == {"b"}


def test_casting_and_relayout_keep_the_numbers() -> None:
    state = Consolidation(MergeRule("sum"), 1.0)
    theta = {"w": torch.randn(2, 3, 4, 5)}
    omega = {"w": torch.full((2, 3, 4, 5), 1e-8)}
    state.add_task(theta, dict(omega))
    for x in (
        theta["w"].half(),
        theta["w"].bfloat16(),
        theta["w"].to(memory_format=torch.channels_last),
        theta["w"],
    ):
        state.fit({"w": x})
        (p,) = state.memory.parts().values()
        assert p.omega.dtype == torch.float32
        assert torch.equal(p.omega[0], omega["w"])
        assert torch.equal(p.anchor[0], theta["w"])


def test_every_dtype_of_state() -> None:
    for dtype, omega_dtype, expected in (
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
    ):
        state = Consolidation(MergeRule("sum", omega_dtype=omega_dtype), 1.0)
        x = {"w": torch.ones(3, dtype=dtype)}
        state.add_task(x, {"w": torch.ones(3)})
        (g,) = state.memory.groups
        assert g.state.omega.dtype == expected
        assert g.state.anchor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_signed_importance_is_clamped_in_its_total(backend: Backend) -> None:
    torch.manual_seed(0)
    state, total = Consolidation(MergeRule(omega_dtype=WIDE, backend=backend), 1.0), None
    for _ in range(5):
        omega = random()
        state.add_task(random(), dict(omega), weight=0.5)
        step = 0.5 * flat(omega)
        total = np.maximum(0, step if total is None else total + step)
    found = flat({name: w for name, (w, _) in state.quadratic().items()})
    assert (found == 0).any()
    np.testing.assert_allclose(found, total, rtol=1e-12)

    again = Consolidation(state.rule, 1.0)
    again.load_tensors(state.tensors(), random())
    assert flat({name: w for name, (w, _) in again.quadratic().items()}).tolist() == found.tolist()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("omega", "message"),
    [
        (lambda: {"w": -row(1, 1.0)}, "importance of 'w': got values with minimum -1"),
        (
            lambda: {"w": torch.tensor([[1.0, -1e-9]], dtype=WIDE)},
            "importance of 'w': got values with minimum -[19]",
        ),
        (lambda: {"w": row(1, float("nan"))}, "importance of 'w': got a sum of nan"),
        (lambda: {"w": row(1, float("inf"))}, "importance of 'w': got a sum of inf"),
        (lambda: {"w": row(2, 1.0)}, r"importance of 'w': got shape \(2, 2\)"),
        (lambda: {"x": row(1, 1.0)}, "importance: got 'x'"),
    ],
)
def test_bad_importance_leaves_the_state_whole(
    omega: Callable[[], dict[str, Tensor]], message: str
) -> None:
    state = Consolidation(MergeRule(anchor="own"), 1.0)
    state.add_task({"w": row(1, 1.0)}, {"w": row(1, 1.0)})
    before = state.memory
    with pytest.raises((ValueError, KeyError), match=message):
        state.add_task({"w": row(1, 1.0)}, omega())
    assert state.memory is before


@pytest.mark.parametrize("total", [0.0, 1e-9])
def test_importance_at_the_level_of_rounding_is_refused(total: float) -> None:
    state = Consolidation(MergeRule("consistent"), 1.0)
    state.add_task({"w": row(1, 1.0)}, {"w": row(1, 1.0)})
    before = state.memory
    with pytest.raises(
        Vanished, match=f"got a sum of {total:g}, expected one above rounding level"
    ):
        state.add_task({"w": row(1, 1.0)}, {"w": row(1, total / 2)})
    assert state.memory is before


@pytest.mark.filterwarnings("ignore:consolidate. task:RuntimeWarning")
def test_importance_is_measured_by_the_median_of_the_tasks_before() -> None:
    state = Consolidation(MergeRule("consistent"), 1.0)
    for total in (1.0, 1.0, 1e7, 1.0):
        state.add_task({"w": row(1, 1.0)}, {"w": row(1, total / 2)})
    assert len(state.alpha) == 4


def test_nothing_to_consolidate_is_a_warning_and_no_entry() -> None:
    state = Consolidation(MergeRule(), 1.0)
    with pytest.warns(RuntimeWarning, match="nothing is consolidated"):
        state.add_task({}, {})
    assert state.memory.entries == []


def test_anchors_that_are_not_finite_are_refused() -> None:
    state = Consolidation(MergeRule(), 1.0)
    with pytest.raises(ValueError, match="parameter 'w': got NaN or Inf"):
        state.add_task({"w": row(1, float("nan"))}, {"w": row(1, 1.0)})


def test_importance_is_freed_before_there_are_new_anchors() -> None:
    names = [str(i) for i in range(16)]
    theta = {name: torch.zeros(64, 64) for name in names}
    state = Consolidation(MergeRule(), 1.0)

    def add_task() -> None:
        state.add_task(theta, {name: torch.ones(64, 64) for name in names})

    add_task()
    # Importance and omega, or omega and anchors; and one tensor's importance once more.
    assert peak(add_task) <= (2 * len(names) + 2) * 4 * 64 * 64


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_state_whole(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Consolidation(MergeRule(omega_dtype=WIDE), 1.0)
    theta = {"a": torch.randn(5, dtype=torch.float64), "b": torch.randn(4)}
    omega = {"a": torch.rand(5, dtype=torch.float64), "b": torch.rand(4)}
    state.add_task(theta, dict(omega))
    before = {k: t.clone() for k, t in state.tensors().items()}
    real, calls = consolidation.merge_omega_, []

    def fails_at_the_second_group(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise failure
        real(*args)

    monkeypatch.setattr(consolidation, "merge_omega_", fails_at_the_second_group)
    with pytest.raises(failure):
        state.add_task({k: t + 1 for k, t in theta.items()}, dict(omega))
    assert len(calls) == 2
    after = state.tensors()
    assert all(torch.equal(t, after[k]) for k, t in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge": "mean"}, "merge: got 'mean'"),
        ({"store": "all"}, "store: got 'all'"),
        ({"alpha_sum": 1}, "alpha_sum: got 1"),
        ({"gamma": 1.5}, "gamma: got 1.5"),
        ({"gamma": float("nan")}, "gamma: got nan"),
        ({"omega_dtype": torch.float16}, "omega_dtype: got torch.float16"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
        ({"merge": "latest"}, "merge: got 'latest', expected one of 'sum', 'consistent', 'decay'"),
        ({"anchor": "first"}, "anchor: got 'first', expected one of 'latest', 'own'"),
    ],
)
def test_wrong_rules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeRule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_wrong_strengths_and_weights_are_refused(value: float) -> None:
    state, _ = consolidated(MergeRule(store="per_task"), 2)
    for call in (
        lambda: state.set_lam(value),
        lambda: state.set_weight(0, value),
        lambda: state.add_task(random(), random(), value),
    ):
        with pytest.raises(ValueError, match=r"(lam|weight): got"):
            call()
    assert state.lam == 0.7
    assert len(state.alpha) == 2
