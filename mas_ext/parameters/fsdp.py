"""Models under fully_shard (FSDP2): their sharded parameters, and a state that is sharded like them.

Nothing of torch.distributed is imported here unless the model's own sharding has imported it: that takes long,
and torch may be built without it.
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.names import Binding, ModelView, check_whole, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

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


def resharded(model: nn.Module) -> None:
    """Put the sharded parameters of the modules that fully_shard was applied to in their places."""
    for unit in _units(model):
        unit.reshard()


def fsdp_states(model: nn.Module) -> list[Any]:
    """FSDP's own records of the modules that fully_shard was applied to, each once."""
    states = [unit._get_fsdp_state() for unit in _units(model)]
    return [*{id(state): state for state in states}.values()]


def param_groups(state: Any) -> list[Any]:
    """FSDP's own records of the parameters that a module gathers at once; torch 2.10 has one."""
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook of a module is FSDP's own."""
    return str(hook.__module__).startswith(_FSDP)


def _fsdp_parameters(model: nn.Module) -> list[Any]:
    """FSDP's own records of the parameters; their `sharded_param` is the same whatever hangs in the module now.

    Where a unit is not resharded after its forward pass, as the root, whole parameters hang in the modules
    until the backward pass, and nothing public tells which sharded ones they stand for.
    """
    groups = [group for state in fsdp_states(model) for group in param_groups(state)]
    return [p for group in groups for p in group.fsdp_params]


def sharded_parameters(model: nn.Module) -> dict[int, Any]:
    """FSDP's own records of the parameters, by the ids of what hangs in their places now, whole or sharded."""
    return {
        id(p._module_info.module._parameters.get(p._module_info.param_name)): p
        for p in _fsdp_parameters(model)
    }


def prepare_passes(model: nn.Module) -> None:
    """Have FSDP find out now what it does in the first pass, such as the dtype that it reduces gradients in."""
    for state in fsdp_states(model):
        state._lazy_init()


# Groups of all ranks of meshes that have two dimensions and don't span the world, as a stage of a pipeline.
_groups: weakref.WeakKeyDictionary[DeviceMesh, ProcessGroup] = weakref.WeakKeyDictionary()


def _group_over(mesh: DeviceMesh) -> ProcessGroup:
    """All ranks of a mesh, which make their group together where there is none yet."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = sorted(mesh.mesh.flatten().tolist())
    world = dist.group.WORLD
    if world is not None and len(ranks) == world.size():
        return world
    if mesh not in _groups:
        _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return _groups[mesh]


def group_of(model: nn.Module) -> ProcessGroup | None:
    """The ranks that a model is sharded over, and its replicas'; None where each has the whole."""
    parameters = _fsdp_parameters(model)
    return _group_over(parameters[0].sharded_param.device_mesh) if parameters else None


def optimizer_view(model: nn.Module, exclude: Sequence[str] = ()) -> ModelView:
    """The view of a model as its optimizer knows it: under fully_shard, the sharded parameters are in place."""
    resharded(model)
    return ModelView(model, exclude)


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
        resharded(view.model)
        kept = {id(p.sharded_param): p for p in _fsdp_parameters(view.model)}
        self._kept = [kept[id(p)] for p in super().parameters()]

    def parameters(self) -> list[Tensor]:
        return [p.sharded_param for p in self._kept]


class _Shard(NamedTuple):
    """How a tensor lies over a mesh: in pieces of equal size along dim, the last ones smaller or empty.

    The last dimension of the mesh is that of the pieces; over a first one of two, each has replicas (HSDP).
    """

    mesh: DeviceMesh
    dim: int
    shape: tuple[int, ...]

    @property
    def placements(self) -> list[Placement]:
        """The placements of a DTensor that lies so."""
        from torch.distributed.tensor import Replicate, Shard

        return [*[Replicate()] * (self.mesh.ndim - 1), Shard(self.dim)]

    def rows(self, number: int) -> _Shard:
        """The layout of a stack of such tensors."""
        return _Shard(self.mesh, self.dim + 1, (number, *self.shape))

    @property
    def size(self) -> tuple[int, ...]:
        """The sizes of the first pieces."""
        each = [*self.shape]
        each[self.dim] = -(-self.shape[self.dim] // self.mesh.size(-1))
        return tuple(each)

    @property
    def begin(self) -> int:
        """Where this rank's piece begins, along dim."""
        return min(self.size[self.dim] * self.mesh.get_local_rank(-1), self.shape[self.dim])

    def own(self, t: Tensor) -> Tensor:
        """This rank's piece of a tensor that may be whole or sharded in any way."""
        t = t.detach()
        if is_sharded(t):
            if t.device_mesh == self.mesh:
                return t.redistribute(placements=self.placements).to_local()
            t = t.full_tensor()
        piece = self._pieces(t)[self.mesh.get_local_rank(-1)]
        return piece.clone(memory_format=torch.contiguous_format)  # no view that keeps the whole

    def _pieces(self, t: Tensor) -> list[Tensor]:
        """All pieces of a whole tensor."""
        ranks = self.mesh.size(-1)
        empty = t.narrow(self.dim, 0, 0)
        return [*t.chunk(ranks, self.dim), *[empty] * ranks][:ranks]

    def filled(self, pieces: Sequence[Tensor], like: Tensor) -> Tensor:
        """Pieces filled up with zeros to equal size, stacked."""
        found = like.new_zeros(len(pieces), *self.size)
        for place, piece in zip(found, pieces, strict=True):
            place.narrow(self.dim, 0, piece.shape[self.dim]).copy_(piece)
        return found

    def spread(self, t: Tensor | None, like: Tensor) -> Tensor:
        """Every rank's piece of a whole tensor, None being zeros, as `filled` gives them."""
        if t is None:
            return like.new_zeros(self.mesh.size(-1), *self.size)
        return self.filled(self._pieces(t), like)

    def put_together(self, filled: Tensor) -> Tensor:
        """The whole tensor, from every rank's piece, as `filled` gives them."""
        return torch.cat([*filled], self.dim).narrow(self.dim, 0, self.shape[self.dim])

    def summed(self, t: Tensor | None, own: Tensor) -> Tensor:
        """This rank's piece of the sum over ranks of whole tensors, None being zeros; like `own`."""
        total = own.new_empty(1, *self.size)
        dist.reduce_scatter_tensor(total, self.spread(t, own), group=self.mesh.get_group(-1))
        if self.mesh.ndim > 1:
            dist.all_reduce(total, group=self.mesh.get_group(0))
        return total[0].narrow(self.dim, 0, own.shape[self.dim])

    def join(self, own: Tensor) -> Tensor:
        """The sharded tensor, from every rank's own piece."""
        from torch.distributed.tensor import DTensor

        like = torch.empty(self.shape, device="meta")
        return DTensor.from_local(
            own,
            self.mesh,
            self.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


_EXPECTED = (
    "expected every parameter sharded by fully_shard alone over one mesh, of shards or of replicas and "
    "shards, on its device (exclude= leaves parameters out)"
)


def _placed(p: DTensor) -> str:
    return f"placements {p.placements} on a mesh of shape {tuple(p.device_mesh.shape)}"


def _shard_of(name: str, p: Tensor) -> _Shard:
    """How a parameter is sharded; a TypeError that names it unless once, with replicas or without."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(p, DTensor):
        got = "one that is not sharded beside others that are"
    elif [type(place) for place in p.placements] not in ([Shard], [Replicate, Shard]):
        got = _placed(p)
    elif p.device.type != p.device_mesh.device_type:
        got = f"a shard on {p.device.type} of a mesh on {p.device_mesh.device_type}"
    else:
        return _Shard(p.device_mesh, cast("Shard", p.placements[-1]).dim, tuple(p.shape))
    raise TypeError(f"parameter {name!r}: got {got}, {_EXPECTED}")


def sharded_dim(p: Tensor) -> int:
    """The dimension that a sharded parameter is cut along."""
    return _shard_of("weight", p).dim


def own_rows(p: Tensor) -> range:
    """The rows that this rank has of a parameter that is sharded by rows."""
    shard = _shard_of("weight", p)
    return range(shard.begin, min(shard.begin + shard.size[0], shard.shape[0]))


class _Gathering(torch.autograd.Function):
    """Whole tensors from every rank's pieces, all of one dtype, in one exchange.

    A piece's gradient is the sum over the ranks of the whole tensor's gradients, in one exchange, too.
    """

    @staticmethod
    def forward(ctx: Any, shards: Sequence[_Shard], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.shards, ctx.lengths = shards, [t.shape[s.dim] for s, t in zip(shards, own, strict=True)]
        mesh = shards[0].mesh
        flat = torch.cat([s.filled([t], t).flatten() for s, t in zip(shards, own, strict=True)])
        found = flat.new_empty(mesh.size(-1) * len(flat))
        dist.all_gather_into_tensor(found, flat, group=mesh.get_group(-1))
        parts = found.view(mesh.size(-1), -1).split([math.prod(s.size) for s in shards], 1)
        return tuple(
            s.put_together(part.reshape(-1, *s.size)) for s, part in zip(shards, parts, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        mesh = ctx.shards[0].mesh
        each = [s.spread(g, g).flatten(1) for s, g in zip(ctx.shards, grads, strict=True)]
        flat = torch.cat(each, 1)
        total = flat.new_empty(flat.shape[1])
        dist.reduce_scatter_tensor(total, flat.flatten(), group=mesh.get_group(-1))
        parts = total.split([math.prod(s.size) for s in ctx.shards])
        return None, *(
            part.view(s.size).narrow(s.dim, 0, length)
            for s, part, length in zip(ctx.shards, parts, ctx.lengths, strict=True)
        )


def refuse_outer(model: nn.Module, theta: Mapping[str, Tensor]) -> None:
    """Raise a TypeError that names a sharded parameter which no unit of the model gathers whole."""
    kept = {id(p.sharded_param): p for p in _fsdp_parameters(model)}
    for name, p in theta.items():
        if not is_sharded(p):
            continue
        if id(p) not in kept:
            raise TypeError(
                f"parameter {name!r}: got one that fully_shard of an outer module shards, expected that "
                "module as model (exclude= leaves parameters out, but not of the model's passes)"
            )
        if kept[id(p)].is_dtensor:
            raise TypeError(
                f"parameter {name!r}: got {_placed(p)}, by fully_shard of a DTensor, {_EXPECTED}"
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
        mesh = first[1].mesh
        # All ranks, and those of them that hold one part each.
        self.group, self._holders = _group_over(mesh), mesh.get_group(-1)
        self._agreement: Agreement | None = None
        self._device = torch.device(mesh.device_type)

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
        refuse_outer(model, theta)
        return found

    def within(self, agreement: Agreement) -> Sharding:
        """This sharding in a call of all ranks: they agree before numbers are exchanged."""
        found = copy.copy(self)
        found._agreement = agreement
        return found

    def _exchanging(self) -> AbstractContextManager[None]:
        return nullcontext() if self._agreement is None else self._agreement.exchanging()

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
        """This rank's pieces of tensors like the parameters; what has no parameter, or is no tensor, as it is.

        Raises:
            ValueError: a tensor of another shape.
        """
        found: dict[str, Tensor] = {}
        for name in sorted(named):  # in the same order on all ranks
            t, shard = named[name], self._shards.get(name)
            if shard is None or not isinstance(t, Tensor):
                found[name] = t
            elif tuple(t.shape) != shard.shape:
                raise ValueError(
                    f"importance of {name!r}: got shape {tuple(t.shape)}, expected {shard.shape}"
                )
            else:
                found[name] = self._piece(shard, t)
        return found

    def _piece(self, shard: _Shard, t: Tensor) -> Tensor:
        """This rank's piece; of a tensor that lies on the ranks, in an exchange with them."""
        with self._exchanging() if is_sharded(t) else nullcontext():
            return shard.own(t)

    @staticmethod
    def local(theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of sharded tensors by name."""
        return dict(zip(theta, local_parts(t.detach() for t in theta.values()), strict=True))

    def summed(self, name: str, t: Tensor | None, own: Tensor) -> Tensor:
        """This rank's piece of the sum over ranks of whole tensors like a parameter; None: zeros."""
        return self._shards[name].summed(t, own)

    def place(self, name: str) -> tuple[int, int]:
        """How many elements a whole parameter has, and how many of them lie before this rank's part.

        A part along another dimension than the first, which lies in many places, is said to come first.
        """
        shard = self._shards[name]
        size, rows = math.prod(shard.shape), shard.shape[0]
        return size, 0 if shard.dim else shard.begin * (size // max(1, rows))

    def gathered(self, parameters: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """The whole of sharded parameters, or of tensors like them, from this rank's pieces; differentiable.

        In one exchange for each dtype, and one more for the gradients, which are summed over the ranks.
        """
        shards = [_shard_of("factor", p) for p in parameters]
        found = [*own]
        for dtype in dict.fromkeys(t.dtype for t in own):
            chosen = [i for i, t in enumerate(own) if t.dtype == dtype]
            with self._exchanging():
                whole: Any = _Gathering.apply(  # type: ignore[no-untyped-call]
                    [shards[i] for i in chosen], *[own[i] for i in chosen]
                )
            for i, t in zip(chosen, whole, strict=True):
                found[i] = t
        return found

    def add_up(self, numbers: Tensor) -> Tensor:
        """Numbers of each rank's part, summed over the parts, the same bits on all ranks."""
        replicas = self.group.size() // self._holders.size()
        return self._reduced(numbers, dist.ReduceOp.SUM) / replicas

    def least(self, numbers: Tensor) -> Tensor:
        """The smallest of each of these numbers over the parts."""
        return self._reduced(numbers, dist.ReduceOp.MIN)

    def _reduced(self, numbers: Tensor, by: Any) -> Tensor:
        total = numbers.to(self._device, copy=True)
        with self._exchanging():
            dist.all_reduce(total, by, self.group)
        return total.to(numbers.device)

    def samples_of_all(self, samples: int) -> int:
        """How many samples all ranks have together."""
        return int(self._reduced(torch.tensor(samples), dist.ReduceOp.SUM))

    def join(self, name: str, own: Tensor) -> Tensor:
        """The sharded tensor like a parameter, from every rank's own piece."""
        return self._shards[name].join(own)

    def sum(self, value: Tensor) -> Tensor:
        """A value of each rank's part, summed over the parts; its gradient is the gradient of the own part."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self._holders)
        return value - value.detach() + total

    def share(self, remainders: Tensor) -> None:
        """Give every part an equal share of the sum over the parts, in place."""
        remainders.copy_(self.add_up(remainders) / self._holders.size())

    def _with_rows(self, name: str, like: Tensor) -> _Shard:
        """The layout of a tensor with a row for each one of a parameter's."""
        if name not in self._shards:
            raise KeyError(f"state: got {name!r}, which the model has no parameter for")
        shard = self._shards[name]
        return shard._replace(dim=0, shape=(shard.shape[0], *like.shape[1:]))

    def join_rows(self, name: str, own: Tensor) -> Tensor:
        """The sharded tensor with a row for each one of a parameter's, from every rank's rows."""
        return self._with_rows(name, own).join(own)

    def own_rows(self, name: str, t: Tensor) -> Tensor:
        """This rank's rows of a tensor with a row for each one of a parameter's."""
        return self._piece(self._with_rows(name, t), t)

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
                found[key] = t * self._holders.size()
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
        for key in sorted(state):  # in the same order on all ranks
            t = state[key]
            kind, _, name = key.partition(".")
            if kind == "remainder":
                found[key] = t / self._holders.size()
            elif kind in ("omega", "anchor"):
                if name not in self._shards:
                    raise KeyError(f"state: got {name!r}, which the model has no parameter for")
                shard = self._shards[name].rows(len(t) if t.dim() else 0)
                if tuple(t.shape) != shard.shape:
                    raise ValueError(
                        f"state, {kind} of {name!r}: got shape {tuple(t.shape)}, expected "
                        f"{shard.shape}"
                    )
                found[key] = self._piece(shard, t)
        return found

    def on_first_rank(
        self, state: Mapping[str, Tensor], write: Callable[[Named], None], agreement: Agreement
    ) -> None:
        """Call `write` with the whole tensors on the first rank."""
        first = dist.get_rank(self.group) == 0
        whole_state = {}
        for key, t in state.items():
            with agreement.exchanging():
                t = whole_tensor(t)
            if first:
                whole_state[key] = t.cpu()
        if first:
            write(whole_state)
        agreement.settle()


def _refuse_observed(state: Mapping[str, Tensor]) -> None:
    # Not by their number: a rank may have had none of them.
    if any(key.startswith("pending.") for key in state):
        raise RuntimeError(
            "state: got importance of observed samples, expected consolidate() before the state of a sharded "
            "model is saved or loaded"
        )
