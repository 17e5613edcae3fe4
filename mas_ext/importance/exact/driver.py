"""`exact`: the sum over samples of abs(per-sample gradient), as MAS defines it, at the speed of a batch.

The uses of parameters that have a rule are followed through one forward and backward pass (tracing.py). How the
samples lie in a model's tensors is found out, never guessed: on the first batch, and whenever a model
takes another path, a few samples are run alone too. Where a parameter's sums then differ, another layout
is tried, and if none is right it takes the generic way, which runs samples alone (single_samples.py,
fallback.py). That all samples lie so is then proven, for all batches or, where data decide, for every single
one (layout_proof.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.exact import layout_proof as proof
from mas_ext.importance.exact.fallback import Generic
from mas_ext.importance.exact.layers import Layout
from mas_ext.importance.exact.rules import RULES
from mas_ext.importance.exact.tracing import Path, Tape
from mas_ext.importance.single_samples import (
    Evaluate,
    Precision,
    Totals,
    differ,
    lowest_precision,
    one_by_one,
    zeros,
)
from mas_ext.kernels import backends
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.warning import warn

# Samples that are run alone to check: an odd number, so that it divides few other sizes by chance.
CHECKED = 3
NO_RULE = "the model uses it in a way for which there is no rule"
LAYOUTS: tuple[Layout, ...] = ("leading", "inner", "trailing", "none")
# What a sum that should be zero may come to, in units of rounding of the largest tensor's sum.
NOISE = 32

# Models whose user was told which parameters take the generic way.
_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


# What a proof holds for: the functions called, the uses of parameters, the number of samples, and which
# sizes in the batch are 1: along such a dimension, rows in several orders are the same.
Signature = tuple[tuple[str, ...], frozenset[Path], int, tuple[tuple[bool, ...], ...]]


class Run(NamedTuple):
    """One forward and backward pass of a batch."""

    output: Tensor
    values: Tensor
    totals: Totals
    signature: Signature
    paths: set[Path]
    # Uses that were not proven before, and have a gradient.
    active: set[tuple[Path, int]]
    # Parameters that the pass can't answer for.
    misfits: set[str]
    # Parameters used on rows of other samples than they are taken for.
    strangers: set[str]
    # The lowest one that the model computed in.
    precision: Precision


class Exact:
    """sum over samples of abs(d objective / d theta), or of its square (Aljundi et al. 2018, equation 2).

    Remembers what it found out about a model.
    """

    def __init__(self, backend: Backend, square: bool = False) -> None:
        """backend: see kernels.backends.serves; square: for the Fisher information."""
        self.backend, self.square = backend, square
        self._layouts: dict[str, Layout] = {}
        # Parameters that take the generic way.
        self.generic: set[str] = set()
        self._checked: set[Path] = set()
        self._functions: set[tuple[str, ...]] = set()
        # Uses whose gradient was not zero when they were checked: a wrong one would have shown.
        self._proven: set[tuple[Path, int]] = set()
        # Whether data may decide where the samples are, so that every batch needs a proof of its own.
        self._open: dict[Signature, bool] = {}
        self._alone = Generic(backend, square)

    def __call__(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        if samples == 1:
            totals, _, values = one_by_one(evaluate, batch, 1, theta, self.square, self.backend)
            return totals, values
        alone: list[tuple[int, Tensor]] = []
        checked = 0
        run = self._run(evaluate, batch, samples, theta) if self._functions else None
        while True:
            known = self._layouts.copy(), self.generic.copy()
            if run is None or (checked < samples and self._to_be_checked(run, new=not alone)):
                stop = min(checked + CHECKED, samples)
                start = max(0, min(checked, stop - 2))  # one sample alone would agree with anything
                few = batches.part(batch, start, stop)
                alone.append((start, self.learn(evaluate, few, theta)))
                checked = stop
            elif run.strangers:
                self._condemn(evaluate.model, run.strangers)
            else:
                unknown = {name for name, _ in run.paths - self._checked}
                self._condemn(evaluate.model, unknown | run.misfits)
                if known == (self._layouts, self.generic):
                    break
            if run is None or known != (self._layouts, self.generic):
                run = self._run(evaluate, batch, samples, theta)
        for start, output in alone:
            together = run.output[start : start + len(output)]
            if theta.keys() - self.generic and differ(together, output, run.precision):
                raise _interacting(output, together)
        self._functions.add(run.signature[0])
        generic = {name: p for name, p in theta.items() if name in self.generic}
        others = self._alone(evaluate, batch, samples, generic) if generic else {}
        unused = theta.keys() - run.totals.keys() - generic.keys()
        return {**zeros({name: theta[name] for name in unused}), **run.totals, **others}, run.values

    def _to_be_checked(self, run: Run, new: bool) -> bool:
        """Whether the model took another path, or a use has its first gradient."""
        if new and not (run.signature[0] in self._functions and run.paths <= self._checked):
            return True
        return not run.active <= self._proven

    def layouts(self, theta: Mapping[str, Tensor]) -> Mapping[str, Layout]:
        """How the samples lie where each parameter is used, as far as is known."""
        for name in theta:
            self._layouts.setdefault(name, LAYOUTS[0])
        return self._layouts

    def knows(self, tape: Tape, batch: Any) -> bool:
        """Whether what was found out holds for a pass without looking at it."""
        return tape.paths() <= self._checked and not self._open.get(_signature(tape, batch), True)

    def learn(self, evaluate: Evaluate, few: Any, theta: Mapping[str, Tensor]) -> Tensor:
        """Compare a few samples with themselves alone, to find out how the model uses its parameters.

        Returns their outputs alone.
        """
        samples = batches.size(few)
        passed = self._forward(evaluate, few, samples, theta)
        # Before the way back, so that its sums and the loop's gradients are not there at the same time.
        expected, output, _ = one_by_one(evaluate, few, samples, theta, self.square, self.backend)
        largest = max(float(total.norm()) for total in expected.values())
        while True:
            run = self._backward(*passed, few=True)
            if differ(run.output, output, run.precision):
                _, again, _ = one_by_one(evaluate, few, samples, {}, self.square, self.backend)
                if not differ(again, output, run.precision):
                    raise _interacting(output, run.output)
                self._condemn(evaluate.model, {*theta}, "the model draws random numbers")
            noise = NOISE * run.precision.eps * largest
            wrong = {
                name
                for name in theta.keys() - self.generic
                if name in run.misfits | run.strangers
                or differ(run.totals.get(name), expected[name], run.precision, noise)
            }
            last = {name for name in wrong if self._layouts[name] == LAYOUTS[-1]}
            self._condemn(evaluate.model, last)
            for name in wrong - last:
                self._layouts[name] = LAYOUTS[LAYOUTS.index(self._layouts[name]) + 1]
            if not wrong:
                break
            passed = self._forward(evaluate, few, samples, theta)
        self._functions.add(run.signature[0])
        self._checked |= run.paths
        self._proven |= run.active
        return output

    def _run(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> Run:
        """A pass of a batch of several samples, whose rows are proven to be theirs."""
        tape, output, values, signature = self._forward(evaluate, batch, samples, theta)
        if tape.theta and signature not in self._open:
            precision = _precision(tape, output)
            del tape, output, values  # one graph at a time
            tape = self._tape(samples, theta)
            self._open[signature] = not proof.keeps_rows(evaluate, batch, tape, precision)
            tape, output, values, signature = self._forward(evaluate, batch, samples, theta)
        return self._backward(tape, output, values, signature)

    def _tape(self, samples: int, theta: Mapping[str, Tensor]) -> Tape:
        direct = {name: p for name, p in theta.items() if name not in self.generic}
        native_serves = backends.serves(next(iter(theta.values())).device, self.backend)
        layouts = self.layouts(direct)
        return Tape(direct, layouts, samples, RULES, self.square, native_serves)

    def _forward(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> tuple[Tape, Tensor, Tensor, Signature]:
        tape = self._tape(samples, theta)
        with tape:
            output, values = evaluate(batch, samples)
        return tape, output, values, _signature(tape, batch)

    def _backward(
        self, tape: Tape, output: Tensor, values: Tensor, signature: Signature, few: bool = False
    ) -> Run:
        paths = {path[0]: path for path in tape.paths()}
        uses = {(path, i) for path in paths.values() for i in range(len(path[1]))}
        tape.watched = {(path[0], i) for path, i in uses - self._proven}
        precision = _precision(tape, output)
        strangers = set()
        if tape.theta and values.requires_grad and (few or self._open.get(signature)):
            strangers = proof.strangers(tape, values, precision)
        totals = tape.backward(values) if tape.theta else {}
        return Run(
            output.detach(),
            values.detach(),
            totals,
            signature,
            {*paths.values()},
            {(paths[name], i) for name, i in tape.active},
            tape.misfits,
            strangers,
            precision,
        )

    def _condemn(self, model: nn.Module, names: set[str], reason: str = NO_RULE) -> None:
        """Send parameters the generic way, and say so once."""
        self.generic |= names
        told = _told.setdefault(model, set())
        new = sorted(names - told)
        if new:
            told |= names
            shown = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
            warn(
                f"importance of {shown}: takes the generic way, exact but slower, since {reason}",
                UserWarning,
            )


def _precision(tape: Tape, output: Tensor) -> Precision:
    dtypes = {output.dtype, *tape.dtypes, *(p.dtype for p in tape.theta.values())}
    return lowest_precision(dtypes, output.is_cuda)


def _signature(tape: Tape, batch: Any) -> Signature:
    ones: list[tuple[bool, ...]] = []

    def note(t: Tensor) -> Tensor:
        ones.append(tuple(size == 1 for size in t.shape))
        return t

    batches.mapped(batch, note)
    return tuple(tape.functions), frozenset(tape.paths()), tape.samples, tuple(ones)


def _interacting(alone: Tensor, together: Tensor) -> ValueError:
    off = float((together - alone).abs().max())
    return ValueError(
        f"model: samples interact: an output changes by up to {off:.2g} when its sample is run alone, so "
        'that a sample has no gradient of its own; use method="batch", or another normalisation'
    )
