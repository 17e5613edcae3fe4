"""What a layer does with its weight and bias: its value, its input's gradient, and per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import Lookup, Product, Rows, Use
from mas_ext.kernels.dtypes import compute_dtype

Layout = Literal["leading", "inner", "trailing", "none"]


@dataclass(frozen=True)
class Fold:
    """Where the samples are in a tensor, of which k more rows may belong to each (windows, positions).

    "leading": dimension 0 is samples * k; "inner": dimension 1 is samples * k; "trailing": dimension 0 is
    k * samples; "none": the tensor is the same for all samples. `columns`: the size that dimension 1 had where
    "inner" was flattened to rows.
    """

    samples: int
    layout: Layout
    columns: int = 0

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be laid out so."""
        if self.layout == "none" or not shape:
            return False
        if self.layout != "inner":
            return shape[0] % self.samples == 0
        if len(shape) > 2:
            return shape[1] % self.samples == 0
        return self.columns > 0 and self.columns % self.samples == shape[0] % self.columns == 0

    def rows(self, shape: Sequence[int]) -> int:
        """How many rows of a tensor of this shape, which fits, belong to each sample."""
        size = shape[0]
        if self.layout == "inner":
            size = shape[1] if len(shape) > 2 else self.columns
        return size // self.samples

    def unfolded(self, t: Tensor) -> Tensor:
        """(samples, k, *rest); (samples, dimension 0, k, *rest) for "inner"."""
        if self.layout == "inner":
            if t.dim() == 2:
                t = t.reshape(-1, self.columns, t.shape[1])
            t = t.reshape(t.shape[0], self.samples, t.shape[1] // self.samples, *t.shape[2:])
            return t.transpose(0, 1)
        k = t.shape[0] // self.samples
        if self.layout == "leading":
            return t.reshape(self.samples, k, *t.shape[1:])
        return t.reshape(k, self.samples, *t.shape[1:]).transpose(0, 1)

    def each(self, numbers: Tensor, like: Tensor) -> Tensor:
        """numbers, one a sample, where the samples are in a tensor of this shape."""
        places = torch.arange(like.numel(), device=like.device).view(like.shape)
        found = numbers.new_empty(like.numel())
        found[self.unfolded(places).reshape(self.samples, -1)] = numbers[:, None]
        return found.view(like.shape)

    def features(self, t: Tensor) -> Tensor:
        """(samples, positions, features) of a tensor (..., features)."""
        return self.unfolded(t).flatten(1, -2)

    def images(self, t: Tensor) -> Tensor:
        """(samples, all pixels of its images, channels) of a tensor (images, channels, *pixels)."""
        return self.unfolded(t.movedim(1, -1).flatten(1, -2)).flatten(1, 2)

    def spread_over(self, g: Tensor, shape: Sequence[int]) -> Tensor | None:
        """(samples, *shape): g summed over all that a parameter of this shape is broadcast along.

        None where the parameter differs along the samples' dimension.
        """
        own = (1,) * (g.dim() - len(shape)) + tuple(shape)
        if self.layout == "inner" and g.dim() == 2:
            own = (1, *own)
        i = 1 if self.layout == "inner" else 0
        if own[i] != 1:
            return None
        g = self.unfolded(g)
        own = (1, *own[:i], 1, *own[i + 1 :])
        dims = [d for d in range(1, g.dim()) if own[d] == 1]
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        return g.sum(dims, dtype=dtype).reshape(self.samples, *shape)


def channels(x: Tensor) -> tuple[int, ...]:
    """The shape with which numbers by channel, dimension 1, are broadcast to x."""
    return (x.shape[1], *[1] * (x.dim() - 2))


class Layer(Protocol):
    """y = f(x, weight) + bias, linear in weight and bias."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y."""

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """The shape with which the bias is broadcast to y."""

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """d y / d x applied to y's gradient."""

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """The weight's per-sample gradients."""


def bias_use(layer: Layer, grad: Tensor, bias: Tensor, fold: Fold) -> Rows:
    """A bias's per-sample gradients: y's, summed over all that it is broadcast along."""
    g = fold.spread_over(grad, layer.bias_shape(grad, bias))
    assert g is not None, "a layer's bias does not differ along the samples"
    return Rows(g.reshape(-1, *bias.shape))


@dataclass(frozen=True)
class Linear:
    """y = x weight^T + bias over the last dimension; transposed: y = x weight + bias."""

    transposed: bool = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Layer."""
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """See Layer."""
        return tuple(bias.shape)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See Layer."""
        weight = weight.to(grad.dtype)
        return torch.matmul(grad, weight.t() if self.transposed else weight)

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """See Layer."""
        g, a = fold.features(grad), fold.features(x)
        return Product(a, g) if self.transposed else Product(g, a)


@dataclass(frozen=True)
class Convolution:
    """y = convolution of x with weight (outputs, inputs / groups, *kernel) + bias, zeros around x.

    transposed: weight is (inputs, outputs / groups, *kernel).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Layer."""
        # Not torch.convolution, which autocast does not know everywhere.
        name = f"conv{'_transpose' if self.transposed else ''}{len(self.kernel)}d"
        y: Tensor = getattr(torch, name)(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            **({"output_padding": self.output_padding} if self.transposed else {}),
        )
        return y

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """See Layer."""
        return (*bias.shape, *[1] * (y.dim() - 2))

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See Layer."""
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight.to(grad.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding or [0] * len(self.kernel),
            self.groups,
            (True, False, False),
        )[0]
        return gradient

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """See Layer."""
        # A transposed convolution is the gradient of an ordinary one: the roles are swapped.
        small, large = (x, grad) if self.transposed else (grad, x)
        rows = _pixels_seen(
            tuple(large.shape[2:]),
            tuple(small.shape[2:]),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            x.shape[0] // fold.samples,
            x.device,
        )
        return Product(fold.images(small), fold.images(large), rows, self.groups)


@lru_cache(maxsize=256)
def _pixels_seen(
    large: tuple[int, ...],
    small: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    images: int,
    device: torch.device,
) -> Tensor:
    """The pixel of the large image that each tap sees at each position of the small one, -1: none.

    int32 (taps, images * positions), pixels counted through all images.
    """
    pixel = torch.zeros(1, 1, dtype=torch.int64)
    for i, size in enumerate(large):
        tap = torch.arange(kernel[i])[:, None] * dilation[i]
        seen = torch.arange(small[i])[None] * stride[i] - padding[i] + tap
        seen = torch.where((seen >= 0) & (seen < size), seen, -1)
        # (taps so far, this dimension's taps, positions so far, this dimension's positions)
        before, own = pixel[:, None, :, None], seen[None, :, None, :]
        pixel = torch.where((before < 0) | (own < 0), -1, before * size + own)
        pixel = pixel.flatten(2).flatten(0, 1)
    first = torch.arange(images)[:, None] * torch.tensor(large).prod()
    pixel = torch.where(pixel[:, None] < 0, -1, pixel[:, None] + first).flatten(1)
    return pixel.to(device, torch.int32).contiguous()


@dataclass(frozen=True)
class Affine:
    """y = x weight + bias elementwise, as behind a normalisation; `shape`: how both are broadcast to x."""

    shape: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Layer."""
        weight = weight.view(self.shape)
        return x * weight if bias is None else torch.addcmul(bias.view(self.shape), x, weight)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """See Layer."""
        return self.shape

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See Layer."""
        return grad * weight.view(self.shape)

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """See Layer."""
        g = fold.spread_over(grad * x, self.shape)
        assert g is not None, "a norm's weight does not differ along the samples"
        return Rows(g)


@dataclass(frozen=True)
class Standardised:
    """y = (x - mean) / sqrt(var + eps) weight + bias by channel: BatchNorm on its running statistics.

    x is all that is kept of the way forward: what the weight multiplies is computed again, element by element,
    as batch_norm itself takes long to start on a GPU; in float32 at least, for 16 bits have not the range.
    """

    mean: Tensor
    var: Tensor
    eps: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Layer."""
        return F.batch_norm(x, self.mean, self.var, weight, bias, eps=self.eps)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """See Layer."""
        return channels(y)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See Layer."""
        return grad * (weight * self._scale()).view(channels(x))

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """See Layer."""
        shape = channels(x)
        mean = self.mean.to(compute_dtype(self.mean.dtype)).view(shape)
        g = fold.spread_over((x - mean).mul_(grad), shape)
        assert g is not None, "a norm's weight does not differ along the samples"
        return Rows(g * self._scale().view(shape))

    def _scale(self) -> Tensor:
        return torch.rsqrt(self.var.to(compute_dtype(self.var.dtype)) + self.eps)


@dataclass(frozen=True)
class Embedding:
    """y = weight[ids]; x holds the ids."""

    padding_idx: int | None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See Layer."""
        return F.embedding(x, weight)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """See Layer."""
        raise AssertionError("an embedding has no bias")

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See Layer."""
        raise AssertionError("ids have no gradient")

    def weight_use(self, grad: Tensor, x: Tensor, fold: Fold) -> Use:
        """See Layer."""
        ids = fold.features(x[..., None])[..., 0]
        if self.padding_idx is not None:
            ids = torch.where(ids == self.padding_idx, -1, ids)
        return Lookup(ids, fold.features(grad))
