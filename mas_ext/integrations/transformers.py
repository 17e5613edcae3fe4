"""Hugging Face: a callback and a mixin for the Trainer of transformers 5, and `attach` for accelerate.

    from mas_ext.integrations.transformers import MASCallback

    mas = MASCallback(lam=1.0, remember=texts)  # that stand for what the model knows
    Trainer(model, arguments, train_dataset=corpus_a, callbacks=[mas], ...).train()  # consolidates at its end
    Trainer(model, arguments, train_dataset=corpus_b, callbacks=[mas], ...).train()

Two places for the penalty, which differ where gradients are clipped (max_grad_norm, 1 by default):

- `MASCallback`: in the optimizer's step. Accumulated and unscaled gradients, already clipped, get the penalty's
  once a step. The logged loss and gradient norm are the task's.
- `MASTrainerMixin`: in the loss. Clipping clips the sum, and the logged loss and gradient norm are the sum's.

The penalty holds what is trained: with LoRA (peft) the updates s B A of the weights, or with
adapters="parameters" the factors one by one. With either one, distillation is a term of the loss.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from mas_ext._arguments import check_factor, check_share
from mas_ext.distillation import Distance, Distillation
from mas_ext.importance import Forward
from mas_ext.integrations import choosing
from mas_ext.integrations.loading import (
    at_most,
    check_batches,
    check_remember,
    once,
    penalty_of,
    remember,
    replace_method,
    try_importance,
)
from mas_ext.integrations.model_output import LogitRows, ModelOutput
from mas_ext.methods.quadratic import Lam, is_automatic
from mas_ext.optim.hooks import Handle, Mode, check_mode
from mas_ext.optim.step_size import STEP_SIZES
from mas_ext.parameters.names import bare_model
from mas_ext.penalty import FusedMASPenalty
from mas_ext.state import files as checkpoint

FILE, TEACHER = "mas_penalty.safetensors", "mas_teacher.safetensors"


def attach(
    penalty: FusedMASPenalty, optimizer: Any, mode: Mode = "gradient", eta: float | None = None
) -> Handle:
    """Attach a penalty to an optimizer that `accelerator.prepare` may have wrapped.

    The penalty is added once per step: under `accelerator.accumulate` when the step is taken, and under float16
    unscaled, behind `accelerator.clip_grad_norm_`.
    """
    return penalty.attach(optimizer, mode, eta)


class LogitDistillation:
    """weight times the distance of a Hugging Face model's logits from those that it has when this is made.

    The mean of KL(q* || q) over the places that have classes (LogitRows), of softened probabilities; the mean
    squared distance where a model predicts numbers, or several labels at once. Of every batch, the teacher's
    logits are computed, and the model's taken from its output, where that has them with a gradient; else the
    model is run once more.

    Args:
        model: the model that is trained, as it is before.
        weight: finite and >= 0.
        temperature: see Distillation.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, temperature: float = 2.0) -> None:
        self.weight = check_factor(weight, "distillation")
        config = getattr(bare_model(model), "config", None)
        problem = getattr(config, "problem_type", None)
        labels = getattr(config, "num_labels", None)
        squared = labels == 1 or problem in ("regression", "multi_label_classification")
        distance: Distance = "squared" if squared else "classes"
        self.distill = Distillation(model, temperature, LogitRows(), distance)
        # Some loops compute their loss without logits, and hand out others that can't be differentiated.
        self.reads_outputs = True

    def __call__(self, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The term for a batch of which the model gave these outputs, 0-dim; None where there are none."""
        rows = None if outputs is None else LogitRows.of(outputs, self.distill.model, inputs)
        if rows is not None and torch.is_grad_enabled() and not rows.requires_grad:
            self.reads_outputs, rows = False, None
        return self.weight * self.distill(inputs, rows)


class MASCallback(TrainerCallback):
    """FusedMASPenalty in a Trainer: applied in every step, consolidated when training has ended.

    It is the last callback from the beginning of a training on: others may write weights at its end, and the
    anchor is what they leave, as it is the best model where that is loaded. Importance is tried on two samples
    before the first step, but of data sets that can only be read in order.

    `penalty` exists from the first `train` on, or before it where it is set. Checkpoints have it in a file of
    their own, which is read when training resumes. `penalty.save` after `train` keeps what was consolidated.

    Args:
        lam: strength, see FusedMASPenalty. "auto": chosen before every training in which the penalty holds
            something, see `chosen_lam`.
        batches: from the training dataloader to the samples that importance is taken from, this rank's part
            of them; by default all of them, each once.
        mode: "gradient" or "proximal", see FusedMASPenalty.attach. None is "gradient", and for lam "auto",
            where no low-rank updates are held, "proximal", which no lam makes diverge.
        forward: see estimate_importance; batches are mappings of the model's inputs. By default ModelOutput().
        remember: for a model that was trained elsewhere: a data set as the Trainer takes it, or a DataLoader,
            that stands for what it knows. The penalty is consolidated on it before the first step of the first
            training, but not where it has tasks already, or training resumes. True, where there are no data:
            the outputs alone are held, by distillation.
        max_samples: the most samples that importance is taken from, of each task and of `remember`: drawn at
            random from a data set that has a length, else the first ones.
        progress: show a progress bar while importance is measured.
        distillation: weight of a term in the loss that holds the model's outputs on the new texts near those
            from before the training, see LogitDistillation; it counts from the first training on where
            `remember` is given, and from the second one on without it.
        temperature: of the distillation, see Distillation.
        keep: for lam "auto", what matters: from 0, the new task alone, to 1, the old ones.
        lams: what was chosen so far, an attribute. The lam of a checkpoint counts as one choice; a penalty that
            is set counts as none.
        options: further arguments of FusedMASPenalty.
    """

    def __init__(
        self,
        lam: Lam = 1.0,
        batches: Callable[[Any], Iterable[Any]] = once,
        mode: Mode | None = None,
        forward: Forward | None = None,
        *,
        remember: Any = None,
        max_samples: int | None = None,
        progress: bool = False,
        distillation: float = 0.0,
        temperature: float = 2.0,
        keep: float = 0.5,
        **options: Any,
    ) -> None:
        if mode is not None:
            check_mode(mode)
        check_share(keep, "keep")
        check_batches(batches)
        check_remember(remember, distillation, max_samples, temperature)
        self.batches, self.mode = batches, mode
        self.remember, self.max_samples, self.progress = remember, max_samples, progress
        self.distillation, self.temperature = distillation, temperature
        self.automatic, self.keep = is_automatic(lam), keep
        strength = 1.0 if self.automatic else lam
        self.options = {"lam": strength, "forward": forward or ModelOutput(), **options}
        self.penalty: FusedMASPenalty | None = None
        self.lams: list[float] = []
        self._teacher: LogitDistillation | None = None
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Make the penalty of this model, with the state so far, also of another model."""
        self._detach()  # from a training that ended in an error
        if self.automatic:
            choosing.check_one_process()
            choosing.check_optimizer(_bare(optimizer), model)
        trainer, folder = _running()
        first = state.is_world_process_zero
        if folder is not None and self.penalty is None and not (folder / FILE).exists():
            raise FileNotFoundError(
                f"{folder / FILE}: not found, expected the penalty of the checkpoint that training resumes "
                "from; where it is elsewhere, set MASCallback.penalty before"
            )
        penalty = self.penalty = penalty_of(model, self.penalty, args.world_size, self.options)
        if folder is not None and (folder / FILE).exists():
            penalty.load_state_dict(checkpoint.load(folder / FILE))
        try_importance(penalty, lambda: self.batches(kwargs["train_dataloader"]))
        if self.remember is not None and self.remember is not True:
            known = self.remember
            if hasattr(known, "__getitem__"):  # a data set, lists of texts among them
                known = trainer.get_test_dataloader(known)
            known = at_most(once(known), self.max_samples)
            remember(penalty, known, folder is not None, self.progress and first)
        if self.automatic and penalty.num_tasks:
            if folder is None:
                penalty.lam = chosen_lam(penalty, trainer, state.max_steps, self.keep, self.lams)
            self.lams.append(penalty.lam)
        if self.distillation and (penalty.num_tasks or self.remember is True):
            self._distill(trainer, model, folder)
        _put_last(self)
        mode = choosing.form(self.mode, self.automatic, penalty)
        self._undo.append(attach(penalty, optimizer, mode).remove)

    def _distill(self, trainer: Any, model: nn.Module, folder: Path | None) -> None:
        """Have this training's losses get the term, from the teacher of its beginning."""
        self._teacher = LogitDistillation(model, self.distillation, self.temperature)
        if folder is not None:
            self._teacher.distill.load_state_dict(checkpoint.load(folder / TEACHER))
        # A Trainer has no other place that knows the loss and the outputs.
        own = partial(_loss, trainer, trainer.compute_loss, None, self._teacher)
        self._undo.append(replace_method(trainer, "compute_loss", own))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the penalty, and the teacher if there is one, beside the checkpoint that is being written."""
        assert self.penalty is not None
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.penalty.save(folder / FILE)
            if self._teacher is not None:
                checkpoint.save(self._teacher.distill.state_dict(), folder / TEACHER)

    def on_train_end(
        self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any
    ) -> None:
        """Consolidate."""
        assert self.penalty is not None
        self._detach()
        batches = at_most(self.batches(train_dataloader), self.max_samples)
        self.penalty.consolidate(batches, progress=self.progress and state.is_world_process_zero)

    def _detach(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._teacher = [], None


def _running() -> tuple[Any, Path | None]:
    """The Trainer that is calling a callback now, and the checkpoint's folder that it resumes from, if any."""
    # Callbacks are handed neither the one nor the other.
    frame = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        if isinstance(local.get("self"), Trainer) and "resume_from_checkpoint" in local:
            folder = local["resume_from_checkpoint"]
            return local["self"], None if folder is None else Path(folder)
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("MASCallback: got a call from elsewhere, expected one by a Trainer")


def _put_last(callback: TrainerCallback) -> None:
    """Have a callback called behind all others by the Trainer that is calling it now."""
    # Callbacks are handed neither the Trainer nor the handler that calls them.
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # A new list: the old one is being gone through.
            handler.callbacks = [*(c for c in handler.callbacks if c is not callback), callback]
        frame = frame.f_back  # type: ignore[assignment]


def chosen_lam(
    penalty: FusedMASPenalty,
    trainer: Any,
    steps: int,
    keep: float = 0.5,
    before: Sequence[float] = (),
) -> float:
    """The lam for a Trainer's next training, from its data alone: `mas_ext.choose_lam` with the Trainer's loss.

    It is trained one and a half times, by a copy of the Trainer's optimizer in a plain loop, without a
    schedule, clipping or a GradScaler; where that is none of SGD, Adam and AdamW, by a new one of the Trainer's
    arguments. Afterwards all is as before, the numbers that the Trainer keeps, too. The loss is measured on
    batches of eval_dataset, a twelfth as many as are trained on.

    Args:
        penalty: a consolidated one, of the Trainer's model.
        steps: how many the training has.
        keep: what matters, from 0 (the new task alone) to 1 (the old ones).
        before: what was chosen for earlier tasks, in order.

    Raises:
        ValueError: a Trainer without one eval_dataset, or on several processes, or with an optimizer that is
            neither known nor that of its arguments; what choose_lam raises.
    """
    args, model = trainer.args, trainer.model
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, Mapping):
        got = type(trainer.eval_dataset).__name__
        raise ValueError(
            f'lam: got "auto" and a Trainer whose eval_dataset is {got}, expected one data set of the new task'
        )

    def loss(batch: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            found: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        return found

    def begin() -> Optimizer:
        model.train()
        own = _bare(trainer.optimizer)
        if type(own) in STEP_SIZES:
            return choosing.beginning(own)
        with _kept(trainer):  # others may not survive a copy
            trainer.optimizer = None
            made: Optimizer = trainer.create_optimizer()
        if type(made) is not type(own):
            raise ValueError(
                f'lam: got "auto" with {type(own).__name__}, expected SGD, Adam, AdamW, or the optimizer that '
                f"the arguments make, {type(made).__name__}"
            )
        return made

    with _kept(trainer):
        data = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
        accumulated = args.gradient_accumulation_steps
        return choosing.choose_in_loop(
            *(penalty, keep, before, loss, begin), *data, steps, accumulated
        )


def _bare(optimizer: Any) -> Optimizer:
    """An optimizer without accelerate's wrapper."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


@contextmanager
def _kept(trainer: Any) -> Iterator[None]:
    """Have a Trainer's attributes, with the numbers in them, and accelerate's lists of loaders be as before."""
    attributes = dict(vars(trainer))
    plain = {name: copy.deepcopy(value) for name, value in attributes.items() if _is_plain(value)}
    of_all, own = GradientState(), trainer.accelerator
    iterated, prepared = [*of_all.dataloader_references], [*own._dataloaders]
    try:
        yield
    finally:
        changed = {name: value for name, value in plain.items() if attributes[name] != value}
        vars(trainer).clear()
        vars(trainer).update(attributes | changed)
        of_all.dataloader_references = iterated
        own._dataloaders[:] = prepared


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Whether this is a number, a word, or a collection of some."""
    if isinstance(value, (dict, list, tuple, set, deque)):
        items = [*value.values()] if isinstance(value, dict) else [*value]
        return depth > 0 and len(items) <= 4096 and all(_is_plain(x, depth - 1) for x in items)
    return value is None or isinstance(value, (bool, int, float, str))


class MASTrainerMixin:
    """A FusedMASPenalty in a Trainer's loss: `class MASTrainer(MASTrainerMixin, Trainer)` with a `penalty`.

    It counts once per step, however many batches are accumulated in it, and whether their losses are means or
    parts of a sum over num_items_in_batch. Evaluation is of the task's loss alone. The caller consolidates:
    `trainer.penalty.consolidate(once(trainer.get_train_dataloader()))`, with `once` of integrations.loading.

    `distillation`, a LogitDistillation that the caller makes before a training, is another term of the loss:
    the mean over the batches of a step.
    """

    penalty: FusedMASPenalty | None = None
    distillation: LogitDistillation | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order in which Trainer's loss is the one that is taken."""
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer) and cls.__mro__.index(Trainer) < cls.__mro__.index(
            MASTrainerMixin
        ):
            raise TypeError(
                f"{cls.__name__}: got MASTrainerMixin behind Trainer, expected it before, as in "
                f"class {cls.__name__}(MASTrainerMixin, Trainer)"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        own: Any = super()
        return _loss(
            *(self, own.compute_loss, self.penalty, self.distillation),
            *(model, inputs, return_outputs, num_items_in_batch),
            **kwargs,
        )


def _loss(
    trainer: Any,
    compute_loss: Callable[..., Any],
    penalty: FusedMASPenalty | None,
    distillation: LogitDistillation | None,
    model: nn.Module,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    """What a Trainer's compute_loss gives, in training with the terms that there are, once a step."""
    given = dict(inputs)  # the Trainer may take the labels out
    reads = model.training and distillation is not None and distillation.reads_outputs
    asked = return_outputs or reads
    found = compute_loss(
        model, inputs, return_outputs=asked, num_items_in_batch=num_items_in_batch, **kwargs
    )
    loss, outputs = found if asked else (found, None)
    if model.training:
        added = _added(trainer, num_items_in_batch)
        if penalty is not None:
            loss = loss + penalty() / added
        if distillation is not None:
            loss = loss + distillation(given, outputs) / added
    return (loss, outputs) if return_outputs else loss


def _added(trainer: Any, num_items_in_batch: Any) -> int:
    """The number of losses that a Trainer adds up in a step; 1 where it takes their mean."""
    added = getattr(trainer, "loss_is_scaled_for_ga", None)
    if added is None:
        of_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        added = of_items or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if added else 1
