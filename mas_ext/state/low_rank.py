"""The state of weights that low-rank adapters update: W of the whole weight, and the update it pulls towards.

    penalty = scale * sum over weights of sum_ij W_ij (D_ij - D*_ij)^2,    D = sum over active adapters of s B A

D* is kept as factors: those of each adapter when the last task ended, which count while that adapter is active.
Once the adapter was merged into its weight, D* is zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.failures import Diverged
from mas_ext.kernels import backends
from mas_ext.kernels.dtypes import (
    DTYPES,
    OMEGA_DTYPES,
    compute_dtype,
    from_codes,
    to_codes,
    unit_of,
)
from mas_ext.kernels.low_rank import (
    UpdateState,
    low_rank_add_grad_,
    low_rank_value,
    low_rank_with_gradients,
)
from mas_ext.kernels.merge import merge_omega_
from mas_ext.parameters.adapters import AdaptedWeight, Factor, LowRankProduct
from mas_ext.parameters.fsdp import Sharding
from mas_ext.parameters.sharded_adapters import by_rows
from mas_ext.state.merge_rules import MergeRule

# So many elements of a weight tell whether it is still the one that was consolidated; of a quantised one
# more, as a change is rounded to steps that may be larger than itself.
_SAMPLES, _SAMPLES_OF_CODES = 64, 1024


class AnchorProduct(NamedTuple):
    """What an adapter added when the last task ended: scale * left right, (m, r) and (r, n)."""

    left: Tensor
    right: Tensor
    scale: float

    def numbers(self, places: Tensor) -> Tensor:
        """Elements, by their places in it as one dimension; float64, on the CPU."""
        columns = max(1, self.right.shape[1])
        places = places.to(self.left.device)
        rows, across = self.left[places // columns], self.right.T[places % columns]
        return self.scale * (rows.double() * across.double()).sum(1).cpu()


class HeldWeight(NamedTuple):
    """What is known of one weight, which is taken for a matrix of shape (m, n).

    Of a sharded weight omega and the left factors of the anchor have this rank's rows; the rest is the same on
    all ranks.

    shape: the weight's own.
    omega: W over unit, of shape (m, n), in the rule's dtype; codes of 8 bits in uint8.
    unit: a factor.
    anchor: by adapter.
    sample: elements of the weight when it was consolidated, float64.
    """

    shape: tuple[int, ...]
    omega: Tensor
    unit: float
    anchor: Mapping[str, AnchorProduct]
    sample: Tensor

    @property
    def weight(self) -> Tensor:
        """W, decoded, of the weight's shape."""
        codes = self.omega.dtype == torch.uint8
        return self._shaped((from_codes(self.omega) if codes else self.omega) * self.unit)

    @property
    def update(self) -> Tensor:
        """D*, of the weight's shape: zero without an anchor."""
        total = torch.zeros_like(self.omega, dtype=torch.float32)
        for p in self.anchor.values():
            dtype = compute_dtype(p.left.dtype)
            total = total.to(dtype) + p.scale * (p.left.to(dtype) @ p.right.to(dtype))
        return self._shaped(total)

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), *self.shape[1:])

    def distances(self, adapted: AdaptedWeight) -> Tensor:
        """Squared distances of the sample, and of its sums with what each adapter added, from the weight now.

        Over the elements that this rank has.

        Raises:
            ValueError: the weight has another shape than when it was consolidated.
        """
        if tuple(adapted.shape) != self.shape:
            raise ValueError(
                f"adapted weight: got shape {tuple(adapted.shape)}, expected {self.shape} as when it was "
                "consolidated"
            )
        places = _chosen(math.prod(self.shape), len(self.sample))
        mine, there = adapted.own(places)
        moved = (adapted.numbers(places) - self.sample)[mine]
        rests = [moved - p.numbers(there) for p in self.anchor.values()]
        return torch.stack([each.square().sum() for each in (moved, *rests)])


def followed(
    held: Mapping[str, HeldWeight],
    adapted: Mapping[str, AdaptedWeight],
    rule: MergeRule,
    sharding: Sharding | None = None,
) -> dict[str, HeldWeight]:
    """Where weights are now; without the anchors of adapters that were merged into them.

    One was merged where the weight is nearer to its sum with what that adapter added.

    Raises:
        ValueError: a weight has another shape than when it was consolidated.
    """
    found = _added_up({n: w.distances(adapted[n]) for n, w in held.items()}, sharding)
    now = {}
    for name, w in held.items():
        moved, *rests = found[name]
        anchor = {
            adapter: p
            for (adapter, p), rest in zip(w.anchor.items(), rests, strict=True)
            if not rest < moved
        }
        place = rule.state_device or adapted[name].weight.device
        now[name] = w._replace(omega=w.omega.to(place), anchor=anchor)
    return now


def _added_up(named: Mapping[str, Tensor], sharding: Sharding | None) -> dict[str, Tensor]:
    """Tensors of one dimension, summed over the ranks in one exchange."""
    if sharding is None or not named:
        return {**named}
    flat = sharding.add_up(torch.cat([*named.values()]))
    return dict(zip(named, flat.split([len(t) for t in named.values()]), strict=True))


def _chosen(size: int, count: int) -> Tensor:
    return torch.arange(0, size, max(1, size // max(1, count)))[:count]


def _sample(adapted: AdaptedWeight) -> Tensor:
    count = _SAMPLES_OF_CODES if adapted.is_quantised else _SAMPLES
    return adapted.numbers(_chosen(adapted.shape.numel(), count))


def anchored(product: LowRankProduct) -> AnchorProduct:
    """The product as it is now, in memory of its own."""
    left, right = (f.matrix(f.parameter.detach()).clone() for f in (product.left, product.right))
    return AnchorProduct(left, right, product.scale)


@torch.no_grad()
def with_task(
    held: Mapping[str, HeldWeight],
    adapted: Mapping[str, AdaptedWeight],
    importance: dict[str, Tensor],
    rule: MergeRule,
    gain: float,
    entry: int,
    move_anchor: bool,
    sharding: Sharding | None = None,
) -> dict[str, HeldWeight]:
    """One task more: W' = keep W + gain Omega_t, and the present products as the anchors of adapted weights.

    Adapters that are not active now keep theirs, unless they were merged since.

    Args:
        held: what is known of the adapted weights.
        adapted: these, all of them in `held` or in `importance`.
        importance: Omega_t by name, in the weights' shapes, or this rank's rows of these; taken out of the
            dictionary as it is merged. A name left out counts as 0.
        entry: the entry's number, which seeds the rounding of bfloat16 and of codes.
        move_anchor: whether anchors move where there are some.
        sharding: how the weights are sharded, if they are; all ranks call it together.

    Raises:
        Diverged: factors that are not finite, or importance that overflows omega.
    """
    if sharding is not None:
        adapted = by_rows(adapted, sharding, lambda p: p.detach().to_local())  # type: ignore[attr-defined]
    finite = {n: all(p.isfinite().all() for p in w.parameters()) for n, w in adapted.items()}
    for name in _false_anywhere(finite, sharding):
        raise Diverged(
            f"adapters of {name!r}: got NaN or Inf, expected finite values; where training diverged, a smaller "
            "lam or lr helps"
        )
    known = followed(held, adapted, rule, sharding)
    units = _units(known, adapted, importance, rule, gain, sharding)
    samples = _added_up({name: _sample(w) for name, w in adapted.items()}, sharding)
    new = {}
    for name, w in adapted.items():
        old, unit = known.get(name), units[name]
        omega = _merged(old, w, importance.pop(name, None), rule, gain / unit, entry, unit)
        anchor = {} if old is None else dict(old.anchor)
        if old is None or move_anchor:
            anchor |= {p.adapter: anchored(p) for p in w.products}
        new[name] = HeldWeight(tuple(w.shape), omega, unit, anchor, samples[name])
    finite = {
        n: not w.omega.is_floating_point() or bool(w.omega.isfinite().all()) for n, w in new.items()
    }
    for name in _false_anywhere(finite, sharding):
        raise Diverged(
            f"importance of {name!r}: got values with which omega overflows {new[name].omega.dtype}, expected "
            "smaller"
        )
    return new


def _false_anywhere(flags: Mapping[str, bool], sharding: Sharding | None) -> list[str]:
    """The names of what is false on any rank."""
    each = torch.tensor([*flags.values()], dtype=torch.float64)
    if sharding is not None:
        each = sharding.least(each)
    return [name for name, flag in zip(flags, each.tolist(), strict=True) if not flag]


def _units(
    known: Mapping[str, HeldWeight],
    adapted: Mapping[str, AdaptedWeight],
    importance: Mapping[str, Tensor],
    rule: MergeRule,
    gain: float,
    sharding: Sharding | None,
) -> dict[str, float]:
    """The factors of omegas with one task more: those that codes of 8 bits need for the largest values."""
    if rule.omega_dtype != torch.uint8:
        return dict.fromkeys(adapted, 1.0)

    def largest(t: Tensor | None) -> float:
        return 0.0 if t is None or not t.numel() else float(t.max())

    pairs = [
        (largest(known[n].weight) if n in known else 0.0, largest(importance.get(n)))
        for n in adapted
    ]
    each = torch.tensor(pairs, dtype=torch.float64).view(-1, 2)
    if sharding is not None:
        each = -sharding.least(-each)
    return {
        name: unit_of(old * rule.keep + gain * new)
        for name, (old, new) in zip(adapted, each.tolist(), strict=True)
    }


def _merged(
    old: HeldWeight | None,
    adapted: AdaptedWeight,
    importance: Tensor | None,
    rule: MergeRule,
    gain: float,
    entry: int,
    unit: float,
) -> Tensor:
    """W' over its unit, in the rule's dtype: of this rank's rows, rounded as in the whole weight."""
    place = rule.state_device or adapted.weight.device
    columns = math.prod(adapted.shape[1:])
    shape, shift = (len(adapted.rows), columns), adapted.rows.start * columns
    dtype = compute_dtype(adapted.dtype)
    new = (
        torch.zeros(shape, dtype=dtype, device=place)
        if importance is None
        else importance.detach().reshape(shape).to(place, dtype, copy=True)
    )
    wide = rule.omega_dtype == torch.float64 and dtype != torch.float64
    omega = torch.zeros(shape, dtype=torch.float32 if wide else rule.omega_dtype, device=place)
    if old is not None:
        before = old.weight.reshape(shape).to(place) / unit
        omega.copy_(to_codes(before) if omega.dtype == torch.uint8 else before)
    if new.numel():
        native = backends.serves(new.device, rule.backend)
        merge_omega_(omega, new, rule.keep, gain, entry, shift, native)
    return omega


class UpdateGroup(NamedTuple):
    """Held weights whose factors have one dtype and device, as the kernels take them.

    products: those of the weights, in order. anchors: of each product, None where there is none.
    """

    state: UpdateState
    products: list[LowRankProduct]
    anchors: list[AnchorProduct | None]

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The left and the right factors' matrices, differentiable."""
        left = [p.left.matrix(p.left.parameter) for p in self.products]
        return left, [p.right.matrix(p.right.parameter) for p in self.products]

    def trained(self) -> list[Tensor]:
        """The factors that require a gradient."""
        factors = (f.parameter for p in self.products for f in (p.left, p.right))
        return [p for p in factors if p.requires_grad]

    def value(self) -> Tensor:
        """The penalty of these weights, differentiable by the factors."""
        if torch.is_grad_enabled():
            return low_rank_with_gradients(*self.factors(), self.state)[0]
        return low_rank_value(*self.factors(), self.state)

    @torch.no_grad()
    def add_grad_(self, grads: Mapping[int, Tensor], times: Tensor | None = None) -> Tensor:
        """Add d value / d factor, times a number, to gradients of factors; returns the value.

        grads: the gradients, by the factors' ids; a factor that is not among them gets none. times: the number,
        read on the device.
        """
        state = self.state
        if times is not None:
            state = state._replace(alpha=state.alpha * times.to(state.alpha.device))
        copied: list[tuple[Factor, Tensor, Tensor]] = []

        def target(factor: Factor) -> Tensor:
            grad = grads.get(id(factor.parameter))
            if grad is None:
                return factor.parameter.new_empty(0)
            matrix = factor.matrix(grad)
            if matrix.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
                # Its dimensions can't be seen as two.
                matrix = torch.zeros_like(matrix)
                copied.append((factor, grad, matrix))
            return matrix

        targets = [[target(side) for side in (p.left, p.right)] for p in self.products]
        left, right = ([pair[i] for pair in targets] for i in (0, 1))
        value = low_rank_add_grad_(*self.factors(), left, right, state)
        for factor, grad, matrix in copied:
            grad += (matrix.T if factor.transposed else matrix).reshape(grad.shape)
        return value


def bound_updates(
    held: Mapping[str, HeldWeight],
    adapted: Mapping[str, AdaptedWeight],
    factor: Callable[[torch.device], Tensor],
    rule: MergeRule,
) -> Iterator[UpdateGroup]:
    """The held weights that have active adapters now, in groups for the kernels; one by one from the CPU.

    factor: what the kernels of a device read as the factor of the quadratic.

    Raises:
        ValueError: factors of several dtypes or devices at one weight.
    """
    kinds: dict[
        tuple[torch.device, torch.dtype], list[tuple[HeldWeight, list[LowRankProduct]]]
    ] = {}
    for name, weight in held.items():
        products = adapted[name].products if name in adapted else []
        if not products:
            continue
        sides = [f.parameter for p in products for f in (p.left, p.right)]
        found = {(t.device, t.dtype) for t in sides}
        if len(found) > 1:
            told = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in found))
            raise ValueError(f"adapters of {name!r}: got {told}, expected one dtype and device")
        kinds.setdefault(found.pop(), []).append((weight, products))
    for (device, dtype), members in kinds.items():
        for part in [members] if rule.state_device is None else [[m] for m in members]:
            yield _group(part, device, dtype, factor(device), rule)


def _group(
    members: Sequence[tuple[HeldWeight, list[LowRankProduct]]],
    device: torch.device,
    dtype: torch.dtype,
    factor: Tensor,
    rule: MergeRule,
) -> UpdateGroup:
    products = [p for _, own in members for p in own]
    anchors = [[w.anchor[p.adapter] for p in own if p.adapter in w.anchor] for w, own in members]
    flat = [a for own in anchors for a in own]
    state = UpdateState(
        [w.omega.to(device) for w, _ in members],
        [w.unit for w, _ in members],
        [len(own) for _, own in members],
        [p.scale for p in products],
        [a.left.to(device, dtype) for a in flat],
        [a.right.to(device, dtype) for a in flat],
        [len(own) for own in anchors],
        [a.scale for a in flat],
        factor,
        backends.serves(device, rule.backend),
    )
    return UpdateGroup(
        state, products, [w.anchor.get(p.adapter) for w, own in members for p in own]
    )


# -- as named tensors ------------------------------------------------------------------------------


def pack_updates(
    held: Mapping[str, HeldWeight], sharding: Sharding | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The held weights as named tensors, sharded as they are, and what is no tensor by the weights' names."""
    tensors, told = {}, {}

    def joined(name: str, t: Tensor) -> Tensor:
        return t if sharding is None else sharding.join_rows(name, t)

    for name, w in held.items():
        scales = {adapter: a.scale for adapter, a in w.anchor.items()}
        told[name] = {"shape": [*w.shape], "unit": w.unit, "scales": scales}
        tensors[f"update.omega.{name}"] = joined(name, w.omega)
        tensors[f"update.sample.{name}"] = w.sample
        for adapter, a in w.anchor.items():
            tensors[f"update.left.{name}.{adapter}"] = joined(name, a.left.contiguous())
            tensors[f"update.right.{name}.{adapter}"] = a.right.contiguous()
    return tensors, told


def keys_of_updates(told: Any) -> set[str]:
    """The tensors' names that go with what is no tensor; a ValueError for what can't be that."""
    try:
        found = set()
        for name, about in told.items():
            numbers = [about["unit"], *about["shape"], *about["scales"].values()]
            if {*about} != {"shape", "unit", "scales"} or not all(map(math.isfinite, numbers)):
                raise ValueError("wrong numbers")
            if about["unit"] < 0 or not all(type(n) is int and n >= 0 for n in about["shape"]):
                raise ValueError("negative numbers")
            found |= {f"update.omega.{name}", f"update.sample.{name}"}
            for adapter in about["scales"]:
                found |= {f"update.left.{name}.{adapter}", f"update.right.{name}.{adapter}"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"state: got a 'config' with wrong updates ({error!r}), expected shape, unit and scales of each"
        ) from error
    return found


def unpack_updates(
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    place: torch.device,
    sharding: Sharding | None = None,
) -> dict[str, HeldWeight]:
    """The held weights on a device, from what pack_updates gave on any number of ranks.

    Raises:
        ValueError: wrong shapes or dtypes, or values that are not finite.
        KeyError: a weight that a sharded model lacks.
    """
    held = {}
    for name, about in told.items():
        shape = tuple(about["shape"])
        rows = shape[0] if shape else 0
        size = (rows, math.prod(shape[1:]))

        def read(
            key: str,
            *sizes: int | None,
            rows_of: str | None = None,
            dtypes: Collection[torch.dtype] = DTYPES,
        ) -> Tensor:
            t = tensors[key]
            fits = t.dim() == len(sizes) and all(
                n in (None, own) for n, own in zip(sizes, t.shape, strict=True)
            )
            if fits and sharding is not None and rows_of is not None:
                t = sharding.own_rows(rows_of, t)
            if not fits or t.dtype not in dtypes or not torch.isfinite(t).all():
                raise ValueError(
                    f"state, {key!r}: got {t.dtype} of shape {tuple(t.shape)}, expected finite numbers of "
                    f"shape {sizes}"
                )
            return t.to(place)

        anchor = {}
        for adapter, scale in about["scales"].items():
            left = read(f"update.left.{name}.{adapter}", size[0], None, rows_of=name)
            right = read(f"update.right.{name}.{adapter}", left.shape[1], size[1])
            anchor[adapter] = AnchorProduct(left, right, float(scale))
        omega = read(f"update.omega.{name}", *size, rows_of=name, dtypes=OMEGA_DTYPES)
        if omega.dtype.is_floating_point and (omega < 0).any():
            raise ValueError(f"state, omega of {name!r}: got negative values, expected importance")
        sample = read(f"update.sample.{name}", None, dtypes=(torch.float64,)).cpu()
        counts = [len(_chosen(math.prod(size), n)) for n in (_SAMPLES, _SAMPLES_OF_CODES)]
        if len(sample) not in counts:
            raise ValueError(
                f"state, sample of {name!r}: got {len(sample)} numbers, expected {counts[0]} or {counts[1]}"
            )
        held[name] = HeldWeight(shape, omega, float(about["unit"]), anchor, sample)
    return held
