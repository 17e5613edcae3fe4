"""What a proof is for, when it is asked for, and what is done where samples differ from themselves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Wired

from mas_ext import estimate_importance
from mas_ext.importance import ImportanceSum
from mas_ext.importance.exact import driver

pytestmark = pytest.mark.usefixtures("one_thread")

Forward = Callable[[Any, Any], Tensor]


def waves(y: Tensor) -> Tensor:
    return y.flatten(1).cumsum(1).sin().sum(1)


def assert_right(model: nn.Module, forward: Forward, batches: Sequence[tuple[Tensor, Any]]) -> None:
    """Without the fallback, and equal to single samples; entries that are lists have an item for each."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        omega = estimate_importance(model, batches, objective=waves, forward=forward)
    theta = dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    samples = [
        (x[k : k + 1], entry[k : k + 1] if isinstance(entry, list) else entry)
        for x, entry in batches
        for k in range(len(x))
    ]
    for sample in samples:
        grads = torch.autograd.grad(waves(forward(model, sample)).sum(), [*theta.values()])
        for total, g in zip(expected.values(), grads, strict=True):
            total += g.abs() / len(samples)
    for name, t in expected.items():
        torch.testing.assert_close(omega[name], t.detach(), rtol=1e-10, atol=1e-12)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def by_entry(m: Any, batch: Any) -> Tensor:
    """One layer sees rows by sample and rows by position; an entry of the batch says which comes first."""
    x, by_sample_first = batch
    n, p = x.shape[:2]
    rows = [x.flatten(0, 1), x.transpose(0, 1).flatten(0, 1)]
    if by_sample_first:
        by_sample, by_position = (m.a(row) for row in rows)
    else:
        by_position, by_sample = (m.a(row) for row in reversed(rows))
    return by_sample.tanh().view(n, p, -1) * by_position.view(p, n, -1).transpose(0, 1)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_proof_is_for_batches_with_the_same_entries_that_are_no_tensors(order: Any) -> None:
    model = Wired(lambda m, x: x, a=nn.Linear(4, 3)).double()
    assert_right(model, by_entry, [(real(5, 3, 4), first) for first in order])


def test_numbers_that_are_made_of_a_samples_own_entries_are_data() -> None:
    """They are last, where nobody looks for samples in a tensor that is made of numbers."""

    def forward(m: Any, batch: Any) -> Tensor:
        x, words = batch
        numbers = torch.tensor(
            [
                [[len(word) + k * word.count(letter) for word in words] for letter in "ab"]
                for k in range(3)
            ]
        )
        return m.out((m.w @ numbers.double()).tanh().movedim(2, 0) * x[:, None])

    words = ["a", "aba", "bb", "aa", "bab"]
    model = Wired(lambda m, x: x, w=torch.randn(4, 2), out=nn.Linear(4, 3)).double()
    assert_right(model, forward, [(real(5, 4), words), (real(4, 4), words[1:])])


def by_truths(m: Any, batch: Any) -> Tensor:
    """Numbers made of a truth value of each sample; they are last, too."""
    x, _ = batch
    truths = [bool(row.sum() > 0) for row in x]
    numbers = torch.tensor([[[k * t + j for t in truths] for j in range(2)] for k in range(1, 4)])
    return m.out((m.w @ numbers.double()).tanh().movedim(2, 0) * x[:, None])


def test_truth_values_of_samples_are_data() -> None:
    model = Wired(lambda m, x: x, w=torch.randn(4, 2), out=nn.Linear(4, 3)).double()
    assert_right(model, by_truths, [(real(5, 4), None), (real(5, 4), None), (real(4, 4), None)])


def with_a_check(m: Any, x: Tensor) -> Tensor:
    """As in DeBERTa: a look at the ids, then rows gathered by indices that are made of numbers."""
    padded = 0 in x
    h = m.table(x)
    order = (torch.tensor(2 - padded) - torch.arange(3)).clamp(min=0)
    return torch.gather(m.a(h), 1, order[None, :, None].expand(len(x), 3, 4))


def test_a_truth_value_of_the_batch_is_no_samples_own() -> None:
    model = Wired(with_a_check, table=nn.Embedding(9, 4), a=nn.Linear(4, 4)).double()
    total, passes = ImportanceSum(), []

    def watch(module: nn.Module, args: Any, y: Tensor) -> None:
        y.register_hook(lambda grad: passes.append(len(grad)))

    model.a.register_forward_hook(watch)
    batches = [torch.randint(1, 9, (5, 3)) for _ in range(3)]
    for batch in batches:
        passes.clear()
        total.add(model, batch)
    assert passes == [5]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for x in torch.cat(batches):
        objective = with_a_check(model, x[None]).square().sum()
        expected += torch.autograd.grad(objective, model.a.weight)[0].abs() / 15
    torch.testing.assert_close(total.mean()["a.weight"], expected)


def with_mean_of_large_batches(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h - h.mean(0).detach() if len(x) > 4 else h)


def test_samples_that_interact_in_a_first_batch_of_more_than_are_tried_are_refused() -> None:
    """Gradients show nothing of it: outputs must be those of samples alone."""
    model = Wired(with_mean_of_large_batches, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="samples interact"):
        estimate_importance(model, [torch.randn(8, 4)])


# By the norm of a whole batch, if it is larger than 1.
NORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda h: h / h.norm().clamp(min=1),
    "clamp to a tensor": lambda h: h / h.norm().clamp(min=torch.ones(())),
    "clamp of the inverse": lambda h: h * (1 / (h.norm() + 1e-6)).clamp(max=1),
    "clamp of every number's": lambda h: h / h.norm(dim=0).clamp(min=1),
    "maximum": lambda h: h / torch.maximum(h.norm(), torch.ones(())),
    "max": lambda h: h / torch.max(torch.ones(()), h.norm()),
    "amax": lambda h: h / torch.stack([h.norm(), torch.ones(())]).amax(),
    "minimum": lambda h: h * torch.minimum(1 / (h.norm() + 1e-6), torch.ones(())),
    "threshold": lambda h: h / nn.functional.threshold(h.norm(), 1.0, 1.0),
    "relu": lambda h: h / (1 + nn.functional.relu(h.norm() - 1)),
    "hardtanh": lambda h: h / (2 + nn.functional.hardtanh(h.norm() - 2, -1, 100)),
    "softshrink": lambda h: h / (1 + nn.functional.softshrink(h.norm(), 1.0)),
    "where": lambda h: torch.where(h.norm() > 1, h / h.norm(), h),
}


@pytest.mark.filterwarnings("ignore:importance of .* takes the fallback")
@pytest.mark.parametrize("way", NORMED)
def test_samples_that_interact_beyond_a_bound_are_refused_when_a_later_batch_passes_it(
    way: str,
) -> None:
    model = Wired(lambda m, x: m.b(NORMED[way](m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    model.a.bias.data.zero_()
    total, x = ImportanceSum(), torch.randn(6, 4)
    total.add(model, 0.01 * x)
    with pytest.raises(ValueError, match="samples interact"):
        total.add(model, 10 * x)


def mixing_in_large_batches(m: Any, x: Tensor) -> Tensor:
    """The gradient of `a` alone is one of other samples, too."""
    h = m.a(x)
    if len(x) > 4:
        h = h + (h.mean(0) - h.mean(0).detach())
    return m.b(torch.tanh(h))


def test_what_remains_without_the_parameters_of_the_fallback_is_proven_for_all_batches() -> None:
    model, total = (
        Wired(mixing_in_large_batches, a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        ImportanceSum(),
    )
    whole: list[int] = []

    def watch(module: nn.Module, args: Any, y: Tensor) -> None:
        y.register_hook(lambda grad: whole.append(len(grad)))

    model.register_forward_hook(watch)
    with pytest.warns(UserWarning, match=r"importance of a\.bias, a\.weight: takes the fallback"):
        total.add(model, torch.randn(7, 4))
    whole.clear()
    total.add(model, torch.randn(7, 4))
    assert whole.count(7) == 1


def frozen_layers(m: Any, x: Tensor) -> Tensor:
    """Random numbers in place of what they remember would make a gradient 16 times as large with each."""
    h = m.first(x)
    for layer in m.more:
        h = h + layer(h).tanh()
    return h


def frozen_gates(m: Any, x: Tensor) -> Tensor:
    """And here half as large with each."""
    h = m.first(x)
    for _ in range(300):
        h = h * (1 + 0.1 * h.detach().sin())
    return h


@pytest.mark.parametrize("forward", [frozen_layers, frozen_gates])
def test_depth_is_no_obstacle(forward: Forward) -> None:
    torch.manual_seed(0)
    more = nn.ModuleList([nn.Linear(32, 32) for _ in range(40)]).requires_grad_(False)
    model, total = Wired(forward, first=nn.Linear(4, 32), more=more), ImportanceSum()
    batches = [torch.randn(7, 4) for _ in range(3)]
    passes: list[int] = []

    def watch(module: nn.Module, args: Any, y: Tensor) -> None:
        y.register_hook(lambda grad: passes.append(len(grad)))

    model.first.register_forward_hook(watch)
    total.add(model, batches[0])
    for batch in batches[1:]:
        passes.clear()
        total.add(model, batch)
        assert passes == [7]
    expected = torch.zeros(32, 4, dtype=torch.float64)
    model.double()
    for x in torch.cat(batches).double():
        objective = forward(model, x[None]).square().sum()
        expected += torch.autograd.grad(objective, model.first.weight)[0].abs() / 21
    torch.testing.assert_close(
        total.mean()["first.weight"].double(),
        expected,
        rtol=1e-3,
        atol=1e-6 * float(expected.max()),
    )


class Inverted(nn.Module):
    """An inverted bottleneck (MobileNet, EfficientNet-Lite), whose ReLU6 let no gradient through above 6."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 3 * inputs
        self.layers = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.residual = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_saturated_units_are_no_obstacle(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6()),
        *(Inverted(4, 4, 1), Inverted(4, 6, 2), nn.BatchNorm2d(6), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=scale)
            nn.init.normal_(module.bias, std=scale)
    model.eval()
    x = scale * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert_right(model, lambda m, batch: m(batch[0]), [(x[:2], None), (x, None)])


def test_parameters_that_differ_from_their_samples_are_told_of_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_NOISE", -1e20)  # nothing agrees
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"0\.bias, 0\.weight, 2\.bias, 2\.weight: takes") as told:
        omega = estimate_importance(model, [x])
    assert len(told) == 1
    for k in range(5):
        grads = torch.autograd.grad(model(x[k : k + 1]).square().sum(), [*model.parameters()])
        for total, g in zip(omega.values(), grads, strict=True):
            total -= g.abs() / 5
    assert all(total.abs().max() < 1e-12 for total in omega.values())
