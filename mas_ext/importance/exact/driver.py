"""`exact`: the sum over samples of abs(per-sample gradient), as MAS defines it, at the speed of a batch.

Where parameters meet data is followed through one forward and backward pass (tracing.py). How the samples lie
there is found out and proven (layout_proof.py), for all batches or, where data decide, for every single one.
What was never seen before is tried on a few samples, which are run alone too. What has no rule goes to the
fallback, which runs samples alone (fallback.py). On a GPU, what came often is replayed (captured.py).
README.md walks through it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact import captured
from mas_ext.importance.exact.captured import CapturedPasses
from mas_ext.importance.exact.fallback import (
    Fallback,
    has_hooks,
    one_by_one,
    outputs_differ,
    refuse_accumulation_hooks,
    refuse_interacting,
)
from mas_ext.importance.exact.layout_proof import ProvenPass, find_owners, layouts_of
from mas_ext.importance.exact.nodes import Meeting
from mas_ext.importance.exact.origins import Earlier
from mas_ext.importance.exact.precision import Precision, lowest_precision
from mas_ext.importance.exact.pull_back import Moves
from mas_ext.importance.exact.recurrent import RULES
from mas_ext.importance.exact.sample_layout import SampleLayout
from mas_ext.importance.exact.tracing import Tape
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

Layouts = Sequence[SampleLayout | None]


class Run(NamedTuple):
    """A forward pass, and where samples lie in it."""

    tape: Tape
    output: Tensor
    values: Tensor
    proof: Proof | None


@dataclass
class Proof:
    """What is known of passes of one signature.

    names: of the parameters in each meeting. layouts: where samples lie in its result. lasting: whether they
    lie so in every batch. shapes: of these results, where layouts are tables of rows and hold for no others.
    """

    names: Sequence[frozenset[str]]
    layouts: Layouts
    lasting: bool
    shapes: Sequence[tuple[int, ...]] | None = None
    moves: dict[int, Moves] = field(default_factory=dict)


class Exact:
    """sum over samples of abs(d objective / d theta), or of its square (Aljundi et al. 2018, equation 2).

    Remembers what it found out about a model.

    Args:
        backend: "auto", "native" or "reference".
        square: whether squares are summed, for the Fisher information.
    """

    def __init__(self, backend: Backend, square: bool = False) -> None:
        self._how = Summation(backend, square)
        # Parameters that go to the fallback, and why.
        self.fallback: dict[str, str] = {}
        # Of the last batch.
        self.last: Proof | None = None
        self._proofs: dict[Hashable, Proof] = {}
        # The functions called in passes in which data decide where samples lie.
        self._open: set[Hashable] = set()
        # Calls without data that are the same for all samples, whatever their shapes.
        self._shared: set[Any] = set()
        self._earlier = Earlier()
        self._single_samples = Fallback(self._how)
        # None between runs in which nothing but the batch changes.
        self._captured: CapturedPasses | None = None
        # Why the last pass that was to be captured could not be.
        self.not_captured = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy finds out about its own model."""
        return Exact, (self._how.backend, self._how.square)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """While it lasts, nothing but the batch changes from call to call: passes on a GPU are captured."""
        self._captured = CapturedPasses()
        try:
            yield
        finally:
            self.not_captured = self._captured.failure
            self._captured = None

    def __call__(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the objectives."""
        alone = evaluate.lockstep is None and captured.possible(theta)
        if self._captured is None or not alone:
            return self._add_up(evaluate, batch, theta)
        return self._captured(
            evaluate,
            batch,
            theta,
            lambda: self._add_up(evaluate, batch, theta),
            lambda given: self._repeated(evaluate, given, theta),
        )

    def _repeated(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor, Any]:
        """The pass of a batch like the last one, by what is known; and what its sums are read by."""
        run = self._forward(evaluate, batch, theta)
        proof = self.known(run.tape, batch)
        if proof is None or not proof.lasting or theta.keys() & self.fallback.keys():
            raise RuntimeError("samples are told apart, or run alone, in every batch")
        totals = self._backward(run._replace(proof=proof))
        return self._complete(totals, theta), run.values.detach(), (proof, run.tape.tables)

    def _add_up(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        if self.last is None:
            _refuse_batch_statistics(evaluate.model)
        refuse_accumulation_hooks(theta)
        hooked = {name for name, p in theta.items() if has_hooks(p)}
        self._send_to_fallback(evaluate.model, hooked, _HOOKS)
        if batches.size(batch) == 1:
            totals, _, values = one_by_one(evaluate, batch, theta, self._how)
            return totals, values
        alone: Tensor | None = None
        lockstep = evaluate.lockstep
        while True:
            decided = self._decided()
            run = self._run(evaluate, batch, theta)
            untried = False
            if run is None or run.proof is None:
                del run
                run = self._prove(evaluate, batch, theta)
                untried = alone is None
            if run.proof is None:
                layouts, mixed = _found_layouts(run)
                if untried:
                    alone, untried = self._try(evaluate, batch, theta), False
                    if mixed:  # to know what this pass met unknown
                        continue
                if decided == self._decided():
                    self._give_up(evaluate.model, mixed)
                if decided != self._decided():  # there may be a proof with less to prove
                    continue
                run = run._replace(proof=Proof(run.tape.met, layouts, False))
                self._open.add(tuple(run.tape.functions))
            proof = run.proof
            assert proof is not None
            if lockstep is not None and (untried or alone is not None or not proof.lasting):
                # Sums over ranks can't be taken back: what is unhandled shows before.
                if untried:
                    alone, untried = self._try(evaluate, batch, theta, proof), False
                self._backward(run, sketched=True)
                self._send_to_fallback(evaluate.model, run.tape.unhandled)
                if decided != self._decided():
                    continue
            totals = self._backward(run)
            self._send_to_fallback(evaluate.model, run.tape.unhandled)
            if untried:  # not before: what the batch's pass remembered is freed by now
                alone = self._try(evaluate, batch, theta, proof)
            if decided == self._decided():
                break
            if lockstep is not None:
                raise RuntimeError(
                    f"importance of {', '.join(sorted(run.tape.unhandled))}: got a batch in which the model "
                    "uses this as in no batch before, expected the same use as before under fully_shard"
                )
        if alone is not None and theta.keys() - self.fallback:
            refuse_interacting(alone, run.output[: len(alone)], _precision(run))
        self.last = run.proof
        slow = {name: p for name, p in theta.items() if name in self.fallback}
        output = None if _RANDOM in self.fallback.values() else run.output
        others = (
            self._single_samples(evaluate, batch, slow, output, _precision(run)) if slow else {}
        )
        if lockstep is not None:
            return {}, run.values.detach()
        return self._complete({**totals, **others}, theta), run.values.detach()

    @staticmethod
    def _complete(found: Totals, theta: Mapping[str, Tensor]) -> Totals:
        """The sums in the order of parameters, zeros for those without influence."""
        unused = zeros({name: p for name, p in theta.items() if name not in found})
        return {name: unused[name] if name in unused else found[name] for name in theta}

    def known(self, tape: Tape, batch: Labelled) -> Proof | None:
        """What is known of a pass that is like one before."""
        proof = self._proofs.get(_signature(tape, batch))
        return None if proof is None or proof.shapes not in (None, tape.shapes) else proof

    def layouts(self) -> dict[str, str]:
        """How the samples lay where each parameter met data in the last batch, in as many words as differ."""
        kinds: dict[str, dict[str, None]] = {}
        if self.last is not None:
            for names, layout in zip(self.last.names, self.last.layouts, strict=True):
                if layout is not None:
                    for name in names:
                        kinds.setdefault(name, {})[layout.kind] = None
        return {name: ", ".join(found) for name, found in kinds.items()}

    def dense(self) -> set[str]:
        """The parameters that were pulled back sample by sample in the last batch."""
        moves = [] if self.last is None else self.last.moves.values()
        return set[str]().union(*(m.dense for m in moves))

    def _decided(self) -> tuple[int, int]:
        return len(self.fallback), len(self._shared)

    def tape(
        self,
        evaluate: Evaluate,
        batch: Labelled,
        theta: Mapping[str, Tensor],
        kind: type[Tape] = Tape,
    ) -> Tape:
        """A tape for a pass of a batch."""
        fast = {name: p for name, p in theta.items() if name not in self.fallback}
        native = backends.serves(next(iter(theta.values())).device, self._how.backend)
        samples = batches.size(batch)
        lockstep = evaluate.lockstep
        constants = [*evaluate.state.tensors, *(lockstep.constants() if lockstep else ())]
        tape = kind(
            constants, fast, samples, RULES, self._shared, self._how.square, native, lockstep
        )
        tape.origins.earlier = self._earlier
        tape.read(evaluate.constants(batch))
        tape.of_samples = not batches.differ_in_tensors_alone(batch.batch)
        return tape

    def _forward(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Run:
        tape = self.tape(evaluate, batch, theta)
        with tape:
            output, values = evaluate(batch)
        return Run(tape, output.detach(), values, None)

    def _run(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Run | None:
        """A pass of a batch with what is known of such passes; None where nothing is known yet."""
        if not self._proofs and not self._open:
            return None
        run = self._forward(evaluate, batch, theta)
        proof = self.known(run.tape, batch)
        if proof is None and tuple(run.tape.functions) in self._open:
            layouts, mixed = _found_layouts(run)
            self._give_up(evaluate.model, mixed)
            proof = Proof(run.tape.met, layouts, False)
        return run._replace(proof=proof)

    def _prove(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Run:
        """A pass of a batch whose signature was never seen before, with a proof if there is a lasting one."""
        tape = self.tape(evaluate, batch, theta)
        proven = ProvenPass(evaluate, batch, tape)
        run = Run(tape, proven.output.detach(), proven.values, None)
        layouts = proven.lasting(_precision(run)) if _has_gradients(run) else []
        if layouts is None:
            return run
        listed = any(layout is not None and layout.table is not None for layout in layouts)
        proof = Proof(tape.met, layouts, True, tape.shapes if listed else None)
        self._proofs[_signature(tape, batch)] = proof
        return run._replace(proof=proof)

    def _give_up(self, model: nn.Module, meetings: Sequence[Meeting]) -> None:
        """Take calls without data for the same for all samples; parameters without one go to the fallback."""
        optional = {m.optional for m in meetings if m.optional is not None} - self._shared
        self._shared |= optional
        if not optional:
            self._send_to_fallback(model, {name for m in meetings for name in m.names})

    def _backward(self, run: Run, totals: Totals | None = None, sketched: bool = False) -> Totals:
        """The sums of a pass, added to `totals`; `sketched`: of a sharded model their sketches, with the graph
        kept.
        """
        assert run.proof is not None
        if totals is None:
            lockstep = run.tape.lockstep
            totals = lockstep.sketches() if lockstep is not None and sketched else {}
        if not run.tape.theta:
            return totals
        tape, proof = run.tape, run.proof
        return tape.backward(run.values, proof.layouts, proof.moves, totals, sketched, sketched)

    def _try(
        self,
        evaluate: Evaluate,
        batch: Labelled,
        theta: Mapping[str, Tensor],
        proof: Proof | None = None,
    ) -> Tensor:
        """Compare a few samples of a batch with themselves alone; returns their outputs alone.

        proof: of the whole batch, which few of its samples are like if they do the same.
        """
        model, few = evaluate.model, batches.between(batch, 0, _CHECKED)
        repeated = False
        while True:
            decided = self._decided()
            expected, output, _ = one_by_one(evaluate, few, theta, self._how, sketched=True)
            run = self._forward(evaluate, few, theta)
            if outputs_differ(output, run.output, _precision(run)):
                _, again, _ = one_by_one(evaluate, few, {}, self._how)
                if not outputs_differ(again, output, _precision(run)):
                    refuse_interacting(output, run.output, _precision(run))
                self._send_to_fallback(model, {*theta}, _RANDOM)
            mixed: list[Meeting] = []
            layouts = None if proof is None else _resized(proof, run.tape)
            if layouts is None:
                layouts, mixed = _found_layouts(run)
            if mixed and not repeated:  # to know what an earlier pass met unknown
                repeated = True
                continue
            self._give_up(model, mixed)
            if decided == self._decided():
                run = run._replace(proof=Proof(run.tape.met, layouts, False))
                self._compare(model, run, expected)
            if decided == self._decided():
                return output

    def _compare(self, model: nn.Module, run: Run, expected: Totals) -> None:
        """Give up what differs from the sums of samples that ran alone; `expected` becomes the differences."""
        norms = {name: float(total.norm()) for name, total in expected.items()}
        for total in expected.values():
            total.neg_()
        errors = self._backward(run, expected, sketched=True)
        self._send_to_fallback(model, run.tape.unhandled)
        precision = _precision(run)
        noise = _NOISE * precision.eps * max(norms.values())
        off: set[str] = set()
        for name in expected.keys() - self.fallback:
            limit = precision.tolerance * norms[name] + noise
            if not float(errors[name].norm()) <= limit:  # NaN is a difference, too
                optional = {m.optional for m in run.tape.meetings if name in m.names} - {None}
                off |= set() if optional - self._shared else {name}
                self._shared |= optional
        self._send_to_fallback(model, off)

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


def _precision(run: Run) -> Precision:
    dtypes = {run.output.dtype, *run.tape.dtypes, *(p.dtype for p in run.tape.theta.values())}
    return lowest_precision(dtypes, run.output.is_cuda)


def _found_layouts(run: Run) -> tuple[Layouts, list[Meeting]]:
    """Where samples lie in one batch, and the meetings whose rows have several of them."""
    tape = run.tape
    if not _has_gradients(run):
        return [None] * len(tape.meetings), []
    owners = find_owners(tape, run.values, _precision(run))
    layouts = layouts_of(tape, owners)
    return layouts, [tape.meetings[i] for i in owners if layouts[i] is None]


def _resized(proof: Proof, tape: Tape) -> Layouts | None:
    """The layouts in a pass of fewer samples that does what the proven one did; None where it may not."""
    if proof.names != tape.met:
        return None
    known = [*zip(proof.layouts, tape.shapes, strict=True)]
    if not all(layout is None or layout.fits(tape.samples, shape) for layout, shape in known):
        return None
    return [layout and replace(layout, samples=tape.samples) for layout in proof.layouts]


def _has_gradients(run: Run) -> bool:
    return bool(run.tape.theta) and run.values.requires_grad


def _signature(tape: Tape, batch: Labelled) -> Hashable:
    """What a proof holds for: functions, numbers read, meetings, samples, and which sizes are 1.

    Along a dimension of size 1, rows in several orders are the same.
    """
    ones: list[tuple[bool, ...]] = []

    def note_sizes(t: Tensor) -> Tensor:
        ones.append(tuple(size == 1 for size in t.shape))
        return t

    batches.mapped(batch, note_sizes)
    return (
        tuple(tape.functions), tuple(tape.reads), tuple(tape.met), tape.samples, tuple(ones),
    )  # fmt: skip
