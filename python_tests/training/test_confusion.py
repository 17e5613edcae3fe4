"""Which class test samples are taken for after the last task: counted, against a loop over samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from oracles import naive_training as naive
from torch import Tensor, nn

from mas_ext import Trainer
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Tensors, from_datasets
from mas_ext.state import files
from mas_ext.trainer import Result

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model: MultiHead, scenario: Scenario, setting: str) -> dict[int, Tensor]:
    """Sample by sample."""
    model.eval()
    found = {}
    for k, task in enumerate(scenario.tasks):
        head = {"task": k, "domain": 0, "class": None}[setting]
        outputs = model.outputs[head] if head is not None else sum(model.outputs)
        found[k] = torch.zeros(len(task.classes), outputs, dtype=torch.int64)
        for i in range(len(task.test)):  # type: ignore[arg-type]
            x, y = task.test[i]
            z = model(x[None], head)[0].tolist()
            found[k][task.classes.index(int(y)), z.index(max(z))] += 1
    return found


def assert_same(result: Result, right: dict[int, Tensor]) -> None:
    assert result.confusion.keys() == right.keys()
    for k, counts in right.items():
        assert result.confusion[k].dtype == torch.int64
        assert torch.equal(result.confusion[k], counts)


@pytest.mark.parametrize("method", ["finetune", "joint"])
@pytest.mark.parametrize("setting", naive.SETTINGS)
def test_counts(method: str, setting: str) -> None:
    """Those that are right are the accuracy; test data of more than one batch, and of other sizes."""
    torch.manual_seed(0)
    scenario, model = naive.scenario(setting), naive.Network()
    few = tuple(
        replace(task, test=task.test.subset(torch.arange(k, naive.SAMPLES)))  # type: ignore[attr-defined]
        for k, task in enumerate(scenario.tasks)
    )
    told: list[Any] = []
    trainer = Trainer(
        model,
        method,
        setting=setting,
        lr=0.02,
        epochs=2,
        callbacks=[lambda news: told.append(news)],
    )
    result = trainer.fit(Scenario(few))
    right = counted(model, Scenario(few), setting)
    assert_same(result, right)
    for k, counts in right.items():
        own = 2 * k if setting == "class" else 0
        share = (counts[0, own] + counts[1, own + 1]) / (naive.SAMPLES - k)
        assert float(result.accuracy[-1, k]) == pytest.approx(float(share))


def test_many_test_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mas_ext.training.run.EVALUATION_BATCH", 3)
    torch.manual_seed(0)
    scenario, model = naive.scenario("class"), naive.Network()
    result = Trainer(model, "finetune", setting="class", epochs=1).fit(scenario)
    assert_same(result, counted(model, scenario, "class"))


def test_only_after_the_last_task() -> None:
    sizes: list[int] = []
    follow = [lambda news: sizes.append(len(news.confusion)) if isinstance(news, Result) else None]
    tiny.trainer("mas", callbacks=follow).fit(tiny.scenario())
    assert sizes == [0, 2]


def test_tasks_without_classes_have_none() -> None:
    model = naive.Network()
    assert (
        Trainer(model, "finetune", task_loss="mse", epochs=1).fit(naive.regression()).confusion
        == {}
    )


def test_outputs_that_are_of_no_class() -> None:
    """A head may have more outputs than its task has classes."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    scenario = Scenario(
        (
            replace(
                tiny.scenario().tasks[0],
                train=(data := Tensors(x, torch.arange(12) % 2)),
                test=data,
                outputs=4,
            ),
        )
    )
    model = MultiHead(nn.Sequential(nn.Linear(3, 4)), 4)
    result = Trainer(model, "finetune", epochs=0).fit(scenario)
    assert_same(result, counted(model, scenario, "task"))
    assert result.confusion[0].shape == (2, 4)
    assert int(result.confusion[0][:, 2:].sum()) > 0


def test_a_run_that_goes_on_has_the_same(tmp_path: Path) -> None:
    whole = tiny.trainer("mas").fit(tiny.scenario())
    tiny.interrupt("mas", tmp_path / "run")
    rest = tiny.trainer("mas", checkpoint=tmp_path / "run").fit(tiny.scenario())
    assert_same(rest, whole.confusion)
    # From its end, too, where nothing is measured again.
    over = tiny.trainer("mas", checkpoint=tmp_path / "run").fit(tiny.scenario())
    assert_same(over, whole.confusion)


def test_a_checkpoint_from_before_there_was_any(tmp_path: Path) -> None:
    tiny.interrupt("mas", tmp_path / "run")
    state = files.unpack(files.load(tmp_path / "run"))
    assert state["found"].pop("confusion") == {}
    files.save(files.pack(state), tmp_path / "run")
    rest = tiny.trainer("mas", checkpoint=tmp_path / "run").fit(tiny.scenario())
    assert_same(rest, tiny.trainer("mas").fit(tiny.scenario()).confusion)


def test_outputs_at_every_place_are_not_counted() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, None].expand(-1, 2, -1)

    x, y = torch.eye(2), torch.arange(2)
    scenario = from_datasets([(Tensors(x, y), Tensors(x, y))])
    trainer = Trainer(
        MultiHead(nn.Sequential(nn.Linear(2, 2), Twice()), 2),
        "finetune",
        epochs=1,
        task_loss=lambda output, target: F.cross_entropy(output.mean(1), target),
        score=lambda output, target: output.mean(1).argmax(1) == target,
    )
    result = trainer.fit(scenario)
    assert result.confusion == {}
    assert result.accuracy[0, 0] in (0.0, 0.5, 1.0)
