"""Tasks that nobody announces: the penalty is consolidated where the loss comes to rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext._arguments import check_count, check_factor
from mas_ext.failures import Diverged
from mas_ext.importance import batches as batch_of
from mas_ext.parameters.restoring import restoring
from mas_ext.penalty import FusedMASPenalty


@dataclass(frozen=True)
class Plateau:
    """Where the loss had come to rest, and that the penalty was consolidated.

    step: the number of steps when it was. learned: the number of steps when the parameters were those that
    became the anchor. mean, variance: of the loss over the window up to there. samples: how many importance
    was measured on. reason: in words.
    """

    step: int
    learned: int
    mean: float
    variance: float
    samples: int
    reason: str


class TaskFree:
    """Consolidates a penalty by itself, on a stream of tasks whose boundaries nobody tells.

        watcher = TaskFree(penalty)
        for x, y in stream:
            losses = F.cross_entropy(model(x), y, reduction="none")
            ...  # backward and optimizer step, as ever
            if plateau := watcher.step(losses, x):
                print(plateau.reason)

    Task-free continual learning (Aljundi, Kelchtermans and Tuytelaars, CVPR 2019). From the paper: the network
    has learned something where the loss is on a plateau, by its mean and standard deviation over a window of
    steps; importance is measured there, on a small buffer of hard samples; and a new plateau counts only after
    a peak, where the mean of the window is above that of the last plateau by more than its standard deviation.

    Ours is what a plateau is, and when it is consolidated. The paper has two thresholds in units of the loss.
    Here a plateau begins where the window's older and newer half have means that agree,

        |older - newer| <= tolerance max(standard deviation of the window, (highest - mean) / 100),

    and a quarter of the peak is gone, highest - mean >= (highest - mean of the last plateau) / 4, where highest
    is the window's highest mean in the peak. So a loss in other units has the same plateaus. From there on the
    mean of the plateau follows the loss down; its standard deviation stays that of its first window.

    The paper consolidates where a plateau begins. What is learned on it would then be held badly. Here the
    parameters of the window with the lowest mean are kept together with its hard samples, and consolidated when
    the next peak shows that something new has begun: what is learned last is in `state_dict()`, not yet in the
    penalty. Hard samples are the hardest of each of the window's batches by the loss that they had then: of a
    whole stream, those that the network met first would stay hardest. They are not trained on again, as they
    are in the paper. Importance is merged as the penalty is told, where the paper takes a running average.

    Beside the penalty it takes the memory of all parameters that are trained, and of the samples. A loss with
    correlated noise, as along one trajectory, has more peaks than tasks unless the window is many times longer
    than the correlation. Under torch.distributed, every rank gives the mean of all ranks' losses, so that all
    of them find the same peaks.

    Args:
        penalty: what is consolidated.
        window: steps over which the loss is looked at, at least 4, and well below the length of a task.
        samples: about how many hard ones are kept: as many of every batch in the window, rounded up.
        tolerance: how much both halves of the window may differ on a plateau, in standard deviations.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        penalty: FusedMASPenalty,
        window: int = 50,
        samples: int = 250,
        tolerance: float = 0.25,
    ) -> None:
        check_count(window, "window", least=4)
        check_count(samples, "samples")
        check_factor(tolerance, "tolerance")
        self.penalty = penalty
        self.window, self.samples, self.tolerance = window, samples, tolerance
        self._known = _known(_Watched())

    @property
    def _watched(self) -> _Watched:
        """What is known: where a consolidation was interrupted, what goes with what the penalty holds."""
        before, after, tasks = self._known
        return after if self.penalty.num_tasks > tasks else before

    @property
    def plateaus(self) -> tuple[Plateau, ...]:
        """All plateaus that were consolidated."""
        return self._watched.plateaus

    def step(self, loss: float | Tensor | Sequence[float], batch: Any) -> Plateau | None:
        """Take note of a step of training; where a peak begins, consolidate the plateau before it.

        Call it after the optimizer's step. A loss on a GPU is read, which waits for it once.

        Args:
            loss: without the penalty: its mean over the batch, or one number for each sample, by which hard
                samples are chosen. With the mean alone all samples count as equally hard, and the first ones
                are kept.
            batch: as an item of `batches` in FusedMASPenalty.consolidate; what is kept of it is copied.

        Returns:
            The plateau that was consolidated, None where none was.

        Raises:
            Diverged: a loss that is not finite.
            ValueError, TypeError: a loss of another shape; a batch that is none; what consolidate raises.
                After any error all is as before the call.
        """
        count = batch_of.size(batch)
        losses = _numbers(loss, count)
        hardest = sorted(range(count), key=lambda i: -losses[i % len(losses)])
        hard = batch_of.at(batch, hardest[: -(-self.samples // self.window)])
        before = self._watched
        curve = self._follow(before.curve, math.fsum(losses) / len(losses))
        buffer = (*before.buffer, hard)[-self.window :]
        now = replace(before, steps=before.steps + 1, curve=curve, buffer=buffer)
        if curve.highest is None:
            now = replace(now, kept=self._kept(now))
        elif before.kept is not None:
            found = _found(before.kept, now)
            now = replace(now, kept=None, plateaus=(*now.plateaus, found))
            self._known = (before, now, self.penalty.num_tasks)
            try:
                self._consolidate(before.kept)
            finally:
                self._known = _known(self._watched)
            return found
        self._known = _known(now)
        return None

    def _follow(self, curve: _Curve, loss: float) -> _Curve:
        """The curve after one more loss."""
        losses = (*curve.losses, loss)[-self.window :]
        curve = replace(curve, losses=losses)
        if len(losses) < self.window:
            return curve
        mean, std = _moments(losses)
        if curve.highest is None:
            if mean > curve.low + curve.noise:
                return replace(curve, highest=mean)
            return replace(curve, low=min(curve.low, mean))
        highest, half = max(curve.highest, mean), len(losses) // 2
        apart = abs(_moments(losses[:half])[0] - _moments(losses[half:])[0])
        if (
            apart <= self.tolerance * max(std, (highest - mean) / 100)
            and highest - mean >= (highest - curve.low) / 4
        ):
            return replace(curve, highest=None, low=mean, noise=std)
        return replace(curve, highest=highest)

    def _kept(self, now: _Watched) -> _Kept:
        """What is kept of a plateau: where it begins, then of each lower window without steps of the last."""
        mean, std = _moments(now.curve.losses)
        kept = now.kept
        if kept is not None and (now.steps < kept.step + self.window or mean >= kept.mean):
            return kept
        values = {name: t.detach().clone() for name, t in _trained(self.penalty.model)}
        return _Kept(now.steps, mean, std**2, values, now.buffer)

    def _consolidate(self, kept: _Kept) -> None:
        """Consolidate the penalty with the parameters and samples that were kept; the model stays as it is."""
        changed = [
            (t, kept.values[name], t.detach().clone())
            for name, t in _trained(self.penalty.model)
            if name in kept.values and kept.values[name].shape == t.shape
        ]

        def put_back() -> None:
            for t, _, own in changed:
                t.detach().copy_(own)

        with restoring(put_back):
            for t, old, _ in changed:
                t.detach().copy_(old)
            self.penalty.consolidate(kept.buffer)

    def state_dict(self) -> dict[str, Any]:
        """All that step() knows, with the samples and parameters that are kept; not the penalty's own state."""
        watched = self._watched
        kept = watched.kept and {**vars(watched.kept), "buffer": list(watched.kept.buffer)}
        return {
            "settings": self._settings(),
            "steps": watched.steps,
            "curve": vars(watched.curve).copy(),
            "buffer": list(watched.buffer),
            "kept": kept,
            "plateaus": [astuple(each) for each in watched.plateaus],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state_dict(), from where all goes on to the same bits; nothing changes on an error.

        Raises:
            ValueError: no such state, or one with other settings.
        """
        expected = {"settings", "steps", "curve", "buffer", "kept", "plateaus"}
        if state.keys() != expected:
            raise ValueError(f"state: got {sorted(state)}, expected {sorted(expected)}")
        if state["settings"] != self._settings():
            raise ValueError(
                f"state: got the settings {state['settings']}, expected {self._settings()}"
            )
        kept = state["kept"]
        self._known = _known(
            _Watched(
                state["steps"],
                _Curve(**{**state["curve"], "losses": tuple(state["curve"]["losses"])}),
                tuple(state["buffer"]),
                kept and _Kept(**{**kept, "buffer": tuple(kept["buffer"])}),
                tuple(Plateau(*each) for each in state["plateaus"]),
            )
        )

    def _settings(self) -> dict[str, float]:
        return {"window": self.window, "samples": self.samples, "tolerance": self.tolerance}


@dataclass(frozen=True)
class _Curve:
    """What is known of the loss.

    losses: the last ones. highest: the window's highest mean in a peak, None on a plateau. low, noise: the
    lowest mean on the last plateau, infinite before the first one, and the standard deviation where it began.
    """

    losses: tuple[float, ...] = ()
    highest: float | None = -math.inf
    low: float = math.inf
    noise: float = 0.0


@dataclass(frozen=True)
class _Kept:
    """The network on a plateau: when, mean and variance of the loss, values by name, hard samples."""

    step: int
    mean: float
    variance: float
    values: dict[str, Tensor]
    buffer: tuple[Any, ...]


@dataclass(frozen=True)
class _Watched:
    """All that changes with a step, replaced as one, so that an error leaves the old one whole."""

    steps: int = 0
    curve: _Curve = _Curve()
    buffer: tuple[Any, ...] = ()
    kept: _Kept | None = None
    plateaus: tuple[Plateau, ...] = ()


# What is known as long as the penalty has so many tasks, and what once it has more.
_Known = tuple[_Watched, _Watched, int]


def _known(watched: _Watched) -> _Known:
    return watched, watched, 0


def _found(kept: _Kept, now: _Watched) -> Plateau:
    """A plateau that ends now."""
    reason = (
        f"the loss rose to {now.curve.highest:.3g} after a plateau at {kept.mean:.3g}, "
        f"standard deviation {kept.variance**0.5:.2g}"
    )
    samples = sum(map(batch_of.size, kept.buffer))
    return Plateau(now.steps, kept.step, kept.mean, kept.variance, samples, reason)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are trained, and buffers, by name."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from model.named_buffers()


def _numbers(loss: float | Tensor | Sequence[float], count: int) -> list[float]:
    """The mean loss, or one number for each of so many samples."""
    try:
        found = torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
    except OverflowError as error:
        raise Diverged(
            f"loss: got a number beyond {sys.float_info.max:g}, expected a finite one"
        ) from error
    if found.shape not in ((), (count,)) or not count:
        raise ValueError(
            f"loss: got shape {tuple(found.shape)} for {count} samples, expected one number, or one for each"
        )
    losses: list[float] = found.detach().reshape(-1).tolist()
    if not all(map(math.isfinite, losses)):
        raise Diverged(
            f"loss: got {next(x for x in losses if not math.isfinite(x))}, expected a finite one"
        )
    return losses


def _moments(losses: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = math.fsum(losses) / len(losses)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / len(losses))
