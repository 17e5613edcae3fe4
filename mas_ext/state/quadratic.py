"""The state of consolidation: one quadratic for any number of tasks, and how tasks enter it.

sum_t alpha_t Omega_t (theta - theta*_t)^2 is a quadratic in theta. It is kept as
scale * (sum_i W_i (theta_i - A_i)^2 + r) in two buffers (store "merged"), or task by task (store
"per_task"). Parameters are named tensors here; models and estimators are not known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mas_ext._arguments import check_factor
from mas_ext.failures import Diverged, IncompleteState, Vanished
from mas_ext.kernels.dtypes import DTYPES, compute_dtype
from mas_ext.kernels.flat_state import flat_view
from mas_ext.kernels.merge import merge_, merge_omega_
from mas_ext.kernels.warning import warn
from mas_ext.parameters.adapters import AdaptedWeight
from mas_ext.parameters.fsdp import Sharding
from mas_ext.parameters.names import check_supported
from mas_ext.state import files as checkpoint
from mas_ext.state.buffers import (
    Group,
    Memory,
    ParameterState,
    add_anchors,
    flat_offsets,
    omega_groups,
)
from mas_ext.state.low_rank import (
    HeldWeight,
    UpdateGroup,
    bound_updates,
    followed,
    keys_of_updates,
    pack_updates,
    unpack_updates,
    with_task,
)
from mas_ext.state.merge_rules import MergeRule, TaskEntry, separate_anchor
from mas_ext.state.sharded_updates import ShardedUpdates

FORMAT = 1


class Consolidation:
    """What is known of the tasks, and the rule by which it changes; a change is made whole or not at all."""

    def __init__(self, rule: MergeRule, lam: float) -> None:
        self.rule = rule
        self.memory = Memory(check_factor(lam, "lam"), [], [], {}, {}, {})

    # -- reading -----------------------------------------------------------------------------------

    @property
    def lam(self) -> float:
        """The strength."""
        return self.memory.lam

    @property
    def scale(self) -> float:
        """The factor of the stored quadratic."""
        return self.rule.scale(self.lam, self.memory.entries)

    @property
    def alpha(self) -> list[float]:
        """alpha_t of every entry."""
        return self.rule.alpha(self.lam, self.memory.entries)

    def quadratic(self) -> dict[str, tuple[Tensor, Tensor]]:
        """W and A by name, such that the penalty is scale * (sum W (theta - A)^2 + r).

        Of a weight that low-rank adapters update, theta is the update, and A is that of the anchor.
        """
        if self.rule.store == "merged":
            own = {n: (p.omega[0], p.anchor[0]) for n, p in self.memory.parts().items()}
            return own | {n: (w.weight, w.update) for n, w in self.memory.updates.items()}
        gains = self.rule.gains(self.memory.entries)
        merged = {}
        for name, p in self.memory.parts().items():
            weight = torch.zeros_like(p.anchor[0], dtype=compute_dtype(p.anchor.dtype))
            anchor = p.anchor[-1].clone()
            for gain, omega, own in zip(gains, p.omega, p.anchor, strict=True):
                new = gain * omega.to(weight.dtype)
                weight = weight + new
                share = torch.where(weight > 0, new / weight, torch.zeros_like(weight))
                anchor = anchor + share * (own - anchor)
            merged[name] = (weight, anchor)
        return merged

    # -- changing ----------------------------------------------------------------------------------

    def set_lam(self, lam: float) -> None:
        """Change the strength, in place where captured graphs read it."""
        self._take_over(self.memory._replace(lam=check_factor(lam, "lam")))

    def set_weight(self, task: int, weight: float) -> None:
        """Change one task's weight, in place where captured graphs read alpha."""
        entries = list(self.memory.entries)
        entries[task] = entries[task]._replace(weight=check_factor(weight, "weight"))
        self._warn_of_weakened(entries)
        self._take_over(self.memory._replace(entries=entries))

    def bound_updates(
        self, adapted: Mapping[str, AdaptedWeight], sharding: Sharding | None = None
    ) -> Iterator[UpdateGroup | ShardedUpdates]:
        """The state of adapted weights, as the kernels take it."""
        held = self.memory.updates

        def factor(device: torch.device) -> Tensor:
            known = self.memory.factors
            if device not in known:
                known[device] = torch.tensor(self.scale, dtype=torch.float64, device=device)
            return known[device]

        def bind(products: Mapping[str, AdaptedWeight]) -> Iterator[UpdateGroup]:
            return bound_updates(held, products, factor, self.rule)

        if sharding is None:
            return bind(adapted)
        own = {n: adapted[n] for n in held if n in adapted and adapted[n].products}
        return iter([ShardedUpdates(own, sharding, bind)] if own else [])

    def follow_updates(
        self,
        adapted: Mapping[str, AdaptedWeight],
        names: Mapping[str, str],
        sharding: Sharding | None = None,
    ) -> None:
        """Take adapted weights under other names, by their old ones; no anchor where an adapter was merged."""
        moved = {names.get(name, name): weight for name, weight in self.memory.updates.items()}
        changed = {name: moved[name] for name in names.values()}
        moved |= followed(changed, adapted, self.rule, sharding)
        self.memory = self.memory._replace(updates=moved)

    def fit(self, theta: Mapping[str, Tensor]) -> None:
        """Follow parameters that were moved, cast, widened, removed or brought back."""
        self._take_over(self._fitted(self.memory, theta))

    def add_task(
        self,
        theta: Mapping[str, Tensor],
        importance: dict[str, Tensor],
        weight: float = 1.0,
        move_anchor: bool = True,
        sharding: Sharding | None = None,
        adapted: Mapping[str, AdaptedWeight] | None = None,
    ) -> None:
        """Merge one task's importance, with the present parameters as its anchor.

        Args:
            theta: the model's parameters by name; those neither known nor in `importance` are ignored.
            importance: Omega_t by name, in the parameters' shapes; a name left out counts as 0. At least 0,
                unless the rule takes it `signed`, where W <- max(0, W + Omega_t). It is taken out of the
                dictionary as it is merged.
            weight: multiplies Omega_t (and 1/S_t under "consistent").
            move_anchor: under the anchor "latest", whether that moves to theta.
            sharding: how the parameters are sharded, if these are one rank's shards. What is checked, and S_t,
                is of all ranks'.
            adapted: the weights that low-rank adapters update, which are in theta, too: of them the update is
                held.

        Raises:
            Diverged: parameters or importance that are not finite.
            Vanished: importance at the level of rounding, under "consistent".
            ValueError: importance that is negative or of another shape.
            TypeError: importance that is no tensor.
        """
        weight = check_factor(weight, "weight")
        adapted = adapted or {}
        total = self._check_importance(theta, importance, sharding, adapted)
        if total is None:
            warn(
                "consolidate: no parameter requires a gradient, nothing is consolidated",
                RuntimeWarning,
            )
            return
        entry = TaskEntry(total, weight)
        entries = [*self.memory.entries, entry]
        old = self.memory.parts()
        gone = sorted(name for name in old if name not in theta)
        if gone:
            warn(
                f"consolidate: the model has no parameter {', '.join(map(repr, gone[:4]))}"
                f"{', ...' if len(gone) > 4 else ''} any more; what was remembered of it is dropped "
                "(rename() keeps it)",
                RuntimeWarning,
            )
        for name, held in self.memory.updates.items():
            if name in importance and name not in adapted:
                # After a merge the weight itself is trained: W counts for it.
                x = theta[name].detach()
                old[name] = ParameterState(
                    held.weight[None], x[None], torch.zeros(()).to(held.omega.device, torch.float64)
                )
        names = [n for n in theta if (n in old or n in importance) and n not in adapted]
        known = {name: theta[name].detach() for name in names}
        merged = self.rule.store == "merged"
        gain = self.rule.gains(entries)[-1] if merged else 1.0
        if not gain <= torch.finfo(torch.float32).max:
            raise Diverged(
                f"importance: got a sum of {total} and a weight of {weight}, expected a factor in omega that "
                f"float32 holds, not {gain:.3g}"
            )
        updates = self._merged_updates(adapted, importance, gain, move_anchor, sharding)
        rows, latest = self._rows(entries), merged and self.rule.anchor == "latest"
        groups = omega_groups(known, old, rows, self.rule, importance, gain, sharding)
        if latest:  # importance is freed before anchors take memory
            self._merge(groups, known, importance, gain, sharding)
        for group in groups:
            add_anchors(group, known, {} if latest and move_anchor else old, self.rule)
        if not merged:
            self._write_row(groups, known, importance, len(entries) - 1, move_anchor)
        elif not latest:
            self._merge(groups, known, importance, gain, sharding)
        for group in groups:
            _finish(group, sharding)
        self._warn_of_weakened(entries)
        self._take_over(Memory(self.lam, entries, groups, {}, updates, {}))

    def drop(self, task: int) -> None:
        """Forget one task; store "per_task" only."""
        kept = [t for t in range(len(self.memory.entries)) if t != task]
        entries = [self.memory.entries[t] for t in kept]
        parts = {
            name: ParameterState(p.omega[kept], p.anchor[kept], p.remainder)
            for name, p in self.memory.parts().items()
            if kept
        }
        self.memory = Memory(self.lam, entries, [], parts, {}, {})

    def rename(self, old: str, new: str) -> None:
        """Give the state of one parameter to another name."""
        known = self.memory.parts().keys() | self.memory.updates.keys()
        if old not in known:
            raise KeyError(f"old: got {old!r}, expected one of the consolidated parameters")
        if new in known:
            raise KeyError(f"new: got {new!r}, which is a consolidated parameter already")
        self.move({old: new})

    def move(self, names: Mapping[str, str]) -> None:
        """Give the state of parameters to other names, of which none has one, all at once."""
        moved = {names.get(name, name): p for name, p in self.memory.parts().items()}
        updates = {names.get(name, name): w for name, w in self.memory.updates.items()}
        self.memory = self.memory._replace(groups=[], absent=moved, updates=updates)

    # -- inside ------------------------------------------------------------------------------------

    def _check_importance(
        self,
        theta: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
        sharding: Sharding | None,
        adapted: Collection[str],
    ) -> float | None:
        """S_t, after every check; None where there is nothing to consolidate."""
        if not importance:
            return None
        anchored = self.memory.names | importance.keys()
        known = [name for name in theta if name in anchored]
        for name in known:
            check_supported(name, theta[name])
        finite = _numbers([torch.isfinite(theta[name]).all() for name in known])
        for name, omega in importance.items():
            if name not in theta:
                raise KeyError(f"importance: got {name!r}, which the model has no parameter for")
            if not isinstance(omega, Tensor):
                raise TypeError(
                    f"importance of {name!r}: got {type(omega).__name__}, expected a tensor"
                )
            if omega.is_complex() or omega.layout != torch.strided or omega.is_meta:
                raise TypeError(
                    f"importance of {name!r}: got {omega.dtype}, {omega.layout} on {omega.device}, expected "
                    "real numbers in a dense tensor with data"
                )
            if omega.shape != theta[name].shape:
                raise ValueError(
                    f"importance of {name!r}: got shape {tuple(omega.shape)}, expected "
                    f"{tuple(theta[name].shape)}"
                )
        sums = _numbers([t.sum(dtype=torch.float64) for t in importance.values()])
        least = _numbers([t.min() if t.numel() else torch.zeros(()) for t in importance.values()])
        if sharding is not None:
            sums = sharding.add_up(sums)
            finite, least = sharding.least(finite), sharding.least(least)
        for name, good in zip(known, finite.tolist(), strict=True):
            if not good:
                raise Diverged(
                    f"parameter {name!r}: got NaN or Inf, expected finite values; where training diverged, a "
                    "smaller lam or the proximal form helps"
                )
        for name, s, low in zip(importance, sums.tolist(), least.tolist(), strict=True):
            if not math.isfinite(s):
                raise Diverged(f"importance of {name!r}: got a sum of {s}, expected finite values")
            if not self.rule.signed and low < 0:
                raise ValueError(
                    f"importance of {name!r}: got values with minimum {low}, expected values from 0 up"
                )
        if sharding is not None:
            # Elsewhere the estimator tells one case from the other, and refuses it.
            found = zip(importance, sums.tolist(), strict=True)
            _warn_of_fused([name for name, s in found if s == 0 and name in adapted])
        total = float(sums.sum())
        if not math.isfinite(total):
            raise Diverged(f"importance: got a sum of {total}, expected a finite one")
        if self.rule.merge == "consistent":
            before = [entry.total for entry in self.memory.entries]
            if total <= 1e-6 * (statistics.median(before) if before else 0.0):
                raise Vanished(
                    f"importance: got a sum of {total:.3g}, expected one above rounding level"
                    f"{f' ({statistics.median(before):.3g} is the median so far)' if before else ''}; "
                    "the usual causes are an output of constant norm, such as a normalised embedding "
                    "(choose another objective), or a training that collapsed (choose a smaller lr)"
                )
        return total

    def _rows(self, entries: list[TaskEntry]) -> int:
        return 1 if self.rule.store == "merged" else len(entries)

    def _write_row(
        self,
        groups: list[Group],
        theta: Mapping[str, Tensor],
        importance: Mapping[str, Tensor],
        row: int,
        move_anchor: bool,
    ) -> None:
        # The latest anchor is that of every row.
        latest = self.rule.anchor == "latest"
        for group in groups:
            omega, anchor = group.state.omega[row], group.state.anchor
            for name, offset in zip(group.names, group.state.offsets, strict=True):
                x = theta[name]
                source = x if move_anchor or not latest else flat_view(anchor[0], offset, x)
                for each in anchor if latest else anchor[row:]:
                    flat_view(each, offset, x).copy_(source)
                if name in importance:
                    flat_view(omega, offset, x).copy_(group.encoded(importance[name]))

    def _merge(
        self,
        groups: list[Group],
        theta: Mapping[str, Tensor],
        importance: dict[str, Tensor],
        gain: float,
        sharding: Sharding | None,
    ) -> None:
        """One task into omega, and into anchors where each has its own; its importance is freed meanwhile."""
        keep, entry = self.rule.keep, len(self.memory.entries)
        for group in groups:
            state, place = group.state, group.state.omega.device
            for i, (name, shift) in enumerate(
                zip(group.names, _shifts(group, sharding), strict=True)
            ):
                x, offset = theta[name], state.offsets[i]
                new = torch.zeros_like(x, dtype=compute_dtype(x.dtype), device=place)
                if name in importance:
                    new.copy_(importance.pop(name))
                numbers = (keep, gain / group.unit)
                if self.rule.anchor == "latest":
                    omega = state.omega[0, offset : offset + x.numel()]
                    merge_omega_(omega, new, *numbers, entry, offset + shift, state.native)
                else:
                    own = group.subset([i])
                    (added,) = merge_(own, [x.to(place)], [new], *numbers, True, entry, shift)
                    group.remainders[i] *= keep
                    group.remainders[i] += added.to(group.remainders.device) * group.unit

    def _merged_updates(
        self,
        adapted: Mapping[str, AdaptedWeight],
        importance: dict[str, Tensor],
        gain: float,
        move_anchor: bool,
        sharding: Sharding | None,
    ) -> dict[str, HeldWeight]:
        """The state of adapted weights with one task more, whose importance is freed as it is merged."""
        keep, known = self.rule.keep, self.memory.updates
        # Without adapters, W alone is left: the weight does not move.
        updates = {
            name: weight._replace(unit=keep * weight.unit, anchor={})
            for name, weight in known.items()
            if name not in adapted and name not in importance
        }
        now = {n: w for n, w in adapted.items() if n in importance or n in known}
        held = {name: known[name] for name in now if name in known}
        numbers = (gain, len(self.memory.entries), move_anchor)
        return updates | with_task(held, now, importance, self.rule, *numbers, sharding)

    def _warn_of_weakened(self, entries: list[TaskEntry]) -> None:
        """Tell of old tasks whose strength falls to a third of what it was, a ninth, and so on."""
        before = self.rule.strengths(self.memory.entries)
        after = self.rule.strengths(entries)[: len(before)]
        falls = [
            [math.floor(1e-9 - math.log(s, 3)) if s > 0 else 0 for s in each]
            for each in (before, after)
        ]
        weak = [t for t, (old, new) in enumerate(zip(*falls, strict=True)) if new > max(old, 0)]
        if weak:
            t = min(weak, key=after.__getitem__)
            warn(
                f"consolidate: task {t} is held with {after[t]:.2g} of the strength that it had at first, as "
                f'merge="consistent" evens out sums of importance, here {entries[t].total:.3g} of task {t} and '
                f'{entries[-1].total:.3g} of the last; merge="sum" leaves strengths as they are',
                RuntimeWarning,
            )

    def _fitted(self, memory: Memory, theta: Mapping[str, Tensor]) -> Memory:
        """A memory in new groups for these parameters; the parts of absent ones are set aside."""
        parts, rows = memory.parts(), self._rows(memory.entries)
        known = {name: x for name, x in theta.items() if name in parts}
        absent = {name: p for name, p in parts.items() if name not in theta}
        groups = omega_groups(known, parts, rows, self.rule)
        for group in groups:
            add_anchors(group, known, parts, self.rule)
        return memory._replace(groups=groups, absent=absent)

    def _take_over(self, memory: Memory) -> None:
        """Hold this from now on, in one assignment; after an error or an interruption, what was held before."""
        try:
            self._tell_kernels(memory)
            self.memory = memory
        except BaseException:
            self._tell_kernels(self.memory)
            raise

    def _tell_kernels(self, memory: Memory) -> None:
        """Write the factor of each row where the kernels read it; a ValueError unless all are finite."""
        alpha = self.rule.alpha(memory.lam, memory.entries)
        scale = self.rule.scale(memory.lam, memory.entries)
        factors = [scale] if self.rule.store == "merged" else alpha
        units = [group.unit for group in memory.groups]
        units += [weight.unit for weight in memory.updates.values()]
        largest = max([1.0, *units])
        if not all(math.isfinite(a * largest) for a in (*factors, *alpha)):
            raise ValueError(
                f"lam: got {memory.lam}, expected one that is finite times the tasks' weights "
                f"{[entry.weight for entry in memory.entries]}"
            )
        for group in memory.groups:
            group.state.alpha.copy_(torch.tensor(factors, dtype=torch.float64) * group.unit)
        for factor in memory.factors.values():
            factor.fill_(scale)

    # -- state dict --------------------------------------------------------------------------------

    def tensors(self, sharding: Sharding | None = None) -> dict[str, Tensor]:
        """The state as named tensors; what is no tensor as JSON in bytes.

        sharding: of what this state is one rank's; of adapted weights, that of all ranks is what is told.
        """
        config: dict[str, Any] = {
            "format": FORMAT,
            "merge": self.rule.merge,
            "anchor": self.rule.anchor,
            "store": self.rule.store,
            "lam": self.lam,
            "entries": [list(entry) for entry in self.memory.entries],
            "names": list(self.memory.parts()),
            "absent": list(self.memory.absent),
        }
        updates, told = pack_updates(self.memory.updates, sharding)
        if told:  # what has none is read by versions that know of none
            config["updates"] = told
        found = {"config": checkpoint.encode(config), **updates}
        for name, p in self.memory.parts().items():
            found.update({f"{kind}.{name}": t for kind, t in p._asdict().items()})
        return found

    def load_tensors(
        self,
        found: Mapping[str, Tensor],
        theta: Mapping[str, Tensor],
        sharding: Sharding | None = None,
    ) -> None:
        """Take over what `tensors` gave, for these parameters; nothing changes on an error.

        sharding: of what theta are one rank's shards.
        """
        keys = (
            "format",
            "merge",
            "anchor",
            "store",
            "lam",
            "entries",
            "names",
            "absent",
            "updates",
        )
        check_format(found)
        config = checkpoint.decode(
            "config", found.get("config"), keys, lambda c: {"updates": {}, **separate_anchor(c)}
        )
        for key in ("merge", "anchor", "store"):
            own = getattr(self.rule, key)
            if config[key] != own:
                raise ValueError(f"state: got {key} {config[key]!r}, expected {own!r}")
        lam, entries = _checked(config, self.rule)
        expected = {f"{kind}.{name}" for kind in ParameterState._fields for name in config["names"]}
        expected |= keys_of_updates(config["updates"])
        for key in sorted(expected ^ (set(found) - {"config"})):
            got, wanted = ("no", "one") if key in expected else ("a", "none")
            raise IncompleteState(f"state: got {got} {key!r}, expected {wanted}")
        parts = {
            name: ParameterState(*(found[f"{kind}.{name}"] for kind in ParameterState._fields))
            for name in config["names"]
        }
        rows = self._rows(entries)
        for name, p in parts.items():
            if name not in theta and name not in config["absent"]:
                raise KeyError(
                    f"state: got {name!r}, which the model has no parameter for, or which is excluded"
                )
            shape = (rows, *(theta[name].shape if name in theta else p.omega.shape[1:]))
            _check_part(name, p, shape)
        device = next((x.device for x in theta.values()), torch.device("cpu"))
        place = torch.device(self.rule.state_device or device)
        updates = unpack_updates(config["updates"], found, place, sharding)
        memory = self._fitted(Memory(lam, entries, [], parts, updates, {}), theta)
        for group in memory.groups:
            for i, name in enumerate(group.names):
                if not all(t.isfinite().all() for t in group.part(i)):
                    raise Diverged(
                        f"state of {name!r}: got values that overflow beside {group.layout[i][0]}, expected "
                        "smaller ones"
                    )
        self._take_over(memory)


def _warn_of_fused(names: Sequence[str]) -> None:
    """Tell of adapted weights whose importance is zero."""
    if names:
        warn(
            f"importance of {names[0]!r}: got zero, so that the task adds nothing to what holds its update; "
            "expected of a layer without influence, while one kernel for a weight and its adapter asks for "
            'adapters="parameters"',
            RuntimeWarning,
        )


def _numbers(each: Sequence[Tensor]) -> Tensor:
    """0-dim tensors of any device as one in float64, on the CPU."""
    return torch.tensor([t.item() for t in each], dtype=torch.float64)


def _shifts(group: Group, sharding: Sharding | None) -> list[int]:
    """How much further each part would lie in a state of whole parameters, where one process has it."""
    if sharding is None:
        return [0] * len(group.names)
    sizes, before = zip(*map(sharding.place, group.names), strict=True)
    lie = zip(flat_offsets(sizes), before, group.state.offsets, strict=False)
    return [whole + start - own for whole, start, own in lie]


def _finish(group: Group, sharding: Sharding | None) -> None:
    """Share a changed group's remainders among the ranks; Diverged on all of them where omega overflowed."""
    if group.state.omega.numel():
        # 0 times what is not finite is NaN, which goes to every rank with the sum.
        group.remainders += 0.0 * group.state.omega.max().to(group.remainders)
    if sharding is not None:
        sharding.share(group.remainders)
    group.add_up()
    if not torch.isfinite(group.remainders).all():
        parts = {name: group.part(i) for i, name in enumerate(group.names)}
        bad = [name for name, p in parts.items() if not p.omega.isfinite().all()]
        bad += [name for name, p in parts.items() if not p.remainder.isfinite()]
        raise Diverged(
            f"importance of {bad[0]!r}: got values with which omega overflows {group.state.omega.dtype}, "
            "expected smaller ones"
        )


def check_format(found: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for a state of another format, which may differ in anything else."""
    got = checkpoint.decode("config", found.get("config")).get("format")
    if got != FORMAT:
        hint = "; update mas_ext" if isinstance(got, int) and got > FORMAT else ""
        raise ValueError(f"state: got format {got!r}, expected {FORMAT}{hint}")


def _checked(config: Mapping[str, Any], rule: MergeRule) -> tuple[float, list[TaskEntry]]:
    """lam and the entries of a loaded configuration, after a check of all that it says."""
    names, absent, entries = (config[key] for key in ("names", "absent", "entries"))
    if not _are_names(names) or not _are_names(absent) or not set(absent) <= set(names):
        raise ValueError("state: got a 'config' with wrong names or absent, expected names")
    pairs = isinstance(entries, list) and all(
        isinstance(entry, list) and len(entry) == 2 for entry in entries
    )
    if not pairs or (names and not entries):
        raise ValueError(
            "state: got a 'config' with wrong entries, expected [total, weight] of each"
        )
    lowest = -math.inf if rule.signed else 0.0
    try:
        lam = _plain_number(config["lam"], "lam")
        found = [
            TaskEntry(_plain_number(total, "total", lowest), _plain_number(weight, "weight"))
            for total, weight in entries
        ]
    except ValueError as error:
        raise ValueError(
            f"state: got a 'config' with wrong lam or entries ({error}), expected numbers"
        ) from error
    if rule.merge == "consistent" and any(total == 0 for total, _ in found):
        raise ValueError("state: got a 'config' with total 0.0, expected finite and > 0")
    return lam, found


def _are_names(names: Any) -> bool:
    strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return strings and len(set(names)) == len(names)


def _plain_number(x: Any, name: str, lowest: float = 0.0) -> float:
    """A number of a loaded configuration; a ValueError unless it is finite and at least `lowest`."""
    if type(x) not in (int, float):
        raise ValueError(f"{name}: got {x!r}, expected a number")
    return check_factor(abs(x) if lowest < 0 else x, name) * (-1 if x < 0 else 1)


def _check_part(name: str, p: ParameterState, shape: tuple[int, ...]) -> None:
    for kind, t in p._asdict().items():
        expected = () if kind == "remainder" else shape
        if tuple(t.shape) != expected or t.dtype not in DTYPES:
            raise ValueError(
                f"state, {kind} of {name!r}: got {t.dtype} of shape {tuple(t.shape)}, expected "
                f"floating point of shape {expected}"
            )
        if not torch.isfinite(t).all() or (kind != "anchor" and (t < 0).any()):
            raise ValueError(
                f"state, {kind} of {name!r}: got NaN, Inf or negative values, expected finite ones"
            )
