"""A callback for Lightning 2.

    from mas_ext.integrations.lightning import MASCallback

    mas = MASCallback(lam=1.0)
    Trainer(callbacks=[mas], ...).fit(module, task_a)  # consolidates at its end
    Trainer(callbacks=[mas], ...).fit(module, task_b)

The penalty goes into the gradients in `on_before_optimizer_step`: these are accumulated, reduced over the ranks
and unscaled, and not clipped yet, so that clipping clips the sum. It works with automatic optimisation, and
with manual one through the optimizers that `self.optimizers()` gives. Parameters have to be whole on every
rank: not with FSDP or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mas_ext.integrations.loading import check_batches, once, penalty_of, try_importance
from mas_ext.optim.hooks import Handle, Mode, check_mode
from mas_ext.penalty import FusedMASPenalty

Batches = Callable[[Trainer], Iterable[Any]]


class MASCallback(Callback):
    """FusedMASPenalty in a Trainer: applied at every step, consolidated when training has ended.

    Other callbacks and the module may write weights in `on_train_end`, as averages do, and callbacks in
    `on_fit_end`, wherever they are in the list: the anchor is what they leave. Importance is tried on two
    samples before the first step, and an error there ends the training before it begins.

    `penalty` is there from the first `fit` on. Its state is part of every checkpoint; one that is written while
    training goes on is from before the task is consolidated, `trainer.save_checkpoint` after `fit` has it.

    Args:
        lam: strength, see FusedMASPenalty.
        batches: from the trainer to the samples that importance is taken from, this rank's part of them; by
            default those of the training dataloader, each once.
        mode: "gradient", or "proximal" with an automatic or a manual step of SGD, Adam or AdamW.
        name: tells several of these callbacks apart in a checkpoint.
        options: further arguments of FusedMASPenalty. Without a `forward` the module is called with the batch's
            first item.
    """

    def __init__(
        self,
        lam: float = 1.0,
        batches: Batches | None = None,
        mode: Mode = "gradient",
        name: str = "",
        **options: Any,
    ) -> None:
        check_mode(mode)
        check_batches(batches)
        self.batches, self.mode, self.name = batches, mode, name
        self.lam, self.options = lam, options
        self.penalty: FusedMASPenalty | None = None
        self._loaded: dict[str, Any] = {}
        self._handles: list[Handle] = []
        # Whether importance is still to be tried, and whether training has ended and is to be consolidated.
        self._untried = self._ended = False

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint."""
        key: str = self._generate_state_key(name=self.name)
        return key

    def state_dict(self) -> dict[str, Any]:
        """The penalty's state."""
        if self._loaded or self.penalty is None:
            return self._loaded
        return dict(self.penalty.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts, when the module has its precision."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the penalty of this module, with the state so far, also of another module."""
        options = {"lam": self.lam, **self.options}
        self.penalty = penalty_of(pl_module, self.penalty, trainer.world_size, options)
        if self._loaded:
            self.penalty.load_state_dict(self._loaded)
            self._loaded = {}
        self._detach()  # from a training that ended in an error
        self._ended, self._untried = False, self.batches is None
        if self.batches is None:
            _loader(trainer)
        else:
            batches = self.batches
            try_importance(self.penalty, lambda: batches(trainer))
        if self.mode == "proximal":
            self._handles = [self.penalty.attach(o, "proximal") for o in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try importance on the first batch."""
        if self._untried and batch is not None:
            assert self.penalty is not None
            self._untried = False
            try_importance(self.penalty, lambda: [batch])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient to those of this optimizer."""
        assert self.penalty is not None
        if self.mode == "gradient":
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self.penalty.add_grad_to(own, _scale_left(trainer, optimizer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand behind the other callbacks, which may write weights still."""
        self._detach()
        self._ended = True
        # A new list: the old one is being gone through.
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Consolidate, where the training was: by now the Trainer has moved the module to the CPU."""
        if not self._ended:
            return
        self._ended = False
        assert self.penalty is not None
        home = pl_module.device
        try:
            pl_module.to(trainer.strategy.root_device)
            self.penalty.consolidate(
                _batches(trainer) if self.batches is None else self.batches(trainer)
            )
        finally:
            pl_module.to(home)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _scale_left(trainer: Trainer, optimizer: Optimizer) -> torch.Tensor | None:
    """The factor of gradients whose optimizer unscales them itself (fused=True)."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    return torch.tensor(scaler.get_scale())


def _loader(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"batches: got none and a training dataloader of {type(loader).__name__}, expected a DataLoader, "
            "or batches= a function from the trainer to batches"
        )
    return loader


def _batches(trainer: Trainer) -> Iterator[Any]:
    """The training data as the module sees them, each sample once."""
    for batch in once(_loader(trainer)):
        converted = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(converted)
