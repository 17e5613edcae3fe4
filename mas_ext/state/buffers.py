"""Where what is remembered lies: flat buffers, one set for the parameters of each device and dtype.

Every parameter has its own part of them, which follows the parameter when that is moved, cast or widened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels import native, ops
from mas_ext.kernels.reference import LARGEST_CODED, compute_dtype, decode, encode, part
from mas_ext.parameters.names import Layout, check_supported, layouts
from mas_ext.state import offloading as streaming
from mas_ext.state.merge_rules import Entry, Rule

# Every tensor's part of the flat state starts at a multiple of this many elements: 16-byte loads.
_ALIGNMENT = 64


class Part(NamedTuple):
    """One parameter's state: omega and anchor of shape (rows, *shape), and its share of r.

    An omega of 8 bits is decoded here: 32 bits.
    """

    omega: Tensor
    anchor: Tensor
    remainder: Tensor


@dataclass
class Group:
    """The flat state of the parameters of one device and dtype; see kernels/reference.py for shapes.

    Omega and anchor of a streamed one lie on the CPU. Omega is `unit` times what is stored, so that alpha holds
    alpha_t unit, and remainder r / unit: 1, or a power of two that brings codes of 8 bits into their range.
    """

    names: list[str]
    layout: list[Layout]
    offsets: list[int]
    omega: Tensor
    anchor: Tensor
    remainders: Tensor
    alpha: Tensor
    remainder: Tensor
    native: bool
    streamed: bool
    unit: float

    @property
    def ops(self) -> ModuleType:
        """What computes with it: kernels.ops, or streaming."""
        return streaming if self.streamed else ops

    def part(self, index: int) -> Part:
        """The state of one parameter, as views but for what is decoded."""
        _, _, shape, stride = self.layout[index]

        def rows(flat: Tensor) -> Tensor:
            return flat.as_strided(
                (flat.shape[0], *shape), (flat.stride(0), *stride), self.offsets[index]
            )

        return Part(self.decoded(rows(self.omega)), rows(self.anchor), self.remainders[index])

    def decoded(self, stored: Tensor) -> Tensor:
        """Omega as it is stored, or what its codes mean."""
        return decode(stored) * self.unit if stored.dtype == torch.uint8 else stored

    def encoded(self, omega: Tensor) -> Tensor:
        """Omega as it is stored, but for the dtype."""
        return encode(omega / self.unit) if self.omega.dtype == torch.uint8 else omega

    def add_up(self) -> None:
        """Have the kernels know what the remainders are by now."""
        self.remainder.copy_(self.remainders.sum() / self.unit)


class Memory(NamedTuple):
    """All that is remembered, replaced as one, so that an interruption leaves the old one whole.

    `absent` holds the state of parameters that the model lacks at the moment.
    """

    entries: list[Entry]
    groups: list[Group]
    absent: dict[str, Part]

    def parts(self) -> dict[str, Part]:
        """The state of every parameter by name; see Group.part."""
        present = {
            name: group.part(i) for group in self.groups for i, name in enumerate(group.names)
        }
        return {**present, **self.absent}


def pack(
    theta: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    rows: int,
    rule: Rule,
    added: Mapping[str, Tensor] | None = None,
    gain: float = 1.0,
) -> list[Group]:
    """New groups for these parameters, holding what the parts know; the rest has Omega 0.

    Codes of 8 bits get the range that they need when gain times `added` comes to them.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, x in theta.items():
        check_supported(name, x)
        kinds.setdefault((x.device, x.dtype), []).append(name)
    groups = []
    for (device, dtype), names in kinds.items():
        offsets, end = [], 0
        for name in names:
            offsets.append(end)
            end += -(-theta[name].numel() // _ALIGNMENT) * _ALIGNMENT
        streamed = rule.state_device is not None
        place = torch.device(rule.state_device or device)
        # Only from pinned memory does a copy leave the host alone.
        pinned = streamed and device.type == "cuda"
        group = Group(
            names,
            layouts(theta[name] for name in names),
            offsets,
            _zeros(rows, end, _omega_dtype(rule, dtype), place, pinned),
            _zeros(rows, end, compute_dtype(dtype), place, pinned),
            torch.zeros(len(names), dtype=torch.float64, device=device),
            torch.zeros(rows, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
            native.serves(device, rule.backend),
            streamed,
            1.0,
        )
        if group.omega.dtype == torch.uint8:
            known = [parts[name].omega for name in names if name in parts]
            new = [added[name] for name in names if name in added] if added else []
            group.unit = _unit(_largest(known) + gain * _largest(new))
        for i, name in enumerate(names):
            _fill(group, i, theta[name], parts.get(name), rows)
        group.add_up()
        groups.append(group)
    return groups


def _zeros(rows: int, end: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    return torch.zeros(rows, end, dtype=dtype, device=device, pin_memory=pinned)


def _largest(tensors: Sequence[Tensor]) -> float:
    return max([0.0, *(float(t.max()) for t in tensors if t.numel())])


def _unit(largest: float) -> float:
    """The power of two that brings everything up to the largest into the range of 8 bits."""
    # Not so far out that float32 has no such power, or only one of fewer bits.
    mantissa, exponent = math.frexp(largest / LARGEST_CODED)
    return 2.0 ** min(max(exponent - (mantissa == 0.5), -100), 100)


def _omega_dtype(rule: Rule, dtype: torch.dtype) -> torch.dtype:
    wide = rule.omega_dtype == torch.float64 and dtype != torch.float64
    return torch.float32 if wide else rule.omega_dtype


def _fill(group: Group, index: int, x: Tensor, old: Part | None, rows: int) -> None:
    if old is not None and old.omega.dim() != x.dim() + 1:
        raise ValueError(
            f"parameter {group.names[index]!r}: got shape {tuple(x.shape)}, expected "
            f"{old.omega.dim() - 1} dimensions as when it was consolidated"
        )
    offset = group.offsets[index]
    for row in range(rows):
        omega, anchor = part(group.omega, row, offset, x), part(group.anchor, row, offset, x)
        anchor.copy_(x.detach())
        if old is not None and row < old.omega.shape[0]:
            # A widened parameter keeps its leading part.
            kept = tuple(
                slice(0, min(a, b)) for a, b in zip(x.shape, old.omega.shape[1:], strict=True)
            )
            omega[kept] = group.encoded(old.omega[row][kept]).to(omega)
            anchor[kept] = old.anchor[row][kept].to(anchor)
    if old is not None:
        group.remainders[index] = old.remainder
