"""Adapted weights of a model under fully_shard: some rows of each on every rank.

    (s B A)[rows] = s B[rows] A

Of B a rank has the rows that it has of the weight; A, r n numbers, it gathers whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from mas_ext.parameters.adapters import AdaptedWeight, Factor, LowRankProduct
from mas_ext.parameters.fsdp import Sharding, sharded_dim, sharded_parameters


def as_sharded(model: nn.Module, adapted: Mapping[str, AdaptedWeight]) -> dict[str, AdaptedWeight]:
    """Weights and factors as fully_shard keeps them between passes, also while FSDP has whole ones in place."""
    kept = {key: p.sharded_param for key, p in sharded_parameters(model).items()}

    def factor(f: Factor) -> Factor:
        return f._replace(parameter=kept.get(id(f.parameter), f.parameter))

    def product(p: LowRankProduct) -> LowRankProduct:
        return p._replace(left=factor(p.left), right=factor(p.right))

    return {
        name: w._replace(products=[product(p) for p in w.products], sharded=kept.get(id(w.weight)))
        for name, w in adapted.items()
    }


def refuse_without_rows(model: nn.Module, adapted: Mapping[str, AdaptedWeight]) -> None:
    """Raise a ValueError that names a weight whose update can't be held by rows."""
    records = {id(p.sharded_param): p for p in sharded_parameters(model).values()}
    for name, w in adapted.items():
        if w.sharded is None:
            continue
        shared, dim = records[id(w.sharded)]._module_info, sharded_dim(w.sharded)
        got = None
        if w.is_quantised:
            got = "a quantised one"
        elif dim != 0:
            got = f"one sharded along dimension {dim}"
        elif any(module is not shared.module for module in shared.shared_modules):
            got = "one that several layers share"
        if got is not None:
            raise ValueError(
                f"adapters: got 'weights' for {name!r}, {got} under fully_shard, expected one of a layer "
                "alone, sharded by rows, or 'parameters'"
            )


def by_rows(
    adapted: Mapping[str, AdaptedWeight], sharding: Sharding, own: Callable[[Tensor], Tensor]
) -> dict[str, AdaptedWeight]:
    """The weights with products of this rank's rows of left factors and whole right ones; differentiable.

    All ranks call it together.

    Args:
        own: from a sharded factor to this rank's piece of it, in some dtype.
    """
    gathered = [f.parameter for w in adapted.values() for p in w.products for f in _gathered(p)]
    whole = iter(sharding.gathered(gathered, [own(p) for p in gathered]))

    def product(p: LowRankProduct, rows: range) -> LowRankProduct:
        if _has_the_same_rows(p.left):
            left = p.left.matrix(own(p.left.parameter))
        else:
            left = p.left.matrix(next(whole))[rows.start : rows.stop]
        return p._replace(left=Factor(left), right=Factor(p.right.matrix(next(whole))))

    return {
        name: w._replace(products=[product(p, w.rows) for p in w.products])
        for name, w in adapted.items()
    }


def _gathered(p: LowRankProduct) -> list[Factor]:
    """The factors that a rank needs the whole of, in order."""
    return [p.right] if _has_the_same_rows(p.left) else [p.left, p.right]


def _has_the_same_rows(left: Factor) -> bool:
    """Whether a left factor is sharded by rows, as the weight is."""
    return not left.transposed and sharded_dim(left.parameter) == 0
