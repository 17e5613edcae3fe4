"""The choice of lam, against problems whose best lam is known, and the readout, against plain loops."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles import naive_training as naive
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, choose_lam, methods, read_pull
from mas_ext.failures import Diverged
from mas_ext.scenarios import Scenario
from mas_ext.trainer import Trainer
from mas_ext.training import run as learning_module

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 6
SUM: Any = "sum"
MERGES = sorted({(merge, anchor) for merge, anchor, _ in tiny.FORMS})


class Plain(nn.Module):
    """Parameters alone: x, float64, and y, which nothing holds."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.y = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()))


class Bowl:
    """A new task, f = sum_i curvature_i (x_i - target_i)^2, whose penalised minimum has a closed form."""

    def __init__(self, importance: float = 1.0, lr: float = 0.05, steps: int = 160) -> None:
        generator = torch.Generator().manual_seed(0)
        self.curvature = 0.5 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
        self.target = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.omega = importance * (0.5 + torch.rand(SIZE, generator=generator).double())
        self.model, self.lr, self.steps = Plain(), lr, steps
        self.penalty = FusedMASPenalty(
            self.model, lam=7.0, merge=SUM, exclude=["y"], omega_dtype=torch.float64
        )
        self.penalty.consolidate(importance={"x": self.omega})

    def loss(self, x: Tensor) -> Tensor:
        return (self.curvature * (x - self.target) ** 2).sum()

    def minimum(self, lam: float) -> Tensor:
        """Of f + lam sum_i omega_i x_i^2; the anchor is 0."""
        return self.curvature * self.target / (self.curvature + lam * self.omega)

    def learn(self) -> Generator[torch.optim.Optimizer, None, None]:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), self.lr)
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.loss(self.model.x).backward()
            optimizer.step()
            self.model.calls += torch.rand(())
            yield optimizer

    def measure(self, outputs: Callable[[Tensor], Sequence[Tensor]] = lambda x: ()) -> Any:
        """The loss, and what depends on x for the old tasks."""
        self.model.eval()
        x = self.model.x.detach()
        return float(self.loss(x)), outputs(x)

    def share_unlearned(self, lam: float) -> float:
        first = self.loss(torch.zeros(SIZE, dtype=torch.float64))
        return float(self.loss(self.minimum(lam)) / first)


@pytest.mark.parametrize("importance", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_without_old_outputs_the_task_is_learned_up_to_a_share(
    importance: float, keep: float
) -> None:
    """The best lam leaves keep / 10 unlearned at the known minimum; the choice is half a decade off at most."""
    bowl = Bowl(importance)
    lam = choose_lam(bowl.penalty, bowl.learn, bowl.measure, keep)
    assert bowl.share_unlearned(lam / 1.2) < keep / 10 < bowl.share_unlearned(lam * 10**0.5)


@pytest.mark.parametrize("importance", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_with_old_outputs_the_known_best_lam_is_met(importance: float, keep: float) -> None:
    """(1 - keep) u + keep v of the closed-form minima is least at a lam that is within half a decade."""
    bowl = Bowl(importance)
    still = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def outputs(x: Tensor) -> list[Tensor]:
        return [(still + 0.5 * x.sum())[:, None]]

    lam = choose_lam(bowl.penalty, bowl.learn, lambda: bowl.measure(outputs), keep)

    def cost(lam: float) -> float:
        moved = 0.5 * float(bowl.minimum(lam).sum())
        lost = 2 * moved**2 / float(((still - still.mean()) ** 2).sum())
        return (1 - keep) * bowl.share_unlearned(lam) + keep * lost

    grid = [10 ** (k / 20) / importance for k in range(-60, 61)]
    least = min(map(cost, grid))
    assert cost(lam) < least + 0.1 * (max(map(cost, grid)) - least)


def test_choices_are_averaged() -> None:
    """Each is the geometric mean of all so far; tasks without a choice, NaN or 0, do not count."""
    raw, found = list[float](), [math.nan, 0.0]
    for importance in (1e-3, 1.0, 1e4, 1e2):
        raw.append(choose_lam((b := Bowl(importance)).penalty, b.learn, b.measure))
        found.append(choose_lam(b.penalty, b.learn, b.measure, before=found))
        mean = math.exp(sum(map(math.log, raw)) / len(raw))
        assert found[-1] == pytest.approx(mean, rel=1e-12)
    assert max(raw) > 1e6 * min(raw)


def test_all_is_as_it_was() -> None:
    bowl = Bowl()
    bowl.model.y.requires_grad_(False)
    bowl.model.train()
    gradient = torch.full((SIZE,), 3.0, dtype=torch.float64)
    bowl.model.x.grad = gradient
    before = copy.deepcopy(bowl.model.state_dict())
    state, random = copy.deepcopy(bowl.penalty.state_dict()), torch.get_rng_state()
    lam = choose_lam(bowl.penalty, bowl.learn, bowl.measure)
    assert lam == choose_lam(bowl.penalty, bowl.learn, bowl.measure)
    assert torch.equal(random, torch.get_rng_state())
    assert bowl.model.training
    assert bowl.model.x.grad is gradient
    assert torch.equal(gradient, torch.full_like(gradient, 3.0))
    for found, kept in (
        (bowl.model.state_dict(), before),
        (bowl.penalty.state_dict(), state),
    ):
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], t) for name, t in kept.items())
    assert bowl.penalty.lam == 7.0


def test_what_modules_keep_is_as_it_was() -> None:
    """Buffers that training replaces, lists, counters and tensors that are neither buffer nor parameter."""
    bowl = Bowl(steps=30)
    model: Any = bowl.model
    model.register_buffer("centre", torch.arange(3.0))
    model.outputs, model.count, model.by_name = [1.0], 3, {}
    model.sums = torch.arange(2.0)
    centre, calls = model.centre, model.calls

    def learn() -> Generator[torch.optim.Optimizer, None, None]:
        for optimizer in bowl.learn():
            model.centre = model.centre * 0.9
            model.outputs.append(0.0)
            model.count += 1
            model.by_name["x"] = model.x.sum()
            model.sums += 1
            yield optimizer

    choose_lam(bowl.penalty, learn, bowl.measure)
    assert model.centre is centre
    assert model.calls is calls
    assert torch.equal(model.centre, torch.arange(3.0))
    assert (model.outputs, model.count, model.by_name) == ([1.0], 3, {})
    assert torch.equal(model.sums, torch.arange(2.0))


def test_a_training_that_moves_nothing_is_refused() -> None:
    bowl = Bowl(lr=0.0)
    with pytest.raises(
        ValueError, match="learn: got a training of 160 steps that moves no parameter"
    ):
        choose_lam(bowl.penalty, bowl.learn, bowl.measure)
    assert bowl.penalty.lam == 7
    # Nothing that is held may be moved: there is nothing to choose.
    bowl = Bowl()
    bowl.model.x.requires_grad_(False)
    y = bowl.model.y

    def learn() -> Generator[torch.optim.Optimizer, None, None]:
        optimizer = torch.optim.SGD([y], 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
            yield optimizer

    assert choose_lam(bowl.penalty, learn, lambda: (float(y.detach().square().sum()), ())) == 0


def test_all_is_as_it_was_after_an_error() -> None:
    bowl = Bowl()
    count = 0

    def measure() -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return bowl.measure()

    before = copy.deepcopy(bowl.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        choose_lam(bowl.penalty, bowl.learn, measure)
    assert count == 5
    assert all(torch.equal(bowl.model.state_dict()[name], t) for name, t in before.items())
    assert bowl.penalty.lam == 7.0
    for handle in bowl.penalty.model._backward_hooks, bowl.model._forward_hooks:
        assert not handle


def test_a_measurement_leaves_the_modes_of_the_training() -> None:
    """A training that sets its mode once, or not at all, is not in that of the measurement from then on."""
    bowl = Bowl(steps=32)
    modes: set[bool] = set()

    def learn() -> Generator[torch.optim.Optimizer, None, None]:
        for optimizer in bowl.learn():
            modes.add(bowl.model.training)
            yield optimizer

    choose_lam(bowl.penalty, learn, bowl.measure)
    assert modes == {True}


def test_an_optimizer_that_is_kept_has_nothing_attached_afterwards() -> None:
    bowl = Bowl(steps=32)
    optimizer = torch.optim.SGD(bowl.model.parameters(), bowl.lr)

    def learn() -> Generator[torch.optim.Optimizer, None, None]:
        for _ in range(bowl.steps):
            optimizer.zero_grad()
            bowl.loss(bowl.model.x).backward()
            optimizer.step()
            yield optimizer

    lam = choose_lam(bowl.penalty, learn, bowl.measure)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert lam == choose_lam(bowl.penalty, learn, bowl.measure)


def test_what_the_model_lacks_at_the_moment_counts_for_nothing() -> None:
    """As a head that was taken off: lam and the readout are those of what is left."""
    bowl, other = Bowl(), Bowl()
    bowl.model.head = nn.Linear(2, 2).double()
    penalty = FusedMASPenalty(bowl.model, exclude=["y"], omega_dtype=torch.float64)
    weight = torch.ones(2, 2, dtype=torch.float64)
    penalty.consolidate(importance={"x": bowl.omega, "head.weight": weight})
    del bowl.model.head
    assert choose_lam(penalty, bowl.learn, bowl.measure) == choose_lam(
        other.penalty, other.learn, other.measure
    )
    with torch.no_grad():
        bowl.model.x.copy_(bowl.minimum(2.0))
    bowl.loss(bowl.model.x).backward()
    assert read_pull(penalty).at_rest == pytest.approx(2.0)


def test_a_penalty_without_any_importance_needs_no_lam() -> None:
    assert choose_lam((bowl := Bowl(0.0)).penalty, bowl.learn, bowl.measure) == 0.0


def test_what_can_not_be_learned_is_held() -> None:
    """A loss that only grows is one of which nothing is to be learned: nearly all is kept."""
    bowl = Bowl(steps=50)
    still = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)

    def outputs(x: Tensor) -> list[Tensor]:
        return [still + x.sum()]

    def learn() -> Generator[torch.optim.Optimizer, None, None]:
        optimizer = torch.optim.SGD(bowl.model.parameters(), 0.002)
        for _ in range(50):
            optimizer.zero_grad()
            (-bowl.loss(bowl.model.x)).backward()
            optimizer.step()
            yield optimizer

    assert choose_lam(bowl.penalty, learn, lambda: bowl.measure(outputs)) > 10


@pytest.mark.parametrize("keep", [-0.1, 1.1, math.nan])
def test_errors_come_before_anything_is_done(keep: float) -> None:
    bowl = Bowl()

    def never() -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match=f"keep: got {keep}, expected a number from 0 to 1"):
        choose_lam(bowl.penalty, never, never, keep)
    with pytest.raises(ValueError, match="penalty: got one that holds nothing yet"):
        choose_lam(FusedMASPenalty(bowl.model), never, never)


def test_errors_of_the_training() -> None:
    one_tensor: Any = lambda: (1.0, torch.ones(3, 1))  # noqa: E731
    bowl = Bowl(steps=0)
    with pytest.raises(ValueError, match="learn: got a training without steps"):
        choose_lam(bowl.penalty, bowl.learn, bowl.measure)
    (bowl := Bowl(steps=8)).model.train()
    training = bowl.learn()
    message = "learn: got 0 steps when it was called again, expected at least 4"
    with pytest.raises(ValueError, match=message):
        choose_lam(bowl.penalty, lambda: training, bowl.measure)
    with pytest.raises(TypeError, match="measure: got one tensor beside the loss, expected a seq"):
        choose_lam(bowl.penalty, bowl.learn, one_tensor)
    bowl = Bowl(lr=1e9)
    with pytest.raises(Diverged, match=r"loss: got .* before the task and .* after learning it"):
        choose_lam(bowl.penalty, bowl.learn, bowl.measure)


# -- the readout -----------------------------------------------------------------------------------


def readout(merge: Any, anchor: Any) -> tuple[FusedMASPenalty, dict[str, tuple[Tensor, ...]]]:
    """A penalty, and by parameter W, A, theta and the gradient of a loss, as float64 numbers."""
    model = tiny.parameters()
    penalty = tiny.consolidated(model, merge=merge, anchor=anchor)
    generator = torch.Generator().manual_seed(5)
    tiny.move(model, generator)
    held = {}
    for name, p in model.named_parameters():
        if name != "image":  # has no gradient
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        g = torch.zeros_like(p) if p.grad is None else p.grad
        parts = (penalty.omega[name], penalty.anchor[name], p.detach(), g)
        held[name] = tuple(part.double().flatten() for part in parts)
    return penalty, held


@pytest.mark.parametrize(("merge", "anchor"), MERGES)
def test_the_pull_is_that_of_a_plain_loop(merge: Any, anchor: Any) -> None:
    penalty, held = readout(merge, anchor)
    force = slope = along = energy = 0.0
    for omega, anchor, theta, gradient in held.values():
        for w, a, x, g in zip(*(t.tolist() for t in (omega, anchor, theta, gradient)), strict=True):
            force += (2 * float(penalty.scale) * w * (x - a)) ** 2
            slope += g**2
            along -= g * (x - a)
            energy += float(penalty.scale) / penalty.lam * w * (x - a) ** 2
    found = read_pull(penalty)
    assert found.ratio == pytest.approx(math.sqrt(force / slope), rel=1e-6)
    assert found.at_rest == pytest.approx(along / (2 * energy), rel=1e-6)
    assert math.isnan(found.held)


def test_at_rest_is_the_lam_of_a_minimum() -> None:
    bowl = Bowl()
    for lam in (0.01, 1.0, 100.0):
        with torch.no_grad():
            bowl.model.x.copy_(bowl.minimum(lam))
        bowl.model.zero_grad()
        bowl.loss(bowl.model.x).backward()
        assert read_pull(bowl.penalty).at_rest == pytest.approx(lam)
        bowl.penalty.lam = lam
        assert read_pull(bowl.penalty).ratio == pytest.approx(1.0)


def test_share_held() -> None:
    """Of the parameters with a step size, by Adam's step sizes one by one; unknown without them."""
    bowl = Bowl()
    optimizer = torch.optim.Adam(bowl.model.parameters(), lr=0.01)
    bowl.loss(bowl.model.x).backward()
    assert math.isnan(read_pull(bowl.penalty, optimizer).held)
    optimizer.step()
    v = optimizer.state[bowl.model.x]["exp_avg_sq"]
    for lam in (1.0, 50.0, 100.0, 1e4):
        bowl.penalty.lam = lam
        held = 0
        for w, second in zip(bowl.omega.tolist(), v.tolist(), strict=True):
            eta = 0.01 / (math.sqrt(second / (1 - 0.999)) + 1e-8)
            held += 2 * eta * lam * w > 1
        assert read_pull(bowl.penalty, optimizer).held == held / SIZE
    assert held > 0
    sgd = torch.optim.SGD(bowl.model.parameters(), lr=0.1, momentum=0.5)
    bowl.penalty.lam = 3.0
    right = sum(2 * 0.2 * 3 * w > 1 for w in bowl.omega.tolist()) / SIZE
    assert read_pull(bowl.penalty, sgd).held == right
    assert 0 < right < 1
    assert math.isnan(read_pull(bowl.penalty, torch.optim.RMSprop(bowl.model.parameters())).held)


# -- in a Trainer ----------------------------------------------------------------------------------

AUTOMATIC = ("mas", "mas-alpha", "ewc", "online-ewc", "si", "rwalk")


def train(
    method: Any, scenario: Scenario | None = None, setting: str = "task", **settings: Any
) -> Any:
    """A run of the tiny network: the weights, and what was found."""
    made = tiny.trainer(method, setting, **settings)
    found = made.fit(scenario or tiny.scenario(setting))
    return made.model.state_dict(), found


@pytest.mark.parametrize("setting", naive.SETTINGS)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_a_run_with_lam_chosen_is_one_with_that_lam(name: str, setting: str) -> None:
    """Choosing leaves nothing behind: two tasks come out to the same bits where lam was known."""
    got, found = train(name, lam="auto", setting=setting)
    assert math.isnan(found.lam[0])
    lam = float(found.lam[1])
    assert 0 < lam < math.inf
    method = methods.create(name, lam=2 * lam if "ewc" in name else lam, mode="proximal")
    right, known = train(method, setting=setting)
    assert known.lam.isnan().all()
    assert got.keys() == right.keys()
    for key, t in right.items():
        assert torch.equal(got[key], t), key


def test_a_run_averages_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lam of a task is the geometric mean of what it and the tasks before it would choose alone."""
    raw: list[float] = []

    def recorded(penalty: Any, learn: Any, measure: Any, keep: float, before: Any) -> float:
        raw.append(choose_lam(penalty, learn, measure, keep))
        return choose_lam(penalty, learn, measure, keep, before)

    monkeypatch.setattr(learning_module, "choose_lam", recorded)
    twice = Scenario(2 * tiny.scenario("task").tasks)
    lam = train("mas", twice, lam="auto")[1].lam
    assert len(raw) == len(lam) - 1 == 3
    for t, found in enumerate(lam[1:].tolist(), 1):
        assert math.log(found) == pytest.approx(sum(map(math.log, raw[:t])) / t)


def test_keep_is_what_is_kept() -> None:
    """The more is to be kept, the larger lam."""
    settings = {"lam": "auto", "epochs": 40, "lr": 0.02}
    little, much = (float(train("mas", keep=keep, **settings)[1].lam[1]) for keep in (0.1, 0.9))
    assert 10 * little < much


@pytest.mark.parametrize("setting", naive.SETTINGS)
@pytest.mark.parametrize("name", [*AUTOMATIC, "ewc-dr"])
@pytest.mark.parametrize("after", [7, 9])
def test_a_run_goes_on_to_the_same_bits(name: str, setting: str, after: int) -> None:
    """Between tasks, where lam is chosen anew, and inside one, where the checkpoint has it."""
    naive.resumed(lambda: methods.create(name, lam="auto"), setting, after)


def test_stopped_while_choosing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the choice at its next step, and it is made again, to the same bits."""
    chosen: list[bool] = []

    def interrupted(penalty: Any, learn: Any, measure: Any, keep: float, before: Any) -> float:
        def stopping() -> Any:
            for n, optimizer in enumerate(learn()):
                if n == 2 and not chosen:
                    chosen.append(False)
                    signal.raise_signal(signal.SIGINT)
                yield optimizer

        return choose_lam(penalty, stopping, measure, keep, before)

    right, known = train("mas", lam="auto", epochs=2)
    monkeypatch.setattr(learning_module, "choose_lam", interrupted)
    settings = {"epochs": 2, "checkpoint": tmp_path / "run", "lam": "auto"}
    with pytest.raises(KeyboardInterrupt):
        train("mas", **settings)
    assert chosen == [False]
    got, found = train("mas", **settings)
    assert torch.equal(found.lam[1:], known.lam[1:])
    assert all(torch.equal(got[key], t) for key, t in right.items())


def test_tasks_that_are_not_trained_choose_nothing() -> None:
    assert train("mas", lam="auto", epochs=[2, 0])[1].lam.isnan().all()


def test_a_checkpoint_of_before_is_read() -> None:
    """Checkpoints that know nothing of a choice of lam are those of runs without one."""
    made = naive.start(methods.create("mas"), "task")
    state = made.state_dict()
    del state["found"]["lam"], state["run"]["keep"]
    again = naive.start(methods.create("mas"), "task")
    again.load_state_dict(state)
    assert again.found.lam.isnan().all()
    other = naive.start(methods.create("mas"), "task", keep=0.3)
    with pytest.raises(ValueError, match=r"checkpoint: got a run with keep None, expected 0\.3"):
        other.load_state_dict(state)


def test_what_can_not_choose_its_lam_says_so() -> None:
    model = tiny.trainer("mas").model
    for name in ("lwf", "ebll", "imm-mean"):
        with pytest.raises(ValueError, match="lam: got 'auto', expected float"):
            Trainer(model, name, lam="auto")
    for name in ("finetune", "joint"):
        with pytest.raises(ValueError, match=f"lam: method '{name}' has no such option"):
            Trainer(model, name, lam="auto")
    with pytest.raises(ValueError, match="lam: got 'auto' beside a MAS that has its own"):
        Trainer(model, methods.MAS(), lam="auto")
    with pytest.raises(ValueError, match="lam: got 'much', expected a number or 'auto'"):
        methods.MAS(lam="much")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep: got 2, expected a number from 0 to 1"):
        Trainer(model, "mas", lam="auto", keep=2)
    with pytest.raises(TypeError, match="optimizer: got RMSprop, whose step length is unknown"):
        train("mas", lam="auto", optimizer=lambda p, lr: torch.optim.RMSprop(p, lr))


def test_on_the_command_line(tmp_path: Path) -> None:
    words = ["run", "--hidden", "8", "--epochs", "1", "--batch-size", "32"]
    auto = [
        "--methods",
        "finetune,mas,si",
        "--lam",
        "auto",
        "--keep",
        "0.3",
        "--out",
        tmp_path / "run",
    ]
    assert tiny.command(*words, *auto) == 0
    found = json.loads((tmp_path / "run" / "mas-seed0" / "result.json").read_text())
    assert found["chosen_lam"][0] is None
    assert min(found["chosen_lam"][1:]) > 0
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'lam = "auto"' in config
    assert "keep = 0.3" in config
    rows = (tmp_path / "run" / "table.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in rows if "| mas " in row] == ["auto"]
    assert tiny.command("run", "--resume", "--out", tmp_path / "run") == 0
    assert tiny.command("report", tmp_path / "run") == 0
    both = ["--methods", "mas,lwf", "--lam", "auto", "--out", tmp_path / "other"]
    assert tiny.command(*words, *both) == 0  # LwF can't choose, and keeps its own
    rows = (tmp_path / "other" / "table.md").read_text().splitlines()
    assert [row.split("|")[2].strip() for row in rows if "| lwf" in row] == ["1"]
