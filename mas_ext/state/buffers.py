"""Where the state of consolidation lies: flat buffers, one set for the parameters of each device and dtype.

Every parameter has its own part of them, which follows the parameter when that is moved, cast or widened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels import backends
from mas_ext.kernels.dtypes import compute_dtype, from_codes, to_codes, unit_of
from mas_ext.kernels.flat_state import State, flat_view
from mas_ext.parameters.fsdp import Sharding
from mas_ext.parameters.names import Binding, Layout, check_supported, layouts
from mas_ext.state.low_rank import HeldWeight
from mas_ext.state.merge_rules import MergeRule, TaskEntry

# Every tensor's part of the flat state starts at a multiple of this many elements: 16-byte loads.
_ALIGNMENT = 64


class ParameterState(NamedTuple):
    """One parameter's state: omega and anchor of shape (rows, *shape), and its share of r.

    An omega of 8 bits is decoded here: 32 bits.
    """

    omega: Tensor
    anchor: Tensor
    remainder: Tensor


@dataclass
class Group:
    """The flat state of the parameters of one device and dtype.

    Omega is `unit` times what is stored, so that the stored alpha is alpha_t unit and the stored remainder
    r / unit: 1, or a power of two that brings codes of 8 bits into their range.

    names, layout: the parameters, and their dtypes, devices, shapes and strides.
    state: omega and anchor on the parameters' device, or on the CPU if `offloaded`.
    remainders: each parameter's share of r, float64 of shape (parameters,).
    binding: where the parameters were found in the model, which a copy may have another one of.
    """

    names: list[str]
    layout: list[Layout]
    state: State
    remainders: Tensor
    offloaded: bool
    unit: float = 1.0
    binding: Binding | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "binding": None}

    def part(self, index: int) -> ParameterState:
        """The state of one parameter, as views but for what is decoded."""
        _, _, shape, stride = self.layout[index]

        def rows(flat: Tensor) -> Tensor:
            return flat.as_strided(
                (flat.shape[0], *shape), (flat.stride(0), *stride), self.state.offsets[index]
            )

        omega = self.decoded(rows(self.state.omega))
        return ParameterState(omega, rows(self.state.anchor), self.remainders[index])

    def subset(self, chosen: Sequence[int], times: Tensor | None = None) -> State:
        """The state of some of the parameters, alpha times a factor."""
        alpha = self.state.alpha
        return self.state._replace(
            offsets=[self.state.offsets[i] for i in chosen],
            alpha=alpha if times is None else alpha * times.to(alpha.device),
        )

    def decoded(self, stored: Tensor) -> Tensor:
        """Omega as it is stored, or what its codes mean."""
        return from_codes(stored) * self.unit if stored.dtype == torch.uint8 else stored

    def encoded(self, omega: Tensor) -> Tensor:
        """Omega as it is stored, but for the dtype."""
        return to_codes(omega / self.unit) if self.state.omega.dtype == torch.uint8 else omega

    def add_up(self) -> None:
        """Have the kernels know what the remainders are by now."""
        self.state.remainder.copy_(self.remainders.sum() / self.unit)


class Memory(NamedTuple):
    """All that is known of the tasks, replaced as one, so that an interruption leaves the old one whole.

    absent: the state of parameters that the model lacks at the moment.
    updates: the state of weights that low-rank adapters update, whether the model has adapters now or not.
    factors: by device, the factor of the quadratic as the kernels of the updates read it.
    """

    lam: float
    entries: list[TaskEntry]
    groups: list[Group]
    absent: dict[str, ParameterState]
    updates: dict[str, HeldWeight]
    factors: dict[torch.device, Tensor]

    @property
    def names(self) -> set[str]:
        """The parameters that something is known of one by one."""
        return {*self.absent, *(name for group in self.groups for name in group.names)}

    def parts(self) -> dict[str, ParameterState]:
        """The state of every parameter by name, as Group.part gives it."""
        present = {
            name: group.part(i) for group in self.groups for i, name in enumerate(group.names)
        }
        return {**present, **self.absent}


def omega_groups(
    theta: Mapping[str, Tensor],
    parts: Mapping[str, ParameterState],
    rows: int,
    rule: MergeRule,
    added: Mapping[str, Tensor] | None = None,
    gain: float = 1.0,
    sharding: Sharding | None = None,
) -> list[Group]:
    """New groups for these parameters without anchors, holding the omega that the parts know, else 0.

    Codes of 8 bits get the range that they need when gain times `added` comes to them, on all ranks that
    `sharding` is over.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, x in theta.items():
        check_supported(name, x)
        kinds.setdefault((x.device, x.dtype), []).append(name)
    groups = []
    for names in kinds.values():
        group = _zeros([theta[name] for name in names], names, rows, rule)
        if rule.omega_dtype == torch.uint8:
            known = [parts[name].omega for name in names if name in parts]
            new = [added[name] for name in names if name in added] if added else []
            largest = torch.tensor([_largest(known), _largest(new)], dtype=torch.float64)
            if sharding is not None:
                largest = -sharding.least(-largest)
            group.unit = unit_of(float(largest[0] + gain * largest[1]))
        for i, name in enumerate(names):
            if name in parts:
                _fill_omega(group, i, theta[name], parts[name])
        group.add_up()
        groups.append(group)
    return groups


def add_anchors(
    group: Group, theta: Mapping[str, Tensor], parts: Mapping[str, ParameterState], rule: MergeRule
) -> None:
    """Give a group the anchors that the parts know; those of the rest are the parameters."""
    dtype, omega = group.layout[0][0], group.state.omega
    kind = dtype if dtype == rule.anchor_dtype else compute_dtype(dtype)
    flat = torch.zeros(omega.shape, dtype=kind, device=omega.device, pin_memory=omega.is_pinned())
    for name, offset in zip(group.names, group.state.offsets, strict=True):
        x, old = theta[name], parts.get(name)
        for row, each in enumerate(flat):
            anchor = flat_view(each, offset, x)
            # Where W is 0 the anchor is of no matter, but 0 times what is not finite would be NaN.
            anchor.copy_(x.detach()).nan_to_num_(0.0, 0.0, 0.0)
            if old is not None and row < len(old.anchor):
                kept = _in_both(x, old.anchor[row])
                anchor[kept] = old.anchor[row][kept].to(anchor)
    group.state = group.state._replace(anchor=flat)


def flat_offsets(sizes: Sequence[int]) -> list[int]:
    """Where tensors of so many elements start in a flat state, and where it ends."""
    return [*accumulate((-(-n // _ALIGNMENT) * _ALIGNMENT for n in sizes), initial=0)]


def _zeros(tensors: list[Tensor], names: list[str], rows: int, rule: MergeRule) -> Group:
    """A group for tensors of one device and dtype, of which nothing is known, without anchors."""
    device, dtype = tensors[0].device, tensors[0].dtype
    *offsets, end = flat_offsets([x.numel() for x in tensors])
    offloaded = rule.state_device is not None
    place = rule.state_device or device
    # Only copies from pinned memory are asynchronous.
    pinned = offloaded and device.type == "cuda"
    wide = rule.omega_dtype == torch.float64 and dtype != torch.float64

    def scalars(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    kind = torch.float32 if wide else rule.omega_dtype
    omega = torch.zeros(rows, end, dtype=kind, device=place, pin_memory=pinned)
    state = State(
        offsets,
        omega,
        omega.new_empty(0),
        scalars(rows),
        scalars(),
        backends.serves(device, rule.backend),
    )
    return Group(names, layouts(tensors), state, scalars(len(names)), offloaded)


def _largest(tensors: Sequence[Tensor]) -> float:
    return max([0.0, *(float(t.max()) for t in tensors if t.numel())])


def _fill_omega(group: Group, index: int, x: Tensor, old: ParameterState) -> None:
    """Write into a new group the omega of a parameter, whose sizes may have grown since, and its remainder."""
    if old.omega.dim() != x.dim() + 1:
        raise ValueError(
            f"parameter {group.names[index]!r}: got shape {tuple(x.shape)}, expected "
            f"{old.omega.dim() - 1} dimensions as when it was consolidated"
        )
    for row, known in zip(group.state.omega, old.omega, strict=False):
        omega, kept = flat_view(row, group.state.offsets[index], x), _in_both(x, known)
        omega[kept] = group.encoded(known[kept]).to(omega)
    group.remainders[index] = old.remainder


def _in_both(x: Tensor, old: Tensor) -> tuple[slice, ...]:
    """The leading part that a widened tensor keeps."""
    return tuple(slice(0, min(a, b)) for a, b in zip(x.shape, old.shape, strict=True))
