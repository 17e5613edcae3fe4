"""Importance gathered batch by batch: sums over samples, by any of the estimators."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_ext.importance import batches as batch_of
from mas_ext.importance import objectives
from mas_ext.importance.batch import Batch
from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.local import Local
from mas_ext.importance.objectives import Objective
from mas_ext.importance.single_samples import Evaluate, Forward, Totals, Values, accumulate
from mas_ext.kernels.native import Backend
from mas_ext.kernels.reference import compute_dtype
from mas_ext.parameters.names import PARALLEL, ModelView, check_supported
from mas_ext.parameters.ranks import SampleSums
from mas_ext.parameters.tracked_model import whole_model

Method = Literal["exact", "batch", "local"]
# (evaluate, batch, samples, parameters by name) -> sums over samples by name, and the objectives.
Estimator = Callable[[Evaluate, Any, int, Mapping[str, Tensor]], tuple[Totals, Tensor]]

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)

METHODS: dict[str, Callable[[Backend], Estimator]] = {
    "exact": Exact,
    "batch": Batch,
    "local": Local,
}


def _default_forward(model: nn.Module, batch: Any) -> Tensor:
    output: Tensor = model(batch_of.first(batch))
    return output


class _Kept:
    """Buffers of one dtype and device as they were, in one tensor: a single wait tells whether one changed."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._before = self._now()

    def _now(self) -> Tensor:
        return torch.cat([b.flatten() for b in self._buffers])

    def restore(self) -> None:
        """Write back those that changed."""
        if torch.equal(self._now(), self._before):
            return
        parts = self._before.split([b.numel() for b in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            if not torch.equal(buffer, part.view_as(buffer)):
                buffer.copy_(part.view_as(buffer))


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """eval() with gradients on; modes and random state are put back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    # A forward pass may put a normalisation back to training, and is then refused.
    buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for b in module.buffers(recurse=False):
                buffers.setdefault((b.dtype, b.device), []).append(b)
    statistics = [_Kept(same) for same in buffers.values()]
    # What runs a model in parallel would wait for other ranks, whose passes have other lengths.
    parallel = [module for module in modes if isinstance(module, PARALLEL)]
    devices = [device] if device.type == "cuda" else []
    # cuDNN has their backward pass in training mode alone; without dropout that is no other function. What
    # derives from them may be another one.
    recurrent = [
        (module, module.dropout)
        for module in modes
        if devices and isinstance(module, nn.RNNBase) and type(module) in _RECURRENT
    ]
    # Autocast keeps rounded weights; those that a pass without gradients left behind would have none.
    cached = torch.is_autocast_cache_enabled()
    # Compiled parts run as they were written, so that what they compute can be followed. Nothing is compiled
    # where the compiler was never imported, which takes seconds.
    compiled = "torch._dynamo" in sys.modules
    as_written = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        as_written,
    ):
        try:
            torch.set_autocast_cache_enabled(False)
            if any(modes.values()):  # modules take long to set attributes
                model.eval()
            for layer, _ in recurrent:
                layer.training = True
                layer.dropout = 0.0
            for wrapper in parallel:
                wrapper.__dict__["forward"] = wrapper.module
            yield
        finally:
            for wrapper in parallel:
                del wrapper.__dict__["forward"]
            for layer, dropout in recurrent:
                layer.dropout = dropout
            torch.set_autocast_cache_enabled(cached)
            for module, training in modes.items():
                if module.training != training:
                    module.training = training
            for kept in statistics:
                kept.restore()


def _refuse_interacting(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model: {name or type(module).__name__} normalises over the batch even in eval "
                "mode (it has no running statistics), so that a sample has no gradient of its own; "
                'use method="batch" or another normalisation'
            )


class ImportanceSum:
    """Importance gathered batch by batch: sums over samples, and how many there were.

    `sums` maps names to tensors like the parameters, float64 for float64 parameters, else float32.
    `objective_sum` is the sum of |objective| over the samples.
    """

    def __init__(
        self,
        method: Method = "exact",
        objective: Objective = "l2",
        forward: Forward | None = None,
        exclude: Sequence[str] = (),
        max_outputs: int = 64,
        backend: Backend = "auto",
    ) -> None:
        """See estimate_importance; backend: see kernels.native.serves."""
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {tuple(METHODS)}")
        objectives.check(objective)
        self.method, self.objective, self.forward = method, objective, forward or _default_forward
        self.exclude, self.max_outputs, self.backend = tuple(exclude), max_outputs, backend
        self._estimator = METHODS[method](backend)
        self._values: Values = partial(
            objectives.values, objective=objective, max_outputs=max_outputs
        )
        self.sums: dict[str, Tensor] = {}
        self.samples = 0
        self.objective_sum = 0.0

    def empty(self) -> ImportanceSum:
        """A new sum of nothing, with the same settings."""
        other = ImportanceSum(
            self.method, self.objective, self.forward, self.exclude, self.max_outputs, self.backend
        )
        other._estimator = self._estimator  # and with what it found out about the model
        return other

    def with_totals(self, totals: SampleSums) -> ImportanceSum:
        """A sum of the same settings that has come to these totals."""
        other = self.empty()
        other.sums, other.samples, other.objective_sum = totals
        return other

    @property
    def totals(self) -> SampleSums:
        """What the sum has come to."""
        return SampleSums(self.sums, self.samples, self.objective_sum)

    def add(self, model: nn.Module | ModelView, batch: Any) -> None:
        """Add a batch: every sample counts the same, whatever the size of its batch.

        Every parameter that requires a gradient now takes part. The model's modes, gradients and
        statistics and the random state are left as they were; on an error, so are the sums.
        """
        view = model if isinstance(model, ModelView) else ModelView(model, self.exclude)
        model = view.model
        theta = {name: p for name, p in view.parameters().items() if p.requires_grad}
        for name, p in theta.items():
            check_supported(name, p)
            old = self.sums.get(name)
            if old is not None and old.shape != p.shape:
                raise ValueError(
                    f"parameter {name!r}: got shape {tuple(p.shape)}, expected {tuple(old.shape)} as "
                    "in the batches before; consolidate before a parameter changes"
                )
        samples = batch_of.size(batch)
        if samples == 0 or not theta:
            self.samples += samples
            return
        if self.method == "exact":
            _refuse_interacting(model)
        device = next(iter(theta.values())).device
        evaluate = Evaluate(model, self.forward, self._values)
        with self._passing(model, device):
            found, objective = self._estimator(evaluate, batch_of.to(batch, device), samples, theta)
        added = float(objective.abs().sum(dtype=torch.float64))
        if not math.isfinite(added):
            bad = [name for name, t in found.items() if not t.isfinite().all()]
            what = f"importance of {bad[0]!r}: got values" if bad else "objective: got a sum"
            raise ValueError(
                f"{what} from a batch with objective {added}, expected finite ones; where training "
                'diverged, a smaller lam or attach(optimizer, mode="proximal") helps'
            )
        # Nothing below can fail: no error leaves half a batch in the sums.
        known = {name: t for name, t in found.items() if name in self.sums}
        accumulate(self.sums, known, False, self.backend)
        self.sums = {**found, **self.sums}
        self.samples += samples
        self.objective_sum += added

    def _passing(self, model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
        """In which state the model runs."""
        return evaluating(model, device)

    def tensors(self) -> dict[str, Tensor]:
        """The sums and counts as named tensors."""
        found = {f"pending.{name}": t for name, t in self.sums.items()}
        found["pending_samples"] = torch.tensor(self.samples)
        found["pending_objective"] = torch.tensor(self.objective_sum, dtype=torch.float64)
        return found

    def load_tensors(self, found: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, for these parameters."""
        try:
            samples, objective = int(found["pending_samples"]), float(found["pending_objective"])
        except KeyError as error:
            raise KeyError(f"state: got no {error}, expected one") from error
        if samples < 0 or not 0 <= objective < float("inf"):
            raise ValueError(
                f"state: got pending_samples {samples} and pending_objective {objective}, expected "
                "finite numbers from 0 up"
            )
        sums = {}
        for key, t in found.items():
            name = key.removeprefix("pending.")
            if name != key:
                if name not in theta or theta[name].shape != t.shape:
                    raise KeyError(
                        f"state, pending importance of {name!r}: got shape {tuple(t.shape)}, expected "
                        "that of a parameter of the model"
                    )
                if not torch.isfinite(t).all() or (t < 0).any():
                    raise ValueError(
                        f"state, pending importance of {name!r}: got NaN, Inf or negative values, "
                        "expected finite ones"
                    )
                sums[name] = t.to(theta[name].device, compute_dtype(theta[name].dtype), copy=True)
        self.sums, self.samples, self.objective_sum = sums, samples, objective

    def refuse_rounding_noise(self, theta: Mapping[str, Tensor]) -> None:
        """An output of constant norm has no sensitivity: what is left of it is rounding.

        sum_i Omega_i |theta_i| is at least of the order of the objective for a network that is homogeneous in
        its parameters (Euler), and of the order of its rounding error for an output of constant norm.
        """
        self._refuse_empty()
        objective = self.objective_sum / self.samples
        change = sum(
            float((total.double() * (theta[name].detach().double().abs() + 0.01)).sum())
            for name, total in self.sums.items()
        )
        change /= self.samples
        wide = all(total.dtype == torch.float64 for total in self.sums.values())
        level = torch.finfo(torch.float64 if wide else torch.float32).eps ** 0.5
        # What is not finite is refused by name later.
        if change <= level * objective < float("inf"):
            raise ValueError(
                f"importance: got a relative sensitivity of {change / max(objective, 1e-300):.3g}, expected "
                f"more than {level:.3g}, the level of rounding; the usual cause is an output of constant "
                "norm, such as a normalised embedding: choose another objective"
            )

    def mean(self) -> dict[str, Tensor]:
        """Omega = sum / samples, by name; no sample at all is an error."""
        self._refuse_empty()
        return {name: total / self.samples for name, total in self.sums.items()}

    def into_mean(self) -> dict[str, Tensor]:
        """The mean, in the memory of the sums, of which nothing is left."""
        self._refuse_empty()
        omega, samples = self.sums, self.samples
        self.sums, self.samples, self.objective_sum = {}, 0, 0.0
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
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"batches: got a single {type(batches).__name__}, expected an iterable of batches; "
            "wrap it in a list"
        )
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: got {max_samples}, expected at least 1")
    view = model if isinstance(model, ModelView) else ModelView(model, total.exclude)
    start = total.samples
    # A loader draws its order while it is read.
    with torch.random.fork_rng(devices=[]):
        for batch in _shown(batches, progress):
            left = None if max_samples is None else max_samples - (total.samples - start)
            if left is not None and left < batch_of.size(batch):
                batch = batch_of.part(batch, 0, left)
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
    """The mean over the samples of these batches, by parameter name; under fully_shard all ranks call it."""
    with whole_model(model, total.exclude) as view:
        gather(total, view, batches, max_samples, progress)
    return total.into_mean()


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm import tqdm

    shown: Iterable[Any] = tqdm(batches, desc="importance", unit="batch")
    return shown
