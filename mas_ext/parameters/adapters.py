"""Weights that low-rank adapters update: which products of parameters are added to them, and by which name.

A layer with LoRA computes with W0 + sum_f scale_f left_f right_f, W0 frozen. Where a library keeps the factors
is told by one function, which is registered; the one for peft is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from mas_ext.kernels.dtypes import DTYPES
from mas_ext.parameters.names import frozen, is_hidden, is_sharded
from mas_ext.parameters.restoring import restoring


class Factor(NamedTuple):
    """A factor of a low-rank product: a parameter, whose dimensions behind the first count as one."""

    parameter: nn.Parameter
    transposed: bool = False

    def matrix(self, like_parameter: Tensor) -> Tensor:
        """The factor's matrix, of the parameter or of a tensor of its shape, such as its gradient."""
        flat = like_parameter.reshape(len(like_parameter), -1)
        return flat.T if self.transposed else flat


class LowRankProduct(NamedTuple):
    """What one adapter adds to a weight of shape (m, n): scale * left right, (m, r) and (r, n)."""

    adapter: str
    left: Factor
    right: Factor
    scale: float


class AdaptedWeight(NamedTuple):
    """A frozen weight, a parameter of `owner`, and the products of the adapters that are active now."""

    owner: nn.Module
    key: str
    products: list[LowRankProduct]

    @property
    def weight(self) -> nn.Parameter:
        """The weight without the products."""
        found = self.owner._parameters[self.key]
        assert found is not None
        return found

    def parameters(self) -> list[nn.Parameter]:
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
    elif isinstance(module, (layers.Linear, layers._ConvNd)):
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
                if _is_held(adapted.weight):
                    found[prefix + adapted.key] = adapted
                return
        for key, child in module._modules.items():
            if child is not None:
                hidden = is_hidden(module, key) or _wraps(module, key)
                walk(child, prefix if hidden else f"{prefix}{key}.")

    if finders:
        walk(model, "")
    return found


def _is_held(weight: nn.Parameter) -> bool:
    """Whether it is frozen, and has floating-point numbers and not, as a tensor subclass, codes for them."""
    plain = type(weight.data) is Tensor or is_sharded(weight)
    return plain and weight.dtype in DTYPES and not weight.requires_grad


def _wraps(module: nn.Module, key: str) -> bool:
    """Whether a child's key is no part of the names that peft's model has without adapters."""
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return False
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    return (key == "base_model" and isinstance(module, peft.PeftModel)) or (
        key == "model" and isinstance(module, tuner)
    )


@contextmanager
def measured(adapted: Mapping[str, AdaptedWeight]) -> Iterator[dict[str, nn.Parameter]]:
    """For a while, gradients are of the adapted weights, each use of its own, and not of the factors.

    A weight's gradient is that of the sum with its products. Yields parameters by the weights' names, which
    share their memory.
    """
    before = [(w, w.weight) for w in adapted.values()]

    def restore() -> None:
        for w, weight in before:
            w.owner._parameters[w.key] = weight

    with frozen(p for w in adapted.values() for p in w.parameters()), restoring(restore):
        for w, weight in before:
            w.owner._parameters[w.key] = nn.Parameter(weight.detach())
        yield {name: w.weight for name, w in adapted.items()}
