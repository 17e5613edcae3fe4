"""`exact`: the sum over samples of abs(per-sample gradient), as MAS defines it, at the speed of a batch.

The uses of parameters that have a rule are followed through one forward and backward pass (tracing.py). How the
samples lie in a model's tensors is found out, never guessed: on the first batch, and whenever a model takes
another path, a few samples are run alone too. Where a parameter's sums then differ, another layout is tried,
and if none is right the parameter goes to the fallback, which runs samples alone (fallback.py). That all
samples lie so is then proven, for all batches or, where data decide, for every single one (layout_proof.py).
README.md walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.fallback import (
    Fallback,
    has_hooks,
    one_by_one,
    refuse_accumulation_hooks,
)
from mas_ext.importance.exact.layout_proof import keeps_rows, layout_violations
from mas_ext.importance.exact.precision import Precision, differ, lowest_precision
from mas_ext.importance.exact.rules import RULES
from mas_ext.importance.exact.sample_layout import LAYOUT_KINDS, LayoutKind
from mas_ext.importance.exact.tracing import Tape, UsesOf
from mas_ext.importance.gradients import Summation, Totals, zeros
from mas_ext.kernels import backends
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.warning import warn

# Samples that are run alone to check: an odd number, so that it divides few other sizes by chance.
_CHECKED = 3
_NO_RULE = "no rule fits how the model uses it"
_RANDOM = "the model draws random numbers"
_HOOKS = "its gradient passes through hooks of its own"
# What a sum that should be zero may come to, in units of rounding of the largest tensor's sum.
_NOISE = 32

# The parameters that a model's user was warned of. Python's own memory of warnings, one a line, is lost with
# every catch_warnings().
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

# What a proof holds for: the functions called, the uses of parameters, the number of samples, and which
# sizes in the batch are 1: along such a dimension, rows in several orders are the same.
Signature = tuple[tuple[str, ...], frozenset[UsesOf], int, tuple[tuple[bool, ...], ...]]


class Run(NamedTuple):
    """One forward and backward pass of a batch."""

    tape: Tape
    output: Tensor
    values: Tensor
    totals: Totals
    signature: Signature
    # Parameters used on rows of other samples than they are taken for.
    violations: set[str]
    # The lowest one that the model computed in.
    precision: Precision


class Exact:
    """sum over samples of abs(d objective / d theta), or of its square (Aljundi et al. 2018, equation 2).

    Remembers what it found out about a model.

    Args:
        backend: "auto", "native" or "reference".
        square: whether squares are summed, for the Fisher information.
    """

    def __init__(self, backend: Backend, square: bool = False) -> None:
        self._how = Summation(backend, square)
        self._layouts: dict[str, LayoutKind] = {}
        # Parameters that go to the fallback, and why.
        self.fallback: dict[str, str] = {}
        self._checked: set[UsesOf] = set()
        self._functions: set[tuple[str, ...]] = set()
        # Uses whose gradient was not zero when they were checked: a wrong one would have shown.
        self._proven: set[tuple[UsesOf, int]] = set()
        # Whether data may decide where the samples are, so that every batch needs a proof of its own.
        self._open: dict[Signature, bool] = {}
        self._single_samples = Fallback(self._how)

    def __call__(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        _refuse_batch_statistics(evaluate.model)
        refuse_accumulation_hooks(theta)
        hooked = {name for name, p in theta.items() if has_hooks(p)}
        self._send_to_fallback(evaluate.model, hooked, _HOOKS)
        samples = batches.size(batch)
        if samples == 1:
            totals, _, values = one_by_one(evaluate, batch, theta, self._how)
            return totals, values
        outputs: list[tuple[int, Tensor]] = []  # of samples run alone, from where on
        checked = 0
        run = self._run(evaluate, batch, theta) if self._functions else None
        while True:
            known = self._layouts.copy(), self.fallback.copy()
            if run is None or (checked < samples and self._to_be_checked(run, new=not outputs)):
                stop = min(checked + _CHECKED, samples)
                start = max(0, min(checked, stop - 2))  # one sample alone would agree with anything
                few = batches.between(batch, start, stop)
                outputs.append((start, self.learn(evaluate, few, theta)))
                checked = stop
            elif run.violations:
                self._send_to_fallback(evaluate.model, run.violations)
            else:
                unknown = {name for name, _ in run.tape.uses() - self._checked}
                self._send_to_fallback(evaluate.model, unknown | run.tape.unhandled)
                if known == (self._layouts, self.fallback):
                    break
            if run is None or known != (self._layouts, self.fallback):
                run = self._run(evaluate, batch, theta)
        for start, output in outputs:
            together = run.output[start : start + len(output)]
            if theta.keys() - self.fallback and differ(together, output, run.precision):
                raise _interacting(output, together)
        self._functions.add(run.signature[0])
        slow = {name: p for name, p in theta.items() if name in self.fallback}
        drawn = _RANDOM in self.fallback.values()
        others = (
            self._single_samples(
                evaluate, batch, slow, None if drawn else run.output, run.precision
            )
            if slow
            else {}
        )
        unused = theta.keys() - run.totals.keys() - slow.keys()
        return {**zeros({name: theta[name] for name in unused}), **run.totals, **others}, run.values

    def _to_be_checked(self, run: Run, new: bool) -> bool:
        """Whether the model took another path, or a use has its first gradient."""
        if new and not (run.signature[0] in self._functions and run.tape.uses() <= self._checked):
            return True
        return not run.tape.active <= self._proven

    def layouts(self, theta: Mapping[str, Tensor]) -> Mapping[str, LayoutKind]:
        """How the samples lie where each parameter is used, as far as is known."""
        for name in theta:
            self._layouts.setdefault(name, LAYOUT_KINDS[0])
        return self._layouts

    def knows(self, tape: Tape, batch: Labelled) -> bool:
        """Whether what was found out holds for a pass without looking at it."""
        return tape.uses() <= self._checked and not self._open.get(_signature(tape, batch), True)

    def learn(self, evaluate: Evaluate, few: Labelled, theta: Mapping[str, Tensor]) -> Tensor:
        """Compare a few samples with themselves alone, to find out how the model uses its parameters.

        Returns their outputs alone.
        """
        passed = self._forward(evaluate, few, theta)
        # Before the way back, so that its sums and the loop's gradients are not there at the same time.
        expected, output, _ = one_by_one(evaluate, few, theta, self._how)
        largest = max(float(total.norm()) for total in expected.values())
        while True:
            run = self._backward(*passed, few=True)
            if differ(run.output, output, run.precision):
                _, again, _ = one_by_one(evaluate, few, {}, self._how)
                if not differ(again, output, run.precision):
                    raise _interacting(output, run.output)
                self._send_to_fallback(evaluate.model, {*theta}, _RANDOM)
            noise = _NOISE * run.precision.eps * largest
            wrong = {
                name
                for name in theta.keys() - self.fallback
                if name in run.tape.unhandled | run.violations
                or differ(run.totals.get(name), expected[name], run.precision, noise)
            }
            last = {name for name in wrong if self._layouts[name] == LAYOUT_KINDS[-1]}
            self._send_to_fallback(evaluate.model, last)
            for name in wrong - last:
                tried = LAYOUT_KINDS.index(self._layouts[name])
                self._layouts[name] = LAYOUT_KINDS[tried + 1]
            if not wrong:
                break
            passed = self._forward(evaluate, few, theta)
        self._functions.add(run.signature[0])
        self._checked |= run.tape.uses()
        self._proven |= run.tape.active
        return output

    def _run(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Run:
        """A pass of a batch of several samples, whose rows are proven to be theirs."""
        tape, output, values, signature = self._forward(evaluate, batch, theta)
        if tape.theta and signature not in self._open:
            precision = _precision(tape, output)
            del tape, output, values  # one graph at a time
            tape = self._tape(batch, theta)
            self._open[signature] = not keeps_rows(evaluate, batch, tape, precision)
            tape, output, values, signature = self._forward(evaluate, batch, theta)
        return self._backward(tape, output, values, signature)

    def _tape(self, batch: Labelled, theta: Mapping[str, Tensor]) -> Tape:
        fast = {name: p for name, p in theta.items() if name not in self.fallback}
        native_serves = backends.serves(next(iter(theta.values())).device, self._how.backend)
        return Tape(
            fast, self.layouts(fast), batches.size(batch), RULES, self._how.square, native_serves
        )

    def _forward(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Tape, Tensor, Tensor, Signature]:
        tape = self._tape(batch, theta)
        with tape:
            output, values = evaluate(batch)
        return tape, output, values, _signature(tape, batch)

    def _backward(
        self, tape: Tape, output: Tensor, values: Tensor, signature: Signature, few: bool = False
    ) -> Run:
        uses = {(of, i) for of in tape.uses() for i in range(len(of[1]))}
        tape.watched = uses - self._proven
        precision = _precision(tape, output)
        violations = set()
        if tape.theta and values.requires_grad and (few or self._open.get(signature)):
            violations = layout_violations(tape, values, precision)
        totals = tape.backward(values) if tape.theta else {}
        return Run(tape, output.detach(), values.detach(), totals, signature, violations, precision)

    def _send_to_fallback(self, model: nn.Module, names: set[str], reason: str = _NO_RULE) -> None:
        """Leave parameters to the fallback, and say so once for each model."""
        self.fallback = dict.fromkeys(names, reason) | self.fallback
        warned = _warned.setdefault(model, set())
        new = sorted(names - warned)
        if new:
            warned |= names
            shown = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
            warn(
                f"importance of {shown}: takes the fallback, exact but slower, since {reason}",
                UserWarning,
            )


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model: {name or type(module).__name__} normalises over the batch even in eval "
                "mode (it has no running statistics), so that a sample has no gradient of its own; "
                'use method="batch" or another normalisation'
            )


def _precision(tape: Tape, output: Tensor) -> Precision:
    dtypes = {output.dtype, *tape.dtypes, *(p.dtype for p in tape.theta.values())}
    return lowest_precision(dtypes, output.is_cuda)


def _signature(tape: Tape, batch: Labelled) -> Signature:
    ones: list[tuple[bool, ...]] = []

    def note_sizes(t: Tensor) -> Tensor:
        ones.append(tuple(size == 1 for size in t.shape))
        return t

    batches.mapped(batch, note_sizes)
    return tuple(tape.functions), frozenset(tape.uses()), tape.samples, tuple(ones)


def _interacting(alone: Tensor, together: Tensor) -> ValueError:
    off = float((together - alone).abs().max())
    return ValueError(
        f"model: samples interact: an output changes by up to {off:.2g} when its sample is run alone, so "
        'that a sample has no gradient of its own; use method="batch", or another normalisation'
    )
