"""`exact`: the sum over samples of abs(per-sample gradient), as MAS defines it, at the speed of a batch.

The uses of parameters that have a rule are followed through one forward and backward pass (tape.py). How the
samples lie in a model's tensors is found out, never guessed: on the first batch, and whenever a model
takes another path, a few samples are run alone too. Where a parameter's sums then differ, another layout
is tried, and if none is right it takes the generic way, which runs samples alone (alone.py, generic.py).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.importance import batches
from mas_ext.importance.alone import TOLERANCE, Evaluate, Totals, differ, one_by_one, zeros
from mas_ext.importance.functions import RULES
from mas_ext.importance.generic import Generic
from mas_ext.importance.layers import Layout
from mas_ext.importance.tape import Mention, Tape
from mas_ext.kernels import native
from mas_ext.kernels.native import Backend

# Samples that are run alone to check: an odd number, so that it divides few other sizes by chance.
CHECKED = 3
NO_RULE = "the model uses it in a way for which there is no rule"
LAYOUTS: tuple[Layout, ...] = ("leading", "second", "none")


# By parameter: where it is used, how the samples lie there, and how often. A check is valid for these.
Path = set[tuple[str, frozenset[tuple[Mention, int]]]]


class Run(NamedTuple):
    """One forward and backward pass of a batch."""

    output: Tensor
    values: Tensor
    totals: Totals
    path: Path
    # Parameters that the pass can't answer for.
    misfits: set[str]
    # The lowest one that the model computed in.
    precision: torch.dtype


class Exact:
    """sum over samples of abs(d objective / d theta), or of its square (Aljundi et al. 2018, equation 2).

    Remembers what it found out about a model.
    """

    def __init__(self, backend: Backend, square: bool = False) -> None:
        """backend: see kernels.native.serves; square: for the Fisher information."""
        self.backend, self.square = backend, square
        self._layouts: dict[str, Layout] = {}
        self._generic: set[str] = set()
        self._checked: Path = set()
        # No sample with a gradient was seen alone yet: a wrong sum would not have shown.
        self._unproven: set[str] = set()
        self._proven: set[str] = set()
        self._alone = Generic(backend, square)

    def __call__(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        if samples == 1:
            totals, _, values = one_by_one(evaluate, batch, 1, theta, self.square, self.backend)
            return totals, values
        for name in theta:
            self._layouts.setdefault(name, "leading")
        alone: list[tuple[int, Tensor]] = []
        checked = 0
        run = self._run(evaluate, batch, samples, theta) if self._checked else None
        while True:
            known = self._layouts.copy(), self._generic.copy()
            if run is None or (checked < samples and self._to_be_checked(run, new=not alone)):
                stop = min(checked + CHECKED, samples)
                start = max(0, min(checked, stop - 2))  # one sample alone would agree with anything
                few = batches.part(batch, start, stop)
                alone.append((start, self._check(evaluate, few, stop - start, theta)))
                checked = stop
            else:
                unknown = {name for name, _ in run.path - self._checked}
                self._condemn(unknown | run.misfits)
                if known == (self._layouts, self._generic):
                    break
            if run is None or known != (self._layouts, self._generic):
                run = self._run(evaluate, batch, samples, theta)
        for start, output in alone:
            together = run.output[start : start + len(output)]
            if theta.keys() - self._generic and differ(together, output, run.precision):
                raise _interacting(output, together)
        generic = {name: p for name, p in theta.items() if name in self._generic}
        others = self._alone(evaluate, batch, samples, generic) if generic else {}
        unused = theta.keys() - run.totals.keys() - generic.keys()
        return {**zeros({name: theta[name] for name in unused}), **run.totals, **others}, run.values

    def _to_be_checked(self, run: Run, new: bool) -> bool:
        """Whether the model took another path, or a parameter has its first gradient."""
        if new and not run.path <= self._checked:
            return True
        return any(bool(run.totals[name].any()) for name in self._unproven & run.totals.keys())

    def _check(
        self, evaluate: Evaluate, few: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> Tensor:
        """Compare a few samples with themselves alone; learn how the model uses its parameters."""
        run = self._run(evaluate, few, samples, theta)
        expected, output, _ = one_by_one(evaluate, few, samples, theta, self.square, self.backend)
        while True:
            if differ(run.output, output, run.precision):
                _, again, _ = one_by_one(evaluate, few, samples, {}, self.square, self.backend)
                if not differ(again, output, run.precision):
                    raise _interacting(output, run.output)
                self._condemn({*theta}, "the model draws random numbers")
            wrong = {
                name
                for name in theta.keys() - self._generic
                if name in run.misfits
                or differ(run.totals.get(name), expected[name], run.precision)
            }
            last = {name for name in wrong if self._layouts[name] == LAYOUTS[-1]}
            self._condemn(last)
            for name in wrong - last:
                self._layouts[name] = LAYOUTS[LAYOUTS.index(self._layouts[name]) + 1]
            if not wrong:
                break
            run = self._run(evaluate, few, samples, theta)
        self._checked |= run.path
        seen = {name for name, total in expected.items() if total.any()}
        self._unproven = (self._unproven | theta.keys()) - seen - self._proven - self._generic
        self._proven |= seen
        return output

    def _run(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> Run:
        direct = {name: p for name, p in theta.items() if name not in self._generic}
        device = next(iter(theta.values())).device
        tape = Tape(
            direct, self._layouts, samples, RULES, self.square, native.serves(device, self.backend)
        )
        with tape:
            output, values = evaluate(batch, samples)
        totals = tape.backward(values) if direct else {}
        dtypes = {output.dtype, *tape.dtypes, *(p.dtype for p in direct.values())}
        return Run(
            output.detach(),
            values.detach(),
            totals,
            _path(tape.mentions),
            tape.misfits,
            max(dtypes, key=TOLERANCE.__getitem__),
        )

    def _condemn(self, names: set[str], reason: str = NO_RULE) -> None:
        """Send parameters the generic way, and say so once."""
        new = sorted(names - self._generic)
        if new:
            self._generic |= names
            shown = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
            warnings.warn(
                f"importance of {shown}: takes the generic way, exact but slower, since {reason}",
                UserWarning,
                stacklevel=2,
            )


def _path(mentions: Iterable[Mention]) -> Path:
    by_name: dict[str, Counter[Mention]] = {}
    for mention in mentions:
        by_name.setdefault(mention.name, Counter())[mention] += 1
    return {(name, frozenset(uses.items())) for name, uses in by_name.items()}


def _interacting(alone: Tensor, together: Tensor) -> ValueError:
    off = float((together - alone).abs().max())
    return ValueError(
        f"model: samples interact: an output changes by up to {off:.2g} when its sample is run alone, so "
        'that a sample has no gradient of its own; use method="batch", or another normalisation'
    )
