"""Small models that a way to compute per-sample gradients may trip over, each with its inputs.

Samples are dimension 0 of input and output; what happens to them in between is what differs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

Inputs = Callable[[int], Any]
Wiring = Callable[[Any, Any], Any]
Forward = Callable[[Any, Any], Tensor]


class Case(NamedTuple):
    """A model, its inputs, and what is known of it.

    `may` names the parameters that may take the fallback, "*" standing for all; whatever is not in it has to be
    fast. `must`: it can't go another way, so that the user has to be told. `noise` names parameters whose
    gradient is zero but for rounding. `sizes` are those of the batches.
    """

    make: Callable[[], nn.Module]
    inputs: Inputs
    may: Sequence[str] = ()
    must: bool = False
    noise: Sequence[str] = ()
    sizes: Sequence[int] = (5, 6, 1)
    forward: Forward | None = None


class Wired(nn.Module):
    """Modules and parameters under their names, and how they are wired: wiring(self, x)."""

    def __init__(self, wiring: Wiring, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, x: Any) -> Any:
        return self.wiring(self, x)


ANY = ("*",)
CASES: dict[str, Case] = {}


def add(name: str, make: Callable[[], nn.Module], inputs: Inputs, **known: Any) -> None:
    assert name not in CASES
    CASES[name] = Case(make, inputs, **known)


def wired(
    name: str, inputs: Inputs, wiring: Wiring, parts: Callable[[], dict[str, Any]], **known: Any
) -> None:
    add(name, lambda: Wired(wiring, **parts()), inputs, **known)


# -- inputs ----------------------------------------------------------------------------------------


def real(*shape: int) -> Inputs:
    return lambda n: torch.randn(n, *shape)


def real_of_lengths(*lengths: int) -> Inputs:
    """4 numbers at each of as many positions as the next length says."""
    turn = itertools.cycle(lengths)
    return lambda n: torch.randn(n, next(turn), 4)


def ids(length: int, vocabulary: int = 7) -> Inputs:
    return lambda n: torch.randint(vocabulary, (n, length))


def first_ones_negative(*shape: int) -> Inputs:
    """The first number decides; it is negative in the first 4 samples of every batch."""

    def inputs(n: int) -> Tensor:
        x = torch.randn(n, *shape)
        first = x.view(n, -1)[:, 0]
        first.abs_()
        first[:4].neg_()
        return x

    return inputs


def sometimes_negative(*shape: int) -> Inputs:
    """The first number decides; it is negative in batches of 5, the first ones."""

    def inputs(n: int) -> Tensor:
        x = torch.randn(n, *shape)
        first = x.view(n, -1)[:, 0]
        first.abs_()
        if n == 5:
            first.neg_()
        return x

    return inputs


def weights(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def without_gradient(module: nn.Module, *names: str) -> nn.Module:
    for name, p in module.named_parameters():
        if not names or name in names:
            p.requires_grad_(False)
    return module


def observed(model: nn.Module, inputs: Inputs) -> nn.Module:
    """With BatchNorm's statistics, and the norms' weights, unlike those at the start."""
    for _ in range(3):
        model(1.5 * inputs(8) + 0.3)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return model


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


# -- linear ----------------------------------------------------------------------------------------

add("linear", lambda: nn.Linear(4, 3), real(4))
add("linear without bias", lambda: nn.Linear(4, 3, bias=False), real(4))
add("mlp", lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), real(4))
add("linear, positions", lambda: nn.Linear(4, 3), real(6, 4))
add("linear, 4-D", lambda: nn.Linear(4, 3), real(2, 3, 4))
add("linear, positions as many as samples", lambda: nn.Linear(4, 3), real(5, 4))
add(
    "linear, positions differ by batch",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
    lambda n: torch.randn(n, n + 2, 4),
)
wired(
    "linear, no positions",
    real(1, 4),
    lambda m, x: m.a(x[:, 1:]).sum(1) + m.b(x[:, 0]),
    lambda: {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)},
)
wired(
    "linear, no inputs",
    real(4),
    lambda m, x: m.a(x[:, :0]) * x.sum(1, keepdim=True),
    lambda: {"a": Wired(lambda m, x: F.linear(x, m.w, m.b), w=torch.zeros(3, 0), b=weights(3))},
)
wired(
    "linear, no inputs, of a derived weight",
    real(4),
    lambda m, x: F.linear(x[:, :0], m.w.exp(), m.b.exp()) * x.sum(1, keepdim=True),
    lambda: {"w": torch.zeros(3, 0), "b": weights(3)},
)
wired(
    "a derived weight without influence",
    real(4),
    lambda m, x: F.linear(x, m.w) + 0 * F.linear(x, m.v.exp()),
    lambda: {"w": weights(3, 4), "v": weights(3, 4)},
)
with torch.inference_mode():
    KEPT = torch.arange(4.0)
wired(
    "a constant of inference mode",
    real(5, 4),
    lambda m, x: x * (m.b + KEPT.to(x.device)),
    lambda: {"b": weights(4)},
)
wired(
    "a sum of no rows of numbers",
    real(5, 4),
    lambda m, x: x * (m.b + (torch.zeros(0, 4).to(x) @ m.w).sum(0)),
    lambda: {"w": weights(4, 4), "b": weights(4)},
)
add(
    "mixer",
    lambda: Wired(
        lambda m, x: m.out(m.channels(m.norm(x + m.tokens(x.mT).mT))),
        tokens=nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5)),
        norm=nn.LayerNorm(4),
        channels=nn.Linear(4, 4),
        out=nn.Linear(4, 2),
    ),
    real(5, 4),
    noise=("tokens.2.bias",),  # the norm takes it away
)
for frozen in ("weight", "bias"):
    add(
        f"linear, frozen {frozen}",
        lambda name=f"1.{frozen}": without_gradient(
            nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), name
        ),
        real(3, 4),
    )
add(
    "a frozen layer",
    lambda: nn.Sequential(
        nn.Linear(4, 5), without_gradient(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    real(4),
)
wired(
    "without influence",
    real(4),
    lambda m, x: m.used(x) + 0 * m.zeroed(x) + m.detached(x).detach(),
    lambda: {name: nn.Linear(4, 3) for name in ("used", "zeroed", "detached", "unused")},
)
wired(
    "no_grad part",
    real(4),
    lambda m, x: m.a(x) * torch.no_grad()(m.a)(x) + torch.no_grad()(m.b)(x),
    lambda: {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)},
)

# -- convolution -----------------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": (nn.Conv1d, (4, 7), {"kernel_size": 3}),
    "conv1d, stride": (nn.Conv1d, (4, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "conv1d, same": (nn.Conv1d, (4, 7), {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "conv1d, circular": (nn.Conv1d, (4, 7), {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "conv2d": (nn.Conv2d, (4, 6, 5), {"kernel_size": 3}),
    "conv2d, no bias": (nn.Conv2d, (4, 6, 5), {"kernel_size": 3, "bias": False}),
    "conv2d, 1x1": (nn.Conv2d, (4, 3, 3), {"kernel_size": 1}),
    "conv2d, stride": (nn.Conv2d, (4, 7, 8), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2)}),
    "conv2d, stride leaves a rest": (nn.Conv2d, (4, 8, 8), {"kernel_size": 3, "stride": 3}),
    "conv2d, same": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "padding": "same"}),
    "conv2d, same, even kernel": (nn.Conv2d, (4, 5, 6), {"kernel_size": (2, 4), "padding": "same"}),
    "conv2d, valid": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "padding": "valid"}),
    "conv2d, reflect": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "conv2d, dilation": (nn.Conv2d, (4, 8, 9), {"kernel_size": 3, "dilation": (2, 3), "padding": 1}),
    "conv2d, groups": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "groups": 2}),
    "conv2d, depthwise": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "groups": 4, "padding": 1}),
    "conv2d, patches": (nn.Conv2d, (4, 8, 8), {"kernel_size": 4, "stride": 4}),
    "conv2d, one position": (nn.Conv2d, (4, 3, 3), {"kernel_size": 3}),
    "conv3d": (nn.Conv3d, (4, 4, 3, 4), {"kernel_size": (2, 3, 2), "stride": (1, 1, 2), "padding": 1}),
    "conv3d, groups": (nn.Conv3d, (4, 3, 3, 4), {"kernel_size": 2, "groups": 2, "dilation": (1, 1, 2)}),
    "transposed 1d": (nn.ConvTranspose1d, (4, 5), {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    "transposed 1d, groups": (nn.ConvTranspose1d, (4, 5), {"kernel_size": 3, "groups": 2, "padding": 1}),
    "transposed 2d": (nn.ConvTranspose2d, (4, 3, 4), {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}),
    "transposed 2d, all": (
        nn.ConvTranspose2d,
        (4, 3, 4),
        {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2, "groups": 2, "dilation": 2},
    ),
    "transposed 2d, depthwise": (nn.ConvTranspose2d, (4, 3, 4), {"kernel_size": 2, "groups": 4}),
    "transposed 3d": (nn.ConvTranspose3d, (4, 2, 3, 2), {"kernel_size": 2, "stride": (1, 2, 2), "groups": 2}),
}  # fmt: skip
for name, (kind, shape, geometry) in GEOMETRIES.items():
    add(name, lambda kind=kind, geometry=geometry: kind(4, 8, **geometry), real(*shape))


def residual_network() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = m.relu(m.first(x))
        y = m.norm(m.conv(h))
        y += h
        return m.head(m.relu(y).mean((2, 3)))

    model = Wired(
        wiring,
        first=nn.Conv2d(3, 4, 3, padding=1),
        conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        head=nn.Linear(4, 3),
    )
    return observed(model, real(3, 6, 6))


add("residual, in-place relu", residual_network, real(3, 6, 6))
add(
    "in-place on outputs and on views of them",
    lambda: Wired(
        lambda m, x: m.b(m.a(x).mul_(2).view(len(x), 8).relu_()).add_(1).sigmoid_(),
        a=nn.Conv1d(2, 4, 2),
        b=nn.Linear(8, 3),
    ),
    real(2, 3),
)
wired(
    "in-place into a slice",
    real(5, 4),
    lambda m, x: m.b(_set_first(m.a(x), 0.5)),
    lambda: {"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)},
)


def _set_first(x: Tensor, value: float) -> Tensor:
    x[:, 0] = value
    return x


add(
    "channels last",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(
        memory_format=torch.channels_last
    ),
    lambda n: torch.randn(n, 3, 6, 6).to(memory_format=torch.channels_last),
)
add(
    "u-net",
    lambda: Wired(
        lambda m, x: m.out(torch.cat([m.down(x), m.up(m.low(F.max_pool2d(m.down(x), 2)))], 1)),
        down=nn.Conv2d(2, 3, 3, padding=1),
        low=nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU()),
        up=nn.ConvTranspose2d(4, 3, 2, stride=2),
        out=nn.Conv2d(6, 1, 1),
    ),
    real(2, 6, 4),
)
add(
    "squeeze and excite",
    lambda: Wired(
        lambda m, x: m.conv(x) * torch.sigmoid(m.gate(x.mean((2, 3))))[:, :, None, None],
        conv=nn.Conv2d(3, 4, 3),
        gate=nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4)),
    ),
    real(3, 5, 5),
)
wired(
    "conv on samples without dimension 0, one by one",
    real(5, 6),
    lambda m, x: torch.stack([m.conv(sample) for sample in x]),
    lambda: {"conv": nn.Conv1d(5, 3, 2)},
    may=ANY,
)
wired(
    "conv by unfold",
    real(2, 5, 4),
    lambda m, x: m.w @ F.unfold(x, 3) + m.b,
    lambda: {"w": weights(4, 18), "b": weights(4, 1)},
)
wired(
    "conv of one size, two sizes of images",
    real(3, 8, 8),
    lambda m, x: torch.cat([flat(m.conv(x)), flat(m.conv(F.avg_pool2d(x, 2)))], 1),
    lambda: {"conv": nn.Conv2d(3, 2, 3)},
)
wired(
    "conv and linear share a weight",
    real(4, 5),
    lambda m, x: m.linear(x.mT).mT + F.conv1d(x.square(), m.linear.weight[:, :, None]),
    lambda: {"linear": nn.Linear(4, 3)},
)

# -- norms -----------------------------------------------------------------------------------------

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm, positions": (lambda: nn.LayerNorm(4), (5, 4)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layer norm, no bias": (lambda: nn.LayerNorm(4, bias=False), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm, no positions": (lambda: nn.GroupNorm(2, 4), (4,)),
    "rms norm": (lambda: nn.RMSNorm(4), (5, 4)),
    "rms norm, two dimensions": (lambda: nn.RMSNorm((5, 4)), (5, 4)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 6)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance norm, statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (4, 3, 3),
    ),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2)),
}
for name, (norm, shape) in NORMS.items():
    add(name, lambda norm=norm, shape=shape: observed(norm(), real(*shape)), real(*shape))

wired(
    "norm used twice, frozen weight in another",
    real(5, 4),
    lambda m, x: m.b(m.a(m.linear(m.a(x)))),
    lambda: {
        "a": observed(nn.LayerNorm(4), real(4)),
        "b": without_gradient(nn.LayerNorm(4), "weight"),
        "linear": nn.Linear(4, 4),
    },
)
wired(
    "norm by hand",
    real(5, 4),
    lambda m, x: m.linear(x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * m.scale),
    lambda: {"scale": weights(4) + 1, "linear": nn.Linear(4, 3)},
)
wired(
    "the low-level names of functions, and keywords",
    real(3, 6),
    lambda m, x: F.linear(
        input=torch.layer_norm(
            torch.conv1d(x, weight=m.kernel, bias=m.b), [4], weight=m.scale, bias=m.shift
        ),
        weight=m.w,
        bias=None,
    ),
    lambda: {
        "kernel": weights(2, 3, 3),
        "b": weights(2),
        "scale": weights(4),
        "shift": weights(4),
        "w": weights(3, 4),
    },
    noise=("b",),
)

# -- embedding -------------------------------------------------------------------------------------

add("embedding", lambda: nn.Embedding(7, 3), ids(5))
add("embedding, one id a sample", lambda: nn.Embedding(7, 3), lambda n: torch.randint(7, (n,)))
add(
    "embedding, padding",
    lambda: nn.Sequential(nn.Embedding(3, 4, padding_idx=1), nn.Linear(4, 2)),
    ids(6, 3),
)
add("embedding, sparse", lambda: nn.Embedding(7, 3, sparse=True), ids(5, 3))
# Its gradient depends on how often an id is in the batch; per sample, in the sample.
add(
    "embedding, scaled by frequency",
    lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
    ids(6, 4),
    may=ANY,
)
add(
    "embedding, scaled by frequency, no id twice in the first samples",
    lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
    lambda n: torch.cat(
        [torch.stack([torch.randperm(4) for _ in range(3)]), torch.randint(4, (n, 4))]
    ),
    may=ANY,
    must=True,
)
add("embedding bag, mean", lambda: nn.EmbeddingBag(7, 3, mode="mean"), ids(5), may=ANY)
add("embedding bag, max", lambda: nn.EmbeddingBag(7, 3, mode="max"), ids(5), may=ANY)
wired(
    "embedding tied to the output layer",
    ids(5),
    lambda m, x: F.linear(torch.tanh(m.hidden(m.embedding(x))), m.embedding.weight),
    lambda: {"embedding": nn.Embedding(7, 3), "hidden": nn.Linear(3, 3)},
)
wired(
    "positions without samples",
    ids(5),
    lambda m, x: m.out(
        torch.tanh(m.token(x) + m.position(torch.arange(x.shape[1], device=x.device)))
    ),
    lambda: {"token": nn.Embedding(7, 4), "position": nn.Embedding(8, 4), "out": nn.Linear(4, 2)},
)
wired(
    "positions without samples, as many as samples",
    ids(5),
    lambda m, x: m.out(
        torch.tanh(m.token(x) + m.position(torch.arange(x.shape[1], device=x.device)))
    ),
    lambda: {"token": nn.Embedding(7, 4), "position": nn.Embedding(5, 4), "out": nn.Linear(4, 2)},
    sizes=(5, 5, 2),
)
wired(
    "positions of every sample",
    ids(5),
    lambda m, x: m.out(
        torch.tanh(m.token(x) + m.position(torch.arange(5, device=x.device).expand(len(x), 5)))
    ),
    lambda: {"token": nn.Embedding(7, 4), "position": nn.Embedding(8, 4), "out": nn.Linear(4, 2)},
)
wired(
    "embedding, sequence first",
    ids(5),
    lambda m, x: m.out(torch.tanh(m.token(x.T))).mean(0),
    lambda: {"token": nn.Embedding(7, 4), "out": nn.Linear(4, 2)},
)

# -- attention -------------------------------------------------------------------------------------


def attention(batch_first: bool, crossed: bool, **options: Any) -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        a, b = (x, x[:, :3]) if crossed else (x, x)
        if not batch_first:
            a, b = (a.transpose(0, 1), b.transpose(0, 1)) if crossed else (a.transpose(0, 1),) * 2
        memory = m.memory(b) if "kdim" in options else b
        y, _ = m.attention(a, memory, memory, need_weights=options.get("add_bias_kv", False))
        return y if batch_first else y.transpose(0, 1)

    parts: dict[str, Any] = {
        "attention": nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
    }
    if "kdim" in options:
        parts["memory"] = nn.Linear(4, options["kdim"])
    model = Wired(wiring, **parts)
    nn.init.normal_(model.attention.in_proj_bias)
    return model


for batch_first in (True, False):
    layout = "samples first" if batch_first else "sequence first"
    for crossed in (False, True):
        kind = "cross" if crossed else "self"
        for variant, options in (
            ("packed", {}),
            ("separate", {"kdim": 3, "vdim": 3}),
            ("bias_k", {"add_bias_kv": True}),
        ):
            add(
                f"{kind}-attention, {variant}, {layout}",
                lambda b=batch_first, c=crossed, o=options: attention(b, c, **o),
                real(5, 4),
            )
    for norm_first in (True, False):
        add(
            f"encoder layer, {layout}, norm {'first' if norm_first else 'last'}",
            lambda b=batch_first, n=norm_first: Wired(
                lambda m, x, b=b: m.layer(x) if b else m.layer(x.transpose(0, 1)).transpose(0, 1),
                layer=nn.TransformerEncoderLayer(4, 2, 6, batch_first=b, norm_first=n),
            ),
            real(5, 4),
        )
add(
    "decoder layer",
    lambda: Wired(
        lambda m, x: m.layer(
            x, m.encoder(x[:, :3]), tgt_mask=torch.ones(5, 5, device=x.device).triu(1).bool()
        ),
        encoder=nn.Linear(4, 4),
        layer=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True),
    ),
    real(5, 4),
)


def _padded(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 5, 4), "padding": torch.arange(5) >= torch.randint(2, 6, (n, 1))}


add(
    "attention with padding, a dict for output",
    lambda: Wired(
        lambda m, batch: {
            "logits": m.out(m.layer(batch["x"], src_key_padding_mask=batch["padding"])[:, 0])
        },
        layer=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        out=nn.Linear(4, 3),
    ),
    _padded,
    forward=lambda model, batch: model(batch)["logits"],
)


def handwritten_transformer() -> nn.Module:
    """Sequence first; k has a bias, which softmax cancels."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        s, b, _ = h.shape
        n = m.norm(h)
        q, k, v = (f(n).view(s, b * 2, 2).transpose(0, 1) for f in (m.q, m.k, m.v))
        y = (q @ k.mT / 2**0.5).softmax(-1) @ v
        h = h + m.o(y.transpose(0, 1).reshape(s, b, 4))
        return (h + m.down(F.gelu(m.up(m.norm2(h))))).transpose(0, 1)

    parts = {name: nn.Linear(4, 4) for name in "qkvo"}
    return Wired(
        wiring, **parts, norm=nn.LayerNorm(4), norm2=nn.LayerNorm(4), up=nn.Linear(4, 6), down=nn.Linear(6, 4)
    )  # fmt: skip


for positions in (5, 6):
    add(
        f"transformer by hand, sequence first, {positions} positions",
        handwritten_transformer,
        real(positions, 4),
        noise=("k.bias",),
    )


def gpt2() -> nn.Module:
    """Its Conv1D: addmm on rows of all samples; packed qkv; a causal mask; tied embeddings."""

    def conv1d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[1])

    def wiring(m: Any, x: Tensor) -> Tensor:
        n, p = x.shape
        h = m.wte(x) + m.wpe(torch.arange(p, device=x.device)[None])
        q, k, v = (
            t.view(n, p, 2, 2).transpose(1, 2) for t in conv1d(m.ln(h), m.w, m.b).split(4, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + conv1d(y.transpose(1, 2).reshape(n, p, 4), m.w2, m.b2)
        return F.linear(m.ln(h), m.wte.weight)

    return Wired(
        wiring, wte=nn.Embedding(7, 4), wpe=nn.Embedding(6, 4), ln=nn.LayerNorm(4),
        w=weights(4, 12), b=weights(12), w2=weights(4, 4), b2=weights(4),
    )  # fmt: skip


add("gpt2", gpt2, ids(6))


def vit() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = m.patch(x).flatten(2).mT
        h = torch.cat([m.cls.expand(len(x), -1, -1), h], 1) + m.position
        h = h + m.scale * m.layer(h)
        return m.head(m.norm(h)[:, 0])

    return Wired(
        wiring, patch=nn.Conv2d(3, 4, 2, stride=2), cls=weights(1, 1, 4), position=weights(1, 5, 4),
        scale=weights(4), layer=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3),
    )  # fmt: skip


add("vit", vit, lambda n: 4 * torch.randn(n, 3, 4, 4))
wired(
    "learned queries, repeated",
    real(5, 4),
    lambda m, x: m.attention(m.queries.repeat(len(x), 1, 1), x, x)[0],
    lambda: {
        "queries": weights(1, 3, 4),
        "attention": nn.MultiheadAttention(4, 2, batch_first=True),
    },
    # A query that is the same for all samples is a linear layer's input all the same.
)
wired(
    "prefix put before the keys",
    real(5, 4),
    lambda m, x: (x @ torch.cat([m.prefix.expand(len(x), -1, -1), m.k(x)], 1).mT).softmax(-1) @ m.v,
    lambda: {"prefix": weights(2, 4), "k": nn.Linear(4, 4, bias=False), "v": weights(7, 3)},
)


def swin() -> nn.Module:
    """Windows of 2 x 2 folded into dimension 0, within each sample."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        n = len(x)
        h = m.embed(x)
        windows = h.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n * 4, 4, 4)
        windows = windows + m.attention(m.norm(windows), m.norm(windows), m.norm(windows))[0]
        windows = m.mlp(windows)
        return windows.view(n, 2, 2, 2, 2, 3).transpose(2, 3).reshape(n, 4, 4, 3)

    return Wired(
        wiring, embed=nn.Linear(3, 4), norm=nn.LayerNorm(4), mlp=nn.Linear(4, 3),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )  # fmt: skip


add("windows folded into the samples", swin, real(4, 4, 3))


def nested(h: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.as_nested_tensor(list(h))


# -- how samples are folded ------------------------------------------------------------------------


def positions_major(layer: Callable[[Any, Tensor], Tensor]) -> Wiring:
    """The layer sees rows (positions * samples): row p * n + b is of sample b."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        n, p = x.shape[:2]
        rows = layer(m, x.transpose(0, 1).reshape(p * n, *x.shape[2:]))
        return rows.view(p, n, *rows.shape[1:]).transpose(0, 1)

    return wiring


for positions in (5, 2):
    wired(
        f"rows by position, {positions} positions",
        real(positions, 4),
        positions_major(lambda m, x: m.b(m.norm(torch.tanh(m.a(x))))),
        lambda: {"a": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "b": nn.Linear(6, 3)},
    )
wired(
    "frames folded into the samples",
    real(3, 2, 4, 4),
    lambda m, x: m.out(F.relu(m.conv(x.flatten(0, 1))).view(len(x), 3, -1).mean(1)),
    lambda: {"conv": nn.Conv2d(2, 3, 3), "out": nn.Linear(12, 2)},
)
wired(
    "frames folded into the samples, with a border",
    real(3, 2, 4, 4),
    lambda m, x: m.out(F.relu(m.conv(x.flatten(0, 1))).view(len(x), 3, -1).mean(1)),
    lambda: {"conv": nn.Conv2d(2, 3, 3, padding=1), "out": nn.Linear(48, 2)},
)
wired(
    "images by frame",
    real(3, 2, 4, 4),
    positions_major(lambda m, x: F.relu(m.conv(x))),
    lambda: {"conv": nn.Conv2d(2, 3, 3)},
)
wired(
    "both folds of one layer",
    real(5, 4),
    lambda m, x: (
        m.a(x.flatten(0, 1)).view(x.shape) * positions_major(lambda m, r: m.a(r))(m, x.square())
    ),
    lambda: {"a": nn.Linear(4, 4)},
)
wired(
    "two views of every sample behind each other",
    real(2, 4),
    lambda m, x: m.a(torch.cat([x[:, 0], x[:, 1]])).view(2, len(x), 3).prod(0),
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "samples in dimension 1 of 4, all as many",
    real(5, 5, 4),
    lambda m, x: m.b(torch.tanh(m.norm(m.a(x.permute(1, 0, 2, 3))))).permute(1, 0, 2, 3),
    lambda: {"a": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "b": nn.Linear(6, 3)},
)
wired(
    "samples in dimension 2 of 4, all as many",
    real(5, 5, 4),
    lambda m, x: m.b(torch.tanh(m.a(x.permute(1, 2, 0, 3)))).permute(2, 0, 1, 3),
    lambda: {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)},
)
wired(
    "a token expanded, samples in dimension 2",
    real(5, 5, 4),
    lambda m, x: m.b(torch.tanh(x.permute(1, 2, 0, 3) + m.token.expand(5, 5, len(x), 4))).permute(
        2, 0, 1, 3
    ),
    lambda: {"token": weights(4), "b": nn.Linear(4, 3)},
)
wired(
    "a scale for every position, sequence first",
    real(5, 4),
    lambda m, x: m.b(x.transpose(0, 1) * m.scale).transpose(0, 1),
    lambda: {"scale": weights(5, 1, 4), "b": nn.Linear(4, 3)},
)
wired(
    "samples last",
    real(5),
    lambda m, x: (m.w @ torch.tanh(m.v @ x.T)).T,
    lambda: {"v": weights(5, 5), "w": weights(3, 5)},
)
wired(
    "samples two by two",
    real(2, 4),
    lambda m, x: torch.cat([m.a(pair.flatten(0, 1)).view(len(pair), 2, 3) for pair in x.split(2)]),
    lambda: {"a": nn.Linear(4, 3)},
    sizes=(4, 6, 1),
)
wired(
    "samples one by one",
    real(4),
    lambda m, x: torch.stack([m.a(sample) for sample in x]),
    lambda: {"a": nn.Linear(4, 3)},
    may=ANY,
)
wired(
    "samples in a nested tensor",
    real(3, 4),
    lambda m, x: m.b(nested(m.a(x)).to_padded_tensor(0.0).tanh()),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)},
    may=ANY,
)
wired(
    "samples backwards inside",
    real(4),
    lambda m, x: m.b(torch.tanh(m.a(x.flip(0)))).flip(0),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)},
)

wired(
    "samples backwards inside, positions differ by batch",
    real_of_lengths(3, 2, 4),
    lambda m, x: m.b(torch.tanh(m.a(x.flip(0)))).flip(0),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)},
    sizes=(5, 5, 5),
)


wired(
    "samples backwards inside, behind two masks",
    real(4, 4),
    lambda m, x: m.b(
        torch.tanh(m.a(x.flip(0)))
        .masked_fill(x.flip(0)[..., :1] > 1, 0.0)
        .masked_fill(x.flip(0)[..., 1:2] > 1, 0.0)
    ).flip(0),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)},
    sizes=(5, 5, 5),
)


def moved(m: Any, x: Tensor) -> Tensor:
    """The layer sees rows of which neighbours are of different samples."""
    rows: Tensor = m.a(x.flatten(0, 1).roll(1, 0)).roll(-1, 0)
    return rows.view(*x.shape[:2], -1)


wired("rows moved by one", real(2, 4), moved, lambda: {"a": nn.Linear(4, 3)})
wired(
    "rows moved by one, a scale for every number",
    real(2, 4),
    lambda m, x: (
        (x.flatten(0, 1).roll(1, 0).view(x.shape) * m.scale).flatten(0, 1).roll(-1, 0).view(x.shape)
    ),
    lambda: {"scale": weights(4)},
)


def by_size(m: Any, x: Tensor) -> Tensor:
    """The layers see rows by sample and by position; the number of positions decides which comes first."""
    n, p = x.shape[:2]
    rows = [(m.a, x.flatten(0, 1)), (m.b, x.transpose(0, 1).flatten(0, 1))]
    if p > 3:
        first, second = (layer(row) for layer, row in rows)
    else:
        second, first = (layer(row) for layer, row in reversed(rows))
    return torch.tanh(first).view(n, p, -1) * second.view(p, n, -1).transpose(0, 1)


wired(
    "sizes decide which layer comes first",
    real_of_lengths(4, 3),
    by_size,
    lambda: {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)},
    sizes=(5, 5),
)
wired(
    "another way for a batch of one",
    real(4),
    lambda m, x: m.a(x) if len(x) == 1 else (m.a.weight @ x[..., None])[..., 0] + m.a.bias,
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "another way for large batches",
    real(4),
    lambda m, x: m.b(m.a(x)) if len(x) < 5 else m.b(m.a(x[:, None]).expand(-1, 2, -1)).mean(1),
    lambda: {"a": nn.Linear(4, 3), "b": nn.Linear(3, 3)},
    sizes=(3, 6, 1),
)

wired(
    "a use without a rule in large batches",
    real(4),
    lambda m, x: m.b(m.a(x) if len(x) < 5 else torch.tensordot(x, m.a.weight, dims=([1], [1]))),
    lambda: {"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(3, 3)},
    may=("a.weight",),
    must=True,
    sizes=(6, 6),
)


def in_height(m: Any, x: Tensor) -> Tensor:
    """Samples below each other make one image."""
    if len(x) < 5:
        return m.conv(x[:, :, None])[:, :, 0]
    return m.conv(x.transpose(0, 1)[None])[0].transpose(0, 1)


wired(
    "one image of large batches",
    real(2, 5),
    in_height,
    lambda: {"conv": nn.Conv2d(2, 3, (1, 2))},
    may=ANY,
    must=True,
    sizes=(6, 6),
)

# -- used more than once ---------------------------------------------------------------------------

wired(
    "autoencoder, W and its transpose",
    real(5),
    lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w.T, m.c),
    lambda: {"w": weights(3, 5), "b": weights(3), "c": weights(5)},
)
wired(
    "one layer three times",
    real(4),
    lambda m, x: m.a(torch.tanh(m.a(torch.tanh(m.a(x))))),
    lambda: {"a": nn.Linear(4, 4)},
)
wired(
    "one layer, different numbers of positions",
    real(6, 4),
    lambda m, x: m.a(x).sum(1) + m.a(x[:, 0]) * m.a(x[:, :3]).amax(1),
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "one kernel with and without groups",
    real(4, 6),
    lambda m, x: F.conv1d(x[:, :2], m.w) * F.conv1d(x, m.w, groups=2),
    lambda: {"w": weights(4, 2, 3)},
)
wired(
    "one bias of a convolution and a linear layer",
    real(2, 4, 4),
    lambda m, x: F.conv2d(x, m.w, m.b).flatten(2) * F.linear(x[:, 0], m.v, m.b).mean(1)[..., None],
    lambda: {"w": weights(3, 2, 2, 2), "v": weights(3, 4), "b": weights(3)},
)
wired(
    "uses that cancel within a sample",
    real(2, 4),
    lambda m, x: m.a(x[:, 0]) - 0.9 * m.a(x[:, 0] + 0.1 * x[:, 1]),
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "one bias, two layers",
    real(4),
    lambda m, x: F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.v, m.b),
    lambda: {"w": weights(3, 4), "v": weights(3, 3), "b": weights(3)},
)


def recurrent() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros_like(m.input(x[:, 0]))
        for step in x.unbind(1):
            h = torch.tanh(m.input(step) + m.hidden(h))
        return m.out(h)

    return Wired(wiring, input=nn.Linear(3, 4), hidden=nn.Linear(4, 4), out=nn.Linear(4, 2))


add("recurrent by hand", recurrent, real(6, 3))
for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):

    def unrolled(m: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return state[0] if isinstance(state, tuple) else state

    wired(cell.__name__, real(5, 3), unrolled, lambda cell=cell: {"cell": cell(3, 4)})
for layer in (nn.LSTM, nn.GRU):
    wired(
        layer.__name__,
        real(5, 3),
        lambda m, x: m.out(m.layer(x)[0][:, -1]),
        lambda layer=layer: {"layer": layer(3, 4, batch_first=True), "out": nn.Linear(4, 2)},
    )


def _packed(m: Any, batch: dict[str, Tensor]) -> Tensor:
    packed = rnn.pack_padded_sequence(
        m.a(batch["x"]), batch["lengths"].cpu(), batch_first=True, enforce_sorted=False
    )
    return m.layer(packed)[1][0][0]


wired(
    "lstm of sequences of several lengths",
    lambda n: {"x": torch.randn(n, 6, 3), "lengths": torch.randint(1, 7, (n,))},
    _packed,
    lambda: {"a": nn.Linear(3, 3), "layer": nn.LSTM(3, 4, batch_first=True)},
    forward=lambda model, batch: model(batch),
)

# -- weights that are no module's ------------------------------------------------------------------

FUNCTIONAL: dict[str, tuple[Wiring, tuple[int, ...], bool]] = {
    "x @ w": (lambda m, x: x @ m.w, (4, 3), True),
    "x @ w.T": (lambda m, x: x @ m.w.T, (3, 4), True),
    "x @ w.mT": (lambda m, x: x @ m.w.mT, (3, 4), True),
    "matmul": (lambda m, x: torch.matmul(x, m.w), (4, 3), True),
    "Tensor.matmul": (lambda m, x: x.matmul(m.w), (4, 3), True),
    "mm of rows": (lambda m, x: torch.mm(x.view(-1, 4), m.w).view(*x.shape[:-1], 3), (4, 3), True),
    "addmm of rows": (
        lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w).view(*x.shape[:-1], 3),
        (4, 3),
        True,
    ),
    "einsum": (lambda m, x: torch.einsum("bpi,oi->bpo", x, m.w), (3, 4), True),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=1), (4, 3), False),
    "inner": (lambda m, x: torch.inner(x, m.w), (3, 4), True),
    "F.linear of a view": (lambda m, x: F.linear(x, m.w.view(3, 4)), (12,), True),
    "F.linear of a slice": (lambda m, x: F.linear(x, m.w[3:]) * F.linear(x, m.w[:3]), (6, 4), True),
    "F.linear of slices that overlap": (
        lambda m, x: F.linear(x, m.w[2:5]) * F.linear(x, m.w[:3]),
        (6, 4),
        True,
    ),
    "F.linear of columns": (lambda m, x: F.linear(x, m.w[:, 1:5]), (3, 6), True),
    "F.linear of every other row": (lambda m, x: F.linear(x, m.w[::2]), (6, 4), True),
    "F.linear of a copy": (lambda m, x: F.linear(x, m.w.T.contiguous()), (4, 3), True),
    "F.linear of a masked weight": (lambda m, x: F.linear(x, m.w * (m.w > 0)), (3, 4), True),
    "F.linear of a normalised weight": (lambda m, x: F.linear(x, F.normalize(m.w)), (3, 4), True),
    "F.linear of an expanded weight": (lambda m, x: F.linear(x, m.w.expand(3, 4)), (1, 4), True),
    "bmm of an expanded weight": (lambda m, x: torch.bmm(x, m.w.expand(len(x), 4, 3)), (4, 3), True),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), 4, 3), beta=0.5),
        (4, 3),
        False,
    ),
    "bmm per head": (
        lambda m, x: torch.bmm(x.view(-1, 2, 2).transpose(0, 1), m.w)
        .transpose(0, 1)
        .reshape(len(x), -1, 6),
        (2, 2, 3),
        False,
    ),
    "matmul of vectors": (lambda m, x: x @ m.w, (4,), True),
    "multiply and sum": (lambda m, x: (x[..., None] * m.w).sum(-2), (4, 3), True),
    "bilinear": (lambda m, x: F.bilinear(x, x.flip(1), m.w, m.b), (3, 4, 4), False),
    "vmap in the model": (lambda m, x: torch.vmap(lambda row: row @ m.w)(x), (4, 3), False),
}  # fmt: skip
for name, (wiring, shape, fast) in FUNCTIONAL.items():
    wired(
        name,
        real(5, 4),
        wiring,
        lambda shape=shape, biased=("add" in name or name == "bilinear"): {
            "w": weights(*shape),
            **({"b": weights(3)} if biased else {}),
        },
        may=() if fast else ANY,
    )
wired(
    "lora",
    real(5, 4),
    lambda m, x: m.frozen(x) + 2 * m.b(m.a(x)),
    lambda: {
        "frozen": without_gradient(nn.Linear(4, 3)),
        "a": nn.Linear(4, 2, bias=False),
        "b": nn.Linear(2, 3, bias=False),
    },
)
wired(
    "lora, merged",
    real(5, 4),
    lambda m, x: F.linear(x, m.frozen.weight + m.b @ m.a),
    lambda: {"frozen": without_gradient(nn.Linear(4, 3)), "a": weights(2, 4), "b": weights(3, 2)},
)

# -- parameters that no layer's rule covers --------------------------------------------------------

wired(
    "temperature",
    real(4),
    lambda m, x: m.a(x) / m.temperature,
    lambda: {"a": nn.Linear(4, 3), "temperature": torch.tensor(0.7)},
)
wired(
    "gate",
    real(4),
    lambda m, x: m.a(x * torch.sigmoid(m.alpha)),
    lambda: {"alpha": weights(4), "a": nn.Linear(4, 3)},
)
wired(
    "mixture by softmax",
    real(4),
    lambda m, x: (torch.stack([m.a(x), m.b(x), x], -1) * m.alpha.softmax(0)).sum(-1),
    lambda: {"alpha": weights(3), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)},
)
wired(
    "constant output",
    real(4),
    lambda m, x: torch.cat([m.constant.expand(len(x), -1), m.a(x)], 1),
    lambda: {"constant": weights(3), "a": nn.Linear(4, 2)},
)
add(
    "prelu",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)),
    real(4),
)
add(
    "bilinear module",
    lambda: Wired(lambda m, x: m.f(x, x.square()), f=nn.Bilinear(4, 4, 3)),
    real(4),
    may=ANY,
)

# Complex numbers that are made of parameters have no rule; those of data may meet real ones.
COMPLEX: dict[str, tuple[Wiring, Inputs, tuple[int, ...], bool]] = {
    "long convolution": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.w)), real(8), (8,), False,
    ),
    "spectral operator": (
        lambda m, x: torch.fft.irfft(
            torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :3], torch.view_as_complex(m.w)), n=8
        ), real(2, 8), (2, 3, 3, 2), False,
    ),
    "complex linear": (
        lambda m, x: F.linear(torch.view_as_complex(x), torch.view_as_complex(m.w)).abs(),
        real(5, 4, 2), (3, 4, 2), False,
    ),
    "complex matrix product": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x) @ torch.view_as_complex(m.w)),
        real(5, 4, 2), (4, 3, 2), False,
    ),
    "complex table": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(m.w)[x]), ids(5), (7, 4, 2), False,
    ),
    "real scale of complex data": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x) * m.w), real(5, 4, 2), (4,), True,
    ),
}  # fmt: skip
for name, (wiring, inputs, shape, fast) in COMPLEX.items():
    wired(name, inputs, wiring, lambda shape=shape: {"w": weights(*shape)}, may=() if fast else ANY)
add(
    "weight norm",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    real(4),
)
add(
    "spectral norm",
    lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    real(4),
)


class Scale(torch.autograd.Function):
    """x w, and a gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


wired(
    "a function with its own backward",
    real(4),
    lambda m, x: m.a(Scale.apply(x, m.w)),
    lambda: {"w": weights(4), "a": nn.Linear(4, 3)},
    may=("w",),
    must=True,
)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        inner = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    return nn.Sequential(inner, nn.Linear(5, 3))


add("scripted part", scripted, real(4), may=("0.0.weight", "0.0.bias"), must=True)
add(
    "compiled part",
    lambda: nn.Sequential(
        torch.compile(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), backend="eager"), nn.Linear(5, 3)
    ),
    real(4),
)
wired(
    "checkpointed part",
    real(4),
    lambda m, x: m.out(checkpoint(m.inner, x, use_reentrant=False)),
    lambda: {
        "inner": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh()),
        "out": nn.Linear(5, 3),
    },
)
wired(
    "double use: a layer's weight and a view of it",
    real(4),
    lambda m, x: m.a(x) + x[:, :3] * m.a.weight.view(-1)[:3],
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "double use: a small part of the gradient",
    real(4),
    lambda m, x: m.a(x) + 1e-3 * x[:, :1] * m.a.weight.sum(),
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "double use: on a constant",
    real(4),
    lambda m, x: m.a(x) * m.a(torch.arange(4).to(x)),
    lambda: {"a": nn.Linear(4, 3)},
)
wired(
    "hooks that change inputs and outputs",
    real(4),
    lambda m, x: m.b(torch.tanh(m.a(x))),
    lambda: {"a": _hooked(nn.Linear(4, 5)), "b": nn.Linear(5, 3)},
)


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, x: (2 * x[0],))
    module.register_forward_hook(lambda module, x, y: y.square())
    return module


# -- backward passes in the forward pass -----------------------------------------------------------


def _slope(m: Any, x: Tensor, create_graph: bool) -> Tensor:
    x = x.detach().requires_grad_()
    energy = m.energy(x)
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=create_graph, retain_graph=True)
    return torch.cat([energy, slope], 1)


for create_graph in (True, False):
    wired(
        f"slope of an energy, {'with' if create_graph else 'without'} its graph",
        real(4),
        lambda m, x, g=create_graph: m.out(_slope(m, x, g)),
        lambda: {
            "energy": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)),
            "out": nn.Linear(5, 3),
        },
        may=("energy.0.weight", "energy.2.weight") if create_graph else (),
    )
wired(
    "straight-through batch mean",
    real(4),
    lambda m, x: m.b(_straight_through(m.a(x))),
    lambda: {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)},
    may=("a.weight", "a.bias"),
    must=True,
)


def _straight_through(h: Tensor) -> Tensor:
    """Its value is h; its gradient mixes samples, unlike that of a sample alone."""
    mean = h.mean(0)
    return h + (mean - mean.detach())


# -- data decide -----------------------------------------------------------------------------------


def routed(m: Any, x: Tensor) -> Tensor:
    """Positions whose first number is positive go to one expert, the others to another."""
    mask = x[..., 0] > 0
    y = x.new_zeros(*x.shape[:-1], 3)
    y[mask] = m.left(x[mask])
    y[~mask] = m.right(x[~mask])
    return m.out(torch.tanh(y))


def experts() -> dict[str, Any]:
    return {"left": nn.Linear(4, 3), "right": nn.Linear(4, 3), "out": nn.Linear(3, 2)}


def chosen(*counts: Sequence[int]) -> Inputs:
    """For each batch in turn, how many of each sample's 3 positions go left."""
    turn = itertools.cycle(counts)

    def inputs(n: int) -> Tensor:
        x = torch.randn(n, 3, 4)
        first = x[..., 0].abs() + 0.1
        for i, count in enumerate(next(turn)):
            first[i, count:].neg_()
        x[..., 0] = first
        return x

    return inputs


add("routed", lambda: Wired(routed, **experts()), real(3, 4))
# As many rows as samples, and the first ones are where one row a sample would put them.
add(
    "routed, as many rows as samples",
    lambda: Wired(routed, **experts()),
    chosen((1, 1, 1, 2, 0, 1), (2, 0, 1, 1, 2, 0)),
    sizes=(6, 6),
)
add(
    "routed, one row a sample at first",
    lambda: Wired(routed, **experts()),
    chosen((1, 1, 1, 1, 1, 1), (2, 0, 1, 1, 2, 0)),
    sizes=(6, 6),
)


def images_of_one_kind(m: Any, x: Tensor) -> Tensor:
    """Images whose first number is positive have a convolution, and a norm, of their own."""
    picked = (x[:, :, 0, 0, 0] > 0).flatten().nonzero()[:, 0]
    images = x.flatten(0, 1)
    y = images.index_copy(0, picked, m.norm(m.conv(images[picked])))
    return m.out(torch.tanh(y)).view(len(x), -1)


wired(
    "images picked for a convolution and a norm",
    real(3, 4, 3, 2),
    images_of_one_kind,
    lambda: {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "norm": observed(nn.GroupNorm(2, 4), real(4, 3, 2)),
        "out": nn.Conv2d(4, 2, 2),
    },
)

# Other ways to pick rows, in which no function marks them by itself.
PICKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no_grad": lambda rows, i: torch.no_grad()(rows.__getitem__)(i),
    "numpy": lambda rows, i: rows[i.cpu().numpy()],
    "embedding": lambda rows, i: F.embedding(i, rows),
    "index_select, negative dim": lambda rows, i: rows.index_select(index=i, dim=-2),
    "take_along_dim": lambda rows, i: rows.take_along_dim(i[:, None].expand(-1, 4), 0),
}


def picking(pick: Callable[[Tensor, Tensor], Tensor]) -> Wiring:
    def wiring(m: Any, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        i = (rows[:, 0] > 0).nonzero()[:, 0]
        y = torch.zeros(len(rows), 3).to(x).index_put((i,), torch.tanh(m.left(pick(rows, i))))
        return m.out(y.view(len(x), -1, 3))

    return wiring


for way, pick in PICKED.items():
    wired(
        f"picked by {way}",
        chosen((1, 1, 1, 2, 0, 1), (2, 0, 1, 1, 2, 0)),
        picking(pick),
        lambda: {"left": nn.Linear(4, 3), "out": nn.Linear(3, 2)},
        sizes=(6, 6),
    )


def compared(gate: Tensor, slots: Tensor) -> Tensor:
    """Which rows go to which slot, shape (slots, rows): the first chosen one to the first, and so on."""
    return ((gate.cumsum(0) * gate)[None] == slots[:, None] + 1).to(gate)


def computed(gate: Tensor, slots: Tensor) -> Tensor:
    """The same, in which nothing is ever compared."""
    return F.relu(1 - (gate.cumsum(0)[None] - slots[:, None] - 1).abs()) * gate


def multiplied(matrix: Callable[[Tensor, Tensor], Tensor]) -> Wiring:
    """Twice as many slots as samples; chosen rows get there, and back, by products with a matrix."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        slot = matrix(F.relu(rows[:, 0].sign()), torch.arange(2 * len(x)).to(x))
        y = slot.T @ torch.tanh(m.left(slot @ rows))
        return m.out(y.view(len(x), -1, 3))

    return wiring


def copied(m: Any, x: Tensor) -> Tensor:
    """Chosen rows are written to the slots of a new tensor."""
    rows = x.flatten(0, 1)
    i = (rows[:, 0] > 0).nonzero()[:, 0]
    slots = torch.zeros(2 * len(x), 4).to(x).index_copy(0, torch.arange(len(i)).to(i), rows[i])
    y = torch.zeros(len(rows), 3).to(x).index_copy(0, i, torch.tanh(m.left(slots))[: len(i)])
    return m.out(y.view(len(x), -1, 3))


class Picked(torch.autograd.Function):
    """rows[i], where autograd knows nothing of i."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, i: Tensor) -> Tensor:
        ctx.i, ctx.count = i, len(rows)
        return rows[i]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy(0, ctx.i, grad), None


def put_back_by_python(m: Any, x: Tensor) -> Tensor:
    """A list of numbers says which rows are chosen, and cat puts them back."""
    gate = (x.flatten(0, 1)[:, 0] > 0).tolist()
    rows = x.flatten(0, 1)
    h = torch.tanh(m.left(torch.stack([row for row, open in zip(rows, gate, strict=True) if open])))
    left = iter(h)
    y = [next(left) if open else h.new_zeros(3) for open in gate]
    return m.out(torch.stack(y).view(len(x), -1, 3))


def put_back_by_a_function(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    gate = rows[:, 0] > 0
    h = torch.cat([torch.tanh(m.left(rows[gate])), torch.zeros(1, 3).to(x)])
    y = Picked.apply(h, torch.where(gate, gate.cumsum(0) - 1, gate.sum()))
    return m.out(y.view(len(x), -1, 3))


ONE_EACH, TWO_EACH = ((1,) * 6, (1, 1, 1, 2, 0, 1)), ((2,) * 6, (2, 2, 2, 1, 2, 1))
ROUTED: dict[str, tuple[Wiring, Sequence[Sequence[int]]]] = {
    "a product with a matrix": (multiplied(compared), TWO_EACH),
    "arithmetic alone": (multiplied(computed), TWO_EACH),
    "index_copy": (copied, TWO_EACH),
    "an operator called directly": (
        picking(lambda rows, i: torch.ops.aten.index(rows, [i])),
        ONE_EACH,
    ),
    "Python": (put_back_by_python, ((2,) * 6, (2, 2, 2, 3, 1, 2))),
    "a function with its own backward": (put_back_by_a_function, ONE_EACH),
    "a checkpointed part": (
        lambda m, x: checkpoint(lambda x: multiplied(compared)(m, x), x, use_reentrant=False),
        TWO_EACH,
    ),
}
# In the first batch, and for the first samples of the second, the slots of a sample are where it is itself.
for way, (wiring, counts) in ROUTED.items():
    wired(
        f"routed by {way}",
        chosen(*counts),
        wiring,
        lambda: {"left": nn.Linear(4, 3), "out": nn.Linear(3, 2)},
        sizes=(6, 6),
    )


def shut_for_pairs(m: Any, x: Tensor) -> Tensor:
    """Samples of which two rows are chosen do without them."""
    gate = ((x[..., 0] > 0).sum(1) != 2).long()[:, None, None]
    return m.open(x) + gate * multiplied(compared)(m, x)


# The whole first batch does without. Of the second, samples run alone in threes agree by chance.
wired(
    "routed, and shut in the first batch",
    chosen((2,) * 9, (2, 2, 2, 1, 2, 2, 2, 2, 1)),
    shut_for_pairs,
    lambda: {"open": nn.Linear(4, 2), "left": nn.Linear(4, 3), "out": nn.Linear(3, 2)},
    sizes=(9, 9),
)


def by_rank(back: Callable[[Tensor, Tensor], Tensor]) -> Wiring:
    """A layer has samples in the order of their first number, and as they are."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return m.out(back(torch.tanh(m.left(x[order])), order.argsort()) * m.left(x))

    return wiring


def into_a_slice(h: Tensor, i: Tensor) -> Tensor:
    y = h.new_zeros(len(h) + 1, h.shape[1])
    y[1:][i.argsort()] = h
    return y[1:]


def turned_by_python(h: Tensor, i: Tensor) -> Tensor:
    return torch.cat([h[int(k)][None] for k in i])


def turned_by_shapes(h: Tensor, i: Tensor) -> Tensor:
    """Of h[k], k is the number of samples before."""
    return torch.stack([h[len((i < k).nonzero())] for k in i])


def turned_when_checkpointed(h: Tensor, i: Tensor) -> Tensor:
    matrix = (i[:, None] == torch.arange(len(h), device=i.device)).to(h)
    return checkpoint(lambda h: matrix @ h, h, use_reentrant=False)


class Again(torch.autograd.Function):
    """function(x), which its backward pass runs again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        return torch.autograd.grad(y, x, grad)[0], None


def turned_and_run_again(h: Tensor, i: Tensor) -> Tensor:
    matrix = (i[:, None] == torch.arange(len(h), device=i.device)).to(h)
    return Again.apply(h, lambda h: matrix @ h)


def ranked(*swapped: Sequence[int]) -> Inputs:
    """Samples in order, but for two, in each batch in turn."""
    turn = itertools.cycle(swapped)

    def inputs(n: int) -> Tensor:
        x = torch.randn(n, 4)
        first = torch.arange(n).to(x)
        i, j = next(turn)
        first[i], first[j] = float(j), float(i)
        x[:, 0] = first / n
        return x

    return inputs


# 129 samples apart: in a proof with one factor for each, these have the same.
wired(
    "two of many samples change places",
    ranked((5, 5), (4, 133)),
    by_rank(Tensor.__getitem__),
    lambda: {"left": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
    sizes=(140, 140),
)
# Of two samples, random numbers might well say the same as the first batch.
for way, back in {
    "an index": Tensor.__getitem__,
    "an index into a slice": into_a_slice,
    "Python": turned_by_python,
    "shapes": turned_by_shapes,
    "a function with its own backward": Picked.apply,
    "a checkpointed product": turned_when_checkpointed,
    "a product that runs again": turned_and_run_again,
}.items():
    wired(
        f"two samples change places by {way}",
        ranked((0, 0), (0, 1)),
        by_rank(back),
        lambda: {"left": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
        sizes=(2, 2),
    )


def turned_over(turn: Callable[[Tensor, Tensor], Tensor], depth: int) -> Wiring:
    """A layer has the batch with its largest first number last, if need be turned over, and as it is."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        over = x[0, 0] > x[-1, 0]
        h = m.left(turn(x, over))
        for _ in range(depth):
            h = torch.tanh(h)
        return m.out(turn(h, over) * m.left(x))

    return wiring


def there_and_back(turn: Callable[[Tensor, Tensor], Tensor], depth: int) -> Wiring:
    """What a layer makes of the batch is turned over, and back again."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        over, h = x[0, 0] > x[-1, 0], m.left(x)
        for _ in range(depth):
            h = torch.tanh(h)
        for _ in range(2):
            h = turn(torch.tanh(turn(h, over)), over)
        return m.out(h * m.left(x))

    return wiring


def turned_by_a_pool(h: Tensor, over: Tensor) -> Tensor:
    far = 1e3 * (2 * over - 1)
    return F.max_pool1d(torch.stack([h, h.flip(0) + far], -1), 2)[..., 0] - F.relu(far)


TURNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda h, over: torch.where(over, h.flip(0), h),
    "truth values as factors": lambda h, over: over * h.flip(0) + ~over * h,
    "integers as factors": lambda h, over: over.long() * h.flip(0) + (1 - over.long()) * h,
    "an integer that opens": lambda h, over: h + over.long() * (h.flip(0) - h),
    "an integer that opens above 1": lambda h, over: (
        h + (1 + over.long()) * (h.flip(0) - h) - (h.flip(0) - h)
    ),
    "a pool": turned_by_a_pool,
}
# What random numbers say of a turn depends on how many are drawn before.
for (way, turn), depth, wiring in itertools.product(
    TURNS.items(), range(3), (turned_over, there_and_back)
):
    wired(
        f"{wiring.__name__} by {way}, behind {depth} functions",
        ranked((0, 0), (0, 1)),
        wiring(turn, depth),
        lambda: {"left": nn.Linear(4, 4), "out": nn.Linear(4, 3)},
        sizes=(2, 2),
    )
MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "truth values": lambda h, over: torch.where(over.expand(len(h), 1), h.flip(0), h),
    "integers, zero at first": lambda h, over: h + over.long().expand(len(h), 1) * (h.flip(0) - h),
}
for way, turn in MANY.items():
    wired(
        f"turned_over by many {way}",
        ranked((0, 0), (0, 19)),
        turned_over(turn, 0),
        lambda: {"left": nn.Linear(4, 4), "out": nn.Linear(4, 3)},
        sizes=(20, 20),
    )


def swapped_behind_a_mask(i: int) -> Wiring:
    """A layer has samples i and i + 1 in each other's place, of which a mask may show nothing."""

    def swap(t: Tensor) -> Tensor:
        return torch.cat([t[:i], t[i : i + 2].flip(0), t[i + 2 :]])

    def wiring(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.left(swap(x))).masked_fill(swap(x)[:, :1] < -1, 0.0)
        return m.out(swap(h) * m.left(x))

    return wiring


for i in range(4, 17, 2):
    wired(
        f"samples {i} and {i + 1} in each other's place behind a mask",
        real(4),
        swapped_behind_a_mask(i),
        lambda: {"left": nn.Linear(4, 4), "out": nn.Linear(4, 3)},
        sizes=(20, 20),
    )


def ragged(m: Any, batch: dict[str, Tensor]) -> Tensor:
    lengths = batch["lengths"].tolist()
    rows = torch.cat([x[:n] for x, n in zip(batch["x"], lengths, strict=True)])
    h = torch.tanh(m.rows(rows)).split(lengths)
    return m.out(torch.stack([part.sum(0) for part in h]))


wired(
    "samples of several lengths, the first ones equal",
    lambda n: {"x": torch.randn(n, 4, 4), "lengths": torch.tensor([2, 2, 2, 1, 3, 2])},
    ragged,
    lambda: {"rows": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
    sizes=(6, 6),
    forward=lambda model, batch: model(batch),
)


def by_position(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.rows(x.transpose(0, 1).flatten(0, 1)))
    return m.out(h.view(x.shape[1], len(x), -1).mean(0))


def windows_by_place(m: Any, x: Tensor) -> Tensor:
    """Rows of windows: (samples, windows, positions) become windows * samples * positions."""
    rows = x.transpose(0, 1)
    return torch.tanh(m.rows(rows.flatten(0, 2))).view(*rows.shape[:3], -1)


wired(
    "rows by position, one position in the first batch",
    real_of_lengths(1, 5),
    by_position,
    lambda: {"rows": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
    sizes=(5, 5),
)
wired(
    "rows by position but for the first, one of them in the first batch",
    real_of_lengths(2, 5),
    lambda m, x: by_position(m, x[:, 1:]) + m.out(x[:, 0]),
    lambda: {"rows": nn.Linear(4, 4), "out": nn.Linear(4, 3)},
    sizes=(5, 5),
)
wired(
    "windows by place, one in the first batch",
    real_of_lengths(3, 6),
    lambda m, x: m.out(windows_by_place(m, x.unflatten(1, (-1, 3))).mean(0).flatten(1)),
    lambda: {"rows": nn.Linear(4, 5), "out": nn.Linear(15, 3)},
    sizes=(5, 5),
)
wired(
    "windows by place, behind each other, one in the first batch",
    real_of_lengths(3, 6),
    lambda m, x: m.out(
        torch.cat(torch.tanh(m.rows(torch.cat(x.split(3, 1)))).split(len(x)), 1).mean(1)
    ),
    lambda: {"rows": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
    sizes=(5, 5),
)
wired(
    "vmap of a layer",
    real(3, 4),
    lambda m, x: torch.vmap(m.a)(x),
    lambda: {"a": nn.Linear(4, 3)},
    may=ANY,
)
wired(
    "index_select by keywords", real(4),
    lambda m, x: m.a(x).index_select(index=torch.tensor([1, 0], device=x.device), dim=1),
    lambda: {"a": nn.Linear(4, 3)},
)  # fmt: skip
wired(
    "frozen weight, its input changed", real(4),
    lambda m, x: (lambda h: m.b(m.a(h) + h.add_(1)))(x * 1.0),
    lambda: {"a": without_gradient(nn.Linear(4, 4), "weight"), "b": nn.Linear(4, 3)},
)  # fmt: skip
wired(
    "input changed in place",
    real(4),
    lambda m, x: m.a(x.mul_(2).sub_(0.3)),
    lambda: {"a": nn.Linear(4, 3)},
)


def turned(m: Any, x: Tensor) -> Tensor:
    angles = torch.arange(9).to(x)[:, None].cos()[torch.arange(x.shape[1])[None]]
    return m.out(torch.tanh(m.embed(x) * angles))


wired(
    "positions looked up by a row of numbers", real(5, 4), turned,
    lambda: {"embed": nn.Linear(4, 3), "out": nn.Linear(3, 2)},
)  # fmt: skip


wired(
    "positions looked up one by one", real(5, 4),
    lambda m, x: m.out(
        torch.tanh(m.embed(x) * torch.arange(9).to(x)[:, None].cos()[torch.arange(x.shape[1])])
    ),
    lambda: {"embed": nn.Linear(4, 3), "out": nn.Linear(3, 2)},
)  # fmt: skip


def halting(m: Any, x: Tensor) -> Tensor:
    """Samples leave the loop one by one."""
    h = torch.tanh(m.first(x))
    for _ in range(3):
        active = h.square().sum(1) < 2
        h = h.index_add(0, active.nonzero()[:, 0], torch.tanh(m.step(h[active])))
    return m.out(h)


wired(
    "halting",
    real(4),
    halting,
    lambda: {"first": nn.Linear(4, 5), "step": nn.Linear(5, 5), "out": nn.Linear(5, 2)},
)

# -- gradients that are zero at first --------------------------------------------------------------

# Where the gate is shut, any rule agrees with zero; where it opens, only the right one does.
for when, inputs in (("at first", first_ones_negative), ("in the first batch", sometimes_negative)):
    wired(
        f"shut {when}: rows moved by one",
        inputs(2, 4),
        lambda m, x: m.open(x[:, 1]) + F.relu(x[:, 0, :1]) * moved(m, x).sum(1),
        lambda: {"open": nn.Linear(4, 3), "a": nn.Linear(4, 3)},
        sizes=(5, 8, 6),
    )
    wired(
        f"shut {when}: rows by position",
        inputs(5, 4),
        lambda m, x: torch.cat(
            [
                flat(m.open(x)),
                flat(
                    positions_major(lambda m, rows: m.a(rows))(m, x)
                    * F.relu(x[:, 0, 0])[:, None, None]
                ),
            ],
            1,
        ),
        lambda: {"open": nn.Linear(4, 2), "a": nn.Linear(4, 3)},
        sizes=(5, 8, 6),
    )
    wired(
        f"shut {when}: the other use of a weight",
        inputs(4),
        lambda m, x: m.a(x) + F.relu(x[:, :1]) * m.a.weight.sum(),
        lambda: {"a": nn.Linear(4, 3)},
        sizes=(5, 8, 6),
    )
    wired(
        f"shut {when}: the same layer's rows elsewhere",
        inputs(5, 4),
        lambda m, x: (
            m.a(x[:, 1])
            + F.relu(x[:, 0, :1]) * positions_major(lambda m, rows: m.a(rows))(m, x).sum(1)
        ),
        lambda: {"a": nn.Linear(4, 3)},
        sizes=(5, 8, 6),
    )


# Those of this file alone; zoo_derived.py and zoo_paths.py add more to CASES.
BASIC = tuple(CASES)
