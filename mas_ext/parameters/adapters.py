"""Weights that low-rank adapters update: which products of parameters are added to them, and by which name.

A layer with LoRA computes with W0 + sum_f scale_f left_f right_f, W0 frozen. Where a library keeps the factors
is told by one function, which is registered; the one for peft is here.

W0 may be quantised: of a linear layer, only the shape and what it computes are asked for, and not how it keeps
its weight. The gradient of the sum is that of a matrix of zeros, E, in y = layer(x) + x E^T.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext.kernels.dtypes import DTYPES
from mas_ext.parameters.fsdp import own_rows
from mas_ext.parameters.names import StandIn, frozen, is_hidden, is_sharded
from mas_ext.parameters.restoring import restoring


class Factor(NamedTuple):
    """A factor of a low-rank product: a parameter, whose dimensions behind the first count as one."""

    parameter: Tensor
    transposed: bool = False

    def matrix(self, like_parameter: Tensor) -> Tensor:
        """The factor's matrix, of the parameter or of a tensor of its shape, such as its gradient."""
        rows, *others = like_parameter.shape
        flat = like_parameter.reshape(rows, math.prod(others))
        return flat.T if self.transposed else flat


class LowRankProduct(NamedTuple):
    """What one adapter adds to a weight of shape (m, n): scale * left right, (m, r) and (r, n)."""

    adapter: str
    left: Factor
    right: Factor
    scale: float


class AdaptedWeight(NamedTuple):
    """A frozen weight, a parameter of `owner`, and the products of the adapters that are active now.

    sharded: the parameter as fully_shard keeps it between passes, of which this rank has some rows.
    """

    owner: nn.Module
    key: str
    products: list[LowRankProduct]
    sharded: Any = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight without the products; as it is kept, if it is quantised or sharded."""
        found = self.owner._parameters[self.key] if self.sharded is None else self.sharded
        assert found is not None
        return found

    @property
    def is_quantised(self) -> bool:
        """Whether what is kept of a linear layer's weight are no floating-point numbers in its shape."""
        weight, shape = self.weight, _shape_of_linear(self.owner)
        return shape is not None and not (_has_numbers(weight) and weight.shape == shape)

    @property
    def shape(self) -> torch.Size:
        """The weight's, (outputs, inputs) of a linear layer."""
        shape = _shape_of_linear(self.owner) if self.is_quantised else None
        return self.weight.shape if shape is None else shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's; of a quantised one that of the factors."""
        if not self.is_quantised:
            return self.weight.dtype
        return self.products[0].left.parameter.dtype if self.products else torch.float32

    @property
    def rows(self) -> range:
        """The rows of the weight that this rank has: all of them, unless it is sharded."""
        return range(self.shape[0]) if self.sharded is None else own_rows(self.sharded)

    def own(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Which places in the weight, as one dimension, lie in this rank's rows, and where in these."""
        columns = math.prod(self.shape[1:])
        begin, end = (row * columns for row in (self.rows.start, self.rows.stop))
        mine = (begin <= places) & (places < end)
        return mine, places[mine] - begin

    @torch.no_grad()
    def numbers(self, places: Tensor) -> Tensor:
        """Elements of the weight, by their places in it as one dimension; float64, on the CPU.

        Of a quantised one they are what its layer makes of unit vectors. Those in other ranks' rows are 0.
        """
        weight = self.weight
        if not self.is_quantised:
            found = torch.zeros(len(places), dtype=torch.float64)
            mine, there = self.own(places)
            local = weight if self.sharded is None else self.sharded.to_local()
            found[mine] = local.reshape(-1)[there.to(weight.device)].double().cpu()
            return found
        rows, columns = places // self.shape[1], places % self.shape[1]
        used, which = columns.unique(return_inverse=True)
        x = torch.zeros(len(used) + 1, self.shape[1], dtype=self.dtype, device=weight.device)
        x[torch.arange(len(used)), used] = 1
        training = self.owner.training

        def restore() -> None:
            self.owner.training = training

        with restoring(restore):
            self.owner.training = True  # in eval mode some rearrange their weight
            y = self.owner(x).double().cpu()
        made: Tensor = (y[:-1] - y[-1])[which, rows]
        return made

    def parameters(self) -> list[Tensor]:
        """The products' factors."""
        return [f.parameter for p in self.products for f in (p.left, p.right)]


# From a module to the weight that it adapts; None for a module that adapts none, or in another way.
Finder = Callable[[nn.Module], AdaptedWeight | None]


def _of_peft(module: nn.Module) -> AdaptedWeight | None:
    """A layer with LoRA by peft: linear, embedding or convolution; not DoRA and other variants."""
    layers: Any = sys.modules["peft.tuners.lora.layer"]
    if not isinstance(module, layers.LoraLayer):
        return None
    layer: Any = module
    base = layer.get_base_layer()
    turned = False
    if isinstance(module, layers.Embedding):
        left, right, turned = layer.lora_embedding_A, layer.lora_embedding_B, True
    elif isinstance(module, (layers.Linear, layers._ConvNd)) or _is_of_bitsandbytes(module):
        turned = getattr(layer, "fan_in_fan_out", False)
        up, down = ({n: m.weight for n, m in s.items()} for s in (layer.lora_B, layer.lora_A))
        left, right = (down, up) if turned else (up, down)
    else:
        return None
    if layer.lora_variant or getattr(base, "groups", 1) != 1:
        return None
    active = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in left]
    products = [
        LowRankProduct(
            n, Factor(left[n], turned), Factor(right[n], turned), float(layer.scaling[n])
        )
        for n in active
    ]
    return AdaptedWeight(base, "weight", products)


def _is_of_bitsandbytes(module: nn.Module) -> bool:
    """Whether it is one of peft's two layers with LoRA over codes of 8 and 4 bits."""
    return type(module).__module__ == "peft.tuners.lora.bnb"


_finders: list[Finder] = []


def register_adapter(finder: Finder) -> Finder:
    """Have adapters of another library held in weight space, too.

        @register_adapter
        def of_my_library(module):
            if not isinstance(module, MyLoRA):
                return None
            product = LowRankProduct("default", Factor(module.B), Factor(module.A), module.scale)
            return AdaptedWeight(module.linear, "weight", [product])

    Args:
        finder: called with every module of a model; gives the weight that it adapts, or None.
    """
    _finders.append(finder)
    return finder


def adapted_weights(model: nn.Module) -> dict[str, AdaptedWeight]:
    """The frozen weights that adapters update, by the names that they have without adapters."""
    finders = [*_finders, *([_of_peft] if "peft.tuners.lora.layer" in sys.modules else [])]
    found: dict[str, AdaptedWeight] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for finder in finders:
            adapted = finder(module)
            if adapted is not None:
                known = adapted.is_quantised or _has_numbers(adapted.weight)
                if known and not adapted.weight.requires_grad:
                    found[prefix + adapted.key] = adapted
                return
        for key, child in module._modules.items():
            if child is not None:
                hidden = is_hidden(module, key) or _wraps(module, key)
                walk(child, prefix if hidden else f"{prefix}{key}.")

    if finders:
        walk(model, "")
    return found


def _has_numbers(weight: nn.Parameter) -> bool:
    """Whether it has floating-point numbers and not, as a tensor subclass, codes for them."""
    return (type(weight.data) is Tensor or is_sharded(weight)) and weight.dtype in DTYPES


def _shape_of_linear(layer: nn.Module) -> torch.Size | None:
    """(outputs, inputs) of a linear layer, whatever it keeps; None of others."""
    outputs, inputs = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(outputs, int) and isinstance(inputs, int):
        return torch.Size((outputs, inputs))
    return None


def _wraps(module: nn.Module, key: str) -> bool:
    """Whether a child's key is no part of the names that peft's model has without adapters."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return False
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    return (key == "base_model" and isinstance(module, peft.PeftModel)) or (
        key == "model" and isinstance(module, tuner)
    )


# Under these, a layer with a quantised weight has the zeros E and the hook that adds x E^T.
_ZEROS, _HOOK = "adapted_weight", "mas_ext: adapted weight"


def _plus_zeros(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    """y + x E^T."""
    x, zeros = args[0], layer._parameters[_ZEROS]
    assert zeros is not None
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        raise ValueError(
            f"model: got a {type(layer).__name__} whose output has no gradient of its input, expected one, as "
            "importance of what comes before is made of it"
        )
    return y + F.linear(x.to(zeros), zeros).to(y)


def factors_of(weight: Tensor) -> Sequence[Tensor]:
    """The factors of the products that are added to a weight while it is `measured`; none of another tensor."""
    found: Sequence[Tensor] = getattr(weight, "adapter_factors", ())
    return found


@contextmanager
def measured(adapted: Mapping[str, AdaptedWeight]) -> Iterator[dict[str, nn.Parameter]]:
    """For a while, gradients are of the adapted weights, each use of its own, and not of the factors.

    A weight's gradient is that of the sum with its products. Yields parameters by the weights' names, which
    share their memory; a StandIn for one that is quantised; of one that is sharded the parameter itself, whose
    flag FSDP gives to the gathered weight, too.
    """
    sharded = [w.sharded for w in adapted.values() if w.sharded is not None]
    whole = [w for w in adapted.values() if w.sharded is None]
    quantised = [w for w in whole if w.is_quantised]
    before = [(w, w.weight) for w in whole if not w.is_quantised]

    def restore() -> None:
        for p in sharded:
            p.requires_grad_(False)
        for w, weight in before:
            w.owner._parameters[w.key] = weight
        for w in quantised:
            w.owner._forward_hooks.pop(_HOOK, None)  # type: ignore[call-overload]
            w.owner._parameters.pop(_ZEROS, None)

    with frozen(p for w in adapted.values() for p in w.parameters()), restoring(restore):
        for p in sharded:
            p.requires_grad_(True)
        for w, weight in before:
            w.owner._parameters[w.key] = nn.Parameter(weight.detach())
        for w in quantised:
            zero = torch.zeros((), dtype=w.dtype, device=w.weight.device)
            w.owner._parameters[_ZEROS] = StandIn(zero.expand(w.shape))
            w.owner._forward_hooks[_HOOK] = _plus_zeros  # type: ignore[index]
        found: dict[str, Any] = {
            n: w.owner._parameters[_ZEROS] if w.is_quantised else w.weight
            for n, w in adapted.items()
        }
        for name, p in found.items():
            if adapted[name].sharded is None:
                p.adapter_factors = adapted[name].parameters()
        yield found
