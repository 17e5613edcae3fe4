"""Importance gathered batch by batch: sums over samples, by any of the estimators."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_ext._arguments import check_choice, check_count
from mas_ext.failures import Diverged, IncompleteState, Vanished
from mas_ext.importance import batches as batch_of
from mas_ext.importance import objectives
from mas_ext.importance.batch import Batch
from mas_ext.importance.eval_effects import (
    refuse_effects_of_eval,
    refuse_fused_adapters,
    refuse_lost_gradients,
)
from mas_ext.importance.evaluation import (
    Evaluate,
    Forward,
    Labelled,
    RunMode,
    Values,
    default_forward,
    evaluating,
)
from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.gradients import Summation, Totals, accumulate
from mas_ext.importance.local import Local
from mas_ext.importance.model_state import Habits, ModelState
from mas_ext.importance.objectives import Objective
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.dtypes import DTYPES, compute_dtype
from mas_ext.parameters.adapters import factors_of
from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.fsdp import Sharding, optimizer_view
from mas_ext.parameters.lockstep import Lockstep
from mas_ext.parameters.names import ModelView, check_supported
from mas_ext.parameters.ranks import SampleSums
from mas_ext.parameters.tracked_model import alone

EstimatorName = Literal["exact", "batch", "local"]
# (evaluate, batch, parameters by name) -> sums over samples by name, and the objectives.
Estimator = Callable[[Evaluate, Labelled, Mapping[str, Tensor]], tuple[Totals, Tensor]]
# (batch, its output on demand, number of samples so far) -> labels, samples in dimension 0.
LabelSource = Callable[[Any, Callable[[], Tensor], int], Tensor]

ESTIMATORS: dict[str, Callable[[Backend], Estimator]] = {
    "exact": Exact,
    "batch": Batch,
    "local": Local,
}


class ImportanceSum:
    """Importance gathered batch by batch: sums over samples, and how many there were.

    `sums` maps names to tensors like the parameters, float64 for float64 parameters, else float32. `totals`,
    which has all three, is replaced as one, so that an interruption leaves the old ones whole.

    Args:
        method: "exact", "batch" or "local", see estimate_importance.
        objective: "l2", "l1", "vector" or a callable, see estimate_importance.
        forward: forward(model, batch) -> output tensor with samples in dimension 0.
        exclude: fnmatch patterns on the names of parameters to leave out.
        max_outputs: the most outputs that "vector" takes, one backward pass each.
        backend: "auto", "native" or "reference".
        estimator: (evaluate, batch, theta) -> sums by name and objectives, instead of the method's.
        values: (output, labels, samples) -> numbers of shape (rows, K), instead of the objective's; each row
            counts as one sample.
        labels: (batch, output, samples so far) -> what `values` gets as labels.
        mode: (model, device, habits) -> context in which the model runs; by default its eval mode.
    """

    def __init__(
        self,
        method: EstimatorName = "exact",
        objective: Objective = "l2",
        forward: Forward | None = None,
        exclude: Sequence[str] = (),
        max_outputs: int = 64,
        backend: Backend = "auto",
        *,
        estimator: Estimator | None = None,
        values: Values | None = None,
        labels: LabelSource | None = None,
        mode: RunMode = evaluating,
    ) -> None:
        check_choice("method", method, ESTIMATORS)
        check_choice("backend", backend, get_args(Backend))
        check_count(max_outputs, "max_outputs")
        if forward is not None and not callable(forward):
            raise TypeError(
                f"forward: got {forward!r}, expected a function (model, batch) -> output"
            )
        objectives.check_objective(objective)
        self.method, self.objective, self.forward = method, objective, forward or default_forward
        self.exclude, self.max_outputs, self.backend = tuple(exclude), max_outputs, backend
        self._estimator = estimator or ESTIMATORS[method](backend)
        self.values: Values = values or partial(
            objectives.values, objective=objective, max_outputs=max_outputs
        )
        self._labels, self._mode, self._habits = labels, mode, Habits()
        self.totals = SampleSums({}, 0, 0.0)
        # While batches of a model under fully_shard are added.
        self._lockstep: Lockstep | None = None

    @property
    def sums(self) -> dict[str, Tensor]:
        """Importance by name, summed over the samples."""
        return self.totals.sums

    @property
    def samples(self) -> int:
        """How many there were."""
        return self.totals.samples

    @property
    def objective_sum(self) -> float:
        """The sum of the absolute values of the objective."""
        return self.totals.objective_sum

    def empty(self) -> ImportanceSum:
        """A new sum of nothing, with the same settings, and with what was found out about the model."""
        return self.with_totals(SampleSums({}, 0, 0.0))

    def with_totals(self, totals: SampleSums) -> ImportanceSum:
        """A sum with the same settings that has come to these totals."""
        other = copy.copy(self)
        other.totals = totals
        return other

    def uninterrupted(self) -> AbstractContextManager[None]:
        """While it lasts, nothing but the batch changes from add to add."""
        estimator = self._estimator
        return estimator.uninterrupted() if isinstance(estimator, Exact) else nullcontext()

    @contextmanager
    def running(self, view: ModelView, agreement: Agreement | None = None) -> Iterator[None]:
        """Batches of a model are added inside.

        Of a model under fully_shard each rank adds its own, as many as it has, and all ranks are inside
        together. The sums are then this rank's shards of those over all ranks; the samples are its own.

        Args:
            view: the model.
            agreement: the call of all ranks that this is a part of, if it is one.

        Raises:
            RuntimeError: another rank failed.
        """
        theta = {name: p for name, p in view.parameters().items() if p.requires_grad}
        with alone(view.model):
            sharding = Sharding.of(view.model, theta)
            if sharding is None:
                yield
                return
            before, device = self.totals, next(iter(theta.values())).device
            own = Agreement("importance", sharding.group, device)
            with own if agreement is None else nullcontext(agreement) as call, call.uninterrupted():
                try:
                    self._lockstep = lockstep = Lockstep(view, theta, sharding, call)
                    with lockstep.installed():
                        yield
                        self._finish(lockstep, view)
                    # It is part of cycles, and would hold the sums until these are collected.
                    sums, lockstep.sums = lockstep.sums, {}
                    if lockstep.sample is None:
                        sums = {}
                    for name, total in before.sums.items():
                        sums[name] = sums[name].add_(total) if name in sums else total.clone()
                    if agreement is None:
                        call.settle()
                    self.totals = self.totals._replace(sums=sums)
                except BaseException:
                    self.totals = before
                    raise
                finally:
                    self._lockstep = None

    def _finish(self, lockstep: Lockstep, view: ModelView) -> None:
        """Have this rank take part in what other ranks still have to run."""
        lockstep.begin(None)
        if lockstep.sample is not None:
            with self._mode(view.model, lockstep.device, self._habits) as state:
                self._evaluate(view, state)
                lockstep.finish()

    def _evaluate(self, view: ModelView, state: ModelState) -> Evaluate:
        lockstep = self._lockstep
        evaluate = Evaluate(view.model, self.forward, self.values, state, lockstep)
        if lockstep is not None:
            lockstep.prepare(evaluate.stand_in)
        return evaluate

    def add(self, model: nn.Module | ModelView, batch: Any) -> None:
        """Add a batch: every sample counts the same, whatever the size of its batch.

        Every parameter that requires a gradient now takes part. The model's modes, gradients and
        statistics and the random state are left as they were; on an error, so are the sums.
        """
        view = model if isinstance(model, ModelView) else ModelView(model, self.exclude)
        theta: dict[str, Tensor] = {n: p for n, p in view.parameters().items() if p.requires_grad}
        lockstep = self._lockstep
        for name, p in (theta if lockstep is None else Sharding.local(theta)).items():
            check_supported(name, p)
            old = self.sums.get(name)
            if old is not None and old.shape != p.shape:
                raise ValueError(
                    f"parameter {name!r}: got shape {tuple(p.shape)}, expected {tuple(old.shape)} as "
                    "in the batches before; consolidate before a parameter changes"
                )
        batch = batch_of.told(batch)
        samples = batch_of.size(batch)
        if samples == 0 or not theta:
            self.totals = self.totals._replace(samples=self.samples + samples)
            return
        device = next(iter(theta.values())).device
        given = Labelled(batch_of.to(batch, device))
        if lockstep is not None:
            sample = batch_of.twice(batch_of.between(batch, 0, 1))
            lockstep.begin(batch_of.to(sample, torch.device("cpu")))
        with self._mode(view.model, device, self._habits) as state:
            evaluate = self._evaluate(view, state)
            if lockstep is not None:
                theta = lockstep.theta()
            first = self._mode is evaluating and view.model not in self._habits.compared
            if first:
                refuse_effects_of_eval(evaluate, given)
            if self._labels is not None:
                plain = batch_of.plain(given.batch)
                own = self._labels(plain, lambda: evaluate.output(given), self.samples)
                given = Labelled(given.batch, own)
            try:
                found, objective = self._estimator(evaluate, given, theta)
            except ValueError:
                refuse_fused_adapters(evaluate, given, theta.values())
                raise
            new = [n for n in found if n not in self.sums and factors_of(theta[n])]
            unused = [theta[n] for n in new if not found[n].any()]
            refuse_fused_adapters(evaluate, given, unused)
            if first:
                refuse_lost_gradients(evaluate, given, theta, found)
                self._habits.compared.add(view.model)
        added = float(objective.abs().sum(dtype=torch.float64))
        if not math.isfinite(added):
            bad = [name for name, t in found.items() if not t.isfinite().all()]
            what = f"importance of {bad[0]!r}: got values" if bad else "objective: got a sum"
            raise Diverged(
                f"{what} from a batch with objective {added}, expected finite ones; where training "
                'diverged, a smaller lam or attach(optimizer, mode="proximal") helps'
            )
        # Into the batch's own memory: an interruption leaves the sums as they were.
        known = {name: t for name, t in self.sums.items() if name in found}
        accumulate(found, known, Summation(self.backend))
        self.totals = SampleSums(
            {**self.sums, **found}, self.samples + len(objective), self.objective_sum + added
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums and counts as named tensors."""
        found = {f"pending.{name}": t for name, t in self.sums.items()}
        found["pending_samples"] = torch.tensor(self.samples)
        found["pending_objective"] = torch.tensor(self.objective_sum, dtype=torch.float64)
        return found

    def load_tensors(self, found: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, for these parameters."""
        counted = {}
        for key in ("pending_samples", "pending_objective"):
            if key not in found:
                raise IncompleteState(f"state: got no {key!r}, expected one")
            if found[key].numel() != 1 or found[key].is_complex():
                raise ValueError(f"state: got a {key!r} that is no number, expected one")
            counted[key] = found[key].item()
        samples, objective = counted["pending_samples"], float(counted["pending_objective"])
        if not isinstance(samples, int) or samples < 0 or not 0 <= objective < float("inf"):
            raise ValueError(
                f"state: got pending_samples {samples} and pending_objective {objective}, expected "
                "finite numbers from 0 up"
            )
        sums = {}
        for key, t in found.items():
            name = key.removeprefix("pending.")
            if name != key:
                if name not in theta or theta[name].shape != t.shape:
                    raise IncompleteState(
                        f"state, pending importance of {name!r}: got shape {tuple(t.shape)}, expected "
                        "that of a parameter of the model"
                    )
                if t.dtype not in DTYPES or not torch.isfinite(t).all() or (t < 0).any():
                    raise ValueError(
                        f"state, pending importance of {name!r}: got {t.dtype}, NaN, Inf or negative values, "
                        "expected finite floating-point ones"
                    )
                sums[name] = t.to(theta[name].device, compute_dtype(theta[name].dtype), copy=True)
        self.totals = SampleSums(sums, samples, objective)

    def refuse_rounding_noise(
        self, theta: Mapping[str, Tensor], sharding: Sharding | None = None
    ) -> None:
        """Raise Vanished for importance at the level of rounding, as of an output of constant norm.

        sharding: of what theta and the sums are this rank's shards.

        sum_i Omega_i |theta_i| is at least of the order of the objective for a network that is homogeneous in
        its parameters (Euler), and of the order of its rounding error for an output of constant norm.
        """
        self._refuse_empty()
        if self.objective_sum == 0:
            raise Vanished(
                "importance: got outputs that are all zero, and so is every importance, expected others; the "
                "usual cause is a last layer that starts at zero (train it first, or measure the importance of "
                "features, with forward=)"
            )
        objective = self.objective_sum / self.samples
        change = sum(
            float((total.double() * (theta[name].detach().double().abs() + 0.01)).sum())
            for name, total in self.sums.items()
        )
        if sharding is not None:
            change = float(sharding.add_up(torch.tensor(change, dtype=torch.float64)))
        change /= self.samples
        wide = all(total.dtype == torch.float64 for total in self.sums.values())
        level = torch.finfo(torch.float64 if wide else torch.float32).eps ** 0.5
        # What is not finite is refused by name later.
        if change <= level * objective < float("inf"):
            raise Vanished(
                f"importance: got a relative sensitivity of {change / max(objective, 1e-300):.3g}, expected "
                f"more than {level:.3g}, the level of rounding; the usual causes are an output of constant "
                "norm, such as a normalised embedding (choose another objective), or a training that collapsed "
                "(choose a smaller lr)"
            )

    def mean(self) -> dict[str, Tensor]:
        """Omega = sum / samples, by name; a ValueError if there was no sample."""
        self._refuse_empty()
        return {name: total / self.samples for name, total in self.sums.items()}

    def into_mean(self) -> dict[str, Tensor]:
        """The mean, in the memory of the sums, which are empty afterwards."""
        self._refuse_empty()
        omega, samples = self.sums, self.samples
        self.totals = SampleSums({}, 0, 0.0)
        for total in omega.values():
            total /= samples
        return omega

    def _refuse_empty(self) -> None:
        if self.samples == 0:
            raise ValueError("batches: got no samples, expected at least one")


def gather(
    total: ImportanceSum,
    model: nn.Module | ModelView,
    batches: Iterable[Any],
    max_samples: int | None = None,
    progress: bool = False,
) -> None:
    """Add batches to a sum, at most max_samples samples in all."""
    batch_of.refuse_no_batch(batches)
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches: got {type(batches).__name__}, expected an iterable of batches")
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"batches: got a single {type(batches).__name__}, expected an iterable of batches; "
            "wrap it in a list"
        )
    if max_samples is not None:
        check_count(max_samples, "max_samples")
    view = model if isinstance(model, ModelView) else ModelView(model, total.exclude)
    start = total.samples
    # A loader draws its order while it is read.
    with torch.random.fork_rng(devices=[]), total.uninterrupted():
        for batch in _shown(batches, progress):
            left = None if max_samples is None else max_samples - (total.samples - start)
            if left is not None and left < batch_of.size(batch):
                batch = batch_of.between(batch, 0, left)
            total.add(view, batch)
            if max_samples is not None and total.samples - start >= max_samples:
                break


def estimate(
    total: ImportanceSum,
    model: nn.Module,
    batches: Iterable[Any],
    max_samples: int | None,
    progress: bool,
) -> dict[str, Tensor]:
    """The mean over the samples of these batches, by parameter name; under fully_shard over all ranks'."""
    view = optimizer_view(model, total.exclude)
    with total.running(view):
        gather(total, view, batches, max_samples, progress)
    sharding = Sharding.of(model, {n: p for n, p in view.parameters().items() if n in total.sums})
    if sharding is None:
        return total.into_mean()
    total.totals = total.totals._replace(samples=sharding.samples_of_all(total.samples))
    return {name: sharding.join(name, own) for name, own in total.into_mean().items()}


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm import tqdm

    shown: Iterable[Any] = tqdm(batches, desc="importance", unit="batch")
    return shown
