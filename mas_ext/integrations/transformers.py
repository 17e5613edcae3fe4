"""Hugging Face: a callback and a mixin for the Trainer of transformers 5, and `attach` for accelerate.

    from mas_ext.integrations.transformers import MASCallback

    mas = MASCallback(lam=1.0)
    Trainer(model, arguments, train_dataset=corpus_a, callbacks=[mas], ...).train()  # consolidates at its end
    Trainer(model, arguments, train_dataset=corpus_b, callbacks=[mas], ...).train()

Two places for the penalty, which differ where gradients are clipped (max_grad_norm, 1 by default):

- `MASCallback`: in the optimizer's step. Accumulated and unscaled gradients, already clipped, get the penalty's
  once a step. The logged loss and gradient norm are the task's.
- `MASTrainerMixin`: in the loss. Clipping clips the sum, and the logged loss and gradient norm are the sum's.

The penalty holds what is trained: with LoRA (peft) the updates s B A of the weights, or with
adapters="parameters" the factors one by one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from mas_ext.importance import Forward
from mas_ext.integrations.loading import check_batches, once, penalty_of, try_importance
from mas_ext.integrations.model_output import ModelOutput
from mas_ext.optim.hooks import Handle, Mode, check_mode
from mas_ext.penalty import FusedMASPenalty
from mas_ext.state import files as checkpoint

FILE = "mas_penalty.safetensors"


def attach(
    penalty: FusedMASPenalty, optimizer: Any, mode: Mode = "gradient", eta: float | None = None
) -> Handle:
    """Attach a penalty to an optimizer that `accelerator.prepare` may have wrapped.

    The penalty is added once per step: under `accelerator.accumulate` when the step is taken, and under float16
    unscaled, behind `accelerator.clip_grad_norm_`.
    """
    return penalty.attach(optimizer, mode, eta)


class MASCallback(TrainerCallback):
    """FusedMASPenalty in a Trainer: applied in every step, consolidated when training has ended.

    It is the last callback from the beginning of a training on: others may write weights at its end, and the
    anchor is what they leave, as it is the best model where that is loaded. Importance is tried on two samples
    before the first step, but of data sets that can only be read in order.

    `penalty` exists from the first `train` on, or before it where it is set. Checkpoints have it in a file of
    their own, which is read when training resumes from one in output_dir; for a checkpoint elsewhere, set
    `penalty` to what FusedMASPenalty.load reads. `penalty.save` after `train` keeps what was consolidated.

    Args:
        lam: strength, see FusedMASPenalty.
        batches: from the training dataloader to the samples that importance is taken from, this rank's part
            of them; by default all of them, each once.
        mode: "gradient" or "proximal", see FusedMASPenalty.attach.
        forward: see estimate_importance; batches are mappings of the model's inputs. By default ModelOutput().
        options: further arguments of FusedMASPenalty.
    """

    def __init__(
        self,
        lam: float = 1.0,
        batches: Callable[[Any], Iterable[Any]] = once,
        mode: Mode = "gradient",
        forward: Forward | None = None,
        **options: Any,
    ) -> None:
        check_mode(mode)
        check_batches(batches)
        self.batches, self.mode = batches, mode
        self.options = {"lam": lam, "forward": forward or ModelOutput(), **options}
        self.penalty: FusedMASPenalty | None = None
        self._handle: Handle | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Make the penalty of this model, with the state so far, also of another model."""
        file = _file(args, state)
        resumed = state.global_step > 0
        if resumed and self.penalty is None and not file.exists():
            raise FileNotFoundError(
                f"{file}: not found, expected the penalty of the checkpoint that training resumes from; where "
                "it is elsewhere, set MASCallback.penalty before"
            )
        self.penalty = penalty_of(model, self.penalty, args.world_size, self.options)
        if resumed and file.exists():
            tensors = checkpoint.load(file)
            self.penalty.load_state_dict({n: t for n, t in tensors.items() if n != "settings"})
        try_importance(self.penalty, lambda: self.batches(kwargs["train_dataloader"]))
        _put_last(self)
        self._detach()  # from a training that ended in an error
        self._handle = attach(self.penalty, optimizer, self.mode)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the penalty beside the checkpoint that is being written."""
        assert self.penalty is not None
        if state.is_world_process_zero:
            self.penalty.save(_file(args, state))

    def on_train_end(
        self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any
    ) -> None:
        """Consolidate."""
        assert self.penalty is not None
        self._detach()
        self.penalty.consolidate(self.batches(train_dataloader))

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


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


def _file(args: Any, state: Any) -> Path:
    return Path(os.path.join(args.output_dir, f"checkpoint-{state.global_step}", FILE))


class MASTrainerMixin:
    """A FusedMASPenalty in a Trainer's loss: `class MASTrainer(MASTrainerMixin, Trainer)` with a `penalty`.

    It counts once per step, however many batches are accumulated in it, and whether their losses are means or
    parts of a sum over num_items_in_batch. Evaluation is of the task's loss alone. The caller consolidates:
    `trainer.penalty.consolidate(once(trainer.get_train_dataloader()))`, with `once` of integrations.loading.
    """

    penalty: FusedMASPenalty | None = None

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
        loss, outputs = own.compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if self.penalty is not None and model.training:
            loss = loss + self.penalty() / _added(self, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def _added(trainer: Any, num_items_in_batch: Any) -> int:
    """The number of losses that a Trainer adds up in a step; 1 where it takes their mean."""
    added = getattr(trainer, "loss_is_scaled_for_ga", None)
    if added is None:
        of_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        added = of_items or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if added else 1
