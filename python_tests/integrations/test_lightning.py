"""The callback in Lightning's own loops, beside the same training written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations import written
from integrations.ranks import both
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

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


def trainer(folder: Path, callback: MASCallback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"precision": "64-true", "max_epochs": 2, "enable_checkpointing": False, **options}
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        default_root_dir=folder,
        **quiet,
        **settings,
    )


def mas(**options: Any) -> MASCallback:
    return MASCallback(written.LAM, merge="latest", omega_dtype=torch.float64, **options)


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
    model, omega, _ = written.two_tasks(extra=33)
    for rank in found:
        written.close(rank["state"], {f"net.{n}": p for n, p in model.named_parameters()})
        written.close(rank["omega"], {f"net.{n}": w for n, w in omega.items()}, 1e-8)
    assert all(torch.equal(found[0]["omega"][n], w) for n, w in found[1]["omega"].items())
