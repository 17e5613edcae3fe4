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

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mas_ext._arguments import check_share
from mas_ext.distillation import Distance, Distillation
from mas_ext.importance import batches as batch_of
from mas_ext.integrations import choosing
from mas_ext.integrations.loading import (
    at_most,
    check_batches,
    check_remember,
    loader_like,
    once,
    penalty_of,
    remember,
    replace_method,
    try_importance,
)
from mas_ext.methods.quadratic import Lam, is_automatic
from mas_ext.optim.hooks import Mode, check_mode
from mas_ext.penalty import FusedMASPenalty

Batches = Callable[[Trainer], Iterable[Any]]
OldOutputs = Callable[[LightningModule, Any], Sequence[Tensor]]

# What the teacher's tensors are called in a checkpoint begins with it.
_TEACHER = "teacher."
# What was chosen for lam so far, and whether the last of it is for a training that has not ended.
_LAMS, _CHOSEN = "lams", "lam_is_chosen"


class MASCallback(Callback):
    """FusedMASPenalty in a Trainer: applied at every step, consolidated when training has ended.

    Other callbacks and the module may write weights in `on_train_end`, as averages do, and callbacks in
    `on_fit_end`, wherever they are in the list: the anchor is what they leave. Importance is tried on two
    samples before the first step, and an error there ends the training before it begins.

    `penalty` is there from the first `fit` on. Its state is part of every checkpoint; one that is written while
    training goes on is from before the task is consolidated, `trainer.save_checkpoint` after `fit` has it.

    Args:
        lam: strength, see FusedMASPenalty. "auto": chosen before every training in which the penalty holds
            something, see `chosen_lam`.
        batches: from the trainer to the samples that importance is taken from, this rank's part of them; by
            default those of the training dataloader, each once.
        mode: "gradient", or "proximal" with an automatic or a manual step of SGD, Adam or AdamW. None is
            "gradient", and for lam "auto", where no low-rank updates are held, "proximal", which no lam makes
            diverge.
        name: tells several of these callbacks apart in a checkpoint.
        remember: for a module that was trained elsewhere: a data set whose items are the training's, or
            batches, that stand for what it knows. The penalty is consolidated on it before the first step of
            the first training, but not where it has tasks already, or training resumes. True, where there
            are no such data: the outputs alone are held, by distillation.
        max_samples: the most samples that importance is taken from, of each task and of `remember`: drawn at
            random from a data set that has a length, else the first ones.
        progress: show a progress bar while importance is measured.
        distillation: weight of a term in the loss that holds the module's outputs on the new data near those
            from before the training, see Distillation; it counts from the first training on where `remember`
            is given, and from the second one on without it. With automatic optimisation alone. The output is
            that of self(x) in training_step, x being the batch's first item, or else is computed once more.
        temperature, distance: of the distillation.
        keep: for lam "auto", what matters: from 0, the new task alone, to 1, the old ones.
        old: for lam "auto", of the module and a batch: outputs for the earlier tasks alone, (N, ...) each, such
            as those of their heads. Without them, as where tasks share all outputs, lam is chosen by the new
            task's loss alone.
        options: further arguments of FusedMASPenalty. Without a `forward` the module is called with the batch's
            first item.

    Attributes:
        lams: what was chosen so far with lam "auto".
    """

    def __init__(
        self,
        lam: Lam = 1.0,
        batches: Batches | None = None,
        mode: Mode | None = None,
        name: str = "",
        *,
        remember: Any = None,
        max_samples: int | None = None,
        progress: bool = False,
        distillation: float = 0.0,
        temperature: float = 2.0,
        distance: Distance = "classes",
        keep: float = 0.5,
        old: OldOutputs | None = None,
        **options: Any,
    ) -> None:
        if mode is not None:
            check_mode(mode)
        if old is not None and not (callable(old) and lam == "auto"):
            raise ValueError(f'old: got {old!r} with lam {lam!r}, expected a function, with "auto"')
        check_share(keep, "keep")
        check_batches(batches)
        check_remember(remember, distillation, max_samples, temperature)
        self.batches, self.mode, self.name = batches, mode, name
        self.remember, self.max_samples, self.progress = remember, max_samples, progress
        self.distillation, self.temperature, self.distance = distillation, temperature, distance
        self.automatic, self.keep, self.old = is_automatic(lam), keep, old
        self.options = {"lam": 1.0 if self.automatic else lam, **options}
        self.penalty: FusedMASPenalty | None = None
        self._loaded: dict[str, Any] = {}
        self._teacher: Distillation | None = None
        self._undo: list[Callable[[], None]] = []
        self._form: Mode = "gradient"
        self.lams: list[float] = []
        # Whether lam is to be chosen before the first step, and whether it is for the training that goes on.
        self._waits = self._chosen = False
        # Whether importance is still to be tried, and whether training has ended and is to be consolidated.
        self._untried = self._ended = False

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint."""
        key: str = self._generate_state_key(name=self.name)
        return key

    def state_dict(self) -> dict[str, Any]:
        """The penalty's state, and within a training the teacher's, if there is one."""
        if self._loaded or self.penalty is None:
            return self._loaded
        teacher = {} if self._teacher is None else self._teacher.state_dict()
        found = {_TEACHER + name: t for name, t in teacher.items()}
        if self.automatic:
            found |= {_LAMS: torch.tensor(self.lams, dtype=torch.float64)}
            found |= {_CHOSEN: torch.tensor(self._chosen)}
        return {**self.penalty.state_dict(), **found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until training starts, when the module has its precision."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the penalty of this module, with the state so far, also of another module."""
        self._detach()  # from a training that ended in an error
        if self.automatic:
            _check_choice(trainer)
        penalty = penalty_of(pl_module, self.penalty, trainer.world_size, self.options)
        self.penalty = penalty
        loaded, self._loaded = self._loaded, {}
        if _LAMS in loaded:
            self.lams = loaded.pop(_LAMS).tolist()
        self._chosen = bool(loaded.pop(_CHOSEN, False))
        taught = {key: loaded.pop(key) for key in [*loaded] if key.startswith(_TEACHER)}
        if loaded:
            penalty.load_state_dict(loaded)
        self._ended, self._untried = False, self.batches is None
        if self.batches is None:
            _loader(trainer)
        else:
            batches = self.batches
            try_importance(penalty, lambda: batches(trainer))
        if self.remember is not None and self.remember is not True:
            known = once(loader_like(self.remember, trainer.train_dataloader))
            known = _Seen(trainer, at_most(known, self.max_samples))
            shown = self.progress and trainer.is_global_zero
            remember(penalty, known, trainer.global_step > 0, shown)
        self._waits = self.automatic and penalty.num_tasks > 0 and not self._chosen
        if not self._waits:
            self._begin(trainer, pl_module, taught)

    def _begin(
        self, trainer: Trainer, module: LightningModule, taught: Mapping[str, torch.Tensor]
    ) -> None:
        """Have this training's losses and steps get what belongs to them."""
        penalty = self.penalty
        assert penalty is not None
        if self.distillation and (penalty.num_tasks or self.remember is True):
            self._distill(module, taught)
        self._form = choosing.form(self.mode, self.automatic, penalty)
        if self._form == "proximal":
            self._undo += [penalty.attach(o, "proximal").remove for o in trainer.optimizers]

    def _distill(self, module: LightningModule, taught: Mapping[str, torch.Tensor]) -> None:
        """Have this training's losses get the term, from the teacher of its beginning."""
        if not module.automatic_optimization:
            raise ValueError(
                f"distillation: got {self.distillation} with manual optimisation, expected an automatic one; "
                "in a training_step that steps by itself, add mas_ext.Distillation to the loss"
            )
        forward = self.options.get("forward")
        teacher = Distillation(module, self.temperature, forward, self.distance)
        if taught:
            teacher.load_state_dict({key.removeprefix(_TEACHER): t for key, t in taught.items()})
        self._teacher = teacher
        own, outputs = module.training_step, []

        def note(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs.append((inputs, output))

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            outputs.clear()
            result = own(batch, *args, **kwargs)
            x = batch_of.first(batch)
            seen = [] if forward else [y for inputs, y in outputs if inputs and inputs[0] is x]
            outputs.clear()
            loss = result["loss"] if isinstance(result, Mapping) else result
            if loss is None:  # a step that is skipped
                return result
            term = self.distillation * teacher(batch, seen[-1] if seen else None)
            return {**result, "loss": loss + term} if isinstance(result, Mapping) else loss + term

        self._undo.append(module.register_forward_hook(note).remove)
        self._undo.append(replace_method(module, "training_step", wraps(own)(training_step)))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try importance on the first batch; choose lam, now that other hooks have begun the training, too."""
        assert self.penalty is not None
        if self._untried and batch is not None:
            self._untried = False
            try_importance(self.penalty, lambda: [batch])
        if self._waits:
            self._waits = False
            lam = chosen_lam(self.penalty, trainer, self.keep, self.old, self.lams)
            self.penalty.lam = lam
            self.lams.append(lam)
            self._chosen = True
            self._begin(trainer, pl_module, {})

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient to those of this optimizer."""
        assert self.penalty is not None
        if self._form == "gradient":
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
            if self.batches is None:
                batches = _Seen(trainer, at_most(once(_loader(trainer)), self.max_samples))
            else:
                batches = at_most(self.batches(trainer), self.max_samples)
            self.penalty.consolidate(batches, progress=self.progress and trainer.is_global_zero)
            self._chosen = False
        finally:
            pl_module.to(home)

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._teacher = [], None


def chosen_lam(
    penalty: FusedMASPenalty,
    trainer: Trainer,
    keep: float = 0.5,
    old: OldOutputs | None = None,
    before: Sequence[float] = (),
) -> float:
    """The lam for a training that begins, from its data alone: `mas_ext.choose_lam` with training_step's loss.

    A tenth of the training dataloader's samples, drawn at random, is held out meanwhile, of which a twelfth as
    many as are trained on are looked at: training_step in eval mode and without gradients, too. It is trained
    one and a half times as many steps as `fit` may still take, by a copy of the module's optimizer in a plain
    loop: without a schedule, clipping, a GradScaler and other callbacks. Nothing is logged, and afterwards the
    module, with its metrics and what else it keeps, and random numbers are as before.

    Args:
        penalty: a consolidated one, of the module in training.
        trainer: one whose training starts, as in a callback's on_train_batch_start.
        keep: what matters, from 0 (the new task alone) to 1 (the old ones).
        old: of the module and a batch, outputs for earlier tasks alone, (N, ...) each.
        before: what was chosen for earlier tasks, in order.

    Raises:
        ValueError: manual optimisation, several optimizers, several processes, a training without an end, or
            training data that can't be read in any order; what choose_lam raises.
    """
    _check_choice(trainer)
    module = trainer.lightning_module
    loaders = choosing.in_two(trainer.train_dataloader)
    batches, held_out = (_Seen(trainer, loader) for loader in loaders)
    # Lightning's own way to tell what training_step takes.
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    calls = itertools.count()

    def loss(batch: Any) -> Tensor:
        result = trainer.strategy.training_step(batch, *([next(calls)] if numbered else []))
        found: Tensor | None = result["loss"] if isinstance(result, Mapping) else result
        if found is None:
            raise ValueError(
                'training_step: got None, expected a loss of every batch where lam is "auto"'
            )
        return found

    steps = int(trainer.estimated_stepping_batches) - trainer.global_step
    with _unlogged(trainer, module):
        return choosing.choose_in_loop(
            *(penalty, keep, before, loss, partial(choosing.beginning, trainer.optimizers[0])),
            *(batches, held_out, steps),
            trainer.accumulate_grad_batches,
            (lambda batch: ()) if old is None else partial(old, module),
        )


def _check_choice(trainer: Trainer) -> None:
    """Raise a ValueError where lam can't be chosen for a training."""
    choosing.check_one_process()
    if not trainer.lightning_module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ValueError(
            f'lam: got "auto" and {len(trainer.optimizers)} optimizers with automatic_optimization '
            f"{trainer.lightning_module.automatic_optimization}, expected one with True; elsewhere, give "
            "mas_ext.choose_lam functions that train and measure"
        )
    choosing.check_optimizer(trainer.optimizers[0], trainer.lightning_module)
    choosing.in_two(trainer.train_dataloader)
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            f'lam: got "auto" and a training of {steps} steps, expected max_epochs or max_steps'
        )


@contextmanager
def _unlogged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Have a module log nothing."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    undo = [replace_method(module, name, nothing) for name in ("log", "log_dict")]
    try:
        yield
    finally:
        trainer.loggers = loggers
        for each in undo:
            each()


class _Seen:
    """Batches as the module sees them, each time they are gone through."""

    def __init__(self, trainer: Trainer, batches: Iterable[Any]) -> None:
        self.trainer, self.batches = trainer, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            converted = self.trainer.precision_plugin.convert_input(batch)
            module = self.trainer.lightning_module
            converted = module._on_before_batch_transfer(converted, dataloader_idx=0)
            yield self.trainer.strategy.batch_to_device(converted)


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
