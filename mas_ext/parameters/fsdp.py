"""Models under fully_shard (FSDP2): whole parameters for a while, and a state that is sharded like them.

Nothing of torch.distributed is imported here unless the model's own sharding has imported it: that takes long,
and torch may be built without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mas_ext.parameters.names import Binding, ModelView, check_whole, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Named = dict[str, Tensor]

_FSDP = "torch.distributed.fsdp"


def _units(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was applied to."""
    fsdp = sys.modules.get(_FSDP)
    if fsdp is None:
        return []
    units = []
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise TypeError(
                f"model: got FullyShardedDataParallel at {name!r}, expected fully_shard (FSDP2) or "
                "DistributedDataParallel"
            )
        if isinstance(module, fsdp.FSDPModule):
            units.append(module)
    return units


def _resharded(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was applied to, with their sharded parameters in place."""
    units = _units(model)
    for unit in units:
        unit.reshard()
    return units


def _fsdp_parameters(model: nn.Module) -> list[Any]:
    """FSDP's own records of the parameters; their `sharded_param` is the same whatever hangs in the module now.

    Where a unit is not resharded after its forward pass, as the root, whole parameters hang in the modules
    until the backward pass, and nothing public tells which sharded ones they stand for.
    """
    states = [unit._get_fsdp_state() for unit in _units(model)]
    groups = [
        group
        for state in states
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        if group is not None
    ]
    return [p for group in groups for p in group.fsdp_params]


def group_of(model: nn.Module) -> ProcessGroup | None:
    """The ranks that a model is sharded over; None where each has the whole."""
    parameters = _fsdp_parameters(model)
    return parameters[0].sharded_param.device_mesh.get_group() if parameters else None


def optimizer_view(model: nn.Module, exclude: Sequence[str] = ()) -> ModelView:
    """The view of a model as its optimizer knows it: under fully_shard, the sharded parameters are in place."""
    _resharded(model)
    return ModelView(model, exclude)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Put whole parameters into the model on every rank, without FSDP's hooks; afterwards all is as it was.

    All ranks enter together. Inside there is no communication: each rank runs the model as often as its own
    samples need, where FSDP's hooks would wait for passes that other ranks don't make. It takes the memory of
    all parameters on each rank, in their own dtype.
    """
    units = _resharded(model)
    modules = [*model.modules()] if units else []
    parameters = [
        (m._parameters, key, p)
        for m in modules
        for key, p in m._parameters.items()
        if p is not None and is_sharded(p)
    ]
    found: dict[int, nn.Parameter] = {}
    for _, _, p in parameters:
        if id(p) not in found:
            found[id(p)] = nn.Parameter(whole_tensor(p.detach()), p.requires_grad)
    # Everything that changes for a while: (dictionary, key, old value, new value).
    changes: list[tuple[dict[str, Any], str, Any, Any]] = [
        (owner, key, p, found[id(p)]) for owner, key, p in parameters
    ]
    for m in modules:
        own = vars(m)
        for key in ("_forward_pre_hooks", "_forward_hooks"):
            kept = {i: h for i, h in own[key].items() if not str(h.__module__).startswith(_FSDP)}
            changes.append((own, key, own[key], type(own[key])(kept)))
    for unit in units:
        for key, method in vars(unit).items():  # by register_fsdp_forward_method
            if getattr(method, "__globals__", {}).get("__name__", "").startswith(_FSDP):
                changes.append((vars(unit), key, method, method.__wrapped__))
    try:
        for owner, key, _, new in changes:
            owner[key] = new
        yield
    finally:
        for owner, key, old, _ in changes:
            owner[key] = old


def whole_tensor(t: Tensor) -> Tensor:
    """The whole of a tensor, which is its own if it is not sharded; all ranks call it together."""
    return t.full_tensor() if is_sharded(t) else t


def local_parts(tensors: Iterable[Any]) -> list[Tensor]:
    """This rank's parts of sharded tensors, differentiable."""
    return [t.to_local() for t in tensors]


class ShardedBinding(Binding):
    """Finds the sharded parameters also while FSDP has whole ones in their places."""

    def __init__(self, view: ModelView, names: Sequence[str]) -> None:
        super().__init__(view, names)
        _resharded(view.model)
        kept = {id(p.sharded_param): p for p in _fsdp_parameters(view.model)}
        self._kept = [kept[id(p)] for p in super().parameters()]

    def parameters(self) -> list[Tensor]:
        return [p.sharded_param for p in self._kept]


class _Shard(NamedTuple):
    """How a tensor lies over a mesh: in pieces of equal size along dim, the last ones smaller or empty."""

    mesh: DeviceMesh
    dim: int
    shape: tuple[int, ...]

    def rows(self, number: int) -> _Shard:
        """The layout of a stack of such tensors."""
        return _Shard(self.mesh, self.dim + 1, (number, *self.shape))

    def own(self, t: Tensor) -> Tensor:
        """This rank's piece of a tensor that may be whole or sharded in any way."""
        t = whole_tensor(t.detach())
        rank, pieces = self.mesh.get_local_rank(), t.chunk(self.mesh.size(), self.dim)
        piece = pieces[rank] if rank < len(pieces) else t.narrow(self.dim, 0, 0)
        return piece.clone(memory_format=torch.contiguous_format)  # no view that keeps the whole

    def join(self, own: Tensor) -> Tensor:
        """The sharded tensor, from every rank's own piece."""
        from torch.distributed.tensor import DTensor, Shard

        like = torch.empty(self.shape, device="meta")
        place = [Shard(self.dim)]
        return DTensor.from_local(
            own, self.mesh, place, run_check=False, shape=like.shape, stride=like.stride()
        )


def _shard_of(name: str, p: Tensor) -> _Shard:
    """How a parameter is sharded; a TypeError that names it unless once, over a mesh of one dimension."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(p, DTensor):
        got = "one that is not sharded beside others that are"
    elif p.device_mesh.ndim != 1 or type(p.placements[0]) is not Shard:
        got = f"placements {p.placements} on a mesh of shape {tuple(p.device_mesh.shape)}"
    elif p.device.type != p.device_mesh.device_type:
        got = f"a shard on {p.device.type} of a mesh on {p.device_mesh.device_type}"
    else:
        return _Shard(p.device_mesh, p.placements[0].dim, tuple(p.shape))
    raise TypeError(
        f"parameter {name!r}: got {got}, expected every parameter sharded by fully_shard over one mesh of "
        "one dimension, on its device (exclude= leaves parameters out)"
    )


class Sharding:
    """How the parameters of one model, and the state that belongs to them, are spread over the ranks.

    Args:
        theta: parameters by name, as fully_shard left them; at least one.

    Raises:
        TypeError: a parameter that is sharded in another way, or not at all.
    """

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        self._shards = {name: _shard_of(name, p) for name, p in theta.items()}
        first, *others = self._shards.items()
        for name, shard in others:
            if shard.mesh != first[1].mesh:
                raise TypeError(
                    f"parameter {name!r}: got another mesh than that of {first[0]!r}, expected one mesh "
                    "for all"
                )
        self.group: ProcessGroup = first[1].mesh.get_group()
        self._ranks: int = first[1].mesh.size()

    @staticmethod
    def of(model: nn.Module, theta: Mapping[str, Tensor]) -> Sharding | None:
        """The sharding of these parameters of a model; None where each rank has the whole.

        Raises:
            TypeError: parameters that are sharded in another way, or only some of them.
        """
        if not theta or not _units(model):
            for name, p in theta.items():
                check_whole(name, p)
            return None
        found = Sharding(theta)
        kept = {id(p.sharded_param) for p in _fsdp_parameters(model)}
        for name, p in theta.items():
            if id(p) not in kept:
                raise TypeError(
                    f"parameter {name!r}: got one that fully_shard of an outer module shards, expected that "
                    "module as model (exclude= leaves parameters out)"
                )
        return found

    def follow(self, theta: Mapping[str, Tensor], consolidated: Collection[str]) -> None:
        """Take over how the parameters are sharded now.

        Raises:
            TypeError: a parameter that is sharded in another way, or not at all.
            ValueError: a consolidated parameter that is sharded otherwise than before.
        """
        now = Sharding(theta)._shards
        for name in now.keys() & self._shards.keys() & set(consolidated):
            before = self._shards[name]
            if now[name] != before:
                raise ValueError(
                    f"parameter {name!r}: got shape {now[name].shape} sharded along dimension "
                    f"{now[name].dim}, expected {before.shape} along {before.dim} as when it was "
                    "consolidated"
                )
        self._shards |= now

    def rename(self, old: str, new: str) -> None:
        """Let what is known of one name hold for another."""
        self._shards[new] = self._shards[old]

    def own(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of whole tensors like the parameters."""
        return {name: self._shards[name].own(t) for name, t in named.items()}

    def join(self, name: str, own: Tensor) -> Tensor:
        """The sharded tensor like a parameter, from every rank's own piece."""
        return self._shards[name].join(own)

    def sum(self, value: Tensor) -> Tensor:
        """A value summed over the ranks, the same bits on all; its gradient is the gradient of the own part."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return value - value.detach() + total

    def share(self, remainders: Tensor) -> None:
        """Give every rank an equal share of the sum over the ranks, in place."""
        dist.all_reduce(remainders, group=self.group)
        remainders /= self._ranks

    # -- a state: omega.NAME and anchor.NAME of shape (rows, *shape), remainder.NAME, and others -------

    def join_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of all ranks, from this one's.

        Raises:
            RuntimeError: there are observed samples, of which each rank has its own.
        """
        _refuse_observed(state)
        found = dict(state)
        for key, t in state.items():
            kind, _, name = key.partition(".")
            if kind == "remainder":
                found[key] = t * self._ranks
            elif kind in ("omega", "anchor"):
                found[key] = self._shards[name].rows(len(t)).join(t)
        return found

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's state, from the state of all ranks, whose tensors are whole or sharded in any way.

        Raises:
            ValueError: a shape that does not fit.
            KeyError: a parameter that the model lacks.
            RuntimeError: there are observed samples.
        """
        _refuse_observed(state)
        found = dict(state)
        for key, t in state.items():
            kind, _, name = key.partition(".")
            if kind == "remainder":
                found[key] = t / self._ranks
            elif kind in ("omega", "anchor"):
                if name not in self._shards:
                    raise KeyError(f"state: got {name!r}, which the model has no parameter for")
                shard = self._shards[name].rows(len(t) if t.dim() else 0)
                if tuple(t.shape) != shard.shape:
                    raise ValueError(
                        f"state, {kind} of {name!r}: got shape {tuple(t.shape)}, expected "
                        f"{shard.shape}"
                    )
                found[key] = shard.own(t)
        return found

    def on_first_rank(self, state: Mapping[str, Tensor], write: Callable[[Named], None]) -> None:
        """Call `write` with the whole tensors on the first rank; an error there is raised on all ranks."""
        first = dist.get_rank(self.group) == 0
        whole_state = {}
        for key, t in state.items():
            t = whole_tensor(t).cpu()
            if first:
                whole_state[key] = t
        failure = None
        if first:
            try:
                write(whole_state)
            except Exception as error:
                failure = error
        said = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        dist.broadcast_object_list(said, dist.get_global_rank(self.group, 0), self.group)
        if failure is not None:
            raise failure
        if said[0] is not None:
            raise RuntimeError(f"save: the first rank failed with {said[0]}")


def _refuse_observed(state: Mapping[str, Tensor]) -> None:
    samples = int(state.get("pending_samples", 0))
    if samples:
        raise RuntimeError(
            f"state: got {samples} observed samples, expected consolidate() before the state of a sharded "
            "model is saved or loaded"
        )
