"""FusedMASPenalty: the penalty of a model, in its loss, in its gradients or in its optimizer.

The only place with the convention of lambda: penalty = lam * sum W (theta - A)^2, without one-half.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from mas_ext._arguments import check_choice, check_count, check_factor
from mas_ext.failures import Diverged, Vanished
from mas_ext.importance import ESTIMATORS, EstimatorName, Forward, ImportanceSum, gather
from mas_ext.importance.evaluation import default_forward
from mas_ext.importance.objectives import Objective
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.penalty import add_grad_, add_grad_alone_
from mas_ext.kernels.proximal import proximal_
from mas_ext.kernels.warning import warn
from mas_ext.optim.fused import FusedOptimizer
from mas_ext.optim.hooks import Handle, Mode, register_hook, unwrapped
from mas_ext.parameters.adapters import AdaptedWeight
from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.fsdp import Sharding, group_of, optimizer_view, whole_tensor
from mas_ext.parameters.names import (
    ModelView,
    check_patterns,
    check_strength,
    frozen,
    parts_of_equal_size,
    strength_of,
)
from mas_ext.parameters.ranks import (
    Ranks,
    SampleSums,
    Together,
    described_importance,
    described_model,
    refuse_unused,
)
from mas_ext.parameters.sharded_adapters import refuse_without_rows
from mas_ext.parameters.tracked_model import TrackedModel, alone
from mas_ext.state import files as checkpoint
from mas_ext.state.buffers import Group, Memory
from mas_ext.state.low_rank import UpdateGroup
from mas_ext.state.merge_rules import (
    AlphaSum,
    Anchor,
    Merge,
    MergeRule,
    StateDevice,
    Store,
    separate_anchor,
)
from mas_ext.state.offloading import group_penalty, run_kernel
from mas_ext.state.quadratic import FORMAT, Consolidation, check_format
from mas_ext.state.sharded_updates import ShardedUpdates

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed import ProcessGroup


Adapters = Literal["weights", "parameters"]


class _Held(NamedTuple):
    """All that a penalty holds, replaced as one, so that an interruption leaves the old one whole.

    followed: new names by old ones, of parameters that were followed.
    """

    state: Consolidation
    pending: ImportanceSum
    followed: dict[str, str]

    def moves(
        self, tracked: TrackedModel, view: ModelView
    ) -> tuple[dict[str, str], dict[str, str]]:
        """New names of parameters whose old ones are gone: those to follow, and those that are not free."""
        known = self.state.memory.names | self.pending.sums.keys()
        found = tracked.moved(known, view)
        free = {old: new for old, new in found.items() if new in view.places and new not in known}
        return free, {old: new for old, new in found.items() if old not in free}

    def renamed(self, names: Mapping[str, str]) -> ImportanceSum:
        """What was observed, under other names."""
        totals = self.pending.totals
        sums = {names.get(name, name): t for name, t in totals.sums.items()}
        return self.pending.with_totals(totals._replace(sums=sums))


class FusedMASPenalty(nn.Module):
    """lam-weighted pull of important parameters towards their old values, on fused kernels.

        value = sum_t alpha_t sum_i Omega_t,i (theta_i - theta*_t,i)^2 = scale (sum_i W_i (theta_i - A_i)^2 + r)

    exactly, in two buffers W and A whatever the number of tasks (store "merged"), or task by task
    ("per_task"). The defaults are Memory Aware Synapses (Aljundi et al., ECCV 2018, equations 2 and 3).

    Args:
        model: any module; a strong reference is kept, and not registered as a submodule.
        lam: strength, finite and >= 0. No one-half anywhere: the gradient is 2 lam W (theta - A).
        importance: "exact", "batch" or "local", see estimate_importance; or an estimator of its own, with
            its own objective, forward and exclude: FisherSum makes this the penalty of EWC.
        objective: "l2", "l1", "vector" or a callable, see estimate_importance.
        forward: forward(model, batch) -> output, see estimate_importance.
        merge: "sum" (alpha_t is lam), "consistent" (MAS-alpha: alpha_t equalise the tasks' total importance) or
            "decay".
        anchor: where it pulls to. "latest": where the last task ended. "own": for each task's importance where
            that task ended, which undoes a part of what later tasks learned.
        alpha_sum: what the alpha_t of "consistent" add up to in equalised units: lam times the number of
            "tasks" (the strength of "sum" at the same lam), or "lam".
        gamma: "decay": W <- gamma W + Omega.
        store: "merged", 8 bytes per float32 parameter, or "per_task", 8 bytes per parameter and task.
        exclude: fnmatch patterns on whole parameter names; one that matches nothing raises.
        strength: factors >= 0 by fnmatch pattern on whole parameter names: Omega_t is multiplied by that of the
            last pattern that matches its name, by 1 where none does, before S_t is taken. A pattern that
            matches nothing raises. `{"*": 0, "*.attention.*": 1}` holds attention alone.
        backend: "auto", "native" (compiled kernels or an error) or "reference" (plain PyTorch).
        omega_dtype: float32, or float64 for float64 parameters. With less memory, W rounded stochastically so
            that it is right on average: bfloat16, 6 bytes per float32 parameter, or uint8, 5: codes of 5 bits
            of exponent and 3 of mantissa, times one power of two for all parameters of a dtype. What is below
            2^-32 of the largest becomes that or 0. docs/PERFORMANCE.md tells the errors.
        anchor_dtype: bfloat16 or float16, with anchor "latest" alone: parameters of this dtype have anchors of
            it, too, exactly. A bfloat16 model with an omega of uint8 then takes 3 bytes per parameter. Other
            parameters' anchors are, as without it, float32, or float64 beside float64 parameters.
        process_group: the ranks of torch.distributed that train this model together: importance is summed
            over them, in consolidate and adapt, which every one of them calls. "auto" is the group of a
            DistributedDataParallel wrapper, or of the mesh that fully_shard shards over. For any other model on
            one of several ranks, say which: the group, or None where this rank trains it alone.
        state_device: "cpu" keeps omega and anchor in the CPU's memory (pinned, for parameters on a GPU): each
            use brings them to the parameters' device block by block, through 64 MiB of buffers and a stream
            of its own, and consolidate works on the CPU. None: where the parameters are.
        adapters: what is held of a weight W0 that low-rank adapters (LoRA) update, found in peft's linear,
            embedding and convolution layers, over linear ones of bitsandbytes and torchao too, and by
            mas_ext.parameters.adapters.register_adapter. "weights": the update D = sum over active adapters of
            s B A, on which the output depends:

                value += scale sum_ij W_ij (D_ij - D*_ij)^2

            with the importance W of the whole weight, measured at W0 + D, one byte per weight with an
            omega_dtype of uint8, and D* as factors, under the name that the weight has without adapters. It
            goes with the anchor "latest" and the store "merged". "parameters": B and A one by one, as if each
            were a weight, though B R and R^-1 A give the same update; also what holds DoRA and other variants.
            Under fully_shard each rank holds its rows of W, and every form of the penalty, attach too, is a
            call of all ranks, which gathers the factors A.

    A model that fully_shard (FSDP2) has sharded over one mesh, of shards or of replicas and shards (HSDP): the
    state is sharded alike, bit for bit the same on replicas, and the kernels work on each rank's own part;
    omega, anchor and state_dict() hold DTensors. What runs the model, or tells of all its parts, is called by
    all ranks of the mesh together: the constructor, penalty(), add_grad_, consolidate, adapt, observe, check,
    save, load. Importance is measured in passes under FSDP's own hooks, and summed over ranks into shards, unit
    by unit: no rank holds more whole parameters than in a training step. What is consolidated keeps its shape.

    Raises:
        ValueError: an argument that is not one of the choices.
        TypeError: parameters that are spread over ranks in another way, or only some of them.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 1.0,
        importance: EstimatorName | ImportanceSum = "exact",
        objective: Objective = "l2",
        forward: Forward | None = None,
        merge: Merge = "sum",
        anchor: Anchor = "latest",
        alpha_sum: AlphaSum = "tasks",
        gamma: float = 1.0,
        store: Store = "merged",
        exclude: Sequence[str] = (),
        strength: Mapping[str, float] = {},
        backend: Backend = "auto",
        omega_dtype: torch.dtype = torch.float32,
        anchor_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | Together | None = "auto",
        state_device: StateDevice = None,
        adapters: Adapters = "weights",
    ) -> None:
        super().__init__()
        check_patterns(model, exclude)
        check_choice("adapters", adapters, get_args(Adapters))
        if isinstance(importance, ImportanceSum):
            if importance.exclude != tuple(exclude):
                raise ValueError(
                    f"exclude: got {tuple(exclude)}, expected {importance.exclude} as in importance"
                )
            pending = importance.empty()
        else:
            check_choice("importance", importance, ESTIMATORS)
            pending = ImportanceSum(importance, objective, forward, exclude, backend=backend)
        rule = MergeRule(
            *(merge, anchor, store, alpha_sum, gamma),
            *(omega_dtype, backend, state_device, anchor_dtype),
        )
        self._held = _Held(Consolidation(rule, lam), pending, {})
        self._tracked = TrackedModel(model, exclude)
        self.adapters: Adapters = adapters
        names = [*self._adapted(), *self._tracked.view(()).found]
        self._strength = check_strength(names, strength)
        self._ranks = Ranks(process_group)
        # What is wrong with it shows here, not at the end of a task.
        self._ranks.group(model)

    # -- the penalty -------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """The value as a differentiable 0-dim tensor; 0 before the first consolidation.

        float64 if any parameter is, else float32, on the first consolidated parameter's device. One fused
        pass forward (12 bytes per float32 parameter) and one backward (16). Compiled, it is part of the graph;
        a model whose parameters were replaced breaks that once (under fullgraph, call it outside first). Under
        DistributedDataParallel every rank adds the same penalty to its loss, and the mean of their gradients is
        right. Under fully_shard the value is that of all ranks, and its gradient goes to each one's own part,
        beside the mean of the losses' gradients: call it after the model, as in model(x) ... + penalty().

        Raises:
            RuntimeError: DistributedDataParallel with find_unused_parameters=True.
        """
        refuse_unused(self.model)
        tracked = self._tracked
        values = [group_penalty(g, tracked.local(theta)) for g, theta in self.bound()]
        if self._state.memory.updates:
            values += self._update_values()
        return self._total(values) if values else _NOTHING.clone()

    @torch.no_grad()
    def add_grad_(self) -> Tensor:
        """Instead of the loss form: after backward, add 2 alpha Omega (theta - A) into .grad, in one pass.

        20 bytes per float32 parameter. A parameter without .grad gets one; a frozen one stays without. Clipping
        after it clips the penalty, too. Under a GradScaler it goes behind scaler.unscale_(optimizer).

        Returns:
            The value, detached.
        """
        tracked = self._tracked
        bound = self.bound()
        if not all([p.requires_grad for _, theta in bound for p in theta]):  # noqa: C419  faster
            value = self.forward()
            self.add_grad_to({id(p) for p in self.model.parameters()})
            return value
        values = [
            run_kernel(
                add_grad_,
                g,
                g.state,
                [tracked.local(theta), tracked.local(_grads(theta))],
            )
            for g, theta in bound
        ]
        values += [group.add_grad_(_grads_by_id(group.trained())) for group in self.updates()]
        return self._total(values) if values else torch.zeros(())

    @torch.no_grad()
    def add_grad_to(self, only: Collection[int], times: Tensor | None = None) -> None:
        """add_grad_ for the parameters with these ids that require a gradient.

        times: a factor, for gradients that are scaled; it is read on the device.
        """
        for g, theta in self.bound():
            chosen = [i for i, p in enumerate(theta) if p.requires_grad and id(p) in only]
            if chosen:
                own = self._tracked.local([theta[i] for i in chosen])
                grads = self._tracked.local(_grads([theta[i] for i in chosen]))
                run_kernel(add_grad_alone_, g, g.subset(chosen, times), [own, grads])
        for group in self.updates():
            group.add_grad_(_grads_by_id([p for p in group.trained() if id(p) in only]), times)

    @torch.no_grad()
    def proximal_(
        self,
        parameters: Sequence[Tensor],
        eta: float | Tensor,
        second_moment: Mapping[int, Tensor] | None = None,
        correction: float = 1.0,
        eps: float = 0.0,
    ) -> None:
        """theta <- theta + c / (1 + c) (A - theta), c = 2 eta scale W: stable for every lam.

        The exact minimiser of penalty + |theta' - theta|^2 / (2 eta). 16 bytes per float32 parameter.

        Args:
            parameters: the ones to move; those frozen or not consolidated are left alone.
            eta: step length, finite and >= 0; a 0-dim tensor is read on the device, where NaN and what is
                negative move nothing.
            second_moment: by id of the parameter, v of Adam; the step length is then
                eta / (sqrt(v correction) + eps).
            correction: 1 / (1 - beta2^step), Adam's bias correction.
            eps: Adam's eps.

        Raises:
            ValueError: an eta, correction or eps that is negative or not finite, before anything is moved.
        """
        length, times = (1.0, eta) if isinstance(eta, Tensor) else (check_factor(eta, "eta"), None)
        check_factor(correction, "correction")
        check_factor(eps, "eps")
        if self._state.memory.updates:
            raise ValueError(_NOT_PROXIMAL)
        wanted = {id(p) for p in parameters}
        for g, theta in self.bound():
            chosen = [i for i, p in enumerate(theta) if p.requires_grad and id(p) in wanted]
            if chosen:
                picked = [theta[i] for i in chosen]
                moments = [second_moment[id(p)] for p in picked] if second_moment else []
                tensors = [self._tracked.local(picked), self._tracked.local(moments)]
                state = g.subset(chosen, times)
                run_kernel(proximal_, g, state, tensors, length, correction, eps)

    def attach(
        self, optimizer: torch.optim.Optimizer, mode: Mode = "gradient", eta: float | None = None
    ) -> Handle:
        """Apply the penalty at every optimizer.step() from now on, instead of penalty() in the loss.

        "gradient": before every step, 2 alpha Omega (theta - A) is added into .grad, as if the penalty were
        part of the loss. Clipping between backward() and step() does not clip it: there add_grad_ goes first.

        "proximal": after every step, theta <- theta + c / (1 + c) (A - theta) with c = 2 eta scale W, stable
        for every lam. eta is what the optimizer multiplies the gradient by: SGD lr (1 - dampening) /
        (1 - momentum), Nesterov too; Adam and AdamW lr / (sqrt(v_hat) + eps) from their state. A parameter that
        Adam has not stepped yet stays where it is.

        A closure, as in step(closure), computes gradients in the step: the penalty's come after it.

        With the optimizers of mas_ext.optim it is part of the step itself, unless the state is on the CPU or
        eta is given. Under a GradScaler a skipped step applies nothing, and the penalty's gradient is scaled as
        the others are. Optimizers with fused=True have both on the device, where they are read.

        Args:
            optimizer: any torch optimizer but LBFGS, also as Fabric, Lightning or accelerate wrap it; only its
                own parameters are touched.
            mode: "gradient" or "proximal".
            eta: for "proximal": the step size, where the optimizer is neither SGD, Adam nor AdamW.

        Returns:
            A handle; handle.remove() ends it.

        Raises:
            TypeError: no torch optimizer, LBFGS, one whose step calls no hooks (a wrapper that hides the real
                one), a schedule-free one in the proximal form, or one whose step size is unknown and no eta.
            ValueError: none of the model's parameters is among the optimizer's; an unknown mode, a wrong eta,
                maximize=True, or a momentum of 1.
            RuntimeError: this penalty, or any one with those of mas_ext.optim, is attached already.
        """
        optimizer = unwrapped(optimizer)
        own = {id(p) for p in self.model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer: got one with none of the model's parameters, expected one that was made from the "
                "model as it is now"
            )
        if mode == "proximal" and (self._adapted() or self._state.memory.updates):
            raise ValueError(_NOT_PROXIMAL)
        offloaded = self._state.rule.state_device is not None
        if isinstance(optimizer, FusedOptimizer) and eta is None and not offloaded:
            return optimizer.attach(self, mode)
        return register_hook(self, optimizer, mode, eta)

    def bound(self) -> list[tuple[Group, list[Tensor]]]:
        """The state's groups with their parameters as they are now; the state follows what has changed."""
        memory = self._state.memory
        found = None if memory.absent and self._are_back() else self._tracked.find(memory.groups)
        if found is None:
            self._fit()
            found = self._tracked.find(self._state.memory.groups)
            if found is None:
                raise RuntimeError("the model's parameters change while the penalty is computed")
        return found

    # Unlike torch.compiler.disable, this does not import the compiler with the package.
    @_disable_dynamo
    def _are_back(self) -> bool:
        """Whether the model has a parameter again that it lacked, under any name."""
        view = ModelView(self.model, self.exclude)
        return not self._state.memory.absent.keys().isdisjoint(view.places) or bool(
            self._held.moves(self._tracked, view)[0]
        )

    @_disable_dynamo
    def _fit(self) -> None:
        """Have the state follow parameters that were moved, cast, widened, renamed, removed or brought back."""
        with alone(self.model):
            view = self._tracked.view(self._state.memory.names)
            self._follow(view)
            memory = self._state.memory
            self._warn_of_replaced(view)
            self._tracked.bind(memory.groups, view)
            back = not memory.absent.keys().isdisjoint(view.places)
            if back or self._tracked.find(memory.groups) is None:
                state = copy.copy(self._state)
                state.fit(self._tracked.own_parameters(view))
                self._held = self._held._replace(state=state)
                self._tracked.bind(state.memory.groups, view)

    def _follow(self, view: ModelView) -> None:
        """Have what is known follow parameters whose names are gone."""
        self._held = self._followed(self._held, view)

    def _followed(self, held: _Held, view: ModelView) -> _Held:
        """What is held once parameters whose names are gone were followed to new names that are free."""
        moved, lost = held.moves(self._tracked, view)
        for old, new in lost.items():
            why = "which is known itself" if new in view.places else "which is excluded"
            warn(
                f"parameter {old!r}: its name is now {new!r}, {why}, so that nothing holds what was "
                f"remembered of {old!r}",
                RuntimeWarning,
            )
        if not moved:
            return held
        told = ", ".join(f"{old!r} is {new!r}" for old, new in [*moved.items()][:4])
        warn(
            f"parameters under other names: {told}{', ...' if len(moved) > 4 else ''}; what is "
            "remembered of them goes with them",
            RuntimeWarning,
        )
        state = copy.copy(held.state)
        state.move(moved)
        return _Held(state, held.renamed(moved), {**held.followed, **moved})

    def _warn_of_replaced(self, view: ModelView) -> None:
        """Tell of parameters in whose place another module has others of the same name."""
        replaced = self._tracked.replaced(self._state.memory.groups, view)
        if replaced:
            told = ", ".join(map(repr, replaced[:4])) + ", ..." * (len(replaced) > 4)
            warn(
                f"parameter{'s' * (len(replaced) > 1)} {told}: got a new module with other values, which are "
                "held to those of the old one until consolidate; give a head of its own another name, or "
                "exclude it",
                RuntimeWarning,
            )

    def _warn_of_hidden(self, omega: Mapping[str, Tensor], view: ModelView) -> None:
        """Tell of factors held one by one that have no importance, since the other factor is zero."""
        if self.adapters == "weights":
            return
        for weight in self._tracked.adapted().values():
            for product in weight.products:
                pair = (product.left.parameter, product.right.parameter)
                for zero, other in (pair, pair[::-1]):
                    name = view.name_of(other)
                    if (
                        name is not None
                        and name in omega
                        and not zero.any()
                        and not omega[name].any()
                    ):
                        warn(
                            f"importance of {name!r}: got zero, as {view.name_of(zero)!r} is, by which it is "
                            "multiplied, and nothing holds it; consolidate once the adapter was trained, or "
                            'use adapters="weights"',
                            RuntimeWarning,
                        )
                        return

    def _adapted(self) -> dict[str, AdaptedWeight]:
        """The weights whose low-rank updates are held; a ValueError where they can't be."""
        found = {} if self.adapters == "parameters" else self._tracked.adapted()
        if found:
            rule = self._state.rule
            given = {"anchor": rule.anchor, "store": rule.store}
            for name, expected in (("anchor", "latest"), ("store", "merged")):
                if given[name] != expected:
                    raise ValueError(
                        f"{name}: got {given[name]!r} for low-rank updates held in weight space, expected "
                        f'{expected!r}, or adapters="parameters"'
                    )
            refuse_without_rows(self.model, found)
        return found

    # Unlike torch.compiler.disable, this does not import the compiler with the package.
    @_disable_dynamo
    def _update_values(self) -> list[Tensor]:
        """The penalty of low-rank updates."""
        return [group.value() for group in self.updates()]

    def updates(self) -> Iterator[UpdateGroup | ShardedUpdates]:
        """The low-rank updates that are held, of the adapters that are active now."""
        held = self._state.memory.updates
        if not held:
            return iter(())
        adapted = self._tracked.adapted()
        self._warn_of_trained(held.keys() - adapted.keys())
        self._follow_updates(adapted, self._tracked.sharding)
        return self._state.bound_updates(adapted, self._tracked.sharding)

    def _follow_updates(
        self, adapted: Mapping[str, AdaptedWeight], sharding: Sharding | None
    ) -> None:
        """Have what is held of adapted weights follow those with other factors, or under other names."""
        held = self._state.memory.updates
        changed = self._tracked.other_factors(adapted, held)
        if changed:
            moved = {old: new for old, new in changed.items() if old != new}
            if moved:
                told = ", ".join(f"{old!r} is {new!r}" for old, new in [*moved.items()][:4])
                warn(f"adapted weights under other names: {told}", RuntimeWarning)
            with alone(self.model):
                state = copy.copy(self._state)
                self._tracked.view(held)  # takes over how weights of other names are sharded
                state.follow_updates(adapted, changed, sharding)
                self._held = self._held._replace(state=state)
                self._tracked.remember_factors(adapted)

    def _warn_of_trained(self, names: Collection[str]) -> None:
        """Tell of weights without adapters that are trained, though their updates are held."""
        found = self._tracked.view(()).found if names else {}
        trained = sorted(n for n in names if n in found and found[n].requires_grad)
        if trained:
            warn(
                f"parameter {trained[0]!r}: got no adapter and a gradient, so that nothing holds it until "
                "consolidate makes its values the anchor",
                RuntimeWarning,
            )

    @property
    def _state(self) -> Consolidation:
        return self._held.state

    @property
    def _pending(self) -> ImportanceSum:
        return self._held.pending

    # -- tasks -------------------------------------------------------------------------------------

    def consolidate(
        self,
        batches: Iterable[Any] | None = None,
        weight: float = 1.0,
        progress: bool = False,
        importance: Mapping[str, Tensor] | None = None,
        sweeps: int = 1,
    ) -> None:
        """End of a task: its importance is merged, and the parameters as they are become its anchor.

        Args:
            batches: unlabelled data of the task, see estimate_importance. Without it the importance
                comes from the batches that were observed. Under torch.distributed, this rank's part of it,
                which may be empty: Omega_t is the mean over all ranks' samples.
            weight: multiplies this task's importance (and 1/S_t under "consistent").
            progress: show a progress bar.
            importance: instead of batches, Omega_t by name, computed elsewhere; a name left out counts as 0.
                Under merge "sum" with anchor "latest", in store "merged", it may be negative:
                W <- max(0, W + Omega_t). The same on every rank.
            sweeps: go through the batches, which must be there for it, so many times, each time for a part of
                the parameters: sums over samples take 8 bytes per parameter of that part alone. Where omega has
                less than 32 bits, the importance found is kept in bfloat16 meanwhile.

        Raises:
            RuntimeError: not exactly one of observed batches, `batches` and `importance`.
            ValueError: see estimate_importance; importance that is negative or of another shape. Subclasses:
                Diverged, a FloatingPointError, too: parameters, outputs or importance that are not finite;
                Vanished: importance at the level of rounding, under merge "consistent"; elsewhere a warning.
        """

        def refuse_others() -> None:
            observed = self._pending.samples or None
            given = {"batches": batches, "importance": importance, "observed samples": observed}
            found = [name for name, value in given.items() if value is not None]
            # Of several ranks, one may have observed nothing.
            if len(found) > 1 or (not found and self._ranks.group(self.model) is None):
                raise RuntimeError(
                    f"batches: got importance from {' and '.join(found) or 'nowhere'}, expected one of "
                    "batches, importance= and samples observed by observe(batch)"
                )

        def find(view: ModelView, call: Agreement) -> Mapping[str, Tensor]:
            if importance is not None and batches is None and not self._pending.samples:
                sharding = self._tracked.sharding
                if sharding is not None:
                    return sharding.within(call).own(importance)
                return {name: whole_tensor(t) for name, t in importance.items()}
            if sweeps > 1 and batches is not None:
                return self._in_sweeps(view, call, batches, sweeps, progress)
            return self._mean(view, call, batches, progress, refuse_others)

        with self.together("consolidate") as call:
            check_count(sweeps, "sweeps")
            if not isinstance(importance, (Mapping, type(None))):
                raise TypeError(
                    f"importance: got {type(importance).__name__}, expected tensors by parameter name"
                )
            if sweeps > 1 and iter(batches or ()) is batches:
                raise ValueError(
                    f"batches: got {type(batches).__name__}, which can be read once, for {sweeps} sweeps, "
                    "expected a list or a DataLoader"
                )
            given = {"sweeps": sweeps, "batches": "none" if batches is None else "some"}
            self._add(call, find, weight, lambda: {**given, **described_importance(importance)})

    def together(self, call: str) -> Agreement:
        """A call of this name that all ranks of process_group make together; alone, this rank's own."""
        if self._tracked.sharding is None and group_of(self.model) is not None:
            self._tracked.view(())  # refuses what was sharded after this was made
        return self._ranks.together(call, self.model)

    def _merged(self, importance: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What consolidate merges of a task's importance: all of it."""
        return importance

    def observe(self, batch: Any) -> None:
        """Gather importance online: averaged over all samples observed since the last consolidation.

        Under torch.distributed each rank keeps its own part until then, and saves its own. Under fully_shard
        every rank calls it as often, with a batch of no samples where it has none, and saves after
        consolidate only.
        """
        with alone(self.model):
            adapted = self._adapted()
            with self._tracked.measured(adapted):
                view = optimizer_view(self.model, self.exclude)
                self._follow(view)
                with self._pending.running(view):
                    self._pending.add(view, batch)
            self._tracked.remember(self._tracked.view(()) if adapted else view)

    def check(self, batch: Any) -> None:
        """Measure the importance of a batch's first two samples, to be told now what consolidate could not do.

        All is as before afterwards. What comes out is of no matter: before training it may not even be finite.

        Raises:
            ValueError: importance can't be measured; it names the model's class, and what was raised.
        """
        # Estimators may run the model in training mode, which moves running statistics.
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        try:
            measured = self._tracked.measured
            with alone(self.model), measured(self._adapted()), suppress(Diverged):
                view, total = optimizer_view(self.model, self.exclude), self._pending.empty()
                with total.running(view):
                    gather(total, view, [batch], max_samples=2)
        except Exception as error:  # of any kind: it is the user's model that fails
            raise ValueError(
                f"model: got {type(self.model).__name__}, expected one whose importance can be measured, with "
                f"forward= where it needs one ({type(error).__name__}: {error})"
            ) from error
        finally:
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.detach().copy_(before)

    def adapt(self, batches: Iterable[Any], weight: float = 1.0) -> None:
        """Unlabelled data met in deployment: one more weighted entry.

        Under anchor "own" its anchor is the present parameters, under "latest" the anchor stays. See
        consolidate.
        """

        def find(view: ModelView, call: Agreement) -> Mapping[str, Tensor]:
            return self._mean(view, call, batches)

        with self.together("adapt") as call:
            self._add(call, find, weight)

    def set_weight(self, t: int, w: float) -> None:
        """Change the weight of entry t; store "per_task" only."""
        with alone(self.model):
            self._state.set_weight(self._task(t), w)

    def drop(self, t: int) -> None:
        """Forget entry t; store "per_task" only."""
        with alone(self.model):
            state = copy.copy(self._state)
            state.drop(self._task(t))
            self._refit(self._held._replace(state=state))

    def rename(self, old: str, new: str) -> None:
        """Let what was consolidated of parameter `old` count for parameter `new` from now on.

        A parameter that is itself under another name is followed without it, as when its layer is wrapped.
        """
        for argument, name in (("old", old), ("new", new)):
            if not isinstance(name, str):
                raise TypeError(f"{argument}: got {name!r}, expected a parameter's name")
        with alone(self.model):
            if old not in self._state.memory.names and self._held.followed.get(old) == new:
                return
            state = copy.copy(self._state)
            state.rename(old, new)
            self._tracked.forget(new)
            if self._tracked.sharding is not None:
                self._tracked.sharding.rename(old, new)
            pending = self._held.renamed({} if new in self._pending.sums else {old: new})
            self._refit(self._held._replace(state=state, pending=pending))

    def _refit(self, held: _Held) -> None:
        """Hold something else from now on, once it fits the parameters that are there."""
        view = self._tracked.view(held.state.memory.names)
        held.state.fit(self._tracked.own_parameters(view))
        self._held = held

    # -- reading -----------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._tracked.model

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns on the names of parameters that are left out."""
        return self._pending.exclude

    @property
    def lam(self) -> float:
        """Strength; may be set at any time, for captured graphs too."""
        return self._state.lam

    @lam.setter
    def lam(self, lam: float) -> None:
        with alone(self.model):
            self._state.set_lam(lam)

    @property
    def omega(self) -> dict[str, Tensor]:
        """W by parameter name: value = scale * (sum W (theta - A)^2 + r).

        Views in store "merged", but for an omega_dtype of uint8, which is decoded to float32.
        """
        return {name: w for name, (w, _) in self._quadratic().items()}

    @property
    def anchor(self) -> dict[str, Tensor]:
        """A by parameter name. Views in store "merged"."""
        return {name: a for name, (_, a) in self._quadratic().items()}

    @property
    def scale(self) -> Tensor:
        """The factor of the stored quadratic, 0-dim float64."""
        return torch.tensor(self._state.scale, dtype=torch.float64)

    @property
    def alpha(self) -> Tensor:
        """alpha_t by entry, float64 of shape (num_tasks,): the factor of Omega_t in the penalty."""
        return torch.tensor(self._state.alpha, dtype=torch.float64)

    @property
    def num_tasks(self) -> int:
        """The number of entries."""
        return len(self._state.memory.entries)

    # -- save and load -----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state and settings to a safetensors file, replacing it atomically.

        Callables (`forward`, a callable `objective`) and an `importance` that is an estimator of its own are
        not saved: give them to `load` again. Under fully_shard the first rank writes the whole of it; for
        checkpoints that every rank writes its part of, see load_distributed.

        Other programs find W and A in the tensors omega.NAME and anchor.NAME, of shape (1, *shape) or
        (tasks, *shape), and in the metadata "mas_ext" as JSON the format's version, the settings, lam, scale
        and alpha.
        """

        def write(found: dict[str, Tensor]) -> None:
            state = self._state
            numbers = {
                "format": FORMAT,
                "lam": state.lam,
                "scale": state.scale,
                "alpha": state.alpha,
            }
            checkpoint.save(found, path, {**numbers, **self._settings()})

        sharding = self._tracked.sharding
        if sharding is None:
            with alone(self.model):
                write(self.state_dict())
            return
        with self.together("save") as call:
            call.refuse_different(self._common)
            sharding.on_first_rank(self.state_dict(), write, call)

    def _settings(self) -> dict[str, Any]:
        """The arguments that made this, with names in place of callables."""
        rule, estimator = self._state.rule, self._pending
        objective, forward = estimator.objective, estimator.forward
        return {
            "importance": estimator.method if type(estimator) is ImportanceSum else None,
            "objective": None if callable(objective) else objective,
            "forward": _name_of(forward),
            "alpha_sum": rule.alpha_sum,
            "gamma": rule.gamma,
            "exclude": list(estimator.exclude),
            "strength": self._strength,
            "omega_dtype": _dtype_name(rule.omega_dtype),
            "anchor_dtype": rule.anchor_dtype and _dtype_name(rule.anchor_dtype),
            "merge": rule.merge,
            "anchor": rule.anchor,
            "store": rule.store,
            "adapters": self.adapters,
        }

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        objective: Objective | None = None,
        forward: Forward | None = None,
        backend: Backend = "auto",
        importance: ImportanceSum | None = None,
        process_group: ProcessGroup | Together | None = "auto",
        state_device: StateDevice = None,
    ) -> FusedMASPenalty:
        """A penalty from a file that `save` wrote, for a model with the same parameters.

        All ranks of the process group call it together, and read the same.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file, wrong shapes, NaN, another format; no forward, objective or estimator
                where the file was made with one, which it can't hold. A subclass: IncompleteState, a file that
                lacks a tensor that it names, or has one more.
            KeyError: a parameter that the model lacks.
        """
        with Ranks(process_group).together("load", model) as call:
            tensors = checkpoint.load(path)
            check_format(tensors)
            settings = _decoded(tensors.pop("settings", None))
            names = settings["exclude"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"exclude: got {names!r} in the file, expected a list of patterns")
            if not isinstance(settings["strength"], dict):
                raise ValueError(
                    f"strength: got {settings['strength']!r} in the file, expected factors by pattern"
                )
            for key in ("importance", "objective", "forward"):
                if not isinstance(settings[key], (str, type(None))):
                    raise ValueError(f"{key}: got {settings[key]!r} in the file, expected a name")
            for key in ("omega_dtype", "anchor_dtype"):
                settings[key] = getattr(torch, str(settings[key]), settings[key])
            saved, named = settings.pop("objective"), settings.pop("forward")
            if settings["importance"] is None:
                if importance is None:
                    raise ValueError("importance: got none, expected the estimator that was used")
                settings["importance"] = importance
            elif importance is not None:
                raise ValueError(
                    f"importance: got {type(importance).__name__}, expected none, as the file was made with "
                    f"{settings['importance']!r}"
                )
            elif saved is None and objective is None:
                raise ValueError(
                    "objective: got none, expected the callable that the file can't hold"
                )
            elif named not in (None, _name_of(default_forward)) and forward is None:
                raise ValueError(
                    f"forward: got none, expected {named}, with which the file was made and which it can't hold"
                )
            penalty = cls(
                model,
                objective=objective or saved,
                forward=forward,
                backend=backend,
                process_group=process_group,
                state_device=state_device,
                **settings,
            )
            penalty._load(tensors, call)
        return penalty

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        with alone(self.model):
            view = optimizer_view(self.model, self.exclude)
            self._follow(view)
            if not self._tracked.was_sharded_since(view):  # else a new penalty takes what is held
                self.bound()  # in the shapes that parameters have now
            found = {**self._state.tensors(self._tracked.sharding), **self._pending.tensors()}
        found["settings"] = checkpoint.encode(self._settings())
        if self._tracked.sharding is not None:
            found = self._tracked.sharding.join_state(found)
        destination.update({prefix + key: t.detach() for key, t in found.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        missing, _, _ = args[-3:]
        found = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if "config" in found:
            self.load_state_dict(found)
        else:
            missing.append(prefix + "config")

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over a state_dict(), lam included; nothing changes on an error.

        All ranks of the process group call it together, with the same.

        Where it comes from a penalty with another exclude, strength, importance, objective, forward, alpha_sum
        or gamma, a warning says so: what is consolidated from now on follows this penalty's own.

        Raises:
            KeyError: a parameter that the model lacks or `exclude` leaves out.
            IncompleteState: a ValueError and a KeyError: state that lacks a part, or has one more.
            ValueError: wrong shapes, NaN, another merge rule, store or format.
        """
        with alone(self.model), self.together("load_state_dict") as call:
            if not isinstance(state_dict, Mapping):
                raise TypeError(
                    f"state: got {type(state_dict).__name__}, expected what state_dict() gave"
                )
            self._load(state_dict, call)
        return nn.modules.module._IncompatibleKeys([], [])

    def _load(self, found: Mapping[str, Tensor], call: Agreement) -> None:
        found = dict(found)
        call.refuse_different(lambda: {"state": sorted(found)})
        settings = _decoded(found.pop("settings")) if "settings" in found else {}
        view = self._tracked.view(self._state.memory.names)
        theta = self._tracked.own_parameters(view)
        sharding = self._tracked.sharding and self._tracked.sharding.within(call)
        if sharding is None:
            found = {key: whole_tensor(t) for key, t in found.items()}
        else:
            found = sharding.own_state(found)
        pending = self._pending.empty()
        observed = {key: t for key, t in found.items() if key.startswith("pending")}
        pending.load_tensors(observed, theta)
        state = copy.copy(self._state)
        state.load_tensors({k: t for k, t in found.items() if k not in observed}, theta, sharding)
        self._refuse_other_adapters(state.memory)
        call.refuse_different(lambda: self._common(state))
        self._warn_of_other(settings)
        self._tracked.bind(state.memory.groups, view)
        with call.uninterrupted():
            call.settle()
            self._held = _Held(state, pending, {})

    # -- inside ------------------------------------------------------------------------------------

    def _warn_of_other(self, settings: Mapping[str, Any]) -> None:
        """Tell of a state from a penalty with other settings, of those that decide what is held.

        Older states have none, and older files no forward.
        """
        own = self._settings()
        known = [key for key in _DECISIVE if key in settings]
        other = [
            k for k in known if settings[k] != own[k] and (k, settings[k]) != ("forward", None)
        ]
        if other:
            told = "; ".join(f"{key} {settings[key]!r}, here {own[key]!r}" for key in other)
            warn(
                f"state: got one from a penalty with {told}; what it holds stays, and what is consolidated "
                "from now on follows this penalty's own",
                RuntimeWarning,
            )

    def _refuse_other_adapters(self, memory: Memory) -> None:
        """Raise a ValueError for a state that holds factors one by one, or products, where this does not."""
        view, names = self._tracked.view(()), memory.names
        if self.adapters == "parameters" and memory.updates:
            raise ValueError(
                f"state: got {next(iter(memory.updates))!r}, whose low-rank update is held, expected factors "
                'held one by one, or a penalty with adapters="weights"'
            )
        for name, weight in self._adapted().items():
            for factor in map(view.name_of, weight.parameters()):
                if factor in names:
                    raise ValueError(
                        f"state: got {factor!r}, held by itself, expected {name!r}, whose update is held, or "
                        'a penalty with adapters="parameters"'
                    )

    def extra_repr(self) -> str:
        """What print() shows."""
        rule = self._state.rule
        choices = f"merge={rule.merge!r}, anchor={rule.anchor!r}, store={rule.store!r}"
        return f"lam={self.lam:g}, {choices}, num_tasks={self.num_tasks}"

    def _total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over groups, and ranks, on the first one's device, float64 if any is."""
        total = values[0]
        if len(values) > 1:
            wide = any(v.dtype == torch.float64 for v in values)
            total = torch.stack([v.to(total.device, torch.float64) for v in values]).sum()
            total = total.to(torch.float64 if wide else torch.float32)
        return total if self._tracked.sharding is None else self._tracked.sharding.sum(total)

    def _task(self, t: int) -> int:
        if self._state.rule.store != "per_task":
            raise RuntimeError('t: entries can be changed with store="per_task" only')
        if not isinstance(t, Integral) or isinstance(t, bool):
            raise TypeError(f"t: got {t!r}, expected the number of an entry")
        if not 0 <= t < self.num_tasks:
            raise IndexError(f"t: got {t}, expected a number from 0 to {self.num_tasks - 1}")
        return t

    def _mean(
        self,
        view: ModelView,
        call: Agreement,
        batches: Iterable[Any] | None,
        progress: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Tensor]:
        """The mean over all ranks' samples: of each one's batches, or of what it observed."""
        total = self._checked(self._sum(view, call, batches, progress, check), view, call)
        # What was observed is still there if a check fails.
        return total.mean() if total.sums is self._pending.sums else total.into_mean()

    def _sum(
        self,
        view: ModelView,
        call: Agreement,
        batches: Iterable[Any] | None,
        progress: bool,
        check: Callable[[], None] = lambda: None,
    ) -> ImportanceSum:
        """The sum over all ranks' samples, after a check: of each one's batches, or of what it observed."""

        def collect() -> SampleSums:
            observed = self._pending.totals
            total = self._pending.with_totals(observed)
            if batches is not None:
                total = self._pending.empty()
            check()
            with total.running(view, call):
                if batches is not None:
                    gather(total, view, batches, progress=progress)
            return total.totals

        summed = self._ranks.sum(collect, view.model, view.parameters(), call)
        return self._pending.with_totals(summed)

    def _in_sweeps(
        self, view: ModelView, call: Agreement, batches: Iterable[Any], sweeps: int, progress: bool
    ) -> dict[str, Tensor]:
        """The mean over all ranks' samples, one part of the parameters after another."""
        trained = {n: p for n, p in view.parameters().items() if p.requires_grad}
        narrow = self._state.rule.omega_dtype in (torch.bfloat16, torch.uint8)
        found, objective = {}, 0.0
        for part in parts_of_equal_size(trained, sweeps):
            with frozen(p for name, p in trained.items() if name not in part):
                total = self._sum(view, call, batches, progress)
            objective = total.objective_sum / max(total.samples, 1)
            mean = total.into_mean()
            for name in [*mean]:
                t = mean.pop(name)
                found[name] = t.bfloat16() if narrow else t
        total = self._pending.with_totals(SampleSums(found, 1, objective))
        return self._checked(total, view, call).sums

    def _checked(self, total: ImportanceSum, view: ModelView, call: Agreement) -> ImportanceSum:
        """The total, unless it is at the level of rounding: an error where it would be divided by its sum."""
        sharding = self._tracked.sharding
        try:
            if total.sums:
                total.refuse_rounding_noise(
                    self._tracked.own_parameters(view), sharding and sharding.within(call)
                )
        except Vanished as error:
            # Divided by its sum it would hold all parameters at random; otherwise it holds none.
            if self._state.rule.merge == "consistent":
                raise
            warn(str(error), RuntimeWarning)
        return total

    def _add(
        self,
        call: Agreement,
        find: Callable[[ModelView, Agreement], Mapping[str, Tensor]],
        weight: float,
        ending: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        """Merge the importance that is found, while no other thread runs the model.

        ending: tells what else the call was given, where it ends a task; None where it does not.
        """
        with alone(self.model):
            adapted, known = self._adapted(), self._state.memory.names
            with self._tracked.measured(adapted) as weights:
                view = self._tracked.view(known)
                self._follow(view)
                given = {"weight": weight, "ends a task": ending is not None}
                call.refuse_different(
                    lambda: {
                        **given,
                        **(ending or dict)(),
                        **self._common(),
                        **described_model(view),
                    }
                )
                sharding = self._tracked.sharding and self._tracked.sharding.within(call)
                self._follow_updates(adapted, sharding)
                names = {view.name_of(p): name for name, p in weights.items()}
                omega = {names.get(name, name): t for name, t in find(view, call).items()}
                _refuse_factors(omega, adapted, view)
                self._warn_of_replaced(view)
                self._warn_of_hidden(omega, view)
                if ending is not None:
                    omega = dict(self._merged(omega))
                for name in omega:
                    factor = strength_of(name, self._strength)
                    if factor != 1:
                        omega[name] = factor * omega[name]
                theta = {names.get(n, n): p for n, p in self._tracked.own_parameters(view).items()}
                state = copy.copy(self._state)
                state.add_task(theta, omega, weight, ending is not None, sharding, adapted)
                pending = self._pending.empty() if ending is not None else self._pending
            self._tracked.bind(state.memory.groups, self._tracked.view(known) if adapted else view)
            with call.uninterrupted():
                call.settle()
                self._held = self._held._replace(state=state, pending=pending)
            self._tracked.remember_factors(adapted)

    def _common(self, state: Consolidation | None = None) -> dict[str, object]:
        """What all ranks have in common; with another state than this one's, if it is given."""
        state = state or self._state
        # Sums may differ in rounding between kinds of devices.
        tasks = [(float(f"{total:.3g}"), weight) for total, weight in state.memory.entries]
        names = sorted(state.memory.names)
        return {**self._settings(), "lam": state.lam, "tasks": tasks, "consolidated": names}

    def _quadratic(self) -> dict[str, tuple[Tensor, Tensor]]:
        self.bound()
        join = self._tracked.join
        return {n: (join(n, w), join(n, a)) for n, (w, a) in self._state.quadratic().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedMASPenalty:
        """.to(), .cuda(), .half(): the state follows the parameters' devices and keeps its dtypes."""
        totals = self._pending.totals
        moved = {name: t.to(fn(t.new_empty(0)).device) for name, t in totals.sums.items()}
        self._pending.totals = totals._replace(sums=moved)
        return self


_NOT_PROXIMAL = (
    "mode: got 'proximal' for low-rank updates held in weight space, expected 'gradient', as the penalty's "
    'minimiser has no closed form in the factors, or adapters="parameters"'
)


def _refuse_factors(
    importance: Mapping[str, Tensor], adapted: Mapping[str, AdaptedWeight], view: ModelView
) -> None:
    """Raise a KeyError for importance of a factor whose product is held."""
    for name, weight in adapted.items():
        for factor in map(view.name_of, weight.parameters()):
            if factor in importance:
                raise KeyError(
                    f"importance: got {factor!r}, expected {name!r}, whose update is held, or "
                    'adapters="parameters"'
                )


# A leaf that is there already: a compiled function can't make one.
_NOTHING = torch.zeros((), requires_grad=True)

# Settings that decide what is held and how strongly. Merge rules that differ are refused, and dtypes may.
_DECISIVE = ("importance", "objective", "forward", "exclude", "strength", "alpha_sum", "gamma")
_SETTINGS = (*_DECISIVE, *("adapters", "merge", "anchor", "store", "omega_dtype", "anchor_dtype"))


def _decoded(settings: Tensor | None) -> dict[str, Any]:
    """The settings that a state has in bytes."""
    return checkpoint.decode("settings", settings, _SETTINGS, _upgraded)


def _name_of(function: Any) -> str:
    """A callable's name, or that of its class."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _upgraded(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file as they are written today, of which older ones lack some."""
    strength = settings.pop("strength", {})  # patterns, not settings
    lacking = {"anchor_dtype": None, "adapters": "parameters", "forward": None}
    return {**lacking, **separate_anchor(settings), "strength": strength}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, made where there are none and dense where they are sparse."""
    grads = [p.grad for p in parameters]
    if any([g is None or g.is_sparse for g in grads]):  # noqa: C419  faster
        for p, g in zip(parameters, grads, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        grads = [p.grad for p in parameters]
    return cast("list[Tensor]", grads)


def _grads_by_id(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    return dict(zip(map(id, parameters), _grads(parameters), strict=True))
