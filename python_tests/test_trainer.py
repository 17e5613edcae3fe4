"""The Trainer: data, settings, stopping and going on, against plain loops; methods have tests of their own."""

from __future__ import annotations

import itertools
import math
import signal
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from oracles import naive_training as naive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import Dataset, Subset, TensorDataset

import mas_ext
from mas_ext import metrics
from mas_ext.failures import Diverged
from mas_ext.methods import MAS, METHODS, Method, Training, create
from mas_ext.methods.ewc import EWC
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.joint import Joint
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Task, Tensors, from_datasets
from mas_ext.state import files
from mas_ext.trainer import Callback, Trainer
from mas_ext.training import run as learning_module
from mas_ext.training.run import Epoch, Learning, Result
from mas_ext.training.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Recorder(Finetune):
    """What a method is shown."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, Tensor, Tensor]] = []
        self.losses: list[Tensor] = []

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """Keeps the batch."""
        self.batches.append((training.task, x, y))
        loss = super().loss(training, x, y)
        self.losses.append(loss.detach())
        return loss


def small(dropout: float = 0.0) -> MultiHead:
    torch.manual_seed(0)
    layers = [nn.Linear(naive.INPUTS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout)]
    return MultiHead(nn.Sequential(*layers).double(), 8)


def fit(
    method: Method | str, model: MultiHead | None = None, *callbacks: Callback, **settings: Any
) -> Result:
    scenario = naive.scenario(settings.get("setting", "task"))
    settings = {"batch_size": 8, "callbacks": callbacks, **settings}
    return Trainer(model or small(), method, **settings).fit(scenario)


# -- data ------------------------------------------------------------------------------------------


def test_every_epoch_takes_every_sample_once_in_another_order() -> None:
    recorder = Recorder()
    fit(recorder, epochs=2)
    data = naive.scenario("task").tasks[1].train
    assert isinstance(data, Tensors)
    of_task = [(x, y) for task, x, y in recorder.batches if task == 1]
    assert [len(y) for _, y in of_task] == [8, 8, 4] * 2
    epochs = [torch.cat([x for x, _ in of_task[i : i + 3]]) for i in (0, 3)]
    for x in epochs:
        assert torch.equal(x[x[:, 0].argsort()], data.x[data.x[:, 0].argsort()])
    assert not torch.equal(*epochs)
    for x, y in of_task:
        for sample, label in zip(x, y.tolist(), strict=True):
            (i,) = (data.x == sample).all(1).nonzero()[0].tolist()
            assert int(data.y[i]) == 2 + label


def test_labels_are_columns_of_what_is_trained() -> None:
    for setting, lowest in (("task", [0, 0, 0]), ("domain", [0, 0, 0]), ("class", [0, 2, 4])):
        recorder = Recorder()
        model = small()
        fit(recorder, model, setting=setting, epochs=1)
        for task in range(3):
            seen = torch.cat([y for t, _, y in recorder.batches if t == task])
            assert seen.unique().tolist() == [lowest[task], lowest[task] + 1]
        assert model.outputs == ([2] if setting == "domain" else [2, 2, 2])


def test_joint_training_mixes_all_tasks_so_far_and_tells_their_heads_apart() -> None:
    class Watched(Joint):
        def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
            loss = super().loss(training, x, y)
            if training.task == 2:
                features = training.model.backbone(x)
                losses = [
                    -training.model.heads[c // 2](h).log_softmax(0)[c % 2]
                    for h, c in zip(features, y.tolist(), strict=True)
                ]
                torch.testing.assert_close(loss, torch.stack(losses).mean())
                labels.append(y)
            return loss

    labels: list[Tensor] = []
    model = MultiHead(nn.Linear(naive.INPUTS, 8).double(), 8)
    fit(Watched(), model, epochs=1)
    assert torch.cat(labels).bincount().tolist() == [10] * 6
    assert max(len(y.unique()) for y in labels) > 4


def test_balanced_samples() -> None:
    x = torch.randn(400, naive.INPUTS, dtype=torch.float64)
    y = (torch.arange(400) % 10 == 0).long()
    recorder = Recorder()
    scenario = from_datasets([(Tensors(x, y), Tensors(x, y))])
    Trainer(small(), recorder, epochs=5, balanced=True).fit(scenario)
    drawn = torch.cat([labels for _, _, labels in recorder.batches])
    assert len(drawn) == 2000
    # 4 standard deviations of a fair coin.
    assert abs(int(drawn.sum()) - 1000) < 4 * 500**0.5


class Listed(Dataset[tuple[Tensor, int]]):
    """The same data, but not in memory."""

    def __init__(self, data: Tensors) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = self.data[i]
        return x, int(y)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_any_data_set_gives_the_same_as_data_in_memory(joint: bool, workers: int) -> None:
    scenario = naive.scenario("task")
    pairs = []
    for task in scenario.tasks:
        assert isinstance(task.train, Tensors)
        pairs.append((Listed(task.train), TensorDataset(task.train.x, task.train.y)))
    method = "joint" if joint else "finetune"
    model = MultiHead(nn.Linear(naive.INPUTS, 8).double(), 8)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    Trainer(model, method, epochs=2, batch_size=100, workers=workers).fit(from_datasets(pairs))
    same = MultiHead(nn.Linear(naive.INPUTS, 8).double(), 8)
    same.load_state_dict(state)
    Trainer(same, method, epochs=2, batch_size=100).fit(scenario)
    for name, t in model.state_dict().items():
        torch.testing.assert_close(t, same.state_dict()[name], rtol=0, atol=1e-12)


# -- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", naive.SETTINGS)
def test_accuracy_is_measured_as_the_setting_says(setting: str) -> None:
    class Tested(Finetune):
        """Tests the model by itself when a task ends."""

        def end_task(self, training: Training) -> None:
            model = training.model.eval()
            for k, task in enumerate(scenario.tasks[: training.task + 1]):
                assert isinstance(task.test, Tensors)
                heads = {"task": [k], "domain": [0], "class": range(training.task + 1)}[setting]
                right = 0
                for x, y in zip(task.test.x, task.test.y.tolist(), strict=True):
                    features = model.backbone(x[None])[0]
                    told = max(
                        (float(z), (h, c))
                        for h in heads
                        for c, z in enumerate(model.heads[h](features).tolist())
                    )[1]
                    right += told == ({"task": k, "domain": 0, "class": k}[setting], y % 2)
                expected[training.task, k] = right / len(task.test)
            model.train()

    expected = torch.full((3, 3), float("nan"), dtype=torch.float64)
    scenario = naive.scenario(setting)
    result = fit(Tested(), setting=setting, epochs=3)
    lower = ~expected.isnan()
    assert torch.equal(result.accuracy[lower], expected[lower])
    assert result.average_accuracy == metrics.average_accuracy(expected)
    assert result.forgetting == metrics.forgetting(expected)
    # With one head for all tasks, those to come are tested as well, and all before any training.
    assert bool(result.accuracy.isnan().any()) == bool(result.initial.isnan().any())
    assert bool(result.initial.isnan().any()) == (setting != "domain")
    assert (result.step_seconds > 0).all()
    assert (result.border_seconds > 0).all()
    assert result.held_bytes.tolist() == [0, 0, 0]


def test_seconds_are_sums_over_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(learning_module, "time", clock)
    result = fit("finetune", epochs=2)
    # One tick between two looks at the clock: 2 epochs of 3 steps; a beginning and an end.
    assert result.step_seconds.tolist() == [2 / 6] * 3
    assert result.border_seconds.tolist() == [2.0] * 3
    stopped = naive.start(Finetune(), "task")
    next(naive.steps(stopped))
    elsewhere = naive.start(Finetune(), "task")
    clock.perf_counter = lambda: 0.0  # what was measured before is kept
    elsewhere.load_state_dict(stopped.state_dict())
    for _ in naive.steps(elsewhere):
        pass
    assert elsewhere.found.border_seconds.tolist() == [1.0, 0.0, 0.0]


def test_accuracy_is_measured_on_the_test_data_without_gradients() -> None:
    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_grad_enabled() == self.training
            return super().forward(x)

    x, y = torch.randn(40, 4), torch.arange(40) % 2
    x[:, 0] = 9.0 * y - 4.5
    train, test = Tensors(x, y), Tensors(x, (y + (torch.arange(40) < 4)) % 2)
    result = Trainer(MultiHead(Watched(4, 8), 8), "finetune", lr=0.05, batch_size=8).fit(
        from_datasets([(train, test)])
    )
    assert result.accuracy.tolist() == [[0.9]]


def test_what_mas_holds_is_two_numbers_a_parameter() -> None:
    result = fit("mas", epochs=1)
    parameters = sum(p.numel() for p in small().backbone.parameters())
    # float64 here; and a remainder for each tensor, counters and settings.
    assert (result.held_bytes >= 16 * parameters).all()
    assert (result.held_bytes < 16 * parameters + 2000).all()


def test_validation_data_are_held_out() -> None:
    recorder, told = Recorder(), []
    model = small()
    trainer = Trainer(
        model, recorder, epochs=2, batch_size=8, validation=0.25, callbacks=[told.append]
    )
    result = trainer.fit(naive.scenario("task"))
    data = naive.scenario("task").tasks[2].train
    assert isinstance(data, Tensors)
    used = torch.cat([x for task, x, _ in recorder.batches if task == 2])
    assert len(used) == 2 * 15
    out = torch.tensor([not (used == x).all(1).any() for x in data.x])
    assert int(out.sum()) == 5
    with torch.no_grad():
        right = model.eval()(data.x[out], 2).argmax(1) == data.y[out] - 4
    assert result.validation[2, 2] == right.double().mean()
    assert not result.validation[2].isnan().any()
    epochs = [news for news in told if isinstance(news, Epoch)]
    assert [(e.task, e.epoch) for e in epochs] == [(t, e) for t in range(3) for e in (1, 2)]
    assert epochs[-1].validation == result.validation[2, 2]
    losses = torch.stack(recorder.losses[-2:])
    assert epochs[-1].loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert sum(isinstance(news, Result) for news in told) == 3


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    class Worse(Finetune):
        """Learns in the first two epochs and unlearns afterwards."""

        def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
            weights.setdefault(epoch(), {n: t.clone() for n, t in model.state_dict().items()})
            sign = 1 if epoch() < 2 else -3
            return sign * F.cross_entropy(training.logits(x), y)

        def end_task(self, training: Training) -> None:
            ended.update({n: t.clone() for n, t in model.state_dict().items()})

    def epoch() -> int:
        return len([news for news in told if isinstance(news, Epoch)])

    told: list[Epoch | Result] = []
    weights: dict[int, dict[str, Tensor]] = {}
    ended: dict[str, Tensor] = {}
    model = small()
    scenario = Scenario(naive.scenario("task").tasks[:1])
    settings: dict[str, Any] = {"epochs": 20, "validation": 0.5, "patience": 3, "lr": 0.05}
    Trainer(model, Worse(), callbacks=[told.append], **settings).fit(scenario)
    shares = [news.validation or 0.0 for news in told if isinstance(news, Epoch)]
    best = shares.index(max(shares))
    assert len(shares) == best + 4 < 20
    for name, t in ended.items():
        assert torch.equal(t, weights[best + 1][name]), name


def test_without_patience_the_last_weights_stay() -> None:
    class Watched(Finetune):
        def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
            last.update({n: p.detach().clone() for n, p in training.model.named_parameters()})

    model, last, told = small(), {}, []  # type: ignore[var-annotated]
    settings: dict[str, Any] = {"epochs": 6, "validation": 0.5, "lr": 0.5, "batch_size": 4}
    scenario = Scenario(naive.scenario("task").tasks[:1])
    Trainer(model, Watched(), callbacks=[told.append], **settings).fit(scenario)
    shares = [news.validation for news in told if isinstance(news, Epoch)]
    assert shares.index(max(shares)) < 5
    for name, p in model.named_parameters():
        assert torch.equal(p, last[name]), name


# -- another task loss -----------------------------------------------------------------------------


def regress(
    method: Method | str = "finetune", model: MultiHead | None = None, **arguments: Any
) -> Result:
    arguments = {"task_loss": F.mse_loss, "batch_size": 8, "epochs": 3, "lr": 0.05, **arguments}
    return Trainer(model or small(), method, **arguments).fit(naive.regression())


@pytest.mark.parametrize("setting", ["task", "domain"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_default_score_of_a_regression_is_minus_its_loss(setting: str, in_memory: bool) -> None:
    """By samples one at a time; targets may come from any data set."""
    scenario = naive.regression()
    if not in_memory:
        data = [TensorDataset(task.train.x, task.train.y) for task in scenario.tasks]  # type: ignore[attr-defined]
        tasks = zip(scenario.tasks, data, strict=True)
        scenario = Scenario(tuple(replace(task, train=d, test=d) for task, d in tasks))
    model = small()
    trainer = Trainer(model, "finetune", task_loss=F.mse_loss, setting=setting, batch_size=8)
    result = trainer.fit(scenario)
    model.eval().requires_grad_(False)
    for k, task in enumerate(naive.regression().tasks):
        errors = [
            float((model(x[None], 0 if setting == "domain" else k)[0] - y).square().sum()) / 2
            for x, y in (task.test[i] for i in range(naive.SAMPLES))
        ]
        assert result.accuracy[2, k] == pytest.approx(-sum(errors) / naive.SAMPLES)
    assert model.outputs == ([2] if setting == "domain" else [2, 2, 2])
    assert bool(result.initial.isnan().any()) == (setting != "domain")


def test_a_score_of_ones_own() -> None:
    """One number per sample, or a batch's mean, for tests and validation; labels smoothed are labels still."""

    def near(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().amax(1) < 0.5

    each, mean = (
        regress(score=score, validation=0.25)
        for score in (near, lambda output, target: near(output, target).double().mean())
    )
    for one, other in ((each.accuracy, mean.accuracy), (each.validation, mean.validation)):
        torch.testing.assert_close(one, other, equal_nan=True)
        share = one[2] * (20 if one is each.accuracy else 5)
        torch.testing.assert_close(share, share.round())
        assert float(share.sum()) > 0
    smooth = partial(F.cross_entropy, label_smoothing=0.1)
    for loss in (smooth, nn.CrossEntropyLoss(label_smoothing=0.1)):
        found = fit("ewc", task_loss=loss, epochs=2).accuracy
        assert torch.equal(
            found.nan_to_num(), fit("ewc", task_loss=smooth, epochs=2).accuracy.nan_to_num()
        )
        assert ((found[2] >= 0) & (found[2] <= 1)).all()


def test_early_stopping_by_scores_below_0() -> None:
    told: list[Epoch | Result] = []
    settings: dict[str, Any] = {"epochs": 20, "validation": 0.5, "patience": 2, "lr": 0.3}
    score = lambda output, target: -10 - F.mse_loss(output, target)  # noqa: E731
    regress(score=score, callbacks=[told.append], **settings)
    scores = [news.validation for news in told if isinstance(news, Epoch) and news.task == 0]
    best = scores.index(max(scores))  # type: ignore[type-var]
    assert best > 0
    assert len(scores) == best + 3 < 20


def test_joint_regression_with_one_head() -> None:
    result = regress("joint", setting="domain", epochs=2)
    assert result.accuracy.isfinite().all()
    with pytest.raises(ValueError, match="task_loss: got joint training of several heads"):
        regress("joint")


def test_what_a_task_without_classes_can_not_have() -> None:
    with pytest.raises(ValueError, match="setting: got 'class' with a task without classes"):
        regress(setting="class")
    with pytest.raises(ValueError, match="balanced: got True with a task without classes"):
        regress(balanced=True)
    with pytest.raises(ValueError, match="task_loss: got 3, expected a callable"):
        regress(task_loss=3)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mse", F.mse_loss),
        ("l1", F.l1_loss),
        ("smooth-l1", F.smooth_l1_loss),
        ("torch.nn.functional:huber_loss", F.huber_loss),
    ],
)
def test_a_task_loss_by_name(name: str, function: Any, tmp_path: Path) -> None:
    """What was begun with one goes on with the other."""
    named, given = small(), small()
    regress(model=named, task_loss=name)
    regress(model=given, task_loss=function)
    for weight, t in named.state_dict().items():
        assert torch.equal(t, given.state_dict()[weight]), weight
    with pytest.raises(KeyboardInterrupt):
        regress(Stopped(5), checkpoint=tmp_path / "run", task_loss=name)
    regress(Stopped(0), checkpoint=tmp_path / "run", task_loss=function)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["test", "validation"])
def test_a_score_that_is_no_number_is_no_result(kind: str, value: float) -> None:
    def score(output: Tensor, y: Tensor) -> Tensor:
        tested = len(y) == naive.SAMPLES
        return torch.full((len(y),), value if tested == (kind == "test") else 1.0)

    told = rf"score of task '(.*)': got {value} over its {kind} data after task '\1'"
    with pytest.raises(Diverged, match=told):
        regress(score=score, validation=0.25)


def test_scores_and_losses_by_name() -> None:
    model = small()
    assert torch.equal(
        fit("finetune", task_loss="cross-entropy", score="accuracy").accuracy.nan_to_num(),
        fit("finetune").accuracy.nan_to_num(),
    )
    huber = regress(model=model, score="torch.nn.functional:huber_loss").accuracy
    assert bool((huber.diagonal() > 0).all())
    for name, message in {
        "msee": "task_loss: got 'msee', did you mean 'mse'?",
        "nowhere:loss": "task_loss: got 'nowhere:loss', .*No module named 'nowhere'",
        "math:loss": "task_loss: got 'math:loss', expected what can be imported",
        "math:pi": "task_loss: got 'math:pi', float, expected a function",
    }.items():
        with pytest.raises(ValueError, match=message):
            regress(task_loss=name)


# -- sequences ---------------------------------------------------------------------------------------


def sequences(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Of 1 to 6 steps of 3 numbers, and two targets each, float64."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(1 + i % 6, 3, generator=generator, dtype=torch.float64) for i in range(count)]
    weights = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return xs, torch.stack([(x.sum(0) @ weights).tanh() for x in xs])


class LastStep(nn.Module):
    """An LSTM's state after the last step of each sequence, which are padded with NaN; (N, 5)."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.lstm, self.packed = nn.LSTM(3, 5, batch_first=True), packed

    def forward(self, x: Tensor) -> Tensor:
        lengths, x = (~x.isnan().any(2)).sum(1), x.nan_to_num()
        if self.packed:
            packed = pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False)
            last: Tensor = self.lstm(packed)[1][0][-1]
            return last
        states: Tensor = self.lstm(x)[0]
        return states[torch.arange(len(x)), lengths - 1]


@pytest.mark.filterwarnings("ignore:.*takes the fallback:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("setting", ["task", "domain"])
def test_a_recurrent_policy_on_sequences_of_different_length(setting: str, packed: bool) -> None:
    """Importance is that of a loop over sequences without padding, and the first task is held."""
    tasks = []
    for task in range(2):
        xs, y = sequences(24, task)
        data = Tensors(pad_sequence(xs, True, float("nan")), y)
        tasks.append(Task(str(task), data, data, outputs=2))
    settings: dict[str, Any] = {"task_loss": "mse", "epochs": 6, "lr": 0.05, "batch_size": 8}

    def learned(method: Method, count: int) -> tuple[MultiHead, Result]:
        torch.manual_seed(0)
        model = MultiHead(LastStep(packed).double(), 5)
        return model, Trainer(model, method, setting=setting, **settings).fit(
            Scenario(tuple(tasks[:count]))
        )

    mas = MAS()
    model, _ = learned(mas, 1)
    theta = {n: p for n, p in model.named_parameters() if setting != "task" or "heads" not in n}
    right = {n: torch.zeros_like(p, requires_grad=False) for n, p in theta.items()}
    for x in sequences(24, 0)[0]:
        state = model.backbone.lstm(x[None])[0][:, -1]
        value = model.classify(state, 0).square().sum()
        for name, g in zip(theta, torch.autograd.grad(value, [*theta.values()]), strict=True):
            right[name] += g.abs() / 24
    assert mas.penalty is not None
    naive.assert_close(mas.penalty.omega, right)
    free, held = (learned(method, 2)[1].accuracy for method in (MAS(0.0), MAS(10.0)))
    assert held[1, 0] > free[1, 0] + 0.01


def test_sequences_that_are_not_padded_are_refused_by_name() -> None:
    class Ragged(Dataset[Any]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(1 + i % 6, 3), torch.zeros(2)

    task = Task("arm", Ragged(), Ragged(), outputs=2)
    with pytest.raises(ValueError, match=r"inputs: got shapes \(.*\) and .*pad_sequence"):
        Trainer(MultiHead(LastStep(False), 5), task_loss="mse").fit(Scenario((task,)))


def test_a_regression_is_resumed_with_the_same_loss_and_score_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        regress(Stopped(5), checkpoint=path)
    with pytest.raises(ValueError, match="got a run with task_loss mse_loss, expected l1_loss"):
        regress(Stopped(0), checkpoint=path, task_loss=F.l1_loss)
    with pytest.raises(ValueError, match="got a run with score None, expected l1_loss"):
        regress(Stopped(0), checkpoint=path, score=F.l1_loss)
    again, whole = small(), small()
    regress(Stopped(0), again, checkpoint=path)
    regress(Stopped(0), whole)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [None, "float16"])
def test_schedule_and_clipping(amp: str | None) -> None:
    class Watched(Finetune):
        def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
            rates.append(training.optimizer.param_groups[0]["lr"])
            gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    rates: list[float] = []
    norms: list[float] = []
    fit(Watched(), epochs=2, schedule="linear", lr=0.6, clip=1e-3, amp=amp)
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0] * 3, abs=1e-9)
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert sorted(norms)[9] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast(amp: str) -> None:
    class Watched(Finetune):
        def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
            seen.append(training.logits(x).dtype)
            return super().loss(training, x, y)

    seen: list[torch.dtype] = []
    data = Tensors(torch.randn(16, 4), torch.arange(16) % 2)
    model = MultiHead(nn.Linear(4, 8), 8)
    before = model.backbone.weight.detach().clone()
    Trainer(model, Watched(), epochs=2, amp=amp).fit(from_datasets([(data, data)]))
    assert set(seen) == {getattr(torch, amp)}
    moved = (model.backbone.weight.detach() - before).abs().max()
    assert 1e-4 < float(moved) < 1e-2  # two steps of Adam of 1e-3 each


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_is_kept() -> None:
    class Overflowing(Finetune):
        def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
            loss = super().loss(training, x, y)
            if learning.at.step == 0:
                loss.register_hook(lambda g: g * torch.inf)
            return loss

    settings = Settings(epochs=1, batch_size=8, amp="float16")
    learning = Learning(small(), Overflowing(), settings, naive.scenario("task"), CPU)
    learning.begin_task()
    before = [p.detach().clone() for p in learning.model.parameters()]
    steps = learning.steps()
    next(steps)
    assert all(map(torch.equal, learning.model.parameters(), before))
    state = learning.state_dict()
    assert state["scaler"]["scale"] == 2**15
    next(steps)
    assert not any(map(torch.equal, learning.model.parameters(), before))
    elsewhere = Learning(small(), Overflowing(), settings, naive.scenario("task"), CPU)
    elsewhere.load_state_dict(state)
    assert elsewhere.state_dict()["scaler"]["scale"] == 2**15


def test_a_single_sample_that_is_left_over_joins_the_last_step() -> None:
    recorder = Recorder()
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        rates.append(steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    fit(recorder, epochs=1, batch_size=19, schedule=schedule)  # 20 samples, and BatchNorm
    assert [len(y) for _, _, y in recorder.batches] == [20] * 3
    assert rates == [1] * 3


def test_a_task_that_was_learned_before_takes_no_epochs() -> None:
    model = small()
    model.add_head(2)
    before = model.heads[0].weight.detach().clone()  # type: ignore[operator]
    recorder = Recorder()
    fit(recorder, model, epochs=[0, 1, 1])
    assert {task for task, _, _ in recorder.batches} == {1, 2}
    assert torch.equal(model.heads[0].weight, before)  # type: ignore[arg-type]
    assert fit("mas", epochs=[0, 1, 1], importance_epochs=1).held_bytes[0] > 0


def test_the_order_of_samples_is_that_of_the_seed() -> None:
    seen = []
    for seed in (1, 1, 2):
        recorder = Recorder()
        fit(recorder, seed=seed, epochs=1)
        seen.append(torch.cat([x for _, x, _ in recorder.batches]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(("deterministic", "mode"), [(False, 1), (True, 2)])
def test_the_callers_determinism_is_put_back(deterministic: bool, mode: int) -> None:
    class Watched(Finetune):
        def end_task(self, training: Training) -> None:
            assert torch.get_deterministic_debug_mode() == mode

    torch.set_deterministic_debug_mode("warn")
    try:
        fit(Watched(), epochs=1, deterministic=deterministic)
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")


def test_random_numbers_and_determinism_are_those_of_the_seed_and_are_put_back() -> None:
    class Watched(Finetune):
        def end_task(self, training: Training) -> None:
            assert torch.are_deterministic_algorithms_enabled()

    models = [small(0.5) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        before = torch.get_rng_state()
        fit(Watched(), model, seed=seed, epochs=2, deterministic=True)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.are_deterministic_algorithms_enabled()
    one, same, other = ([*model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- stopping and going on -------------------------------------------------------------------------


class Stopped(Finetune):
    """Presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        """Counts."""
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


EVERYTHING: dict[str, Any] = {
    "epochs": 3,
    "validation": 0.2,
    "patience": 2,
    "schedule": "cosine",
    "clip": 0.5,
    "amp": "float16",
    "lr": 0.01,
}


@pytest.mark.parametrize("setting", naive.SETTINGS)
@pytest.mark.parametrize("after", [1, 4, 6, 11, 14])
def test_ctrl_c_ends_the_step_and_fit_goes_on_to_the_same_bits(
    after: int, setting: str, tmp_path: Path
) -> None:
    settings = {**EVERYTHING, "setting": setting}
    whole = small(0.5)
    told: list[Epoch | Result] = []
    expected = fit(Finetune(), whole, told.append, **settings)
    path = tmp_path / "run.safetensors"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Stopped(after), small(0.5), checkpoint=path, **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    elsewhere = small(0.5)
    torch.manual_seed(99)
    stopped = Stopped(0)  # the same method, which does not stop again
    tail: list[Epoch | Result] = []
    found = fit(stopped, elsewhere, tail.append, checkpoint=path, **settings)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, elsewhere.state_dict()[name]), name
    for key in ("accuracy", "validation", "initial"):
        a, b = getattr(expected, key), getattr(found, key)
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    epochs = [[e for e in news if isinstance(e, Epoch)] for news in (told, tail)]
    assert epochs[0][-len(epochs[1]) :] == epochs[1] != []
    # What is over stays as it is.
    again = fit(stopped, small(0.5), checkpoint=path, **settings)
    assert torch.equal(again.accuracy.nan_to_num(-1), found.accuracy.nan_to_num(-1))


def test_ctrl_c_while_a_task_ends_is_heard_before_the_next_begins(tmp_path: Path) -> None:
    class Slow(Finetune):
        def begin_task(self, training: Training) -> None:
            begun.append(training.task)

        def end_task(self, training: Training) -> None:
            signal.raise_signal(signal.SIGINT)

    begun: list[int] = []
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Slow(), checkpoint=path, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Slow(), checkpoint=path, epochs=1)
    assert begun == [0, 1]


class Killed(Exception):
    """What a callback raises."""


@pytest.mark.parametrize("setting", naive.SETTINGS)
@pytest.mark.parametrize("news", [1, 2, 3, 4, 6])
def test_a_run_goes_on_between_epochs_and_tasks(news: int, setting: str, tmp_path: Path) -> None:
    """From the checkpoint before, which for 3 and 6 was written when the last epoch was over."""

    def tell(what: Epoch | Result) -> None:
        told.append(what)
        if len(told) == news:
            raise Killed

    settings: dict[str, Any] = {"epochs": 2, "importance_epochs": 1, "lr": 0.05, "batch_size": 8}
    settings.update(setting=setting, checkpoint=tmp_path / "run")
    model, told = small(0.5), []  # type: ignore[var-annotated]
    with pytest.raises(Killed):
        Trainer(model, "mas-alpha", callbacks=[tell], **settings).fit(naive.scenario(setting))
    assert model.heads
    again, tail, whole, all_told = small(0.5), [], small(0.5), []  # type: ignore[var-annotated]
    Trainer(again, "mas-alpha", callbacks=[tail.append], **settings).fit(naive.scenario(setting))
    settings["checkpoint"] = None
    Trainer(whole, "mas-alpha", callbacks=[all_told.append], **settings).fit(
        naive.scenario(setting)
    )
    for name, t in whole.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name
    epochs = [[e for e in news if isinstance(e, Epoch)] for news in (all_told[news - 1 :], tail)]
    assert epochs[0] == epochs[1]


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path) -> None:
    class Twice(Finetune):
        def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        fit(Twice(), checkpoint=tmp_path / "run.safetensors")
    assert not (tmp_path / "run.safetensors").exists()


STRANGE = [None, -1, 7, 1.5, "x", [], {}, {"a": 1}, torch.zeros(2), torch.zeros(0, 3)]


def test_a_crafted_checkpoint_is_refused(tmp_path: Path) -> None:
    """Whatever is put in the place of anything in it, or taken away: a ValueError, or a run to the end."""
    path = tmp_path / "run"
    tiny.interrupt("mas", path)
    whole = files.unpack(files.load(path))
    assert whole["at"]["task"] == 1
    for key in whole:
        for other in [{**whole, key: strange} for strange in STRANGE] + [
            {k: v for k, v in whole.items() if k != key}
        ]:
            files.save(files.pack(other), path)
            with suppress(ValueError):
                tiny.trainer("mas", checkpoint=path).fit(tiny.scenario())


def test_a_checkpoint_of_another_run_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Stopped(2), checkpoint=path)
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    *most, last = naive.scenario("task").tasks
    fewer = Scenario((*most, replace(last, test=Subset(last.test, range(19)))))
    with pytest.raises(ValueError, match=r"checkpoint: got a run with lr 0\.001, expected 0\.5"):
        fit(Stopped(2), model, checkpoint=path, lr=0.5)
    with pytest.raises(ValueError, match="got a run with method Stopped, expected MAS"):
        fit("mas", model, checkpoint=path)
    with pytest.raises(
        ValueError, match=r"got a run with numbers of samples \[\[20, 20\], .* 19\]\]"
    ):
        Trainer(model, Stopped(2), batch_size=8, checkpoint=path).fit(fewer)
    with pytest.raises(ValueError, match=r"got a run with tasks .*, expected \[\['2', 4, 5\]"):
        Trainer(model, Stopped(2), batch_size=8, checkpoint=path).fit(
            naive.scenario("task").reordered([2, 1, 0])
        )
    wider = MultiHead(nn.Linear(naive.INPUTS, 9), 9)
    with pytest.raises(ValueError, match=r"got 'backbone\.0\.weight' of shape \(8, 5\), exp"):
        fit(Stopped(2), wider, checkpoint=path)
    assert not wider.heads
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        fit(Stopped(2), model, checkpoint=path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_run_does_not_go_on_with_other_options_of_its_method(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    options: dict[str, Any] = {"alpha": (1.0, 2.0, 3.0), "lam": 1.0}
    found = fit(create("imm-mode", **options), checkpoint=path, epochs=1)
    for name, change in (("alpha", (1.0, 2.0, 4.0)), ("lam", 2.0), ("max_samples", 5)):
        part = {"alpha": "alpha", "lam": "transfer", "max_samples": "merging"}[name]
        with pytest.raises(ValueError, match=f"checkpoint: got a run with method's {part} "):
            fit(create("imm-mode", **{**options, name: change}), checkpoint=path, epochs=1)
    # A list is as good as a tuple; callables are not compared.
    options["alpha"] = [1.0, 2.0, 3.0]
    again = fit(create("imm-mode", **options), checkpoint=path, epochs=1)
    assert torch.equal(again.step_seconds, found.step_seconds)
    path.unlink()
    for _ in range(2):
        method = create("mas", objective=lambda output: output.square().sum(1))
        fit(method, checkpoint=path, epochs=1)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"setting": "tasks"}, "setting: got 'tasks', expected one of"),
        ({"optimizer": "rmsprop"}, "optimizer: got 'rmsprop', expected one of sgd, adam, adamw"),
        ({"schedule": "step"}, "schedule: got 'step', expected one of cosine, linear"),
        ({"amp": "half"}, "amp: got 'half'"),
        ({"lr": 0.0}, "lr: got 0.0, expected a finite number above 0"),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"epochs": -1}, "epochs: got -1"),
        ({"epochs": [1, 1]}, "epochs: got 2 numbers, expected one for each of 3 tasks"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size: got 2.5"),
        ({"seed": -1}, "seed: got -1, expected an integer of at least 0"),
        ({"workers": -1}, "workers: got -1"),
        ({"importance_epochs": -1}, "importance_epochs: got -1"),
        ({"validation": -0.5}, r"validation: got -0\.5"),
        ({"epochs": 2.5}, r"epochs: got 2\.5, expected integers of at least 0"),
        ({"epochs": []}, r"epochs: got \[\]"),
        ({"epochs": [1, -1, 1]}, "epochs: got"),
        ({"lr": None}, "lr: got None, expected a finite number above 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"clip": 0.0}, r"clip: got 0\.0"),
        ({"patience": 0, "validation": 0.1}, "patience: got 0, expected a whole number"),
        ({"checkpoint": "no-such-folder/run"}, "checkpoint: got no-such-folder/run, expected a f"),
        ({"validation": 1.0}, "validation: got 1.0"),
        ({"validation": 0.01}, "validation data of task '0': got no samples"),
        ({"patience": 2}, "patience: got 2 with validation=0.0"),
        (
            {"patience": 2, "validation": 0.1, "importance_epochs": 1},
            "importance_epochs: got 1 with patience",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit("finetune", **settings)


def test_what_does_not_fit_together() -> None:
    with pytest.raises(TypeError, match="settings: got 'batchsize', did you mean 'batch_size'"):
        fit("finetune", batchsize=3)
    with pytest.raises(ValueError, match="model: got Linear, expected a MultiHead"):
        Trainer(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"method: got <class .*Finetune'>, expected a Method or"):
        Trainer(small(), Finetune)  # type: ignore[arg-type]
    model = small()
    model.add_head(7)
    with pytest.raises(
        ValueError, match=r"model: got heads with \[7\] outputs, expected \[2, 2, 2\]"
    ):
        fit("finetune", model)
    data = [Tensors(torch.randn(9, 5), torch.arange(9) % classes) for classes in (2, 3)]
    with pytest.raises(ValueError, match=r"setting: got 'domain' with tasks of \[2, 3\] outputs"):
        Trainer(small(), setting="domain").fit(from_datasets([(d, d) for d in data]))


def test_a_training_that_diverges_is_an_error() -> None:
    with pytest.raises(Diverged, match=r"loss: got \w+ in epoch \d of task 0, expected a finite"):
        fit("finetune", lr=1e200, optimizer="sgd", epochs=3)
    assert issubclass(Diverged, FloatingPointError)


@pytest.mark.parametrize("method", [*METHODS, EWC(labels="sampled"), EWC(labels="all")])
@pytest.mark.parametrize("task", [0, 1])
def test_a_last_step_that_diverges_is_found_out(method: Any, task: int) -> None:
    """The loss of the last epoch is still finite: importance is not, or the next task's loss."""
    model = small()

    def spoil(news: Epoch | Result) -> None:
        if isinstance(news, Epoch) and news.task == task:
            with torch.no_grad():
                for parameter in model.backbone.parameters():
                    parameter.fill_(torch.nan)

    with pytest.raises(Diverged, match=r"expected (a )?finite"):
        fit(method, model, spoil, epochs=1)


def test_public_names() -> None:
    assert mas_ext.Trainer is Trainer
    assert Settings().setting == "task"
    learning = Learning(small(), Finetune(), Settings(epochs=0), naive.scenario("task"), CPU)
    learning.begin_task()
    assert not learning.epochs_left()
