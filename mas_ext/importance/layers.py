"""What a layer does with its weight and bias: its value, its input's gradient, and per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.uses import Lookup, Product, Rows, Use

Layout = Literal["leading", "second", "none"]


@dataclass(frozen=True)
class Fold:
    """Where the samples are in a tensor.

    "leading": dimension 0, which may be samples times something (windows, positions); "second": dimension 1,
    or the inner part of a dimension 0 that is positions times samples; "none": the tensor is the same for
    all samples.
    """

    samples: int
    layout: Layout

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be laid out so."""
        if self.layout == "none" or not shape:
            return False
        inner = self.layout == "second" and len(shape) > 2 and shape[1] == self.samples
        return inner or shape[0] % self.samples == 0

    def unfolded(self, t: Tensor) -> Tensor:
        """(samples, k, *rest): dimension 0 was k * samples, or k where samples are dimension 1."""
        if self.layout == "second" and t.dim() > 2 and t.shape[1] == self.samples:
            return t.transpose(0, 1)
        return self._folded(t)

    def _folded(self, t: Tensor) -> Tensor:
        """(samples, k, *rest) of a tensor whose dimension 0 is k * samples."""
        k = t.shape[0] // self.samples
        if self.layout == "leading":
            return t.reshape(self.samples, k, *t.shape[1:])
        return t.reshape(k, self.samples, *t.shape[1:]).transpose(0, 1)

    def features(self, t: Tensor) -> Tensor:
        """(samples, positions, features) of a tensor (..., features)."""
        return self.unfolded(t).flatten(1, -2)

    def images(self, t: Tensor, dims: int) -> Tensor:
        """(samples, all pixels of its images, channels) of a tensor (images, channels, *dims pixels)."""
        if t.dim() != dims + 2:
            raise AssertionError("a single image has no dimension of samples")
        rows = t.movedim(1, -1).flatten(1, -2)
        return self._folded(rows).flatten(1, 2)

    def spread_over(self, g: Tensor, shape: torch.Size) -> Tensor | None:
        """(samples, *shape): g summed over all that a parameter of this shape is broadcast along.

        None where the parameter differs along the samples' dimension.
        """
        padded = (1,) * (g.dim() - len(shape)) + tuple(shape)
        inner = self.layout == "second" and g.dim() > 2 and g.shape[1] == self.samples
        if padded[1 if inner else 0] != 1:
            return None
        # Both have (samples, k, *rest) now; k is the parameter's own dimension 0 where samples were inner.
        g = self.unfolded(g)
        own = (1, padded[0] if inner else 1, *padded[2 if inner else 1 :])
        dims = [d for d in range(1, g.dim()) if own[d] == 1]
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        return (g.sum(dims, dtype=dtype) if dims else g).reshape(self.samples, *shape)


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
        dims = x.dim() - 2
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
        return Product(fold.images(small, dims), fold.images(large, dims), rows, self.groups)


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
        g = fold.spread_over(grad * x, torch.Size(self.shape))
        assert g is not None, "a norm's weight does not differ along the samples"
        return Rows(g)


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
