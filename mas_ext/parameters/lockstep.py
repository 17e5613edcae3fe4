"""Passes of a model under fully_shard: as many on every rank, whatever each of them has to do.

FSDP gathers a unit's parameters when a pass enters the unit, and all ranks have to enter it together. So the
ranks agree before every pass: one that has none to run at that moment runs a stand-in, a sample that counts for
nothing. FSDP also tells when a backward pass has left a unit: there the unit's sums are complete, are summed
over the ranks and cut into each rank's shard, one parameter at a time, as FSDP reduces gradients. No rank holds
more whole parameters, or sums like them, than FSDP itself in a training step.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.parameters.agreement import Agreement, quiet
from mas_ext.parameters.fsdp import (
    Named,
    Sharding,
    fsdp_states,
    is_fsdp_hook,
    param_groups,
    refuse_outer,
    resharded,
)
from mas_ext.parameters.names import ModelView
from mas_ext.parameters.sketch import SKETCH, sketch

# From a unit's whole parameters by name to their sums in this pass; absent: 0.
Take = Callable[[Mapping[str, Tensor]], Named]


class _Next(Enum):
    """What a rank, or all of them together, do next."""

    FORWARD = 1
    BACKWARD = 2
    NOTHING = 3


class _Unit:
    """What FSDP gathers and reduces at once.

    calls: how often the last forward pass entered it. left: how often this backward pass still leaves it.
    """

    def __init__(self, group: Any, names: Mapping[int, str]) -> None:
        self.group = group
        self.calls = self.left = 0
        self._named = {
            names[id(p.sharded_param)]: p for p in group.fsdp_params if id(p.sharded_param) in names
        }

    def has_run(self) -> bool:
        """Whether FSDP has made the whole parameters, whose memory it takes and frees from then on."""
        return all(hasattr(p, "_unsharded_param") for p in self.group.fsdp_params)

    def gather(self) -> None:
        """Take part in gathering its parameters, unless they are whole."""
        self.group.unshard()
        self.group.wait_for_unshard()

    def whole(self) -> Named:
        """Its whole parameters by name, with numbers only while a pass is inside."""
        return {name: p.unsharded_param for name, p in self._named.items()}


class Lockstep:
    """Passes of a sharded model; all ranks make one of these together, and end it together.

    sums: by name, this rank's shard of the sum over ranks. sample: the batch of the stand-in, None if no rank
    has any. device: of the parameters.

    Args:
        view: the model.
        theta: its sharded parameters by name, of those that sums are found of.
        sharding: how these are sharded.
        agreement: the call of all ranks that passes are made in.
    """

    def __init__(
        self,
        view: ModelView,
        theta: Mapping[str, Tensor],
        sharding: Sharding,
        agreement: Agreement,
    ) -> None:
        refuse_outer(view.model, view.found)
        self._model, self._sharding, self._agreement = view.model, sharding, agreement
        self._states = fsdp_states(view.model)
        names = {id(p): name for name, p in theta.items()}
        groups = [group for state in self._states for group in param_groups(state)]
        self._units = [_Unit(group, names) for group in groups]
        self.sums = {
            name: torch.zeros_like(own, dtype=compute_dtype(own.dtype), requires_grad=False)
            for name, own in sharding.local(theta).items()
        }
        self.device = next(iter(self.sums.values())).device
        self.sample: Any = None
        self._begun = self._reduces = False
        self._counts = True
        self._graph: Tensor | None = None
        # The units in the order in which passes enter them; before the first one, that of the modules.
        self._entered: list[_Unit] = []
        self._order = self._units
        self._take: Take | None = None
        self._into: Named | None = None
        # What a pass backward does in units where ranks exchange something: in this one so far, and all that it
        # does, as the last one did or as the forward pass tells.
        self._course: list[Callable[[], object]] = []
        self._whole_course: list[Callable[[], object]] = []
        # Whether a pass backward runs.
        self._inside = False
        # What went wrong where a unit's sums were taken.
        self._error: BaseException | None = None

    # -- beginning and end ---------------------------------------------------------------------------

    def begin(self, sample: Any) -> None:
        """Agree on a sample for the stand-in: this rank's own, or that of the first rank that has one."""
        if self._begun:
            return
        self._begun = True
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        # What can't be sent fails before the agreement.
        sent = None if sample is None else pickle.dumps(sample)
        mine = 0 if sample is None else ranks - rank
        first, lacking = self._agreement.largest(mine, sample is None)
        self.sample = sample
        if first and lacking:
            said = self._agreement.said_by(ranks - first, sent)
            self.sample = pickle.loads(said) if sample is None else sample

    def prepare(self, stand_in: Callable[[], Tensor]) -> None:
        """Know how the stand-in runs; where the model never ran, have FSDP make the whole parameters."""
        self._stand_in = stand_in
        if not all(unit.has_run() for unit in self._units):
            self.forward(stand_in)

    def finish(self) -> None:
        """Run stand-ins until no rank needs them."""
        self._take_part(_Next.NOTHING)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, no mode sees what FSDP does, and sums are taken where a pass leaves a unit."""
        # Everything that changes for a while: (dictionary, key, new value).
        changes: list[tuple[dict[str, Any], str, Any]] = []
        for module in self._model.modules():
            own = vars(module)
            for key in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = {i: _unseen(h) if is_fsdp_hook(h) else h for i, h in own[key].items()}
                changes.append((own, key, type(own[key])(hooks)))
        for state in self._states:
            for key in (
                *("_pre_forward", "_post_forward"),
                *("_pre_backward", "_root_post_backward_final_callback"),
            ):
                changes.append((vars(state), key, _unseen(getattr(state, key))))
        for unit in self._units:
            own = vars(unit.group)
            changes.append((own, "pre_forward", self._entering(unit)))
            changes.append((own, "post_forward", self._passing(unit)))
            changes.append((own, "pre_backward", self._approaching(unit)))
            changes.append((own, "post_backward", self._leaving(unit)))
        before = [(owner, key, owner[key]) for owner, key, _ in changes if key in owner]
        try:
            for owner, key, new in changes:
                owner[key] = new
            yield
        finally:
            for owner, key, _ in changes:
                del owner[key]
            for owner, key, old in before:
                owner[key] = old
            self._reset()

    # -- passes --------------------------------------------------------------------------------------

    def theta(self) -> Named:
        """The whole parameters by name, in the order of `sums`."""
        found = {name: p for unit in self._units for name, p in unit.whole().items()}
        return {name: found[name] for name in self.sums}

    def constants(self) -> list[Tensor]:
        """All whole parameters that FSDP keeps, also those that no sums are found of."""
        return [p.unsharded_param for unit in self._units for p in unit.group.fsdp_params]

    def sketches(self) -> Named:
        """Sketches of 0 by name."""
        zero = torch.zeros(SKETCH, dtype=torch.float64, device=self.device)
        return {name: zero.clone() for name in self.sums}

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """The output of a forward pass, when all ranks run one."""
        self._graph = None
        self._take_part(_Next.FORWARD)
        return self._forward(run)

    def backward(
        self,
        root: Tensor,
        inputs: Sequence[Tensor] = (),
        take: Take | None = None,
        into: Named | None = None,
        retain: bool = False,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """A backward pass, when all ranks run one.

        Args:
            root: a number.
            inputs: tensors that get gradients, beside the parameters, which have theirs until `take` returns.
            take: gives the sums of a unit's parameters, once the pass has left the unit.
            into: what sketches of these are added to; by default they are summed over the ranks, into `sums`.
            retain: whether the graph is kept.
            around: what the pass runs in.
        """
        counts = self._counts and take is not None and into is None
        self._take_part(_Next.BACKWARD, counts)
        with around():
            self._backward(root, inputs, take, into, retain)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While it lasts, this rank adds nothing to the sums."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _forward(self, run: Callable[[], Tensor]) -> Tensor:
        # As FSDP leaves it, the root stays whole for the backward pass.
        self._reset()
        self._entered, self._course = [], []
        for unit in self._units:
            unit.calls = 0
        try:
            output = run()
        except BaseException:  # other ranks are still inside
            for unit in self._order[len(self._entered) :]:
                unit.gather()
                unit.group.reshard()
            raise
        self._order = self._entered
        self._whole_course = self._whole_course or self._course[::-1]
        return output

    def _backward(
        self,
        root: Tensor,
        inputs: Sequence[Tensor] = (),
        take: Take | None = None,
        into: Named | None = None,
        retain: bool = True,
    ) -> None:
        self._take, self._into, self._error = take, into, None
        self._course, self._inside = [], True
        for unit in self._units:
            unit.left = max(1, unit.calls)
        leaves = [*self.theta().values(), *inputs]
        try:
            try:
                torch.autograd.backward(root, retain_graph=retain, inputs=leaves)
            except BaseException:
                self._run_on()
                raise
            for unit in self._units:
                if unit.left > 0:
                    self._deliver(unit)
        finally:
            self._take = self._into = None
            self._inside = False
            self._reset()
        self._whole_course = self._course
        if self._error is not None:
            raise self._error

    def _run_on(self) -> None:
        """After an error, do with other ranks what their passes still do, with nothing to add to sums."""
        self._take = self._into = None
        for event in self._whole_course[len(self._course) :]:
            event()
        for unit in self._units:
            if unit.left > 0:
                self._deliver(unit)

    @torch.no_grad()
    def _deliver(self, unit: _Unit) -> None:
        """Take the sums of a unit's parameters."""
        unit.left = 0
        theta = unit.whole()
        found: Named = {}
        try:
            if self._take is not None and self._error is None:
                found = self._take(theta)
            if self._into is not None:
                for name in [*found]:
                    self._into[name] += sketch(found.pop(name))
        except BaseException as error:  # other ranks add up their sums now
            self._error, found = error, {}
        for p in theta.values():
            p.grad = None
        if self._reduces:
            for name in theta:
                total = found.pop(name, None) if self._counts else None
                self.sums[name] += self._sharding.summed(name, total, self.sums[name])

    def _entering(self, unit: _Unit) -> Callable[..., Any]:
        original = unit.group.pre_forward

        def pre_forward(*args: Any) -> Any:
            unit.calls += 1
            self._entered.append(unit)
            # Also in a pass backward, where a checkpointed part runs again.
            self._course.append(unit.gather if self._inside else unit.group.post_backward)
            return original(*args)

        return pre_forward

    def _passing(self, unit: _Unit) -> Callable[..., Any]:
        original = unit.group.post_forward

        def post_forward(*args: Any) -> Any:
            if not self._inside:
                self._course.append(partial(unit.group.pre_backward, True))
            return original(*args)

        return post_forward

    def _approaching(self, unit: _Unit) -> Callable[..., Any]:
        original = unit.group.pre_backward

        def pre_backward(*args: Any) -> Any:
            self._course.append(partial(original, *args))
            return original(*args)

        return pre_backward

    def _leaving(self, unit: _Unit) -> Callable[..., Any]:
        original = unit.group.post_backward

        def post_backward(*args: Any) -> None:
            self._course.append(unit.group.post_backward)
            unit.left -= 1
            if unit.left == 0:
                self._deliver(unit)
            # What FSDP would reduce.
            kept = [(p, p.grad) for p in unit.whole().values()]
            for p, _ in kept:
                p.grad = None
            original(*args)
            for p, grad in kept:
                p.grad = grad

        return _unseen(post_backward)

    def _reset(self) -> None:
        """Free the whole parameters, after errors too."""
        for state in self._states:
            idle = type(state._training_state).IDLE
            state._training_state, state._state_ctx.iter_forward_root = idle, None
            state._state_ctx.post_backward_final_callback_queued = False
            getattr(state._comm_ctx, "post_forward_order", []).clear()  # none before the first pass
            for group in param_groups(state):
                group._training_state = idle
                group._post_forward_indices.clear()
        with quiet():
            resharded(self._model)

    # -- agreement -----------------------------------------------------------------------------------

    @property
    def _group(self) -> Any:
        return self._sharding.group

    def _take_part(self, wish: _Next, reduces: bool = False) -> None:
        """Run stand-ins until all ranks do what this one wishes."""
        while True:
            forward, backward, lacking, reducing = self._agreement.largest(
                wish is _Next.FORWARD,
                wish is _Next.BACKWARD,
                wish is _Next.NOTHING and self._graph is None,
                reduces,
            )
            # Where a stand-in has no graph yet, all ranks run forward.
            onward = forward or (backward and lacking)
            found = _Next.FORWARD if onward else _Next.BACKWARD if backward else _Next.NOTHING
            self._reduces = bool(reducing)
            if found is wish:
                return
            if found is _Next.FORWARD:
                with torch.enable_grad():
                    output = self._forward(self._stand_in)
                    self._graph = output.sum() if wish is _Next.NOTHING else None
            else:
                assert self._graph is not None
                self._backward(self._graph)


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its torch functions and operators seen by no mode."""

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with quiet():
            return function(*args, **kwargs)

    return unseen
