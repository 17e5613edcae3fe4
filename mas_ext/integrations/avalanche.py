"""Plugins for Avalanche 0.6: its arguments, this library's importance, state and kernels.

    from mas_ext.integrations.avalanche import MASPlugin

    strategy = Naive(model=model, optimizer=optimizer, plugins=[MASPlugin(lambda_reg=1.0)], ...)

The penalty goes into the gradients in `before_update`, and its value into `strategy.loss` for the loggers, or
in the proximal form into the optimizer's step; `after_training_exp` consolidates, from the experience's data.
Heads may be added and grow. On several processes the model is in DistributedDataParallel
(`DistributedHelper.wrap_model`), and every rank reads its part of the data. `save_checkpoint` and
`maybe_load_checkpoint` keep a plugin with its strategy; after loading it is found in `strategy.plugins`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

from avalanche.models.utils import avalanche_forward, is_multi_task_module
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mas_ext._arguments import check_factor, check_share
from mas_ext.compat import AveragedFromFirst, BatchMeans
from mas_ext.importance import EstimatorName, FisherSum, ImportanceSum
from mas_ext.importance.fisher import Labels
from mas_ext.importance.objectives import Objective
from mas_ext.integrations import choosing
from mas_ext.integrations.loading import own_part, try_importance
from mas_ext.methods.path import PathIntegral
from mas_ext.methods.quadratic import Lam, is_automatic
from mas_ext.optim.hooks import Handle, Mode, check_mode
from mas_ext.parameters.names import named_parameters
from mas_ext.penalty import FusedMASPenalty
from mas_ext.state.merge_rules import Merge


class QuadraticPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """What the plugins have in common: `penalty`, from the first experience on, and when it is applied.

    Other plugins may write weights at the end of an experience, wherever they are in the list: the anchor is
    what they leave. Importance is tried on two samples before an experience's first step.

    Args:
        lam: its strength; "auto": chosen before every experience but the first, see `chosen_lam`.
        step: "gradient" or "proximal", see FusedMASPenalty.attach. None is "gradient", and for a strength
            "auto" "proximal", which no lam makes diverge.
        keep: for a strength "auto", what matters: from 0, the new experience alone, to 1, the old ones.
        name: what subclasses call the strength.

    Attributes:
        lams: what was chosen so far.
    """

    def __init__(
        self,
        lam: Lam | Sequence[float] = 1.0,
        step: Mode | None = None,
        keep: float = 0.5,
        name: str = "lam",
    ) -> None:
        super().__init__()
        if step is not None:
            check_mode(step, "step")
        check_share(keep, "keep")
        self.automatic, self.keep = is_automatic(lam, name), keep
        self.strength: Any = 1.0 if self.automatic else lam
        self.step, self._form = step, step or "gradient"
        self.penalty: FusedMASPenalty | None = None
        self._handle: Handle | None = None
        self.lams: list[float] = []
        # Task labels of the experiences so far.
        self._tasks: set[int] = set()

    def build(self, model: nn.Module) -> FusedMASPenalty:
        """The penalty of a model."""
        raise NotImplementedError

    def consolidate(self, penalty: FusedMASPenalty, batches: Iterable[Any]) -> None:
        """Consolidate at the end of an experience, whose samples `batches` gives once."""
        penalty.consolidate(batches)

    def try_out(self, penalty: FusedMASPenalty, strategy: Any) -> None:
        """Raise now what would be raised at the end of this experience."""
        try_importance(penalty, lambda: _batches(strategy, 0))

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Make the penalty at the first experience; by now the model has the heads for it."""
        if self.automatic:
            choosing.check_one_process()
            choosing.check_optimizer(strategy.optimizer, strategy.model)
        if self.penalty is None:
            self.penalty = self.build(strategy.model)
        self.try_out(self.penalty, strategy)
        self._detach()  # from a training that ended in an error
        if self.automatic and self.penalty.num_tasks:
            old = sorted(self._tasks - _labels(strategy))
            batches = _batches(strategy, kwargs.get("num_workers", 0))
            lam = chosen_lam(self.penalty, strategy, batches, self.keep, old, self.lams)
            self.penalty.lam = lam
            self.lams.append(lam)
        # A new list: the old one is being gone through.
        strategy.plugins = [*(p for p in strategy.plugins if not _calls(p, self)), _Last(self)]
        self._form = choosing.form(self.step, self.automatic, self.penalty)
        if self._form == "proximal":
            self._handle = self.penalty.attach(strategy.optimizer, mode="proximal")

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add the penalty's gradient to the loss's, which is reduced over the ranks by now."""
        assert self.penalty is not None
        if self._form == "gradient":
            strategy.loss = strategy.loss.detach() + self.penalty.add_grad_()

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Consolidate behind all other plugins, with the keyword num_workers of `strategy.train`."""
        if any(_calls(p, self) for p in strategy.plugins):
            return
        self._detach()
        assert self.penalty is not None
        self.consolidate(self.penalty, _batches(strategy, kwargs.get("num_workers", 0)))
        self._tasks |= _labels(strategy)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Last:
    """Calls a plugin again behind all others at the end of an experience, and is gone."""

    def __init__(self, plugin: QuadraticPlugin) -> None:
        self.plugin = plugin

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        strategy.plugins = [p for p in strategy.plugins if p is not self]
        self.plugin.after_training_exp(strategy, **kwargs)


def _calls(plugin: Any, other: QuadraticPlugin) -> bool:
    return isinstance(plugin, _Last) and plugin.plugin is other


class MASPlugin(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Memory Aware Synapses, in place of avalanche.training.plugins.MASPlugin.

        penalty = lambda_reg sum_i W_i (theta_i - theta*_i)^2
        W = Omega_1, then W <- alpha W + (1 - alpha) Omega_t

    with Omega_t per sample, where Avalanche takes whole batches in training mode; importance="avalanche" gives
    Avalanche's numbers, see compat.avalanche.

    Args:
        lambda_reg: strength, or "auto", see QuadraticPlugin.
        alpha: share of the old importance that is kept, from 0 to 1; of no effect with `merge`.
        verbose: show a progress bar.
        importance: "exact", "batch", "local", see estimate_importance, or "avalanche".
        objective: see estimate_importance. Outputs that a classifier masks count for nothing.
        merge: instead of the average, "sum" (the MAS paper), "consistent" (MAS-alpha) or "decay" of
            FusedMASPenalty.
        step, keep: see QuadraticPlugin.
        exclude: fnmatch patterns on the names of parameters to leave out.
        options: further arguments of FusedMASPenalty.
    """

    def __init__(
        self,
        lambda_reg: Lam = 1.0,
        alpha: float = 0.5,
        verbose: bool = False,
        *,
        importance: EstimatorName | Literal["avalanche"] = "exact",
        objective: Objective = "l2",
        merge: Merge | None = None,
        step: Mode | None = None,
        keep: float = 0.5,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(lambda_reg, step, keep, "lambda_reg")
        check_share(alpha, "alpha")
        self.verbose = verbose
        self._estimator = (
            BatchMeans(objective, _output, exclude, training=True)
            if importance == "avalanche"
            else ImportanceSum(importance, objective, _output, exclude)
        )
        rule = {"merge": "decay", "gamma": alpha} if merge is None else {"merge": merge}
        self._kind = AveragedFromFirst if merge is None else FusedMASPenalty
        self._options = {"lam": self.strength, "exclude": exclude, **rule, **options}

    def build(self, model: nn.Module) -> FusedMASPenalty:
        return self._kind(model, importance=self._estimator, **self._options)

    def consolidate(self, penalty: FusedMASPenalty, batches: Iterable[Any]) -> None:
        penalty.consolidate(batches, progress=self.verbose)


class EWCPlugin(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Elastic Weight Consolidation, in place of avalanche.training.plugins.EWCPlugin.

        penalty = ewc_lambda sum_t sum_i F_t,i (theta_i - theta*_t,i)^2          mode "separate"
        penalty = ewc_lambda sum_i W_i (theta_i - theta*_i)^2, W <- decay_factor W + F_t          "online"

    F_t is the diagonal Fisher information, the mean over samples of squared gradients; Avalanche squares the
    gradient of a batch's mean, which is smaller: an ewc_lambda chosen for it is too large here. Either mode
    keeps two numbers per parameter, whatever the number of experiences.

    Args:
        ewc_lambda: strength, without one-half, or "auto", see QuadraticPlugin.
        mode: "separate" or "online".
        decay_factor: with "online", share of the old importance that is kept, from 0 to 1.
        keep_importance_data: with "separate", keep every experience by itself (store "per_task").
        labels: "true", "predicted", "sampled" or "all", see estimate_fisher.
        step, keep: see QuadraticPlugin.
        exclude: fnmatch patterns on the names of parameters to leave out.
        options: further arguments of FusedMASPenalty.
    """

    def __init__(
        self,
        ewc_lambda: Lam,
        mode: Literal["separate", "online"] = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        *,
        labels: Labels = "true",
        step: Mode | None = None,
        keep: float = 0.5,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(ewc_lambda, step, keep, "ewc_lambda")
        if mode not in ("separate", "online"):
            raise ValueError(f"mode: got {mode!r}, expected 'separate' or 'online'")
        if (decay_factor is None) == (mode == "online"):
            wanted = "a number" if mode == "online" else "None"
            raise ValueError(f"decay_factor: got {decay_factor} with {mode!r}, expected {wanted}")
        if decay_factor is not None:
            check_share(decay_factor, "decay_factor")
        if keep_importance_data and mode == "online":
            raise ValueError(
                "keep_importance_data: got True with 'online', which has one importance"
            )
        rule: dict[str, Any] = (
            {"anchor": "own", "store": "per_task" if keep_importance_data else "merged"}
            if decay_factor is None
            else {"merge": "decay", "gamma": decay_factor}
        )
        self._estimator = FisherSum(labels, _logits, exclude)
        self._options = {"lam": self.strength, "exclude": exclude, **rule, **options}

    def build(self, model: nn.Module) -> FusedMASPenalty:
        return FusedMASPenalty(model, importance=self._estimator, **self._options)


class SynapticIntelligencePlugin(QuadraticPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Synaptic Intelligence, in place of avalanche.training.plugins.SynapticIntelligencePlugin.

        penalty = si_lambda/2 sum_i W_i (theta_i - theta*_i)^2
        W_i <- max(0, W_i + omega_i / ((theta_i(end) - theta_i(start))^2 + eps))

    with the path integral omega of methods.path, along the gradient without the penalty's (Zenke et al. 2017).
    Avalanche's is along the penalised gradient, and cut off at 0.001 from above and not at 0 from below: an
    si_lambda chosen for it is too large here.

    Args:
        si_lambda: strength, of which half counts; a list has one for each experience, the last for all others;
            "auto", see QuadraticPlugin.
        eps: damping, > 0.
        excluded_parameters: names of modules or parameters, or fnmatch patterns. As in Avalanche, parameters
            of normalisations that follow the batch are excluded, too.
        device: "as_strategy": the state lies where the parameters are.
        step, keep: see QuadraticPlugin.
        options: further arguments of FusedMASPenalty.
    """

    def __init__(
        self,
        si_lambda: Lam | Sequence[float],
        eps: float = 1e-7,
        excluded_parameters: Sequence[str] | None = None,
        device: Any = "as_strategy",
        *,
        step: Mode | None = None,
        keep: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(si_lambda, step, keep, "si_lambda")
        if not eps > 0:
            raise ValueError(f"eps: got {eps}, expected more than 0")
        if device != "as_strategy":
            raise ValueError(f"device: got {device!r}, expected 'as_strategy'")
        lams = self.strength if isinstance(self.strength, Sequence) else [self.strength]
        self.si_lambda = [check_factor(lam, "si_lambda") for lam in lams]
        self.eps, self._excluded, self._options = eps, excluded_parameters or (), options
        self._path = PathIntegral({})

    def build(self, model: nn.Module) -> FusedMASPenalty:
        exclude = _excluded(model, self._excluded)
        return FusedMASPenalty(model, exclude=exclude, **self._options)

    def try_out(self, penalty: FusedMASPenalty, strategy: Any) -> None:
        """Try nothing: no output is asked for."""

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, *args, **kwargs)
        assert self.penalty is not None
        if not self.automatic:
            experience = strategy.clock.train_exp_counter
            self.penalty.lam = self.si_lambda[min(experience, len(self.si_lambda) - 1)] / 2
        theta = named_parameters(self.penalty.model, self.penalty.exclude)
        self._path = PathIntegral(theta)

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._path.before_step(strategy.optimizer, (), {})
        super().before_update(strategy, *args, **kwargs)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Add this step to the path integral."""
        self._path.after_step(strategy.optimizer, (), {})

    def consolidate(self, penalty: FusedMASPenalty, batches: Iterable[Any]) -> None:
        """Consolidate the importance that the path integral gives; the batches are not read."""
        theta = named_parameters(penalty.model, penalty.exclude)
        penalty.consolidate(importance=self._path.importance(theta, self.eps))
        self._path = PathIntegral({})


def chosen_lam(
    penalty: FusedMASPenalty,
    strategy: Any,
    batches: DataLoader[Any],
    keep: float = 0.5,
    old: Sequence[int] = (),
    before: Sequence[float] = (),
) -> float:
    """The lam for an experience, from its data alone: `mas_ext.choose_lam` with the strategy's loss.

    A tenth of the samples, drawn at random, is held out meanwhile, of which a twelfth as many as are trained on
    are looked at. It is trained one and a half times as many steps as the experience has, by a copy of the
    strategy's optimizer in a plain loop, without other plugins, and afterwards all is as before. Outputs for
    the earlier experiences are those of their tasks' heads, or of their classes, where the benchmark tells of
    these; else the new loss alone decides.

    Args:
        penalty: a consolidated one, of the strategy's model.
        strategy: one that begins an experience, as in a plugin's before_training_exp.
        batches: of the experience.
        keep: what matters, from 0 (the new experience alone) to 1 (the old ones).
        old: labels of earlier tasks.
        before: what was chosen for earlier experiences, in order.

    Raises:
        ValueError: on several processes; an experience of one sample; what choose_lam raises.
    """
    train, held_out = choosing.in_two(batches)
    multi = is_multi_task_module(strategy.model)
    now = {*getattr(strategy.experience, "classes_in_this_experience", ())}
    classes = sorted({*getattr(strategy.experience, "previous_classes", ())} - now)

    def loss(batch: Any) -> Tensor:
        strategy.mbatch = [*batch]
        strategy._unpack_minibatch()
        strategy.mb_output = strategy.forward()
        found: Tensor = strategy.criterion()
        return found

    def outputs(batch: Any) -> list[Tensor]:  # behind the loss of the same batch
        if multi:
            return [avalanche_forward(strategy.model, strategy.mb_x, task) for task in old]
        return [strategy.mb_output[:, classes]] if classes else []

    kept = strategy.mbatch, strategy.mb_output
    try:
        return choosing.choose_in_loop(
            *(penalty, keep, before, loss, partial(choosing.beginning, strategy.optimizer)),
            *(train, held_out, strategy.train_epochs * len(batches)),
            old=outputs,
        )
    finally:
        strategy.mbatch, strategy.mb_output = kept


def _labels(strategy: Any) -> set[int]:
    """The task labels of the experience; none where a benchmark knows no tasks."""
    return {*getattr(strategy.experience, "task_labels", ())}


def _batches(strategy: Any, num_workers: int) -> DataLoader[Any]:
    """Batches (x, y, ..., task label) of the experience in its own order, as Avalanche's plugins read it."""
    dataset = strategy.experience.dataset
    return DataLoader(
        own_part(dataset),
        batch_size=strategy.train_mb_size,
        collate_fn=getattr(dataset, "collate_fn", None),
        num_workers=num_workers,
    )


def _logits(model: nn.Module, batch: Any) -> Tensor:
    """The strategy's logits, masks included, by the heads of the samples' tasks."""
    x, task = batch[0], batch[-1]
    if is_multi_task_module(model) and (task == task[0]).all():
        task = int(task[0])  # one head, instead of rows put together from several
    logits: Tensor = avalanche_forward(model, x, task)
    return logits


def _output(model: nn.Module, batch: Any) -> Tensor:
    """The logits, with 0 instead of the large constant with which classifiers mask unused units."""
    output = _logits(model, batch)
    masking = [m for m in model.modules() if getattr(m, "masking", False)]
    for value in {float(m.mask_value) for m in masking}:  # type: ignore[arg-type]
        output = output.masked_fill(output.eq(value), 0.0)
    return output


def _excluded(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Patterns for the parameters of these modules, or by these names, and for parameters of normalisations."""
    theta = named_parameters(model)
    patterns = [p for name in names for p in (name, f"{name}.*") if fnmatch.filter(theta, p)]
    norms = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
        for p in m.parameters()
    }
    return (*patterns, *(name for name, p in theta.items() if id(p) in norms))
