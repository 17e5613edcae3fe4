"""Our plugins beside Avalanche's own, in Avalanche's own loop."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.scenarios.task_aware import task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training import Naive
from avalanche.training import plugins as theirs
from integrations.ranks import both
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mas_ext
from mas_ext.failures import Diverged
from mas_ext.integrations import avalanche as ours

CLASSES, TASKS, INPUTS = 3, 3, 6


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stream(shared: bool = False) -> list[Any]:
    """Three experiences of 23 samples, each with classes and a task label of its own, or all with the same."""
    datasets = []
    for t in range(TASKS):
        generator = torch.Generator().manual_seed(t)
        y = torch.arange(23) % CLASSES
        x = torch.randn(23, INPUTS, generator=generator) + 2 * torch.eye(INPUTS)[y + t]
        labelled = TensorDataset(x, y if shared else y + CLASSES * t)
        labelled.targets = labelled.tensors[1].tolist()  # type: ignore[attr-defined]
        datasets.append(as_classification_dataset(labelled))
    benchmark = benchmark_from_datasets(train=datasets)
    benchmark = benchmark if shared else task_incremental_benchmark(benchmark)
    experiences = list(with_classes_timeline(benchmark).train_stream)
    for experience in experiences:  # as a list, which its multi-head classifier needs
        experience.classes_in_this_experience = list(experience.classes_in_this_experience)
    return experiences


def plain() -> nn.Module:
    """Dropout and BatchNorm tell the modes apart."""
    return nn.Sequential(
        nn.Linear(INPUTS, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(8, CLASSES * TASKS),
    )


def grows() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), IncrementalClassifier(8))


def heads() -> nn.Module:
    return MTSimpleMLP(INPUTS, 8)


Network = Callable[[], nn.Module]


class Reseed(theirs.SupervisedPlugin):  # type: ignore[misc]
    """The same random numbers for both, whatever the importance pass before drew; and the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        torch.manual_seed(strategy.clock.train_exp_counter)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.losses.append(strategy.loss.item())


def strategy(
    network: Network, plugin: Any, lr: float = 0.1, optimizer: Any = torch.optim.SGD
) -> tuple[Any, Reseed]:
    torch.manual_seed(0)
    model, seed = network(), Reseed()
    made = Naive(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr, momentum=0.5),
        train_mb_size=5,
        train_epochs=2,
        plugins=[seed, plugin],
        evaluator=None,
    )
    return made, seed


@pytest.mark.parametrize("network", [plain, grows, heads])
def test_avalanche_numbers(network: Network) -> None:
    """Importance, losses with the penalty in them, parameters: as with Avalanche's plugin."""
    own = theirs.MASPlugin(lambda_reg=0.7, alpha=0.3)
    plugin = ours.MASPlugin(0.7, 0.3, importance="avalanche", omega_dtype=torch.float64)
    (a, seed_a), (b, seed_b) = strategy(network, own), strategy(network, plugin)
    for experience in stream():
        a.train(experience)
        b.train(experience)
        assert plugin.penalty is not None
        for name, w in plugin.penalty.omega.items():
            torch.testing.assert_close(w, own.importance[name].data, rtol=1e-9, atol=1e-12)
    assert len(seed_a.losses) > 20
    torch.testing.assert_close(seed_b.losses, seed_a.losses, rtol=1e-9, atol=0)
    for (name, x), y in zip(
        b.model.state_dict().items(), a.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=name)


def single_samples(model: nn.Module, experience: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model says of each sample alone, in eval mode, and the label."""
    model.eval()
    for x, y, t in experience.dataset:
        multi = isinstance(model, MTSimpleMLP)
        output = model(x[None], torch.tensor([t])) if multi else model(x[None])
        yield output[0], torch.as_tensor(y)


def gradient(value: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(found, model.parameters(), strict=True)
    ]


def mean_of(
    model: nn.Module, experience: Any, value: Callable[[Tensor, Tensor], Tensor], power: int
) -> dict[str, Tensor]:
    """1/N sum_k abs(gradient)^power by name."""
    model = copy.deepcopy(model)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for output, y in single_samples(model, experience):
        total = [
            t + g.abs() ** power
            for t, g in zip(total, gradient(value(output, y), model), strict=True)
        ]
    names = [name for name, _ in model.named_parameters()]
    return {n: t / len(experience.dataset) for n, t in zip(names, total, strict=True)}


def used(output: Tensor) -> Tensor:
    """Without the masked units."""
    return output[output > -999]


@pytest.mark.parametrize("network", [plain, grows, heads])
def test_exact_importance_of_the_logits_in_use(network: Network) -> None:
    plugin = ours.MASPlugin(0.5, merge="sum", omega_dtype=torch.float64)
    trained, _ = strategy(network, plugin)
    expected: dict[str, Tensor] = {}
    for experience in stream():
        trained.train(experience)
        new = mean_of(trained.model, experience, lambda out, y: used(out).square().sum(), 1)
        for name, omega in new.items():
            old = expected.get(name, torch.zeros_like(omega))
            grown = torch.zeros_like(omega)
            grown[: len(old)] = old
            expected[name] = grown + omega
    assert plugin.penalty is not None
    assert plugin.penalty.num_tasks == TASKS
    assert plugin.penalty.omega.keys() == expected.keys()
    for name, w in plugin.penalty.omega.items():
        torch.testing.assert_close(w, expected[name], rtol=1e-8, atol=1e-12, msg=name)


def test_masked_units_do_not_hide_the_sensitivity() -> None:
    """Units at -1000 have a large norm that depends on nothing: MAS-alpha would refuse an output like that."""
    torch.set_default_dtype(torch.float32)
    plugin = ours.MASPlugin(merge="consistent")
    trained, _ = strategy(heads, plugin)
    for experience in stream():
        trained.train(experience)
    assert plugin.penalty is not None
    assert plugin.penalty.num_tasks == TASKS


@pytest.mark.parametrize(("mode", "factor"), [("separate", None), ("online", 0.6)])
def test_ewc(mode: Any, factor: float | None) -> None:
    plugin = ours.EWCPlugin(0.8, mode, factor, omega_dtype=torch.float64)
    trained, _ = strategy(plain, plugin)
    fishers, anchors = [], []
    experiences = stream()
    for experience in experiences[:2]:
        trained.train(experience)
        fishers.append(mean_of(trained.model, experience, nn.functional.cross_entropy, 2))
        anchors.append({n: p.detach().clone() for n, p in trained.model.named_parameters()})
    with torch.no_grad():
        for p in trained.model.parameters():
            p += torch.randn_like(p)
    theta = dict(trained.model.named_parameters())
    if mode == "online":
        fishers, anchors = (
            [{n: factor * f + fishers[1][n] for n, f in fishers[0].items()}],
            anchors[1:],
        )
    expected = 0.8 * sum(
        (f[n] * (theta[n] - anchor[n]) ** 2).sum()
        for f, anchor in zip(fishers, anchors, strict=True)
        for n in theta
    )
    assert plugin.penalty is not None
    torch.testing.assert_close(plugin.penalty(), expected, rtol=1e-8, atol=0)


def test_ewc_keeps_every_experience_when_asked() -> None:
    plugin = ours.EWCPlugin(1.0, keep_importance_data=True)
    trained, _ = strategy(plain, plugin)
    for experience in stream():
        trained.train(experience)
    assert plugin.penalty is not None
    plugin.penalty.drop(0)
    assert plugin.penalty.num_tasks == 2


@pytest.mark.parametrize("network", [plain, grows, heads])
def test_si(network: Network) -> None:
    """The path along the plain gradient, step by step, and lambda/2 of each experience."""
    plugin = ours.SynapticIntelligencePlugin([0.0, 4.0], eps=1e-2, omega_dtype=torch.float64)
    trained, _ = strategy(network, plugin)
    path = Written(plugin, trained)
    trained.plugins.insert(0, path)
    for experience in stream():
        trained.train(experience)
    assert plugin.penalty is not None
    assert plugin.penalty.lam == 2.0
    assert path.penalised > 3
    norm = {"1.weight", "1.bias"} if network is plain else set()
    assert plugin.penalty.omega.keys() == dict(trained.model.named_parameters()).keys() - norm
    for name, w in plugin.penalty.omega.items():
        torch.testing.assert_close(w, path.omega[name], rtol=1e-7, atol=1e-10, msg=name)


class Written(theirs.SupervisedPlugin):  # type: ignore[misc]
    """Synaptic Intelligence written out: W from the gradients that the loss alone has, before our plugin's."""

    def __init__(self, plugin: ours.SynapticIntelligencePlugin, trained: Any) -> None:
        super().__init__()
        self.omega: dict[str, Tensor] = {}
        self.penalised = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        theta = dict(strategy.model.named_parameters())
        self.start = {n: p.detach().clone() for n, p in theta.items()}
        self.path = {n: torch.zeros_like(p) for n, p in self.start.items()}

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        theta = dict(strategy.model.named_parameters())
        self.g = {n: p.grad.clone() for n, p in theta.items() if p.grad is not None}
        self.old = {n: p.detach().clone() for n, p in theta.items()}

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        for n, p in strategy.model.named_parameters():
            if n in self.g:
                self.path[n] -= self.g[n] * (p.detach() - self.old[n])
                self.penalised += bool((p.grad != self.g[n]).any())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        for n, p in strategy.model.named_parameters():
            w = self.path[n] / ((p.detach() - self.start[n]) ** 2 + 1e-2)
            old = self.omega.get(n, torch.zeros_like(w))
            w[: len(old)] += old
            self.omega[n] = w.clamp(min=0)


def test_excluded_as_in_avalanche() -> None:
    plugin = ours.SynapticIntelligencePlugin(1.0, excluded_parameters=["0", "*.bias"])
    trained, _ = strategy(plain, plugin)
    trained.train(stream()[0])
    assert plugin.penalty is not None
    assert set(plugin.penalty.omega) == {"4.weight"}


def test_a_proximal_step_cannot_diverge() -> None:
    experiences = stream()
    moved = []
    for step in ("gradient", "proximal"):
        plugin = ours.MASPlugin(1e6, step=step)  # type: ignore[arg-type]
        trained, _ = strategy(grows, plugin)
        trained.train(experiences[0])
        before = trained.model[0].weight.detach().clone()
        # What diverged has importance beyond all numbers, which is refused where it would be merged.
        with suppress(Diverged) if step == "gradient" else nullcontext():
            trained.train(experiences[1])
        moved.append(float((trained.model[0].weight - before).detach().abs().max()))
        assert not trained.optimizer._optimizer_step_post_hooks
    assert not moved[0] < 1  # far away, or NaN
    assert moved[1] < 0.1


def test_after_a_training_that_failed() -> None:
    """The next one with the same optimizer has the penalty once."""
    plugin = ours.MASPlugin(step="proximal")
    trained, _ = strategy(plain, plugin)

    class Failing(theirs.SupervisedPlugin):  # type: ignore[misc]
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory")

    failing = Failing()
    trained.plugins.append(failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        trained.train(stream()[0])
    trained.plugins.remove(failing)
    trained.train(stream()[0])
    assert plugin.penalty is not None
    assert plugin.penalty.num_tasks == 1
    assert not trained.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, mas_ext.optim.SGD], ids=["torch", "ours"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.MASPlugin(2.0),
        lambda: ours.MASPlugin(2.0, importance="avalanche"),
        lambda: ours.EWCPlugin(5.0, "online", 0.5, step="proximal"),
        lambda: ours.SynapticIntelligencePlugin(3.0),
    ],
    ids=["mas", "avalanche", "ewc", "si"],
)
def test_checkpoints(
    make: Callable[[], Any], optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Avalanche's own mechanism, after one experience of three: the others end in the same bits."""
    if optimizer is torch.optim.SGD:
        # torch takes this name away again after importing; dill, which Avalanche saves with, then fails on
        # every SGD, whatever the plugins.
        monkeypatch.setattr(torch.optim, "sgd", sys.modules["torch.optim.sgd"], raising=False)
    experiences = stream()
    whole, _ = strategy(heads, make(), optimizer=optimizer)
    for experience in experiences:
        whole.train(experience)

    first, _ = strategy(heads, make(), optimizer=optimizer)
    first.train(experiences[0])
    save_checkpoint(first, tmp_path / "checkpoint")
    again, _ = strategy(heads, make(), optimizer=optimizer)
    resumed, start = maybe_load_checkpoint(again, tmp_path / "checkpoint")
    assert start == 1
    for experience in experiences[start:]:
        resumed.train(experience)
    (plugin,) = [p for p in resumed.plugins if isinstance(p, ours.QuadraticPlugin)]
    assert plugin.penalty is not None
    assert plugin.penalty.model is resumed.model
    assert plugin.penalty.num_tasks == TASKS
    for x, y in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ours.MASPlugin(step="adam"), "step: got 'adam'"),
        (lambda: ours.MASPlugin(alpha=2.0), "alpha: got 2.0"),
        (lambda: ours.EWCPlugin(1.0, "online", -0.5), "decay_factor: got -0.5"),
        (lambda: ours.EWCPlugin(1.0, "both"), "mode: got 'both'"),
        (lambda: ours.EWCPlugin(1.0, "online"), "decay_factor: got None"),
        (lambda: ours.EWCPlugin(1.0, decay_factor=0.5), "decay_factor: got 0.5"),
        (lambda: ours.EWCPlugin(1.0, "online", 0.5, True), "keep_importance_data: got True"),
        (lambda: ours.SynapticIntelligencePlugin(1.0, eps=0), "eps: got 0"),
        (lambda: ours.SynapticIntelligencePlugin(1.0, device="cpu"), "device: got 'cpu'"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_two_processes(tmp_path: Path) -> None:
    """23 samples, which two ranks can't share evenly: the importance of one process, the same bits on both."""
    found = both("avalanche", tmp_path)
    model = plain()
    model.load_state_dict(found[0]["state"])
    expected = mean_of(model, stream()[0], lambda out, y: out.square().sum(), 1)
    for name, w in expected.items():
        torch.testing.assert_close(found[0]["omega"][name], w, rtol=1e-8, atol=1e-12, msg=name)
        assert torch.equal(found[0]["omega"][name], found[1]["omega"][name])
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
    plugins = (ours.MASPlugin, ours.EWCPlugin, ours.SynapticIntelligencePlugin)
    assert all(p.supports_distributed for p in plugins)


# -- before the first step of an experience, and after its last one ------------------------------------


class Counting(theirs.SupervisedPlugin):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.steps += 1


class LossInside(nn.Sequential):
    """In eval mode, as importance is measured."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)
        return output if self.training else output.square().mean()


@pytest.mark.parametrize("make", [lambda: ours.MASPlugin(1.0), lambda: ours.EWCPlugin(1.0)])
def test_what_cant_be_measured_is_told_before_the_first_step(make: Any) -> None:
    made, _ = strategy(lambda: LossInside(nn.Linear(INPUTS, CLASSES * TASKS)), make())
    counting = Counting()
    made.plugins.append(counting)
    with pytest.raises(ValueError, match="model: got LossInside, expected one whose importance"):
        made.train(stream()[0])
    assert counting.steps == 0


@pytest.mark.parametrize("make", [lambda: ours.MASPlugin(0.0), lambda: ours.EWCPlugin(0.0)])
def test_the_trial_leaves_random_numbers_and_data(make: Any) -> None:
    """A penalty of no strength: the training with dropout is the same, bit for bit."""
    found = []
    for plugin in (Counting(), make()):
        made, _ = strategy(plain, plugin)
        for experience in stream()[:2]:
            torch.manual_seed(1)
            made.train(experience)
        found.append(made.model.state_dict())
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name]), name


class Writes(theirs.SupervisedPlugin):  # type: ignore[misc]
    """Writes weights at the end of an experience, as averages do."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p in strategy.model.parameters():
                p *= 0.5


@pytest.mark.parametrize("first", [True, False])
def test_weights_written_at_the_end_are_the_anchor(first: bool) -> None:
    """Of several plugins; after each experience the strategy has the plugins that it had."""
    own = [ours.MASPlugin(0.5), ours.EWCPlugin(0.5), ours.SynapticIntelligencePlugin(0.5)]
    made, _ = strategy(plain, own[0])
    made.plugins[-1:] = [*own, Writes()] if first else [Writes(), *own]
    plugins = list(made.plugins)
    for number, experience in enumerate(stream()[:2], 1):
        made.train(experience)
        assert made.plugins == plugins
        for plugin in own:
            assert plugin.penalty is not None
            assert plugin.penalty.num_tasks == number
            latest = number == 1 or isinstance(plugin, ours.SynapticIntelligencePlugin)
            for n, a in plugin.penalty.anchor.items() if latest else ():
                theta = made.model.get_parameter(n).detach()
                torch.testing.assert_close(a, theta, rtol=1e-12, atol=1e-15, msg=n)


def test_a_training_that_failed_leaves_no_second_consolidation() -> None:
    class Fails(theirs.SupervisedPlugin):  # type: ignore[misc]
        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            raise MemoryError

    plugin, fails = ours.MASPlugin(0.5), Fails()
    made, _ = strategy(plain, plugin)
    plugins = list(made.plugins)
    made.plugins.append(fails)
    with pytest.raises(MemoryError):
        made.train(stream()[0])
    made.plugins = [p for p in made.plugins if p is not fails]
    made.train(stream()[0])
    assert made.plugins == plugins
    assert plugin.penalty is not None
    assert plugin.penalty.num_tasks == 1


# -- the strength by itself ------------------------------------------------------------------------

PLUGINS: dict[str, Callable[[], Any]] = {
    "mas": lambda: ours.MASPlugin("auto", keep=0.9, omega_dtype=torch.float64),
    "ewc": lambda: ours.EWCPlugin("auto", keep=0.9, omega_dtype=torch.float64),
    "si": lambda: ours.SynapticIntelligencePlugin("auto", keep=0.9),
}


class Start(theirs.SupervisedPlugin):  # type: ignore[misc]
    """The random numbers, the model and what held it when an experience begins, before other plugins."""

    def __init__(self, plugin: Any) -> None:
        super().__init__()
        self.plugin = plugin

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.random, self.model = torch.get_rng_state(), copy.deepcopy(strategy.model)
        penalty = self.plugin.penalty
        self.held = None if penalty is None else dict(penalty.state_dict())
        self.optimizer = copy.deepcopy(strategy.optimizer.state_dict())


class End(theirs.SupervisedPlugin):  # type: ignore[misc]
    """The batch that an experience begins with, after other plugins."""

    batch: Any = ()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.batch = strategy.mbatch


@pytest.mark.parametrize(
    ("name", "network", "shared", "order"),
    [
        ("mas", plain, True, (0, 1, 2)),
        ("mas", plain, False, (0, 1, 2)),
        ("mas", grows, False, (0, 1, 2)),
        ("mas", heads, False, (0, 1, 0)),
        ("ewc", heads, False, (0, 1, 2)),
        ("si", grows, True, (0, 1, 2)),
        ("si", grows, False, (0, 1, 2)),
    ],
)
def test_strength_by_itself(
    name: str, network: Network, shared: bool, order: tuple[int, ...]
) -> None:
    """It is that of choose_lam in a loop written out, and training is as with that number."""
    plugin = PLUGINS[name]()
    start, lams = Start(plugin), list[float]()
    made, seed = strategy(network, plugin)
    made.plugins.insert(0, start)
    made.plugins.append(end := End())
    for i, t in enumerate(order):
        experience = stream(shared)[t]
        made.train(experience)
        assert plugin.penalty is not None
        assert end.batch is None
        if i == 0:
            continue
        assert start.held is not None
        penalty = PLUGINS[name]().build(start.model)
        penalty.load_state_dict(start.held)
        old = sorted({*order[:i]} - {t})
        lams.append(written_out(start, experience, t, lams, penalty, shared, old))
        assert plugin.penalty.lam == pytest.approx(lams[-1], rel=1e-9)
    assert lams[0] > 0
    assert lams[0] != lams[1]
    assert len(seed.losses) == 3 * 2 * 5


def written_out(
    start: Start,
    experience: Any,
    t: int,
    before: list[float],
    penalty: mas_ext.FusedMASPenalty,
    shared: bool,
    heads: list[int],
) -> float:
    """choose_lam with a loop over nine tenths of an experience, measured on the other two samples."""
    model = start.model
    multi, task = isinstance(model, MTSimpleMLP), 0 if shared else t
    x, y = (torch.stack([torch.as_tensor(s[i]) for s in experience.dataset]) for i in (0, 1))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    known, rest = order[2:], order[:2].sort().values
    data = DataLoader(TensorDataset(x[known], y[known]), 5, shuffle=True, drop_last=True)

    def output(x: Tensor, task: int) -> Tensor:
        found: Tensor = model(x, torch.full((len(x),), task)) if multi else model(x)
        return found

    def learn() -> Iterator[torch.optim.Optimizer]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        optimizer.load_state_dict(copy.deepcopy(start.optimizer))
        batches = (batch for _ in range(3) for batch in data)
        for a, b in itertools.islice(batches, 10):  # two epochs of five
            optimizer.zero_grad()
            F.cross_entropy(output(a, task), b).backward()
            optimizer.step()
            yield optimizer

    def measure() -> tuple[float, list[Tensor]]:
        model.eval()
        with torch.no_grad():
            logits = output(x[rest], task)
            old = [output(x[rest], k) for k in heads] if multi else [logits[:, : CLASSES * t]]
            old = [] if shared else old
            return float(F.cross_entropy(logits, y[rest])), old

    torch.set_rng_state(start.random)
    return mas_ext.choose_lam(penalty, learn, measure, 0.9, before)


class Given(theirs.SupervisedPlugin):  # type: ignore[misc]
    """Sets the strength of a plugin's penalty at the beginning of every experience."""

    def __init__(self, plugin: Any, lams: list[float]) -> None:
        super().__init__()
        self.plugin, self.lams = plugin, lams

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.plugin.penalty.lam = self.lams[strategy.clock.train_exp_counter]


def test_training_with_a_strength_by_itself() -> None:
    """It is that with the same number in the proximal form."""
    plugin, told = PLUGINS["mas"](), ours.MASPlugin(1.0, step="proximal", omega_dtype=torch.float64)
    (made, seed), lams = strategy(plain, plugin), list[float]()
    for experience in stream():
        made.train(experience)
        lams.append(plugin.penalty.lam)
    twin, twins = strategy(plain, told)
    twin.plugins.insert(2, Given(told, lams))
    for experience in stream():
        twin.train(experience)
    assert len({*lams}) == 3
    assert seed.losses == twins.losses
    for p, q in zip(made.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_wrong_strengths() -> None:
    for make, words in (
        (lambda: ours.MASPlugin("atuo"), "lambda_reg: got 'atuo', expected a number or 'auto'"),  # type: ignore[arg-type]
        (
            lambda: ours.SynapticIntelligencePlugin([1.0, "auto"]),  # type: ignore[list-item]
            "si_lambda: got 'auto'",
        ),
        (lambda: ours.EWCPlugin("auto", keep=2), "keep: got 2, expected a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
