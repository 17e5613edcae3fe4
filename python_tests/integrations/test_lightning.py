"""The callback in Lightning's own loops, beside the same training written out."""

from __future__ import annotations

import copy
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integrations import written
from integrations.ranks import both
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import SumMetric

import mas_ext
from mas_ext import FusedMASPenalty
from mas_ext.integrations import choosing
from mas_ext.integrations.lightning import MASCallback


class Module(LightningModule):  # type: ignore[misc]
    def __init__(self, manual: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.net = written.network()
        self.automatic_optimization = not manual
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=written.LR, momentum=0.5, fused=self.fused)


def loader(t: int, batch: int = 8, dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*written.task(t, dtype=dtype)), batch_size=batch)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"precision": "64-true", "max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks],
        default_root_dir=folder,
        **quiet,
        **settings,
    )


def mas(**options: Any) -> MASCallback:
    return MASCallback(written.LAM, omega_dtype=torch.float64, **options)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("parts", "clip"), [(1, None), (2, 0.3)])
def test_as_written(tmp_path: Path, manual: bool, parts: int, clip: float | None) -> None:
    """Accumulated gradients, with the penalty once a step, clipped together."""
    if manual and parts > 1:
        parts, clip = 1, None  # both are up to the module there
    module, callback = Module(manual), mas()
    for t in range(2):
        own = {"gradient_clip_val": clip, "accumulate_grad_batches": parts}
        trainer(tmp_path, callback, **own).fit(module, loader(t, 8 // parts))
    model, omega, anchor = written.two_tasks(clip=clip)
    written.close(dict(module.net.named_parameters()), dict(model.named_parameters()))
    assert callback.penalty is not None
    written.close(callback.penalty.omega, {f"net.{n}": w for n, w in omega.items()}, 1e-8)
    written.close(callback.penalty.anchor, {f"net.{n}": a for n, a in anchor.items()})


def test_strength_by_name(tmp_path: Path) -> None:
    module, callback = Module(), mas(strength={"net.0.*": 3.0, "*.bias": 0.5})
    trainer(tmp_path, callback).fit(module, loader(0))
    omega = written.importance(module.net, written.task(0)[0])
    factors = {"0.weight": 3.0, "0.bias": 0.5, "3.weight": 1.0, "3.bias": 0.5}
    assert callback.penalty is not None
    expected = {f"net.{n}": factors[n] * w for n, w in omega.items()}
    written.close(callback.penalty.omega, expected, 1e-8)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients(tmp_path: Path, fused: bool) -> None:
    """float16 with a GradScaler: a penalty that is not scaled as the gradients are would be 1024 times off."""
    module, callback = Module(fused=fused), mas()
    for t in range(2):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        data = loader(t, dtype=torch.float32)
        trainer(tmp_path, callback, precision=None, plugins=[plugin]).fit(module, data)

    model = written.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=written.LR, momentum=0.5)
    omega: dict[str, Tensor] = {}
    anchor: dict[str, Tensor] = {}
    for t in range(2):
        optimizer.state.clear()
        x, y = written.task(t, dtype=torch.float32)
        for a, b in [*zip(x.split(8), y.split(8), strict=True)] * 2:
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(a), b)
            optimizer.zero_grad()
            (loss * 1024).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= 1024
            if omega:
                written.penalty(model, omega, anchor).backward()
            optimizer.step()
        omega = written.importance(model, x)
        anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    written.close(dict(module.net.named_parameters()), dict(model.named_parameters()), 1e-3)


def test_proximal(tmp_path: Path) -> None:
    """Nothing can move what an enormous lam holds, and nothing diverges."""
    module, callback = Module(), MASCallback(1e9, mode="proximal")
    trainer(tmp_path, callback).fit(module, loader(0))
    held = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer(tmp_path, callback).fit(module, loader(1))
    written.close(dict(module.named_parameters()), held, 1e-4)
    assert callback.penalty is not None
    assert callback.penalty.num_tasks == 2


def test_two_optimizers_get_their_own_part(tmp_path: Path) -> None:
    class Two(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            layers = self.net[0], self.net[3]
            return [torch.optim.SGD(m.parameters(), lr=written.LR, momentum=0.5) for m in layers]

    module, callback = Two(manual=True), mas()
    for t in range(2):
        trainer(tmp_path, callback).fit(module, loader(t))
    model, _, _ = written.two_tasks()
    written.close(dict(module.net.named_parameters()), dict(model.named_parameters()))


def test_checkpoint(tmp_path: Path) -> None:
    """Stopped inside the second task; a new process's objects end where an unstopped run does."""
    module, callback = Module(), mas()
    trainer(tmp_path, callback).fit(module, loader(0))
    saving = trainer(tmp_path, callback, max_epochs=1)
    saving.fit_loop.on_run_end = lambda: None  # it is stopped, not ended
    saving.fit(module, loader(1))
    saving.save_checkpoint(tmp_path / "stopped.ckpt")

    resumed, other = Module().double(), mas()
    going_on = trainer(tmp_path, other)
    going_on.fit(resumed, loader(1), ckpt_path=tmp_path / "stopped.ckpt")
    going_on.save_checkpoint(tmp_path / "ended.ckpt")
    model, omega, _ = written.two_tasks()
    written.close(dict(resumed.net.named_parameters()), dict(model.named_parameters()))
    assert other.penalty is not None
    written.close(other.penalty.omega, {f"net.{n}": w for n, w in omega.items()}, 1e-8)

    third = mas()
    third.load_state_dict(
        torch.load(tmp_path / "ended.ckpt", weights_only=False)["callbacks"][other.state_key]
    )
    third.on_train_start(going_on, resumed)
    assert third.penalty is not None
    written.close(third.penalty.omega, other.penalty.omega)


def test_what_was_remembered_goes_over_to_another_module(tmp_path: Path) -> None:
    module, callback = Module(), mas()
    trainer(tmp_path, callback).fit(module, loader(0))
    again = Module().double()
    again.load_state_dict(module.state_dict())
    trainer(tmp_path, callback).fit(again, loader(1))
    model, _, _ = written.two_tasks()
    written.close(dict(again.net.named_parameters()), dict(model.named_parameters()))


def test_two_of_them_in_one_checkpoint(tmp_path: Path) -> None:
    module, callbacks = Module(), [mas(name="a"), mas(name="b", exclude=("net.0.*",))]
    one = trainer(tmp_path, callbacks[0])
    one.callbacks.append(callbacks[1])
    one.fit(module, loader(0))
    one.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=False)["callbacks"]
    assert len({c.state_key for c in callbacks} & saved.keys()) == 2


def test_data_of_ones_own(tmp_path: Path) -> None:
    x = written.task(5, 7)[0]
    module, callback = Module(), mas(batches=lambda _: x.split(3))
    trainer(tmp_path, callback).fit(module, loader(0))
    assert callback.penalty is not None
    expected = written.importance(module.net, x)
    written.close(callback.penalty.omega, {f"net.{n}": w for n, w in expected.items()}, 1e-8)


def test_wrong_arguments() -> None:
    """Refused at once, not when a task is over."""
    with pytest.raises(ValueError, match="mode: got 'prox', expected 'gradient' or 'proximal'"):
        MASCallback(mode="prox")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batches: got list, expected a function"):
        MASCallback(batches=[])  # type: ignore[arg-type]


def test_several_loaders_need_a_word(tmp_path: Path) -> None:
    class Both(Module):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch["a"], index)

    with pytest.raises(TypeError, match="batches: got none and a training dataloader of dict"):
        trainer(tmp_path, mas()).fit(Both(), {"a": loader(0), "b": loader(1)})


def test_two_processes(tmp_path: Path) -> None:
    """DDP: as one process with all the data, 33 samples to estimate from, which two can't share evenly."""
    found = both("lightning", tmp_path)
    model, omega, _ = written.two_tasks(extra=33, distillation=0.5)
    for rank in found:
        written.close(rank["state"], {f"net.{n}": p for n, p in model.named_parameters()})
        written.close(rank["omega"], {f"net.{n}": w for n, w in omega.items()}, 1e-8)
    assert all(torch.equal(found[0]["omega"][n], w) for n, w in found[1]["omega"].items())


# -- a module that was trained elsewhere, and distillation -----------------------------------------


def as_distilled(weight: float, parts: int = 1, t: int = 1) -> torch.nn.Module:
    """A task after another one is remembered, with the penalty and the term of distillation."""
    model = written.network().double()
    teacher = copy.deepcopy(model)
    omega = written.importance(model, written.task(0)[0])
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=written.LR, momentum=0.5)
    x, y = written.task(t)
    size = 8 // parts
    for start in [*range(0, len(x), 8)] * 2:
        optimizer.zero_grad()
        for i in range(start, start + 8, size):
            a, b = x[i : i + size], y[i : i + size]
            loss = F.cross_entropy(model(a), b) + weight * written.divergence(model, teacher, a)
            (loss / parts).backward()
        written.penalty(model, omega, anchor).backward()
        optimizer.step()
    return model


class Returns(Module):
    """What a training_step may return beside the loss, and how it may run the network."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.runs = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)

    def training_step(self, batch: Any, index: int) -> Any:
        if self.kind == "not by self()":
            return F.cross_entropy(self.net(batch[0]), batch[1])
        if self.kind == "others, too":
            self(batch[0] + 1)
        loss = super().training_step(batch, index)
        if self.kind == "others, too":
            self(batch[0] - 1)
        return {"loss": loss, "more": 1} if self.kind == "dict" else loss


@pytest.mark.parametrize("kind", ["tensor", "dict", "not by self()", "others, too"])
@pytest.mark.parametrize("parts", [1, 2])
def test_remembered_and_distilled_as_written(tmp_path: Path, kind: str, parts: int) -> None:
    """The base's task is remembered once, before the first step; the output is computed once."""
    module = Returns(kind)
    callback = mas(remember=TensorDataset(*written.task(0)), distillation=0.6)
    fit = trainer(tmp_path, callback, accumulate_grad_batches=parts)
    fit.fit(module, loader(1, 8 // parts))
    expected = dict(as_distilled(0.6, parts).named_parameters())
    written.close(dict(module.net.named_parameters()), expected)
    assert callback.penalty is not None
    assert callback.penalty.num_tasks == 2
    assert "training_step" not in vars(module)
    assert not module._forward_hooks


def test_the_output_is_computed_once(tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 0.6):
        module, callback = Returns("tensor"), mas(remember=loader(0), distillation=weight)
        before = copy.deepcopy(module.net)
        trainer(tmp_path, callback).fit(module, loader(1))
        found.append(module.runs)
        assert not all(
            torch.equal(p, q)
            for p, q in zip(before.parameters(), module.net.parameters(), strict=True)
        )
    assert found[0] == found[1]


def test_without_data_outputs_alone_are_held(tmp_path: Path) -> None:
    for remember, weight in ((None, 0.0), (True, 0.6)):
        module = Module()
        callback = MASCallback(0.0, remember=remember, distillation=0.6)
        trainer(tmp_path, callback).fit(module, loader(1))
        model = written.network().double()
        teacher = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=written.LR, momentum=0.5)
        for x, y in [*loader(1)] * 2:
            optimizer.zero_grad()
            (
                F.cross_entropy(model(x), y) + weight * written.divergence(model, teacher, x)
            ).backward()
            optimizer.step()
        written.close(dict(module.net.named_parameters()), dict(model.named_parameters()))


def test_distillation_is_scaled_with_the_loss(tmp_path: Path) -> None:
    """float16 with a GradScaler, beside float64: a term that is not scaled would be 1024 times too small."""
    module = Module()
    callback = MASCallback(written.LAM, remember=loader(0, dtype=torch.float32), distillation=20.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    data = loader(1, dtype=torch.float32)
    trainer(tmp_path, callback, precision=None, plugins=[plugin]).fit(module, data)
    expected = {n: p.float() for n, p in as_distilled(20.0).named_parameters()}
    written.close(dict(module.net.named_parameters()), expected, 2e-2)


def test_a_distance_of_ones_own_and_a_forward(tmp_path: Path) -> None:
    """The squared distance of features, which the training_step does not give."""
    module = Module()
    callback = MASCallback(
        *(0.0,),
        remember=loader(0),
        distillation=0.6,
        distance="squared",
        forward=lambda m, batch: m.net[1](m.net[0](batch[0])),
    )
    trainer(tmp_path, callback).fit(module, loader(1))
    model = written.network().double()
    teacher = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=written.LR, momentum=0.5)
    for x, y in [*loader(1)] * 2:
        optimizer.zero_grad()
        features, target = (m[0](x).tanh() for m in (model, teacher))
        term = (features - target.detach()).square().mean()
        (F.cross_entropy(model(x), y) + 0.6 * term).backward()
        optimizer.step()
    written.close(dict(module.net.named_parameters()), dict(model.named_parameters()))


def test_distillation_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """With the teacher of the training's beginning; one that has ended leaves none."""

    def callback() -> MASCallback:
        return mas(remember=loader(0), distillation=0.6)

    stopped, first = Module(), callback()
    saving = trainer(tmp_path, first, max_epochs=1)
    saving.fit_loop.on_run_end = lambda: None  # it is stopped, not ended
    saving.fit(stopped, loader(1))
    saving.save_checkpoint(tmp_path / "stopped.ckpt")
    assert any(key.startswith("teacher.") for key in first.state_dict())

    module, second = Module().double(), callback()
    with torch.no_grad():
        for p in module.parameters():
            p += 1
    trainer(tmp_path, second).fit(module, loader(1), ckpt_path=tmp_path / "stopped.ckpt")
    written.close(dict(module.net.named_parameters()), dict(as_distilled(0.6).named_parameters()))
    assert second.penalty is not None
    assert second.penalty.num_tasks == 2
    assert not any(key.startswith("teacher.") for key in second.state_dict())


def test_distillation_with_manual_optimisation_is_refused(tmp_path: Path) -> None:
    callback = mas(remember=loader(0), distillation=0.6)
    with pytest.raises(ValueError, match=r"distillation: got 0\.6 with manual optimisation"):
        trainer(tmp_path, callback).fit(Module(manual=True), loader(1))


def test_at_most_so_many_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = torch.randperm(written.SAMPLES, generator=torch.Generator().manual_seed(0))[:7]
    module = Module()
    base = copy.deepcopy(module.net).double()
    callback = mas(remember=loader(0), max_samples=7, progress=True)
    trainer(tmp_path, callback).fit(module, loader(1))
    one = written.importance(base, written.task(0)[0][drawn])
    two = written.importance(module.net, written.task(1)[0][drawn])
    assert callback.penalty is not None
    expected = {f"net.{n}": one[n] + two[n] for n in one}
    written.close(callback.penalty.omega, expected, 1e-8)
    assert "importance: 1batch" in capsys.readouterr().err


# -- before the first step --------------------------------------------------------------------------


class Counting(Module):
    """How many batches it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.steps += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NoForward(Counting):
    forward = LightningModule.forward


class LossInside(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


class Dictionary(Counting):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x)}


class Stream(IterableDataset[Any]):
    """Can be read once."""

    def __init__(self) -> None:
        self.read = iter(TensorDataset(*written.task(0)))

    def __iter__(self) -> Any:
        return self.read


@pytest.mark.parametrize("kind", [NoForward, LossInside, Dictionary])
@pytest.mark.parametrize("data", ["loader", "stream", "batches", "list of batches"])
def test_what_cant_be_measured_is_told_before_the_first_step(
    tmp_path: Path, kind: Any, data: str
) -> None:
    module, train = kind(), loader(0)
    callback = mas()
    if data == "stream":
        train = DataLoader(Stream(), batch_size=8)
    elif data == "batches":
        callback = mas(batches=lambda _: loader(1))
    elif data == "list of batches":
        callback = mas(batches=lambda _: list(loader(1)))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(
        ValueError, match=f"model: got {kind.__name__}, expected one whose importance"
    ):
        trainer(tmp_path, callback).fit(module, train)
    assert module.steps == 0
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_a_wrong_forward_and_wrong_loaders_are_told_before_the_first_step(tmp_path: Path) -> None:
    module = Counting()
    with pytest.raises(ValueError, match=r"model: got Counting, .*KeyError"):
        trainer(tmp_path, mas(forward=lambda m, b: m({}["x"]))).fit(module, loader(0))
    with pytest.raises(TypeError, match="batches: got none and a training dataloader of list"):
        trainer(tmp_path, mas()).fit(module, list(loader(0)))
    assert module.steps == 0


def test_a_stream_given_as_batches_is_not_read_ahead(tmp_path: Path) -> None:
    seen = []

    def batches(_: Any) -> Any:
        return stream

    def forward(module: Any, batch: Any) -> Tensor:
        seen.extend(batch[0][:, 0].tolist())
        output: Tensor = module(batch[0])
        return output

    stream = iter(loader(1))
    callback = mas(batches=batches, importance="batch", forward=forward)
    trainer(tmp_path, callback).fit(Module(), loader(0))
    assert seen == written.task(1)[0][:, 0].tolist()


class Noisy(Dataset[Any]):
    """Augments by every source of random numbers that there is."""

    def __init__(self) -> None:
        self.x, self.y = written.task(0)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + random.random() + np.random.rand() + torch.rand(()).double(), self.y[i]


@pytest.mark.parametrize("given", [False, True])
def test_the_trial_leaves_random_numbers_and_the_order_of_data(tmp_path: Path, given: bool) -> None:
    """A penalty of no strength: the training of a module with dropout is the same, bit for bit."""
    found = []
    for callback in (
        None,
        MASCallback(0.0, batches=(lambda t: t.train_dataloader) if given else None),
    ):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
        module = Module()
        module.net[2].p = 0.5
        module.net.register_forward_hook(
            lambda m, a, y: y + 0.01 * (random.random() + np.random.rand())
        )
        data = DataLoader(
            Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        with suppress(ValueError):  # outputs are random: no importance can be measured at the end
            trainer(tmp_path, *([callback] if callback else [])).fit(module, data)
        found.append([p.detach().clone() for p in module.parameters()])
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


# -- weights that are written when training ends ------------------------------------------------------


class Writes(Callback):
    """Writes weights at this event."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.write)

    def write(self, trainer: Trainer, module: Any, *_: Any) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.5)


class WritesItself(Module):
    def on_train_end(self) -> None:
        Writes("").write(None, self)  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[], tuple[Module, list[Callback]]]] = {
    "exponential average": lambda: (Module(), [EMAWeightAveraging(decay=0.5)]),
    "stochastic average": lambda: (Module(), [StochasticWeightAveraging(0.01, swa_epoch_start=1)]),
    "at the end of training": lambda: (Module(), [Writes("on_train_end")]),
    "at the end of fit": lambda: (Module(), [Writes("on_fit_end")]),
    "the module": lambda: (WritesItself(), []),
    "several": lambda: (WritesItself(), [Writes("on_train_end"), EMAWeightAveraging(decay=0.5)]),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_weights_written_at_the_end_are_the_anchor(tmp_path: Path, kind: str, first: bool) -> None:
    module, others = WRITERS[kind]()
    both = [mas(name="a"), mas(name="b")]
    callbacks = [*both, *others] if first else [*others, *both]
    plain = trainer(tmp_path, *callbacks, max_epochs=3)
    plain.fit(module, loader(0))
    omega = written.importance(module.net, written.task(0)[0])
    for callback in both:
        assert callback.penalty is not None
        assert callback.penalty.num_tasks == 1
        theta = {n: p.detach() for n, p in module.named_parameters()}
        written.close(callback.penalty.anchor, theta, 1e-12)
        written.close(callback.penalty.omega, {f"net.{n}": w for n, w in omega.items()}, 1e-8)


def test_a_training_that_fails_is_not_consolidated_by_the_next(tmp_path: Path) -> None:
    class Fails(Module):
        def on_train_end(self) -> None:
            raise MemoryError

    callback = mas()
    with pytest.raises(MemoryError):
        trainer(tmp_path, callback).fit(Fails(), loader(0))
    assert callback.penalty is not None
    assert callback.penalty.num_tasks == 0
    trainer(tmp_path, callback).fit(Module(), loader(0))
    assert callback.penalty.num_tasks == 1


# -- optimizers as they are handed out ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, mas_ext.optim.SGD])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_an_optimizer_of_fabric(kind: Any, mode: Any) -> None:
    model = written.network().double()
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, kind(model.parameters(), lr=0.1))
    penalty = FusedMASPenalty(model, lam=5.0, omega_dtype=torch.float64)
    penalty.consolidate([written.task(0)[0]])
    penalty.attach(optimizer, mode)
    check_pull(
        penalty,
        model,
        lambda: fabric.backward(0 * wrapped(written.task(0)[0]).sum()),
        optimizer,
        mode,
    )


def check_pull(
    penalty: FusedMASPenalty, model: Any, backward: Any, optimizer: Any, mode: str
) -> None:
    """One step of length 0.1 is the penalty's alone."""
    with torch.no_grad():
        for p in model.parameters():
            p += 1.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward()
    optimizer.step()
    for n, p in model.named_parameters():
        c = 2 * 0.1 * penalty.scale * penalty.omega[n]
        pull = c if mode == "gradient" else c / (1 + c)
        expected = before[n] - pull * (before[n] - penalty.anchor[n])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, mas_ext.optim.SGD])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("manual", [True, False])
def test_an_optimizer_of_a_module(tmp_path: Path, kind: Any, mode: Any, manual: bool) -> None:
    """As self.optimizers() gives it, whose steps have closures."""

    class Attaches(Module):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.1)

        def on_train_start(self) -> None:
            self.penalty.attach(self.optimizers(), mode)
            with torch.no_grad():
                for p in self.net.parameters():
                    p += 1.0
            self.before = {n: p.detach().clone() for n, p in self.net.named_parameters()}

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = 0 * self(batch[0]).sum()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    module = Attaches(manual).double()
    penalty = module.__dict__["penalty"] = FusedMASPenalty(
        module.net, lam=5.0, omega_dtype=torch.float64
    )
    penalty.consolidate([written.task(0)[0]])
    trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, loader(0))
    for n, p in module.net.named_parameters():
        c = 2 * 0.1 * penalty.scale * penalty.omega[n]
        pull = c if mode == "gradient" else c / (1 + c)
        expected = module.before[n] - pull * (module.before[n] - penalty.anchor[n])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


# -- the example -----------------------------------------------------------------------------------


def test_example() -> None:
    """Digits are forgotten without, and kept by either one and by both."""
    script = Path(__file__).parents[2] / "examples" / "lightning_distillation.py"
    done = subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, timeout=300
    )
    found = [re.findall(r"([\d.]+) %", line) for line in done.stdout.splitlines()]
    (plain, learned), *kept = ([float(number) for number in line] for line in found)
    assert len(kept) == 3
    assert plain < 92 < 97 < learned
    assert all(old > 97 for old, _ in kept)
    assert all(new > 95 for _, new in kept)


# -- lam by itself ---------------------------------------------------------------------------------


class Noting(Module):
    """It logs, and counts the samples that training_step has seen in a metric, and its steps by itself.

    Its data are another task's until on_before_batch_transfer, and its training begins in a hook of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = SumMetric()
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.scale = 3.0

    def on_before_batch_transfer(self, batch: Any, index: int) -> Any:
        return batch[0] * 2, batch[1]

    def training_step(self, batch: Any, index: int) -> dict[str, Tensor]:  # type: ignore[override]
        self.seen.update(len(batch[0]))
        loss = self.scale * super().training_step(batch, index)
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=True)
        self.log_dict({"seen": self.seen}, on_epoch=True)
        for logger in self.loggers:
            logger.log_metrics({"index": index})
        return {"loss": loss}


class Start(Callback):  # type: ignore[misc]
    """The random numbers of the first batch of a training."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.state = torch.get_rng_state()


class Kept(DummyLogger):  # type: ignore[misc]
    """What a module itself writes into its logger."""

    def __init__(self) -> None:
        super().__init__()
        self.index = [-1]

    def log_metrics(self, metrics: dict[str, Any], *_: Any, **__: Any) -> None:
        self.index += [metrics["index"]] if "index" in metrics else []


@pytest.mark.parametrize("heads", [False, True])
def test_lam_by_itself(tmp_path: Path, heads: bool) -> None:
    """It is that of choose_lam in a loop written out, and training is as with that number."""

    def old(module: LightningModule, batch: Any) -> list[Tensor]:
        return [module(batch[0])[:, :2]]

    module, told, lams = Noting(), Noting(), list[float]()
    held: dict[str, tuple[Tensor, Tensor]] = {}
    wide: Any = {"omega_dtype": torch.float64}
    callback = MASCallback("auto", keep=0.9, old=old if heads else None, **wide)
    plain = MASCallback(mode="proximal", **wide)
    for t in range(3):
        net, start = copy.deepcopy(module.net).double(), Start()
        chose = trainer(tmp_path, start, callback)
        chose.loggers = [logged := Kept()]
        chose.fit(module, loader(t, 4))
        assert logged.index == [-1, *range(8), *range(8)]
        assert callback.penalty is not None
        if t == 0:
            omega = written.importance(module.net, 2 * written.task(0)[0])
            written.close(callback.penalty.omega, {f"net.{n}": w for n, w in omega.items()})
        else:
            torch.set_rng_state(start.state)
            lams.append(written_out(net, held, t, old if heads else None, lams))
            assert callback.penalty.lam == pytest.approx(lams[-1], rel=1e-9)
            assert plain.penalty is not None
            plain.penalty.lam = callback.penalty.lam
        fitted = trainer(tmp_path, plain)
        fitted.fit(told, loader(t, 4))
        assert fitted.callback_metrics["seen"] == 32
        assert chose.callback_metrics == fitted.callback_metrics
        written.close(dict(module.named_parameters()), dict(told.named_parameters()))
        assert torch.equal(torch.stack(module.losses), torch.stack(told.losses))
        held = {
            n.removeprefix("net."): (callback.penalty.omega[n], callback.penalty.anchor[n])
            for n in callback.penalty.omega
        }
    assert lams[0] > 0
    assert lams[0] != lams[1]


def written_out(
    net: torch.nn.Module,
    held: dict[str, tuple[Tensor, Tensor]],
    t: int,
    old: Any,
    before: list[float],
) -> float:
    """choose_lam with a loop over nine tenths of a task, measured on a batch of the others."""
    penalty = FusedMASPenalty(net, omega_dtype=torch.float64)
    penalty.consolidate(importance={n: omega for n, (omega, _) in held.items()})
    for n, (_, anchor) in held.items():
        torch.testing.assert_close(dict(net.named_parameters())[n].detach(), anchor)
    x, y = written.task(t)
    x = 2 * x  # as the module has it before it is transferred
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    known, rest = order[3:], order[:3].sort().values
    data = DataLoader(TensorDataset(x[known], y[known]), 4, shuffle=True, drop_last=True)

    def learn() -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=written.LR, momentum=0.5)
        done = 0
        while done < 16:
            for a, b in data:
                if done == 16:
                    break
                optimizer.zero_grad()
                (3 * F.cross_entropy(net(a), b)).backward()
                optimizer.step()
                done += 1
                yield optimizer

    def measure() -> tuple[float, list[Tensor]]:
        net.eval()  # or dropout draws
        with torch.no_grad():
            output = net(x[rest])
            return 3 * float(F.cross_entropy(output, y[rest])), [output[:, :2]] if old else []

    return mas_ext.choose_lam(penalty, learn, measure, 0.9, before)


class Saved(Callback):  # type: ignore[misc]
    """A checkpoint of the middle of a training."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def test_lam_by_itself_where_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a task it is kept; for the next task it is chosen again, by the same Trainer and by a new one."""
    steps, choose = list[int](), choosing.choose_in_loop

    def counted(*given: Any, **options: Any) -> float:
        steps.append(given[7])
        return choose(*given, **options)

    monkeypatch.setattr(choosing, "choose_in_loop", counted)
    module, callback, file = Module(), MASCallback("auto"), tmp_path / "half.ckpt"
    for t in range(2):
        trainer(tmp_path, callback).fit(module, loader(t))
    trainer(tmp_path, callback, Saved(file)).fit(module, loader(2))
    assert callback.penalty is not None
    assert len({*callback.lams}) == len(callback.lams) == 2
    assert callback.penalty.lam == callback.lams[-1]

    again, then = MASCallback("auto"), trainer(tmp_path)
    then.callbacks.append(again)
    then.fit(Module(), loader(2), ckpt_path=file)
    assert again.penalty is not None
    assert again.lams == callback.lams
    assert again.penalty.lam == callback.penalty.lam
    # Lightning rounds weights of float64 to float32 where it loads them.
    written.close(again.penalty.omega, callback.penalty.omega, 1e-5)

    then.save_checkpoint(tmp_path / "end.ckpt")
    then.fit_loop.max_epochs = 4
    then.fit(then.lightning_module, loader(3))
    assert len({*again.lams}) == len(again.lams) == 3

    new = MASCallback("auto")
    trainer(tmp_path, new, max_epochs=4).fit(Module(), loader(3), ckpt_path=tmp_path / "end.ckpt")
    assert new.lams[:2] == again.lams[:2]
    assert len(new.lams) == 3
    assert steps == [8, 8, 8, 8]  # two epochs of four batches, in every training


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__(manual=True)

    def configure_optimizers(self) -> Any:
        return [Module.configure_optimizers(self) for _ in range(2)]


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return zip(*written.task(0), strict=True)


def test_lam_by_itself_where_it_can_not_be_chosen(tmp_path: Path) -> None:
    """It is refused before the first task, not when the second one begins."""
    one = DataLoader(TensorDataset(*(part[:1] for part in written.task(0))))
    for module, data, options, words in (
        (Module(manual=True), loader(0), {}, "1 optimizers with automatic_optimization False"),
        (TwoOptimizers(), loader(0), {}, "2 optimizers with automatic_optimization False"),
        (Module(), DataLoader(Endless(), 4), {"max_steps": 3}, "training data in a Endless"),
        (Module(), one, {}, "training data in a TensorDataset, .* two samples or more"),
        (Module(), loader(0), {"max_epochs": -1}, "a training of inf steps, expected max_epochs"),
    ):
        callback = MASCallback("auto", batches=lambda trainer: loader(0))
        with pytest.raises(ValueError, match=f'lam: got "auto" and {words}'):
            trainer(tmp_path, callback, **options).fit(module, data)
        assert callback.penalty is None
    with pytest.raises(ValueError, match="keep: got -1, expected"):
        MASCallback("auto", keep=-1)
    with pytest.raises(
        ValueError, match=r'old: got .* with lam 1, expected a function, with "auto"'
    ):
        MASCallback(1, old=lambda module, batch: [])
    for wrong in (lambda m, b: m(b[0]), lambda m, b: None, lambda m, b: [1.0]):
        callback = MASCallback("auto", remember=loader(1).dataset, old=wrong)
        with pytest.raises(
            TypeError, match=r"old: got a function that gives a .*, expected one that"
        ):
            trainer(tmp_path, callback).fit(Module(), loader(0))
    with pytest.raises(ValueError, match="lam: got 'atuo', expected a number or 'auto'"):
        MASCallback("atuo")  # type: ignore[arg-type]


class Skipping(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return None if index == 0 else loss


def test_lam_by_itself_needs_a_loss(tmp_path: Path) -> None:
    module, callback = Skipping(), MASCallback("auto", remember=loader(1).dataset)
    with pytest.raises(ValueError, match="training_step: got None, expected a loss of every batch"):
        trainer(tmp_path, callback).fit(module, loader(0))
