"""More of the zoo: parameters that are looked up, reshaped, merged or scaled before they meet data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from zoo import Inputs, Wiring, ids, real, weights, wired, without_gradient

# -- position tables -------------------------------------------------------------------------------


def tokens_and(positions: Wiring) -> Wiring:
    """Token embeddings with positions added, and a layer that mixes both."""
    return lambda m, x: m.out(torch.tanh(m.token(x) + positions(m, x)))


def with_positions(**parts: Any) -> dict[str, Any]:
    return {"token": nn.Embedding(7, 4), **parts, "out": nn.Linear(4, 2)}


def changing_lengths(*lengths: int) -> Inputs:
    """Ids whose number differs by batch."""
    turn = iter(lengths * 100)
    return lambda n: torch.randint(7, (n, next(turn)))


POSITIONS: dict[str, tuple[Wiring, Callable[[], dict[str, Any]]]] = {
    "arange": (
        lambda m, x: m.position(torch.arange(x.shape[1])),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "a row of arange": (
        lambda m, x: m.position(torch.arange(x.shape[1])[None]),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "arange from an offset, keywords": (
        lambda m, x: F.embedding(
            weight=m.position.weight, input=torch.arange(start=2, end=2 + x.shape[1]).unsqueeze(0)
        ),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "a table indexed": (
        lambda m, x: m.position[torch.arange(x.shape[1])],
        lambda: {"position": weights(8, 4)},
    ),
    "a table sliced": (lambda m, x: m.position[: x.shape[1]], lambda: {"position": weights(8, 4)}),
    "a table of one row, sliced": (
        lambda m, x: m.position[:, : x.shape[1]],
        lambda: {"position": weights(1, 8, 4)},
    ),
    "narrow": (
        lambda m, x: m.position.narrow(0, 0, x.shape[1])[None],
        lambda: {"position": weights(8, 4)},
    ),
    "ids expanded": (
        lambda m, x: m.position(torch.arange(x.shape[1]).expand(len(x), -1)),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "ids repeated": (
        lambda m, x: m.position(torch.arange(x.shape[1]).repeat(len(x), 1)),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "ids like the input": (
        lambda m, x: m.position(torch.arange(x.shape[1]).expand_as(x)),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "ids counted": (
        lambda m, x: m.position(torch.ones_like(x).cumsum(1) - 1),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "a padding row": (
        lambda m, x: m.position(torch.arange(x.shape[1])),
        lambda: {"position": nn.Embedding(8, 4, padding_idx=1)},
    ),
    "two tables, added": (
        lambda m, x: (
            m.rows(torch.arange(x.shape[1]) // 2) + m.columns(torch.arange(x.shape[1]) % 2)
        ),
        lambda: {"rows": nn.Embedding(4, 4), "columns": nn.Embedding(2, 4)},
    ),
    "a table used twice": (
        lambda m, x: (
            m.position(torch.arange(x.shape[1])) * m.position(torch.arange(x.shape[1])[None])
        ),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "one table for positions and tokens": (
        lambda m, x: m.token(torch.arange(x.shape[1])),
        dict,
    ),
    "positions of the tokens": (
        lambda m, x: m.position(x.argsort(1)),
        lambda: {"position": nn.Embedding(8, 4)},
    ),
    "a table through a layer": (
        lambda m, x: torch.tanh(m.project(m.position(torch.arange(x.shape[1])))),
        lambda: {"position": nn.Embedding(8, 3), "project": nn.Linear(3, 4)},
    ),
    "a table interpolated": (
        lambda m, x: (
            F.interpolate(m.position, size=x.shape[1], mode="linear", align_corners=False).mT
        ),
        lambda: {"position": weights(1, 4, 3)},
    ),
}
for way, (positions, parts) in POSITIONS.items():
    wired(
        f"positions by {way}",
        ids(5),
        tokens_and(positions),
        lambda parts=parts: with_positions(**parts()),
        sizes=(5, 6, 2, 1, 5),
    )
    wired(
        f"positions by {way}, lengths differ by batch",
        changing_lengths(5, 3, 2, 6, 1),
        tokens_and(positions),
        lambda parts=parts: with_positions(**parts()),
        sizes=(5, 3, 4, 3, 2),
    )


def given_positions(n: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(7, (n, 5)), "positions": torch.arange(5).repeat(n, 1)}


def shifted_positions(n: int) -> dict[str, Tensor]:
    start = torch.randint(3, (n, 1))
    return {"ids": torch.randint(7, (n, 5)), "positions": torch.arange(5) + start}


for way, given in (("equal", given_positions), ("shifted by sample", shifted_positions)):
    wired(
        f"positions passed in, {way}",
        given,
        lambda m, batch: m.out(torch.tanh(m.token(batch["ids"]) + m.position(batch["positions"]))),
        lambda: with_positions(position=nn.Embedding(8, 4)),
        sizes=(5, 3, 2, 1),
        forward=lambda model, batch: model(batch),
    )

# -- relative position biases ----------------------------------------------------------------------

DISTANCES = torch.arange(5)[:, None] - torch.arange(5)[None] + 4


class Cached(nn.Module):
    """A bias table gathered by an index that is kept where `place` says."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.table = nn.Parameter(weights(9, 2))
        self.place, self.cache = place, {}
        if place == "buffer":
            self.register_buffer("index", DISTANCES)
        if place == "attribute":
            self.plain = {"index": [DISTANCES.clone()]}

    def forward(self) -> Tensor:
        if self.place == "buffer":
            index = self.index
        elif self.place == "attribute":
            index = self.plain["index"][0]
        elif self.place == "global":
            index = DISTANCES
        elif self.place == "cache":
            index = self.cache.setdefault(5, torch.arange(5)[:, None] - torch.arange(5) + 4)
        else:
            index = torch.arange(5)[:, None] - torch.arange(5) + 4
        return self.table[index.flatten()].view(5, 5, 2).permute(2, 0, 1)


def heads(t: Tensor) -> Tensor:
    return t.unflatten(-1, (2, -1)).transpose(-3, -2)


def biased(m: Any, x: Tensor) -> Tensor:
    for layer in (m.first, m.second):
        q, k, v = (heads(t) for t in layer(x).chunk(3, -1))
        scores = q @ k.mT / 2**0.5 + m.bias()[None]
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return m.out(x)


def biased_fused(m: Any, x: Tensor) -> Tensor:
    for layer in (m.first, m.second):
        q, k, v = (heads(t) for t in layer(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias())
        x = x + y.transpose(1, 2).flatten(2)
    return m.out(x)


def biased_by_sample(m: Any, x: Tensor) -> Tensor:
    """The index depends on the sample."""
    q, k, v = (heads(t) for t in m.first(x).chunk(3, -1))
    index = (DISTANCES + (x[:, 0, 0] > 0).long()[:, None, None]) % 9
    bias = m.bias.table[index].permute(0, 3, 1, 2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return m.second(x) @ m.mix + m.out(y.transpose(1, 2).flatten(2)).sum(-1, keepdim=True)


for place in ("buffer", "attribute", "global", "cache", "anew"):
    for how, wiring in (("added", biased), ("as a mask", biased_fused)):
        wired(
            f"relative bias {how}, its index kept in a {place}",
            real(5, 4),
            wiring,
            lambda place=place: {
                "bias": Cached(place),
                "first": nn.Linear(4, 12),
                "second": nn.Linear(4, 12),
                "out": nn.Linear(4, 2),
            },
            sizes=(5, 6, 2, 1),
        )
wired(
    "relative bias by sample",
    real(5, 4),
    biased_by_sample,
    lambda: {
        "bias": Cached("global"),
        "first": nn.Linear(4, 12),
        "second": nn.Linear(4, 12),
        "mix": weights(12, 2),
        "out": nn.Linear(4, 2),
    },
)
wired(
    "relative bias of every window",
    real(2, 5, 4),
    lambda m, x: biased_fused(m, x.flatten(0, 1)).view(len(x), -1),
    lambda: {
        "bias": Cached("buffer"),
        "first": nn.Linear(4, 12),
        "second": nn.Linear(4, 12),
        "out": nn.Linear(4, 2),
    },
)

# -- class and mask tokens -------------------------------------------------------------------------


def masked_set(m: Any, x: Tensor) -> Tensor:
    h = m.embed(x)
    h[x[..., 0] > 0] = m.token
    return h


TOKENS: dict[str, tuple[Wiring, tuple[int, ...]]] = {
    "expand": (lambda m, x: torch.cat([m.token.expand(len(x), 1, 4), m.embed(x)], 1), (1, 1, 4)),
    "expand of a row": (
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1),
        (1, 4),
    ),
    "expand of a vector": (
        lambda m, x: torch.cat([m.token.expand(len(x), 1, -1), m.embed(x)], 1),
        (4,),
    ),
    "expand with a list": (
        lambda m, x: torch.cat([m.token.expand([len(x), 1, 4]), m.embed(x)], 1),
        (1, 1, 4),
    ),
    "expand by keyword": (
        lambda m, x: torch.cat([m.token.expand(size=(len(x), 1, 4)), m.embed(x)], 1),
        (1, 1, 4),
    ),
    "broadcast_to": (
        lambda m, x: torch.cat([torch.broadcast_to(m.token, (len(x), 1, 4)), m.embed(x)], 1),
        (1, 1, 4),
    ),
    "repeat": (lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1), m.embed(x)], 1), (1, 1, 4)),
    "repeat of several": (
        lambda m, x: torch.cat([m.token.repeat(len(x), 2, 1), m.embed(x)], 1),
        (3, 4),
    ),
    "expand_as": (
        lambda m, x: torch.cat([m.token.expand_as(m.embed(x[:, :1])), m.embed(x)], 1),
        (1, 1, 4),
    ),
    "zeros plus token": (
        lambda m, x: torch.cat([torch.zeros(len(x), 1, 4).to(x) + m.token, m.embed(x)], 1),
        (4,),
    ),
    "stack": (lambda m, x: torch.cat([torch.stack([m.token] * len(x)), m.embed(x)], 1), (1, 4)),
    "expand, sequence first": (
        lambda m, x: torch.cat(
            [m.token.expand(1, len(x), 4), m.embed(x).transpose(0, 1)]
        ).transpose(0, 1),
        (1, 1, 4),
    ),
    "as many as samples": (
        lambda m, x: torch.cat([m.token.expand(len(x), 5, 4), m.embed(x)], 1),
        (5, 4),
    ),
    "where": (lambda m, x: torch.where(x[..., :1] > 0, m.token, m.embed(x)), (4,)),
    "where, by method": (lambda m, x: m.token.where(x[..., :1] > 0, m.embed(x)), (4,)),
    "where, the other way": (
        lambda m, x: torch.where(x[..., :1] > 0, m.embed(x), m.token),
        (1, 1, 4),
    ),
    "product with a mask": (
        lambda m, x: (x[..., :1] > 0) * m.token + (x[..., :1] <= 0) * m.embed(x),
        (4,),
    ),
    "lerp": (lambda m, x: torch.lerp(m.embed(x), m.token, (x[..., :1] > 0).to(x)), (4,)),
    "setitem by a mask": (masked_set, (4,)),
    "both class and mask token": (
        lambda m, x: torch.cat(
            [m.token[:1].expand(len(x), 1, 4), torch.where(x[..., :1] > 0, m.token[1], m.embed(x))],
            1,
        ),
        (2, 4),
    ),
    "first token written": (lambda m, x: _write_first(m.embed(x), m.token), (4,)),
    "padded": (lambda m, x: F.pad(m.embed(x), (0, 0, 1, 0)) + F.pad(m.token, (0, 0, 0, 5)), (1, 4)),
}


def _write_first(h: Tensor, token: Tensor) -> Tensor:
    h[:, 0] = token
    return h


for way, (wiring, shape) in TOKENS.items():
    wired(
        f"token by {way}",
        real(5, 4),
        lambda m, x, wiring=wiring: m.out(torch.tanh(m.layer(wiring(m, x)))),
        # Zero, as it is at the start of training.
        lambda shape=shape, zero=way in ("expand", "where", "repeat"): {
            "token": torch.zeros(shape) if zero else weights(*shape),
            "embed": nn.Linear(4, 4),
            "layer": nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            "out": nn.Linear(4, 2),
        },
        sizes=(5, 3, 2, 1),
        may=("token",) if way in ("stack", "repeat of several") else (),
    )

# -- elementwise functions of a parameter ------------------------------------------------------------

SCALES: dict[str, tuple[Wiring, tuple[int, ...]]] = {
    "1 + w": (lambda m, x: F.layer_norm(x, (4,)) * (1 + m.w), (4,)),
    "1 + w, addition in place": (lambda m, x: F.layer_norm(x, (4,)).mul_(1 + m.w), (4,)),
    "1 + w as a norm's weight": (lambda m, x: F.layer_norm(x, (4,), 1 + m.w, m.w), (4,)),
    "1 + w as an RMS norm's weight": (lambda m, x: F.rms_norm(x, (4,), weight=1 + m.w), (4,)),
    "1 + w as a batch norm's weight": (
        lambda m, x: (
            F.batch_norm(x.mT, torch.zeros(4).to(x), torch.ones(4).to(x), 1 + m.w, m.w.exp()).mT
        ),
        (4,),
    ),
    "1 + w as a group norm's weight": (
        lambda m, x: F.group_norm(x.mT, 2, weight=1 + m.w, bias=m.w.tanh()).mT,
        (4,),
    ),
    "softplus": (lambda m, x: x * F.softplus(m.w), (4,)),
    "exp": (lambda m, x: torch.exp(-torch.exp(m.w) * x.abs()), (4,)),
    "exp, positions as many as samples": (lambda m, x: x * m.w.exp(), (5, 4)),
    "exp of a number": (lambda m, x: 3 * x * m.w.exp(), ()),
    "exp, and its tanh added": (lambda m, x: x * m.w.exp() + m.w.tanh(), (4,)),
    "clamp": (lambda m, x: x * m.w.clamp(0, 1), (4,)),
    "softmax of positions": (lambda m, x: x * m.w.softmax(0)[:, None], (5,)),
    "mean": (lambda m, x: x - m.w.mean(), (4, 3)),
    "norm": (lambda m, x: 5 * x / m.w.norm(), (4, 3)),
    "outer product": (lambda m, x: x @ torch.outer(m.w[:4], m.w[1:]), (5,)),
    "cumsum": (lambda m, x: x * m.w.cumsum(0), (4,)),
    "sorted": (lambda m, x: x * m.w.sort().values, (4,)),
    "sum with itself": (lambda m, x: x * (m.w + m.w.flip(0)), (4,)),
    "concatenated": (lambda m, x: x * torch.cat([m.w, m.w]), (2,)),
    "stacked": (lambda m, x: x * torch.stack([m.w[0], m.w[1], m.w[0], -m.w[1]]), (2,)),
    "detached part": (lambda m, x: x * (m.w * m.w.detach()), (4,)),
    "no gradient": (lambda m, x: x * m.w * m.w.detach().exp(), (4,)),
    "rounded straight-through": (
        lambda m, x: x * (m.w + ((4 * m.w).ceil() / 4 - m.w).detach()),
        (4,),
    ),
    "distances of its rows": (lambda m, x: x * F.pdist(m.w)[:4], (4, 3)),
    "diagonal": (lambda m, x: x @ torch.diag(m.w), (4,)),
    "a triangle": (lambda m, x: x @ m.w.tril(), (4, 4)),
    "matrix exponential": (lambda m, x: x @ torch.matrix_exp(m.w - m.w.T), (4, 4)),
    "inverse": (lambda m, x: x @ torch.linalg.inv(m.w + 3 * torch.eye(4).to(x)), (4, 4)),
    "solve with data": (
        lambda m, x: torch.linalg.solve(m.w @ m.w.T + 3 * torch.eye(4).to(x), x.mT).mT,
        (4, 4),
    ),
    "kron": (lambda m, x: x @ torch.kron(m.w, torch.eye(2).to(x)), (2, 2)),
    "complex": (lambda m, x: filtered(x, torch.view_as_complex(m.w)), (3, 2)),
    "complex, of real": (lambda m, x: filtered(x, m.w), (3,)),
    "complex, absolute": (lambda m, x: x * torch.view_as_complex(m.w).abs(), (4, 2)),
    "power of data": (lambda m, x: x.abs() ** m.w.exp(), (4,)),
    "data to a power": (lambda m, x: m.w.exp() ** x, (4,)),
    "a parameter minus data": (lambda m, x: (m.w - x).square(), (4,)),
    "a parameter over data": (lambda m, x: m.w / (1 + x.square()), (4,)),
    "distances": (lambda m, x: torch.cdist(x, m.w), (4, 4)),
    "maximum": (lambda m, x: torch.maximum(x, m.w), (4,)),
    "addcmul": (lambda m, x: torch.addcmul(m.w, x, m.w, value=0.5), (4,)),
    "addcmul by keywords": (lambda m, x: torch.addcmul(input=x, tensor1=x, tensor2=m.w), (4,)),
    "add with alpha": (lambda m, x: torch.add(x, m.w, alpha=2), (4,)),
    "add by keywords": (lambda m, x: torch.add(input=x, other=m.w), (4,)),
    "mul by keywords": (lambda m, x: x.mul(other=m.w), (4,)),
    "linear by keywords": (lambda m, x: F.linear(bias=m.w[0], weight=m.w, input=x), (4, 4)),
    "matmul by keywords": (lambda m, x: torch.matmul(input=x, other=m.w), (4, 4)),
    "out given": (lambda m, x: x * torch.exp(m.w), (4,)),
    "prelu of a softplus": (lambda m, x: F.prelu(x.mT, F.softplus(m.w)).mT, (4,)),
    "kernel from a parameter": (
        lambda m, x: F.conv1d(x.mT, m.w.softmax(-1), padding=1, groups=4).mT,
        (4, 1, 3),
    ),
    "masked fill": (lambda m, x: x.masked_fill(x > 0, 0.0) * m.w.masked_fill(m.w > 0.5, 0.5), (4,)),
    "state space": (lambda m, x: _scan(x, -torch.exp(m.w)), (4,)),
}


def filtered(x: Tensor, response: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, dim=-1) * response, n=4, dim=-1)


def _scan(x: Tensor, a: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.exp(a * x[:, t].abs()) * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


for way, (wiring, shape) in SCALES.items():
    for zero in (False, True):
        if zero and not way.startswith(("1 + w", "softplus", "exp", "softmax", "inverse")):
            continue  # no gradients but its own, or none
        wired(
            f"scaled by {way}{', zero at first' if zero else ''}",
            real(5, 4),
            lambda m, x, wiring=wiring: m.out(torch.tanh(wiring(m, m.embed(x)))),
            lambda shape=shape, zero=zero: {
                "w": torch.zeros(shape) if zero else weights(*(shape or (1,))).view(shape) + 0.1,
                "embed": nn.Linear(4, 4),
                "out": nn.Linear(4, 2),
            },
            sizes=(5, 3, 2, 1),
            may=("w",) if way in ("solve with data", "distances", "complex") else (),
        )

# -- adapters --------------------------------------------------------------------------------------


ADAPTERS: dict[str, tuple[Wiring, dict[str, Any]]] = {
    "unmerged": (
        lambda m, x: m.base(x) + 0.5 * F.linear(F.linear(x, m.a), m.b),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "unmerged, matmul": (
        lambda m, x: m.base(x) + (x @ m.a.T @ m.b.T) * 2,
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged": (
        lambda m, x: F.linear(x, m.base.weight + m.b @ m.a, m.base.bias),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, scale": (
        lambda m, x: F.linear(x, m.base.weight + 0.5 * (m.b @ m.a), m.base.bias),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, scale behind": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) * 0.5),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, divided": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) / 8),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, alpha": (
        lambda m, x: F.linear(x, torch.add(m.base.weight, m.b @ m.a, alpha=0.5)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, subtracted": (
        lambda m, x: F.linear(x, torch.sub(m.base.weight, m.b @ m.a, alpha=3)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, rsub": (lambda m, x: F.linear(x, 1 - m.b @ m.a), {"a": (2, 4), "b": (5, 2)}),
    "merged, transposed": (
        lambda m, x: F.linear(x, m.base.weight + (m.a.T @ m.b.T).T * 0.5),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, T": (lambda m, x: F.linear(x, (m.a.T @ m.b.T).T), {"a": (2, 4), "b": (5, 2)}),
    "merged, mT and transpose": (
        lambda m, x: x @ (m.base.weight.mT + m.a.transpose(0, 1) @ m.b.mT),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, addmm": (
        lambda m, x: F.linear(x, torch.addmm(m.base.weight, m.b, m.a, beta=0.5, alpha=2)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, einsum": (
        lambda m, x: F.linear(x, m.base.weight + torch.einsum("or,ri->oi", m.b, m.a)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, three factors": (
        lambda m, x: F.linear(x, m.base.weight + m.b @ m.c @ m.a),
        {"a": (2, 4), "b": (5, 2), "c": (2, 2)},
    ),
    "merged, scale learned": (
        lambda m, x: F.linear(x, m.base.weight + m.s * (m.b @ m.a)),
        {"a": (2, 4), "b": (5, 2), "s": (1,)},
    ),
    "merged, scale learned, a number": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) * m.s),
        {"a": (2, 4), "b": (5, 2), "s": ()},
    ),
    "merged, rank scales": (
        lambda m, x: F.linear(x, m.base.weight + (m.b * m.s) @ m.a),
        {"a": (2, 4), "b": (5, 2), "s": (2,)},
    ),
    "merged, mask": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) * (m.base.weight > 0)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged twice": (
        lambda m, x: (
            F.linear(x, m.base.weight + m.b @ m.a) * F.linear(x.flip(1), m.base.weight + m.b @ m.a)
        ),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged once, used twice": (
        lambda m, x: (lambda w: F.linear(x, w) * F.linear(x.flip(1), w))(m.base.weight + m.b @ m.a),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged and unmerged": (
        lambda m, x: F.linear(x, m.base.weight + m.b @ m.a) * F.linear(F.linear(x, m.a), m.b),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged with itself": (lambda m, x: F.linear(x, m.b @ m.b.T), {"b": (4, 4)}),
    "merged with itself plain": (lambda m, x: F.linear(x, m.b @ m.b), {"b": (4, 4)}),
    "merged, used as weight too": (
        lambda m, x: F.linear(x, m.b @ m.a) + F.linear(x, m.b),
        {"a": (4, 4), "b": (5, 4)},
    ),
    "merged, 3-D of one": (
        lambda m, x: F.linear(x, (m.b[None] @ m.a[None])[0]),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, in 3-D": (
        lambda m, x: torch.einsum("bpi,hoi->bpho", x, m.b @ m.a).flatten(2),
        {"a": (2, 2, 4), "b": (2, 5, 2)},
    ),
    "merged, reshaped": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a).view(5, 4)),
        {"a": (2, 10), "b": (2, 2)},
    ),
    "merged, cast": (
        lambda m, x: F.linear(x, m.base.weight + (m.b.double() @ m.a.double()).to(x.dtype)),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged, kept in no_grad": (
        lambda m, x: F.linear(x, m.base.weight + m.b @ m.a) + F.linear(x, (m.b @ m.a).detach()),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged as convolution": (
        lambda m, x: F.conv1d(x.mT, (m.b @ m.a).view(5, 4, 1)).mT,
        {"a": (2, 4), "b": (5, 2)},
    ),
    "merged as convolution of 3": (
        lambda m, x: F.conv1d(x.mT, (m.b @ m.a).view(5, 4, 3), padding=1).mT,
        {"a": (2, 12), "b": (5, 2)},
    ),
    "kron": (lambda m, x: F.linear(x, torch.kron(m.b, m.a)), {"a": (1, 2), "b": (5, 2)}),
    "hadamard": (
        lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) * (m.d @ m.c)),
        {"a": (2, 4), "b": (5, 2), "c": (2, 4), "d": (5, 2)},
    ),
    "frozen a": (lambda m, x: F.linear(x, m.base.weight + m.b @ m.base.weight), {"b": (5, 5)}),
    "IA3": (lambda m, x: m.base(x) * m.s, {"s": (5,)}),
    "IA3 on inputs": (lambda m, x: m.base(x * m.s), {"s": (4,)}),
    "IA3, 2-D, flattened": (lambda m, x: m.base(x) * m.s.flatten(), {"s": (1, 5)}),
    "IA3 merged": (
        lambda m, x: F.linear(x, m.base.weight * m.s, m.base.bias * m.s.flatten()),
        {"s": (5, 1)},
    ),
    "IA3 of inputs merged": (lambda m, x: F.linear(x, m.base.weight * m.s), {"s": (1, 4)}),
    "subtracted in one use, added in another": (
        lambda m, x: F.linear(x, m.base.weight - m.b @ m.a) + 2 * F.linear(x.flip(1), m.b @ m.a),
        {"a": (2, 4), "b": (5, 2)},
    ),
    "a row added": (lambda m, x: F.linear(x, m.base.weight + m.s), {"s": (1, 4)}),
    "a column added": (lambda m, x: F.linear(x, m.base.weight + m.s), {"s": (5, 1)}),
    "a vector subtracted": (lambda m, x: F.linear(x, m.base.weight - m.s), {"s": (4,)}),
    "BitFit": (lambda m, x: F.linear(x, m.base.weight, m.base.bias + m.s), {"s": (5,)}),
    "VeRA": (
        lambda m, x: (
            m.base(x)
            + m.b * F.linear(m.a * F.linear(x, m.base.weight), m.base.weight @ m.base.weight.T)
        ),
        {"a": (5,), "b": (5,)},
    ),
    "DoRA": (
        lambda m, x: (lambda w: F.linear(x, m.s[:, None] * w / w.norm(dim=1, keepdim=True)))(
            m.base.weight + m.b @ m.a
        ),
        {"a": (2, 4), "b": (5, 2), "s": (5,)},
    ),
    "DoRA, norm detached": (
        lambda m, x: (lambda w: F.linear(x, w) * (m.s / w.norm(dim=1).detach()))(
            m.base.weight + m.b @ m.a
        ),
        {"a": (2, 4), "b": (5, 2), "s": (5,)},
    ),
    "DoRA, unmerged": (
        lambda m, x: (
            m.base(x) * (m.s / (m.base.weight + m.b @ m.a).norm(dim=1))
            + F.linear(F.linear(x, m.a), m.b)
        ),
        {"a": (2, 4), "b": (5, 2), "s": (5,)},
    ),
    "prompt": (
        lambda m, x: m.base(torch.cat([m.s.expand(len(x), -1, -1), x], 1).softmax(1)),
        {"s": (3, 4)},
    ),
    "prompt as many as samples": (
        lambda m, x: m.base(torch.cat([m.s.expand(len(x), -1, -1), x], 1).softmax(1)),
        {"s": (5, 4)},
    ),
    "prompt, from an embedding": (
        lambda m, x: m.base(
            torch.cat([m.table(torch.arange(3)[None].expand(len(x), -1)), x], 1).softmax(1)
        ),
        {"table": lambda: nn.Embedding(3, 4)},
    ),
    "prompt, through an encoder": (
        lambda m, x: m.base(
            torch.cat([m.mlp(m.table(torch.arange(3)))[None].repeat(len(x), 1, 1), x], 1).softmax(1)
        ),
        {
            "table": lambda: nn.Embedding(3, 4),
            "mlp": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
        },
    ),
    "prefix": (lambda m, x: _prefix(m, x), {"s": (2, 3, 2, 2)}),
}


def _prefix(m: Any, x: Tensor) -> Tensor:
    """Keys and values, (2, tokens, heads, size), before those of the input."""
    q = heads(m.base(x)[..., :4])
    k, v = (torch.cat([s.transpose(0, 1).expand(len(x), -1, -1, -1), q], 2) for s in m.s.unbind())
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def adapted(shapes: dict[str, Any], zero: str) -> dict[str, Any]:
    parts = {
        name: shape() if callable(shape) else torch.tensor(0.7) if shape == () else weights(*shape)
        for name, shape in shapes.items()
    }
    if zero:
        parts[zero].zero_()
    return {"base": without_gradient(nn.Linear(4, 5)), **parts}


for way, (wiring, shapes) in ADAPTERS.items():
    # At the start one factor is zero, and the other's gradient with it.
    for zero in ("", "b") if {"a", "b"} <= {*shapes} and "ed, " not in way else ("",):
        wired(
            f"adapter, {way}{', b zero' if zero else ''}",
            real(5, 4),
            wiring,
            lambda shapes=shapes, zero=zero: adapted(shapes, zero),
            sizes=(5, 3, 2, 1),
        )
# -- tables -----------------------------------------------------------------------------------------

Table = tuple[Wiring, Callable[[], dict[str, Any]]]


def tied(
    head: Wiring = lambda m, h: F.linear(h, m.table.weight), size: int = 7, **more: Any
) -> Table:
    """A language model whose table of tokens is its last layer too."""
    return (
        lambda m, x: head(m, torch.tanh(m.hidden(m.table(x)))),
        lambda: {
            "table": nn.Embedding(size, 4, padding_idx=more.get("padding_idx")),
            "hidden": nn.Linear(4, 4),
            **({"b": weights(7)} if "bias" in more else {}),
        },
    )


def looked_up(wiring: Wiring, *shape: int, **more: tuple[int, ...]) -> Table:
    """A table, and a layer behind it."""
    shapes = {"table": shape, **more}
    return wiring, lambda: {
        "hidden": nn.Linear(4, 4),
        **{k: weights(*s) for k, s in shapes.items()},
    }


TABLES: dict[str, tuple[Table, Inputs]] = {
    "as many ids as rows": (tied(), ids(7)),
    "plain": (tied(), ids(5)),
    "few tokens": (tied(size=40), ids(3, 40)),
    "few tokens, padding": (tied(size=40, padding_idx=0), ids(6, 3)),
    "padding negative": (tied(padding_idx=-2), ids(6)),
    "padding negative, by the function": (
        looked_up(lambda m, x: m.hidden(torch.tanh(F.embedding(x, m.table, padding_idx=-2))), 7, 4),
        ids(6),
    ),
    "rows of at most some norm": (
        looked_up(lambda m, x: m.hidden(torch.tanh(F.embedding(x, m.table, max_norm=0.5))), 7, 4),
        ids(5),
    ),
    "added to every row, too": (
        tied(lambda m, h: (F.linear(h, m.table.weight)[..., None] * (1 + m.table.weight)).sum(-1)),
        ids(5),
    ),
    "matmul": (tied(lambda m, h: h @ m.table.weight.T), ids(5)),
    "matmul mT": (tied(lambda m, h: h @ m.table.weight.mT), ids(5)),
    "einsum": (tied(lambda m, h: torch.einsum("bte,ve->btv", h, m.table.weight)), ids(5)),
    "scaled": (tied(lambda m, h: F.linear(h, m.table.weight * 0.5)), ids(5)),
    "scaled and normalised": (
        tied(lambda m, h: F.linear(h, F.normalize(m.table.weight, dim=1))),
        ids(5),
    ),
    "last token": (tied(lambda m, h: F.linear(h[:, -1], m.table.weight)), ids(5)),
    "with bias": (tied(lambda m, h: F.linear(h, m.table.weight, m.b), bias=True), ids(5)),
    "one id": (tied(), ids(1)),
    "twice as input, too": (
        (
            lambda m, x: F.linear(
                torch.tanh(m.hidden(m.table(x) + m.table(x.flip(1)))), m.table.weight
            ),
            lambda: {"table": nn.Embedding(7, 4), "hidden": nn.Linear(4, 4)},
        ),
        ids(5),
    ),
    "sliced": (tied(lambda m, h: F.linear(h, m.table.weight[:5])), ids(5)),
    "scaled before": (
        looked_up(
            lambda m, x: F.linear(torch.tanh(m.hidden(F.embedding(x, m.table * 2))), m.table * 2),
            7,
            4,
        ),
        ids(5),
    ),
    "exp": (
        looked_up(
            lambda m, x: F.linear(torch.tanh(m.hidden(m.table.exp()[x])), m.table.exp()), 7, 4
        ),
        ids(5),
    ),
    "factored": (
        (
            lambda m, x: F.linear(torch.tanh(m.hidden((m.a @ m.b)[x])), m.a @ m.b),
            lambda: {"a": weights(7, 2), "b": weights(2, 4), "hidden": nn.Linear(4, 4)},
        ),
        ids(5),
    ),
    "factored, unmerged": (
        (
            lambda m, x: F.linear(
                F.linear(torch.tanh(m.hidden(m.table(x) @ m.b)), m.b), m.table.weight
            ),
            lambda: {"table": nn.Embedding(7, 2), "b": weights(2, 4), "hidden": nn.Linear(4, 4)},
        ),
        ids(5),
    ),
    "sequence first": (
        tied(lambda m, h: F.linear(h.transpose(0, 1), m.table.weight).transpose(0, 1)),
        ids(5),
    ),
    "one-hot": (
        looked_up(
            lambda m, x: F.linear(
                torch.tanh(m.hidden(F.one_hot(x, 7).to(m.table) @ m.table)), m.table
            ),
            7,
            4,
        ),
        ids(5),
    ),
    "negative ids": (looked_up(lambda m, x: m.hidden(torch.tanh(m.table[x - 7])), 7, 4), ids(5)),
    "3-D table": (looked_up(lambda m, x: m.hidden(torch.tanh(m.table[x])), 7, 3, 4), ids(5)),
    "index_select": (
        looked_up(
            lambda m, x: m.hidden(torch.tanh(m.table.index_select(0, x.flatten()))).view(
                len(x), -1
            ),
            7,
            4,
        ),
        ids(5),
    ),
    "index_select by keywords": (
        looked_up(
            lambda m, x: m.hidden(
                torch.tanh(torch.index_select(m.table, index=x.flatten(), dim=-2))
            ).view(len(x), -1),
            7,
            4,
        ),
        ids(5),
    ),
    "two indices": (
        looked_up(lambda m, x: m.hidden(torch.tanh(m.table[x, x.flip(1)])), 7, 7, 4),
        ids(5),
    ),
    "gather": (
        looked_up(lambda m, x: m.hidden(torch.tanh(m.table.gather(0, x[..., :4]))), 7, 4),
        ids(4),
    ),
    "vector table": (looked_up(lambda m, x: m.hidden(torch.tanh(m.table[x])), 7), ids(4)),
    "int32 ids": (
        (
            lambda m, x: m.hidden(torch.tanh(m.table(x.int()))),
            lambda: {"table": nn.Embedding(7, 4), "hidden": nn.Linear(4, 4)},
        ),
        ids(4),
    ),
}
for way, ((wiring, parts), inputs) in TABLES.items():
    wired(
        f"table, {way}",
        inputs,
        wiring,
        parts,
        sizes=(5, 3, 2, 1),
        may=("table",) if way in ("two indices", "gather", "rows of at most some norm") else (),
    )


# -- weights computed anew on every call -----------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(x, (w - mean) / (var + 1e-5).sqrt(), self.bias)


class ScaledStandardisedConv(nn.Conv2d):
    """Batch norm of the weight, as timm has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.3).view(-1)
        w = F.batch_norm(w, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Exponential(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.exp()


class Halves(nn.Module):
    """A weight of two parameters, one above the other."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w[:2].clone(), w[2:].clone()


def parametrized(module: nn.Module, *by: nn.Module, name: str = "weight") -> nn.Module:
    for parametrization in by:
        parametrize.register_parametrization(module, name, parametrization)
    return module


def old(norm: Callable[..., nn.Module], module: nn.Module, **options: Any) -> nn.Module:
    """By hooks, of which torch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(module, **options)


def old_spectral_norm(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """After some steps of its power iteration: before, it may divide by nearly 0."""
    made = old(spectral_norm, layer, n_power_iterations=20)
    with torch.no_grad():
        made(torch.ones(1, *shape))
    return made


new_weight_norm, new_spectral_norm = parametrizations.weight_norm, parametrizations.spectral_norm
COMPUTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight norm": (lambda: new_weight_norm(nn.Linear(4, 3)), (4,)),
    "weight norm, dim 1": (lambda: new_weight_norm(nn.Linear(4, 3), dim=1), (4,)),
    "weight norm, dim None": (lambda: new_weight_norm(nn.Linear(4, 3), dim=None), (4,)),
    "weight norm of a conv": (lambda: new_weight_norm(nn.Conv1d(4, 3, 2)), (4, 5)),
    "weight norm of a transposed conv": (
        lambda: new_weight_norm(nn.ConvTranspose1d(4, 3, 2)),
        (4, 5),
    ),
    "weight norm, old": (lambda: old(weight_norm, nn.Linear(4, 3)), (4,)),
    "weight norm of a conv, old": (lambda: old(weight_norm, nn.Conv2d(4, 3, 2)), (4, 3, 3)),
    "spectral norm": (lambda: new_spectral_norm(nn.Linear(4, 3)), (4,)),
    "spectral norm of a conv": (lambda: new_spectral_norm(nn.Conv2d(4, 3, 2)), (4, 3, 3)),
    "spectral norm, old": (lambda: old_spectral_norm(nn.Linear(4, 3), (4,)), (4,)),
    "spectral norm of a conv, old": (
        lambda: old_spectral_norm(nn.Conv2d(4, 3, 2), (4, 3, 3)),
        (4, 3, 3),
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), (4,)),
    "standardised conv": (lambda: StandardisedConv(4, 3, 2), (4, 3, 3)),
    "standardised conv with gains": (lambda: ScaledStandardisedConv(4, 3, 2), (4, 3, 3)),
    "symmetric": (lambda: parametrized(nn.Linear(4, 4), Symmetric()), (4,)),
    "exponential, bias too": (
        lambda: parametrized(
            parametrized(nn.Linear(4, 3), Exponential()), Exponential(), name="bias"
        ),
        (4,),
    ),
    "two in a row": (lambda: parametrized(nn.Linear(4, 4), Exponential(), Symmetric()), (4,)),
    "of two halves": (lambda: parametrized(nn.Linear(4, 5), Halves()), (4,)),
    "of a norm": (lambda: parametrized(nn.LayerNorm(4), Exponential()), (4,)),
}


def used_twice(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return m.computed(x) * m.computed(x.flip(1))


for way, (make, shape) in COMPUTED.items():
    wired(
        f"{way}, behind a layer",
        real(*shape),
        lambda m, x: m.computed(torch.tanh(m.first(x.flatten(1))).view(x.shape)),
        lambda make=make, shape=shape: {
            "computed": make(),
            "first": nn.Linear(math.prod(shape), math.prod(shape)),
        },
        sizes=(5, 3, 2, 1),
    )
    if "conv" not in way:
        wired(
            f"{way}, cached and used twice",
            real(*shape),
            used_twice,
            lambda make=make: {"computed": make()},
            sizes=(5, 3, 2, 1),
        )
for how, norm in (
    ("", new_weight_norm),
    (", old", lambda module, name: old(weight_norm, module, name=name)),
):
    wired(
        f"weight norm of a recurrent weight{how}",
        real(5, 3),
        lambda m, x: m.layer(x)[0],
        lambda norm=norm: {"layer": norm(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")},
        sizes=(5, 3, 2, 1),
    )
    wired(
        f"weight norm of an embedding{how}",
        ids(5),
        lambda m, x: m.out(m.table(x)),
        lambda norm=norm: {"table": norm(nn.Embedding(7, 4), "weight"), "out": nn.Linear(4, 2)},
        sizes=(5, 3, 2, 1),
    )
    wired(
        f"weight norm of attention{how}",
        real(5, 4),
        lambda m, x: m.layer(x, x, x)[0],
        lambda norm=norm: {
            "layer": norm(nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight")
        },
        sizes=(5, 3, 2, 1),
    )

# -- products --------------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Wiring, tuple[int, ...]]] = {
    "groups": (
        lambda m, x: torch.einsum("bpgi,goi->bpgo", x.unflatten(-1, (2, 2)), m.w).flatten(2),
        (2, 3, 2),
    ),
    "ellipsis": (lambda m, x: torch.einsum("...i,oi->...o", x, m.w), (3, 4)),
    "ellipsis of groups": (
        lambda m, x: torch.einsum("...gi,goi->...go", x.unflatten(-1, (2, 2)), m.w).flatten(2),
        (2, 3, 2),
    ),
    "ellipsis of both": (lambda m, x: torch.einsum("...i,...oi->...o", x, m.w), (3, 4)),
    "weight first": (lambda m, x: torch.einsum("oi,bpi->bop", m.w, x), (3, 4)),
    "heads out": (lambda m, x: torch.einsum("bpi,hoi->bhpo", x, m.w), (2, 3, 4)),
    "heads in": (
        lambda m, x: torch.einsum("bphd,hdo->bpo", x.unflatten(-1, (2, 2)), m.w),
        (2, 2, 3),
    ),
    "per position": (lambda m, x: torch.einsum("bpi,pio->bpo", x, m.w), (5, 4, 3)),
    "mixing positions": (lambda m, x: torch.einsum("bpi,pq->bqi", x, m.w), (5, 5)),
    "elementwise": (lambda m, x: torch.einsum("bpi,pi->bpi", x, m.w), (5, 4)),
    "summed from x": (lambda m, x: torch.einsum("bpi,oi->bo", x, m.w), (3, 4)),
    "no arrow": (lambda m, x: torch.einsum("bpi,io", x, m.w), (4, 3)),
    "spaces, capitals": (
        lambda m, x: torch.einsum("b P i, o i -> P b o", x, m.w).transpose(0, 1),
        (3, 4),
    ),
    "three operands": (lambda m, x: torch.einsum("bpi,oi,o->bpo", x, m.w, m.w[:, 0]), (3, 4)),
    "diagonal": (lambda m, x: torch.einsum("bpi,ii->bpi", x, m.w), (4, 4)),
    "outer": (lambda m, x: torch.einsum("bpi,o->bpio", x, m.w), (3,)),
    "list of operands": (lambda m, x: torch.einsum("bpi,oi->bpo", [x, m.w]), (3, 4)),
    "transposed weight": (lambda m, x: torch.einsum("bpi,io->bpo", x, m.w.T), (3, 4)),
    "weight twice": (
        lambda m, x: (
            torch.einsum("bpi,oi->bpo", x, m.w) * torch.einsum("bpi,oi->bpo", x.flip(1), m.w)
        ),
        (3, 4),
    ),
    "all as many": (lambda m, x: torch.einsum("bpq,pqr->bpr", x @ x.mT, m.w), (5, 5, 5)),
    "samples last": (lambda m, x: torch.einsum("oi,pib->bpo", m.w, x.permute(1, 2, 0)), (3, 4)),
    "samples in the middle": (
        lambda m, x: torch.einsum("pbi,oi->pbo", x.transpose(0, 1), m.w).transpose(0, 1),
        (3, 4),
    ),
    "bmm per head": (
        lambda m, x: (
            torch.bmm(heads(x).transpose(0, 1).flatten(1, 2), m.w)
            .view(2, len(x), -1)
            .transpose(0, 1)
        ),
        (2, 2, 3),
    ),
    "matmul per head": (lambda m, x: (heads(x) @ m.w).transpose(1, 2).flatten(2), (2, 2, 3)),
    "matmul per head, broadcast": (
        lambda m, x: (heads(x) @ m.w[None]).transpose(1, 2).flatten(2),
        (2, 2, 3),
    ),
    "matmul broadcast over heads": (
        lambda m, x: (x[:, None] @ m.w).transpose(1, 2).flatten(2),
        (2, 4, 3),
    ),
    "matmul of a matrix expanded over heads": (
        lambda m, x: (x[:, None] @ m.w.expand(2, 4, 3)).flatten(1),
        (4, 3),
    ),
    "matmul of a matrix expanded over two dimensions": (
        lambda m, x: (x[:, None, None] @ m.w.expand(2, 2, 4, 3)).flatten(1),
        (4, 3),
    ),
    "matmul of rows and a matrix in 3-D": (
        lambda m, x: (x.flatten(0, 1) @ m.w[None]).view(len(x), -1),
        (4, 3),
    ),
    "matmul, weight first": (lambda m, x: (m.w @ x.mT).mT, (3, 4)),
    "matmul per head, weight first": (lambda m, x: (m.w @ heads(x).mT).flatten(1), (2, 3, 2)),
    "matmul per position": (lambda m, x: (x[:, :, None] @ m.w).squeeze(2), (5, 4, 3)),
    "bmm per position": (lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), (5, 4, 3)),
    "bmm by keywords": (
        lambda m, x: torch.bmm(input=x.transpose(0, 1), mat2=m.w).transpose(0, 1),
        (5, 4, 3),
    ),
    "mm by keywords": (lambda m, x: torch.mm(x.flatten(0, 1), mat2=m.w).view(len(x), 5, 3), (4, 3)),
    "mm, weight first": (
        lambda m, x: (
            torch.mm(m.w, x.flatten(0, 1).T).view(3, len(x), 5).transpose(0, 1).reshape(len(x), -1)
        ),
        (3, 4),
    ),
    "data times vector": (lambda m, x: x @ m.w, (4,)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=([2], [1])), (3, 4)),
    "block diagonal": (lambda m, x: x @ torch.block_diag(m.w[0], m.w[1]), (2, 2, 3)),
    "einsum of groups, viewed": (
        lambda m, x: (
            torch.einsum("bpgi,goi->gbpo", x.unflatten(-1, (2, 2)), m.w)
            .view(2, len(x), -1)
            .transpose(0, 1)
        ),
        (2, 3, 2),
    ),
    "one group": (
        lambda m, x: torch.einsum("bpgi,goi->bpgo", x[:, :, None], m.w).flatten(2),
        (1, 3, 4),
    ),
    "addmm kw": (
        lambda m, x: torch.addmm(m.w[0], mat1=x.flatten(0, 1), mat2=m.w).view(len(x), -1),
        (4, 3),
    ),
    "addmm, scaled": (
        lambda m, x: torch.addmm(m.w[0], x.flatten(0, 1), m.w, beta=0.5).view(len(x), -1),
        (4, 3),
    ),
    "addmm, multiplied": (
        lambda m, x: torch.addmm(m.w[0], x.flatten(0, 1), m.w, alpha=2).view(len(x), -1),
        (4, 3),
    ),
    "addmm of a row for every sample": (
        lambda m, x: torch.addmm(torch.stack([m.w[0]] * len(x)), x[:, 0], m.w),
        (4, 3),
    ),
    "addmm method": (lambda m, x: m.w[0].addmm(x.flatten(0, 1), m.w).view(len(x), -1), (4, 3)),
}
# Where no rule fits: letters missing, several of a kind, or one matrix for several heads of the same rows.
LEFT = (
    "ellipsis of both", "summed from x", "no arrow", "three operands", "diagonal", "tensordot",
    "matmul broadcast over heads", "addmm, scaled", "addmm, multiplied", "addmm of a row for every sample",
)  # fmt: skip
for way, (wiring, shape) in PRODUCTS.items():
    wired(
        f"product, {way}",
        real(5, 4),
        lambda m, x, wiring=wiring: wiring(m, torch.tanh(m.first(x))),
        lambda shape=shape: {"w": weights(*shape), "first": nn.Linear(4, 4)},
        sizes=(5, 3, 2, 1),
        may=("w",) if way in LEFT else (),
    )
