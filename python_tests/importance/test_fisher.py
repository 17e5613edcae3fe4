"""The Fisher information's diagonal against a naive float64 loop, one sample and one label at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, Wired

import mas_ext

pytestmark = pytest.mark.usefixtures("one_thread")

Omega = dict[str, Tensor]
SUM: Any = "sum"
LABELS = ("true", "predicted", "sampled", "all", "normal", "reversed")
MODELS = [
    "mlp",
    "residual, in-place relu",
    "vit",
    "recurrent by hand",
    "embedding, one id a sample",
]


def test_a_network_that_has_learned_its_labels_is_no_rounding_noise() -> None:
    """Squares of small gradients are smaller still; total importance is what has to be above 0."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(12 * torch.eye(2))
        model.bias.zero_()
    penalty = mas_ext.FusedMASPenalty(model, importance=mas_ext.FisherSum("true"))
    penalty.consolidate([(torch.eye(2), torch.arange(2))])
    wrong = 1 / (1 + math.exp(12))  # of each sample: g = +-wrong, on its own input alone
    torch.testing.assert_close(penalty.omega["bias"] * 8 * wrong**2 / 2, torch.full((2,), wrong**2))


def estimate(model: nn.Module, batches: Any, **options: Any) -> Omega:
    found: Omega = mas_ext.estimate_fisher(model, batches, **options)  # type: ignore[attr-defined, unused-ignore]
    return found


def setting(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = CASES[name].make().double()
    batches = [CASES[name].inputs(size) for size in (5, 6, 1)]
    batches = [x.double() if x.is_floating_point() else x for x in batches]
    classes = model(batches[0]).shape[1]
    return model, [(x, torch.randint(classes, (len(x),))) for x in batches]


def naive(model: nn.Module, batches: list[tuple[Tensor, Tensor]], labels: str) -> Omega:
    """1/N sum_k (d log p(y_k | x_k) / d theta)^2; the mean over y for "all" and "normal"."""
    model.eval()
    theta = dict(model.named_parameters())
    omega = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    samples = 0
    for xs, ys in batches:
        for x, y in zip(xs.split(1), ys.tolist(), strict=True):
            samples += 1
            logits = model(x)[0] * (-1 if labels == "reversed" else 1)
            p = (logits.exp() / logits.exp().sum()).detach().tolist()
            if labels == "normal":
                for output in logits.flatten():
                    grads = torch.autograd.grad(
                        output, list(theta.values()), retain_graph=True, allow_unused=True
                    )
                    for key, g in zip(theta, grads, strict=True):
                        omega[key] += 0 if g is None else g * g
                continue
            if labels == "all":
                weights = dict(enumerate(p))
            else:
                weights = {p.index(max(p)) if labels == "predicted" else y: 1.0}
            for label, weight in weights.items():
                value = logits[label] - logits.exp().sum().log()
                grads = torch.autograd.grad(
                    value, list(theta.values()), retain_graph=True, allow_unused=True
                )
                for key, g in zip(theta, grads, strict=True):
                    if g is not None:
                        omega[key] += weight * g * g
    return {name: t / samples for name, t in omega.items()}


def assert_close(got: Omega, expected: Omega, tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        error = float((got[name].double() - right).norm())
        assert error <= tolerance * float(right.norm()), name


@pytest.mark.filterwarnings("ignore:.*takes the fallback:UserWarning")
@pytest.mark.parametrize("labels", ["true", "predicted", "all", "normal", "reversed"])
@pytest.mark.parametrize("name", MODELS)
def test_fisher_is_its_definition(name: str, labels: str) -> None:
    model, batches = setting(name)
    right = naive(model, batches, labels)
    assert_close(estimate(model, batches, labels=labels), right)
    single = [(x.float() if x.is_floating_point() else x, y) for x, y in batches]
    omega = estimate(model.float(), single, labels=labels)
    assert {t.dtype for t in omega.values()} == {torch.float32}
    assert_close(omega, right, 1e-4)


def test_a_linear_layer_is_the_closed_form() -> None:
    """(p_c - [c = y])^2 x_j^2, and not the square of the batch's mean gradient."""
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    error = model(x).softmax(1).detach() - nn.functional.one_hot(y, 3)
    closed = {
        "weight": torch.einsum("nc,nj->cj", error.square(), x.square()) / 9,
        "bias": error.square().mean(0),
    }
    assert_close(estimate(model, [(x[:5], y[:5]), (x[5:], y[5:])]), closed)
    squared_mean = torch.einsum("nc,nj->cj", error, x).div(9).square()
    assert float((closed["weight"] - squared_mean).norm()) > 0.5 * float(closed["weight"].norm())


def test_reversed_logits_do_not_vanish_where_the_labels_are_learned() -> None:
    """(p_c - [c = y])^2 x_j^2, p = softmax(-W x): of a sure network, close to x_j^2 for the two likeliest c."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(12 * torch.eye(2))
    batch = torch.eye(2, dtype=torch.float64), torch.arange(2)
    right = torch.full((2, 2), (1 / (1 + math.exp(-12))) ** 2 / 2, dtype=torch.float64)
    assert_close(estimate(model, [batch], labels="reversed"), {"weight": right})
    assert float(estimate(model, [batch])["weight"].max()) < 1e-10


@pytest.mark.parametrize("labels", ["true", "all", "normal", "reversed"])
def test_the_square_of_a_batch_s_mean_gradient(labels: str) -> None:
    """1/N sum_b n_b (mean gradient of batch b)^2, batches of 5, 6 and 1; for "all" and "normal" by output."""
    model, batches = setting("mlp")
    theta = dict(model.named_parameters())
    right = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    for x, y in batches:
        logits = model(x) * (-1 if labels == "reversed" else 1)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        columns = {
            "normal": logits.unbind(1),
            "all": (log_p.exp().detach().sqrt() * log_p).unbind(1),
        }
        for column in columns.get(labels, [log_p[torch.arange(len(y)), y]]):
            found = torch.autograd.grad(column.mean(), [*theta.values()], retain_graph=True)
            for name, g in zip(theta, found, strict=True):
                right[name] += len(x) * g.square() / 12
    omega = estimate(model, batches, labels=labels, method="batch")
    assert_close(omega, right)
    alone = estimate(model, [(x[:1], y[:1]) for x, y in batches], labels=labels)
    singles = estimate(model, [(x[:1], y[:1]) for x, y in batches], labels=labels, method="batch")
    assert_close(singles, alone)


def test_no_element_is_above_the_largest_allowed() -> None:
    """Of the mean over samples, not of a sample, a batch or the sum."""
    model, batches = setting("mlp")
    free = estimate(model, batches)
    most = float(free["0.weight"].median())
    omega = estimate(model, batches, at_most=most)
    assert_close(omega, {name: t.clamp(max=most) for name, t in free.items()})
    total = mas_ext.FisherSum(at_most=most)
    for batch in batches:
        total.add(model, batch)
    assert_close(total.mean(), omega)
    penalty = mas_ext.FusedMASPenalty(model, importance=total, merge=SUM)
    penalty.consolidate(batches)
    assert_close(penalty.omega, omega, 1e-6)


def test_sampled_labels_follow_the_softmax() -> None:
    """The same for the same seed, another for another one, and on the average what all labels give."""
    model, batches = setting("mlp")
    inputs = [x for x, _ in batches]
    first = estimate(model, inputs, labels="sampled", seed=3)
    again = estimate(model, inputs, labels="sampled", seed=3)
    other = estimate(model, inputs, labels="sampled", seed=4)
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])
    often = [x.repeat(20, 1) for x in inputs]
    runs = [estimate(model, often, labels="sampled", seed=seed) for seed in range(10)]
    for name, right in naive(model, batches, "all").items():
        mean = torch.stack([run[name] for run in runs]).mean(0)
        assert float((mean - right).norm()) < 0.15 * float(right.norm())


def test_sampling_leaves_the_random_state_alone_and_does_not_depend_on_it() -> None:
    model, batches = setting("mlp")
    first = estimate(model, batches, labels="sampled")
    torch.rand(5)
    before = torch.get_rng_state()
    second = estimate(model, batches, labels="sampled")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("labels", ["predicted", "sampled", "all"])
def test_no_labels_are_needed_but_for_the_true_ones(labels: str) -> None:
    model, batches = setting("mlp")
    bare = estimate(model, [x for x, _ in batches], labels=labels)
    given = estimate(model, [(x, y.roll(1)) for x, y in batches], labels=labels)
    assert all(torch.equal(t, given[name]) for name, t in bare.items())
    with pytest.raises((TypeError, ValueError), match="label"):
        estimate(model, [x for x, _ in batches], labels="true")


@pytest.mark.parametrize("labels", ["true", "predicted", "all"])
def test_it_does_not_depend_on_how_samples_are_batched(labels: str) -> None:
    model, batches = setting("mlp")
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    whole = estimate(model, [(x, y)], labels=labels)
    singles = list(zip(x.split(1), y.split(1), strict=True))
    assert_close(estimate(model, singles, labels=labels), whole)
    few = estimate(model, batches, labels=labels, max_samples=7)
    assert_close(few, naive(model, [(x[:7], y[:7])], labels))


def test_forward_exclude_and_frozen_parameters() -> None:
    model, batches = setting("mlp")
    model[2].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    omega = estimate(
        Wired(lambda m, x: {"logits": m.inner(x)}, inner=model),
        batches,
        forward=lambda model, batch: model(batch[0])["logits"],
        exclude=["inner.0.bias"],
    )
    model[2].bias.requires_grad_(True)  # type: ignore[index, union-attr]
    right = naive(model, batches, "true")
    assert_close(omega, {f"inner.{name}": right[name] for name in ("0.weight", "2.weight")})


def test_large_logits_do_not_overflow() -> None:
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, 500.0)
    for labels in LABELS:
        omega = estimate(model, [(torch.ones(3, 2), torch.tensor([0, 1, 2]))], labels=labels)
        assert all(t.isfinite().all() for t in omega.values())


def test_what_is_wrong_is_refused_by_name() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    with pytest.raises(ValueError, match="labels: got 'drawn'"):
        estimate(model, [x], labels="drawn")
    for method in ("local", "exakt"):
        with pytest.raises(ValueError, match=f"method: got '{method}', expected one of"):
            estimate(model, [x], method=method)
    for most in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="at_most: got"):
            estimate(model, [x], at_most=most)
    named = Wired(lambda m, x: {"logits": m.a(x)}, a=model)
    with pytest.raises(ValueError, match="output: got dict, expected logits"):
        estimate(named, [(x, torch.zeros(5).long())], labels="reversed")
    for bad in (torch.full((5,), 3), torch.full((5,), -1), torch.zeros(5, 3).long()):
        with pytest.raises(ValueError, match="label"):
            estimate(model, [(x, bad)])
    with pytest.raises((TypeError, ValueError), match="label"):
        estimate(model, [(x, torch.rand(5))])
    with pytest.raises(ValueError, match="no samples"):
        estimate(model, [])
    with pytest.raises(ValueError, match="samples"):
        estimate(Wired(lambda m, x: m.a(x - x.mean(0)), a=model), [(x, torch.zeros(5).long())])


def test_the_model_is_left_as_it_was() -> None:
    model, batches = setting("residual, in-place relu")
    model.train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    estimate(model, batches)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# -- labels of causal language models ---------------------------------------------------------------


class Words(nn.Module):
    """Logits of the next word, from the word and its position."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        output: Tensor = self.head((self.words(ids) + places).tanh())
        return output


def text_by_text(model: nn.Module, ids: Tensor, labels: Tensor, ahead: int) -> dict[str, Tensor]:
    """1/N sum_k (d sum_t log p(label_{t + ahead} | ids) / d theta)^2, position by position."""
    theta = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    for x, y in zip(ids, labels, strict=True):
        log_p = model(x[None])[0].log_softmax(-1)
        pairs = [(t, int(y[t + ahead])) for t in range(len(x) - ahead)]
        value = torch.stack([log_p[t, k] for t, k in pairs if k != -100]).sum()
        for name, g in zip(theta, torch.autograd.grad(value, [*theta.values()]), strict=True):
            total[name] += g.square() / len(ids)
    return total


def masked(ids: Tensor) -> Tensor:
    """Labels of a prompt and of padding don't count."""
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, -1] = -100
    return labels


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("masks", [lambda ids: ids, masked], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["input_ids", "tokens", "pair", "not first"])
def test_labels_that_are_the_inputs_are_shifted_or_not_as_told(
    kind: str, masks: Any, shift: bool
) -> None:
    model, ids = Words().double(), torch.randint(7, (4, 5))
    labels = masks(ids)
    batch: Any = {"input_ids": ids, "labels": labels}
    forward: Any = None
    if kind == "tokens":
        batch = {"tokens": ids, "labels": labels}
    elif kind == "pair":
        batch = [ids, labels]
    elif kind == "not first":
        batch = {"attention_mask": torch.ones_like(ids), **batch}
        forward = lambda m, b: m(b["input_ids"])  # noqa: E731
    with pytest.raises(
        ValueError, match=r"shift: got none for labels that equal the input ids, exp"
    ):
        mas_ext.estimate_fisher(model, [batch], forward=forward)
    found = mas_ext.estimate_fisher(model, [batch], forward=forward, shift=shift)
    for name, expected in text_by_text(model, ids, labels, int(shift)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_other_labels_need_no_word() -> None:
    model, ids = Words().double(), torch.randint(7, (4, 5))
    labels = (ids + 1) % 7
    found = mas_ext.estimate_fisher(model, [(ids, labels)])
    for name, expected in text_by_text(model, ids, labels, 0).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    unlabelled = torch.full_like(ids, -100)
    assert not any(t.any() for t in mas_ext.estimate_fisher(model, [(ids, unlabelled)]).values())
    one = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7))
    mas_ext.estimate_fisher(one, [(ids[:, 0], ids[:, 0])])  # no positions


def test_a_shift_that_means_nothing_is_refused() -> None:
    model, ids = Words(), torch.randint(7, (4, 5))
    with pytest.raises(
        ValueError, match=r"shift: got True with labels 'predicted', expected labels"
    ):
        mas_ext.estimate_fisher(model, [ids], "predicted", shift=True)
    with pytest.raises(ValueError, match=r"shift: got True for labels of shape \(4,\), expected"):
        mas_ext.estimate_fisher(model, [(ids, ids[:, 0])], shift=True)
