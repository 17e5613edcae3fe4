"""Layers: their values, their inputs' gradients, and the per-sample gradients of their weights and biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import Dense, Lookup, PerSample, Product
from mas_ext.importance.exact.sample_layout import SampleLayout
from mas_ext.kernels.dtypes import compute_dtype


def channels(x: Tensor) -> tuple[int, ...]:
    """The shape with which numbers by channel, dimension 1, are broadcast to x."""
    return (x.shape[1], *[1] * (x.dim() - 2))


class Layer:
    """y = f(x, weight) + bias, linear in weight and bias.

    by_row: whether every row over y's last dimension is a function of x's row. recurs: whether x and y's
    gradient are not what the weight multiplies and what that has for gradient: then y is kept for `backward`.
    """

    by_row = False
    recurs = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y."""
        raise NotImplementedError

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        """The shape with which the bias is broadcast to y."""
        return tuple(bias.shape)

    def repeated_shapes(self, y: Tensor) -> Sequence[tuple[int, ...]]:
        """The shapes with which weight and bias are broadcast to y, where they are."""
        return ()

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """d y / d x applied to y's gradient, where x has one."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where it recurs: the gradient of weight's product, what weight multiplies, and the gradient of x."""
        raise NotImplementedError

    def backward_of_rows(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Where it recurs: any gradients of weight's product and of x, made of the rows of `backward`."""
        raise NotImplementedError

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        """The weight's per-sample gradients."""
        raise NotImplementedError

    def bias_gradients(self, grad: Tensor, bias: Tensor, layout: SampleLayout) -> PerSample:
        """The bias's per-sample gradients: y's, summed over all that the bias is broadcast along."""
        return Dense(layout.sum_to(grad, self.bias_shape(grad, bias)))


@dataclass(frozen=True)
class Linear(Layer):
    """y = x weight^T + bias over the last dimension.

    transposed: y = x weight + bias.
    """

    transposed: bool = False
    by_row = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(grad, (weight.t() if self.transposed else weight).to(grad.dtype))

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        left, right = layout.features(grad), layout.features(x)
        return Product(right, left) if self.transposed else Product(left, right)


@dataclass(frozen=True)
class OfZeros(Linear):
    """Linear whose weight is known to be zero, and is not read: y and the gradient of x are zero, too."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.new_zeros(()).expand(x.shape)


@dataclass(frozen=True)
class GroupedLinear(Layer):
    """y_g = x_g weight_g^T for every group: x (..., groups * inputs), weight (groups, outputs, inputs)."""

    groups: int
    by_row = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x, weight.mT)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._product(grad, weight.to(grad.dtype))

    @staticmethod
    def _product(x: Tensor, matrices: Tensor) -> Tensor:
        rows = x.reshape(-1, len(matrices), matrices.shape[1]).transpose(0, 1)
        return torch.bmm(rows, matrices).transpose(0, 1).reshape(*x.shape[:-1], -1)

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        return Product(layout.features(grad), layout.features(x), None, self.groups)


@dataclass(frozen=True)
class Convolution(Layer):
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
        return (*bias.shape, *[1] * (y.dim() - 2))

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
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

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        # A transposed convolution is the gradient of an ordinary one: the roles are swapped.
        small, large = (x, grad) if self.transposed else (grad, x)
        rows = _pixels_seen(
            tuple(large.shape[2:]),
            tuple(small.shape[2:]),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            layout.images_each(x.shape[0]),
            x.device,
        )
        return Product(layout.images(small), layout.images(large), rows, self.groups)


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
        pixel = torch.where(own < 0, -1, before * size + own)  # below 0 where before is
        pixel = pixel.flatten(2).flatten(0, 1)
    first = torch.arange(images)[:, None] * torch.tensor(large).prod()
    pixel = torch.where(pixel[:, None] < 0, -1, pixel[:, None] + first).flatten(1)
    return pixel.to(device, torch.int32).contiguous()


def _in_rows(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape differs only along the last dimension of what it is broadcast to."""
    return all(size == 1 for size in shape[:-1])


@dataclass(frozen=True)
class Affine(Layer):
    """y = x weight + bias elementwise, as behind a normalisation; `shape`: how both are broadcast to x."""

    shape: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.view(self.shape)
        return x * weight if bias is None else torch.addcmul(bias.view(self.shape), x, weight)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        return self.shape

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        return _in_rows(self.shape)

    def repeated_shapes(self, y: Tensor) -> Sequence[tuple[int, ...]]:
        return (self.shape,)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad * weight.view(self.shape)

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        return Dense(layout.sum_to(grad * x, self.shape))


@dataclass(frozen=True)
class Broadcast(Layer):
    """y = weight, seen with `shape` and expanded to `y_shape`; there is no x."""

    shape: tuple[int, ...]
    y_shape: tuple[int, ...]

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        return _in_rows(self.shape)

    def repeated_shapes(self, y: Tensor) -> Sequence[tuple[int, ...]]:
        return (self.shape,)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight.view(self.shape).expand(self.y_shape)

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        return Dense(layout.sum_to(grad, self.shape))


@dataclass(frozen=True)
class Standardised(Layer):
    """y = (x - mean) / sqrt(var + eps) weight + bias by channel: BatchNorm on its running statistics.

    x is all that is kept of the way forward: what the weight multiplies is computed again, element by element,
    as batch_norm itself takes long to start on a GPU; in float32 at least, for 16 bits have not the range.
    """

    mean: Tensor
    var: Tensor
    eps: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, weight, bias, eps=self.eps)

    def bias_shape(self, y: Tensor, bias: Tensor) -> tuple[int, ...]:
        return channels(y)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad * (weight * self._scale()).view(channels(x))

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        shape = channels(x)
        mean = self.mean.to(compute_dtype(self.mean.dtype)).view(shape)
        g = layout.sum_to((x - mean).mul_(grad), shape)
        return Dense(g * self._scale().view(shape))

    def _scale(self) -> Tensor:
        return torch.rsqrt(self.var.to(compute_dtype(self.var.dtype)) + self.eps)


@dataclass(frozen=True)
class Embedding(Layer):
    """y = weight[ids]; x holds the ids."""

    padding_idx: int | None
    by_row = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        ids = layout.features(x[..., None])[..., 0]
        if self.padding_idx is not None:
            ids = torch.where(ids == self.padding_idx, -1, ids)
        return Lookup(ids, layout.features(grad))
