"""More of the zoo: recurrent layers, routed experts, and what Python reads or runs again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint
from zoo import ANY, Inputs, Wiring, ranked, real, weights, wired, without_gradient

# -- recurrent layers ------------------------------------------------------------------------------


def sequences(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 6, 3), "lengths": torch.randint(1, 7, (n,))}


def packed(batch: dict[str, Tensor], x: Tensor) -> rnn.PackedSequence:
    return rnn.pack_padded_sequence(
        x, batch["lengths"].cpu(), batch_first=True, enforce_sorted=False
    )


def all_of(result: Any) -> Tensor:
    """The outputs and last states of a recurrent layer, flattened by sample."""
    y, states = result
    if isinstance(y, rnn.PackedSequence):
        y = rnn.pad_packed_sequence(y, batch_first=True, total_length=6)[0]
    states = states if isinstance(states, tuple) else (states,)
    return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def encoded(m: Any, x: Tensor) -> Any:
    """First states from an encoder."""
    s = m.encoder(x).view(len(x), -1, 2, 4).permute(2, 1, 0, 3).contiguous()
    return (s[0], s[1]) if isinstance(m.layer, nn.LSTM) else s[0]


def zero_states(m: Any, x: Tensor) -> Any:
    s = torch.zeros(m.layer.num_layers * (1 + m.layer.bidirectional), len(x), 4).to(x)
    return (s, s) if isinstance(m.layer, nn.LSTM) else s


def relu_rnn(*sizes: int, **options: Any) -> nn.RNN:
    return nn.RNN(*sizes, nonlinearity="relu", **options)


RECURRENT: dict[str, Callable[..., Any]] = {
    "lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "relu rnn": relu_rnn,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "2 layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "2 layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.5},  # none in eval mode
}
USES: dict[str, tuple[Inputs, Wiring]] = {
    "all results": (real(5, 3), lambda m, x: all_of(m.layer(m.input(x)))),
    "sequence first": (real(5, 3), lambda m, x: 3 * m.layer(m.input(x).mT.permute(2, 0, 1))[0].transpose(0, 1)),
    "packed": (sequences, lambda m, b: all_of(m.layer(packed(b, m.input(b["x"]))))),
    "states given": (real(5, 3), lambda m, x: all_of(m.layer(m.input(x), encoded(m, x[:, 0])))),
    "zero states": (real(5, 3), lambda m, x: all_of(m.layer(m.input(x), zero_states(m, x)))),
    "packed, states given": (
        sequences,
        lambda m, b: all_of(m.layer(packed(b, m.input(b["x"])), encoded(m, b["x"][:, 0]))),
    ),
}  # fmt: skip


def recurrent(
    kind: Callable[..., nn.Module], options: dict[str, Any], use: str
) -> dict[str, nn.Module]:
    states = 8 * options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    parts = {
        "input": nn.Linear(3, 3),
        "layer": kind(3, 4, batch_first=use != "sequence first", **options),
    }
    return parts | ({"encoder": nn.Linear(3, states)} if "given" in use else {})


for (name, kind), (variant, options), (use, (inputs, wiring)) in itertools.product(
    RECURRENT.items(), OPTIONS.items(), USES.items()
):
    if name == "relu rnn" and variant != "2 layers, both directions":
        continue
    wired(
        f"{name}, {variant}, {use}",
        inputs,
        wiring,
        lambda kind=kind, options=options, use=use: recurrent(kind, options, use),
        sizes=(5, 3, 2, 5, 1) if use != "sequence first" else (5, 3, 6, 5, 4),
        forward=lambda model, batch: model(batch),
    )


def learned(expand: Callable[[Tensor, int], Tensor]) -> Wiring:
    """First states are parameters, expanded to the samples."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        s = expand(m.first, len(x))
        return all_of(m.layer(x, (s, s.tanh()) if isinstance(m.layer, nn.LSTM) else s))

    return wiring


STATES: dict[str, tuple[Callable[[Tensor, int], Tensor], tuple[int, ...]]] = {
    "expand": (lambda t, n: t.expand(-1, n, -1), (2, 1, 4)),
    "expand, contiguous": (lambda t, n: t.expand(-1, n, -1).contiguous(), (2, 1, 4)),
    "repeat": (lambda t, n: t.repeat(1, n, 1), (2, 1, 4)),
    "tile": (lambda t, n: t.tile(1, n, 1), (2, 1, 4)),
    "torch.tile": (lambda t, n: torch.tile(t, (1, n, 1)), (2, 1, 4)),
    "unsqueeze": (lambda t, n: t.unsqueeze(1).repeat(1, n, 1), (2, 4)),
    "expand of a tanh": (lambda t, n: t.tanh().expand(2, n, 4), (2, 1, 4)),
    "stack": (lambda t, n: torch.stack([t[0].expand(n, 4), t[1].expand(n, 4)]), (2, 4)),
    "zeros": (lambda t, n: torch.zeros(2, n, 4).to(t) + t, (2, 1, 4)),
    "repeat_interleave": (lambda t, n: t.repeat_interleave(n, 1), (2, 1, 4)),
    "cat": (lambda t, n: torch.cat([t] * n, 1), (2, 1, 4)),
}
for (way, (expand, shape)), kind in itertools.product(STATES.items(), (nn.LSTM, nn.GRU)):
    wired(
        f"{kind.__name__} with learned states by {way}",
        real(5, 3),
        learned(expand),
        lambda kind=kind, shape=shape: {
            "first": weights(*shape),
            "layer": kind(3, 4, num_layers=2, batch_first=True),
        },
        sizes=(5, 2, 3, 1),
        may=("first",) if way in ("repeat_interleave", "cat") else (),
    )


def lengths_of(*lengths: Sequence[int]) -> Inputs:
    turn = itertools.cycle(lengths)
    return lambda n: {"x": torch.randn(n, 6, 3), "lengths": torch.tensor(next(turn))}


def positions_of(*lengths: int) -> Inputs:
    turn = itertools.cycle(lengths)
    return lambda n: torch.randn(n, next(turn), 3)


def in_two_parts(m: Any, x: Tensor) -> Tensor:
    y, states = m.layer(x[:, :3])
    return torch.cat([y, m.layer(x[:, 3:], states)[0]], 1)


def truncated(m: Any, x: Tensor) -> Tensor:
    y, (h, c) = m.layer(x[:, :3])
    return torch.cat([y, m.layer(x[:, 3:], (h.detach(), c.detach()))[0]], 1)


wired(
    "lstm, packed, lengths equal in the first batch",
    lengths_of([4, 4, 4, 4], [4, 3, 4, 1], [2, 2, 2, 2]),
    lambda m, b: all_of(m.layer(packed(b, b["x"]))),
    lambda: {"layer": nn.LSTM(3, 4, batch_first=True)},
    sizes=(4, 4, 4),
    forward=lambda model, batch: model(batch),
)


def packed_as_sorted(m: Any, batch: dict[str, Tensor]) -> Tensor:
    x = rnn.pack_padded_sequence(batch["x"], batch["lengths"].cpu(), batch_first=True)
    return all_of(m.layer(x))


for kind in (nn.LSTM, nn.GRU):
    wired(
        f"{kind.__name__}, packed as they are, lengths equal in the first batch",
        lengths_of([4, 4, 4, 4], [5, 4, 4, 3], [6, 4, 2, 1]),
        packed_as_sorted,
        lambda kind=kind: {"layer": kind(3, 4, batch_first=True)},
        sizes=(4, 4, 4),
        forward=lambda model, batch: model(batch),
    )
wired(
    "gru, steps differ by batch",
    positions_of(5, 3, 1, 4),
    lambda m, x: m.out(m.layer(x)[0].mean(1)),
    lambda: {
        "layer": nn.GRU(3, 4, batch_first=True, bidirectional=True),
        "out": nn.Linear(8, 2),
    },
    sizes=(5, 5, 2, 4),
)
wired(
    "lstm with projections",
    real(5, 3),
    lambda m, x: m.layer(x)[0],
    lambda: {"layer": nn.LSTM(3, 4, proj_size=2, batch_first=True)},
    may=ANY,
    must=True,
)
LSTM_USES: dict[str, tuple[Wiring, dict[str, Any]]] = {
    "used twice": (lambda m, x: 3 * m.layer(m.layer(m.layer(x)[0][..., :3])[0][..., 1:])[0], {}),
    "in two parts": (in_two_parts, {}),
    "truncated": (truncated, {}),
    "of windows": (lambda m, x: m.layer(x.view(-1, 3, 3))[0].reshape(len(x), -1), {}),
    "checkpointed": (lambda m, x: checkpoint(lambda x: m.layer(x)[0], x, use_reentrant=False), {}),
    "some frozen": (lambda m, x: m.layer(x)[0], {"frozen": ("weight_hh_l0", "bias_ih_l0")}),
    "others frozen": (lambda m, x: m.layer(x)[0], {"frozen": ("weight_ih_l0", "bias_hh_l0")}),
    "sample by sample": (lambda m, x: torch.stack([m.layer(s[None])[0][0] for s in x]), {"may": ANY}),
}  # fmt: skip
for way, (wiring, known) in LSTM_USES.items():
    wired(
        f"lstm, {way}",
        real(6, 3),
        wiring,
        lambda known=known: {
            "layer": without_gradient(
                nn.LSTM(3, 4, batch_first=True), *known.get("frozen", ("none",))
            )
        },
        sizes=(5, 3, 2, 1),
        may=known.get("may", ()),
    )


def unrolled(m: Any, x: Tensor) -> Tensor:
    state, ys = m.first(x[:, 0]), []
    if isinstance(m.cell, nn.LSTMCell):
        state = state, state.tanh()
    for step in x.unbind(1):
        state = m.cell(hx=state, input=step)
        ys.append(torch.cat(state, 1) if isinstance(state, tuple) else state)
    return torch.stack(ys, 1)


def relu_cell(*sizes: int, **options: Any) -> nn.RNNCell:
    return nn.RNNCell(*sizes, nonlinearity="relu", **options)


for cell, bias in itertools.product(
    (nn.LSTMCell, nn.GRUCell, nn.RNNCell, relu_cell), (True, False)
):
    wired(
        f"{cell.__name__} with states given{'' if bias else ', no bias'}",
        real(5, 3),
        unrolled,
        lambda cell=cell, bias=bias: {"first": nn.Linear(3, 4), "cell": cell(3, 4, bias=bias)},
        sizes=(5, 3, 2, 1),
    )


def with_a_hook(w: Tensor) -> Tensor:
    w = 2 * w
    w.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return w


def lstm_of(change: Callable[[Tensor], Tensor]) -> Wiring:
    def wiring(m: Any, x: Tensor) -> Tensor:
        w_ih, w_hh, *biases = m.layer._flat_weights
        state = torch.zeros(1, len(x), 4).to(x)
        return torch.lstm(
            x, (state, state), [w_ih, change(w_hh), *biases], True, 1, 0.0, False, False, True
        )[0]

    return wiring


def cell_of(change: Callable[[Tensor], Tensor]) -> Wiring:
    def wiring(m: Any, x: Tensor) -> Tensor:
        w = change(m.cell.weight_hh)
        h, ys = m.first(x[:, 0]), []
        for step in x.unbind(1):
            h = torch.gru_cell(step, h, m.cell.weight_ih, w, m.cell.bias_ih, m.cell.bias_hh)
            ys.append(h)
        return torch.stack(ys, 1)

    return wiring


for way, change, known in (
    ("detached", Tensor.detach, {}),
    ("with a hook", with_a_hook, {"may": ANY, "must": True}),
):
    wired(
        f"lstm, a weight {way}",
        real(5, 3),
        lstm_of(change),
        lambda: {"layer": nn.LSTM(3, 4, batch_first=True)},
        **known,
    )
    wired(
        f"GRUCell, a weight {way}",
        real(5, 3),
        cell_of(change),
        lambda: {"first": nn.Linear(3, 4), "cell": nn.GRUCell(3, 4)},
        **known,
    )

# -- routed experts --------------------------------------------------------------------------------


def topk(m: Any, x: Tensor) -> Tensor:
    """Two of three experts for every position."""
    rows = x.flatten(0, 1)
    gate = m.gate(rows).softmax(-1)
    w, which = gate.topk(2, -1)
    w = w / w.sum(-1, keepdim=True)
    y = torch.zeros_like(rows)
    for e in range(3):
        i, k = torch.where(which == e)
        y = y.index_add(0, i, w[i, k, None] * m.experts[e](rows[i]))
    return y.view(x.shape)


def topk_in_place(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    w, which = m.gate(rows).softmax(-1).topk(2, -1)
    y = torch.zeros_like(rows)
    mask = F.one_hot(which, 3).permute(2, 1, 0)
    for e in range(3):
        k, i = torch.where(mask[e])
        if i.numel() == 0:
            continue
        y.index_add_(0, i, m.experts[e](rows[None, i].reshape(-1, 4)) * w[i, k, None])
    return y.view(x.shape)


def experts_that_are_hit(m: Any, x: Tensor) -> Tensor:
    """Experts without rows are not called."""
    rows = x.flatten(0, 1)
    w, which = m.gate(rows).softmax(-1).topk(1, -1)
    y = torch.zeros_like(rows)
    mask = F.one_hot(which, 3).permute(2, 1, 0)
    for e in mask.sum((-1, -2)).nonzero():
        k, i = torch.where(mask[e].squeeze(0))
        y.index_add_(0, i, m.experts[e](rows[i]) * w[i, k, None])
    return y.view(x.shape)


def written_back(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    which = m.gate(rows).argmax(-1)
    p = m.gate(rows).softmax(-1)
    y = torch.zeros_like(rows)
    for e in range(3):
        i = (which == e).nonzero().flatten()
        y[i] = m.experts[e](rows[i]) * p[i, e, None]
    return y.view(x.shape)


def scattered_back(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    which = m.gate(rows).argmax(-1)
    p = m.gate(rows).softmax(-1)
    y = torch.zeros_like(rows)
    for e in range(3):
        (i,) = (which == e).nonzero(as_tuple=True)
        y.scatter_add_(0, i[:, None].expand(-1, 4), m.experts[e](rows[i]) * p[i, e, None])
    return y.view(x.shape)


def masked_rows(m: Any, x: Tensor) -> Tensor:
    which = m.gate(x).argmax(-1)
    p = m.gate(x).softmax(-1)
    y = torch.zeros_like(x)
    for e in range(3):
        y[which == e] = m.experts[e](x[which == e]) * p[which == e][:, e, None]
    return y


def masked_scatter(m: Any, x: Tensor) -> Tensor:
    which = m.gate(x).argmax(-1)
    p = m.gate(x).softmax(-1)
    return sum(
        torch.zeros_like(x).masked_scatter((which == e)[..., None], m.experts[e](x[which == e]))
        for e in range(3)
    ) * p.amax(-1, keepdim=True)


def all_experts(m: Any, x: Tensor) -> Tensor:
    """Every expert sees all rows."""
    p = m.gate(x).softmax(-1)
    return torch.einsum("bpe,bpeo->bpo", p, torch.stack([e(x) for e in m.experts], 2))


def sorted_by_expert(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    p = m.gate(rows).softmax(-1)
    which = p.argmax(-1)
    order = which.argsort(stable=True)
    counts = torch.bincount(which, minlength=3).tolist()
    ys = torch.cat([e(part) for e, part in zip(m.experts, rows[order].split(counts), strict=True)])
    return (ys[order.argsort()] * p.amax(-1, keepdim=True)).view(x.shape)


def modules() -> dict[str, Any]:
    return {
        "gate": nn.Linear(4, 3),
        "experts": nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3)
        ),
    }


def stacked_weights() -> dict[str, Any]:
    return {"gate": nn.Linear(4, 3), "up": weights(3, 4, 5), "down": weights(3, 5, 4)}


def bmm_of_expanded_rows(m: Any, x: Tensor) -> Tensor:
    p = m.gate(x).softmax(-1)
    rows = x.flatten(0, 1)
    h = torch.bmm(rows.expand(3, -1, -1), m.up).tanh()
    y = torch.bmm(h, m.down).view(3, *x.shape)
    return (y * p.permute(2, 0, 1)[..., None]).sum(0)


def bmm_of_repeated_rows(m: Any, x: Tensor) -> Tensor:
    p = m.gate(x).softmax(-1)
    rows = x.flatten(0, 1).repeat(3, 1).view(3, -1, 4)
    y = torch.bmm(torch.bmm(rows, m.up).tanh(), m.down).view(3, len(x), -1, 4)
    return (y * p.permute(2, 0, 1)[..., None]).sum(0)


def weights_by_number(m: Any, x: Tensor) -> Tensor:
    """Weights of all experts in one parameter, indexed by the expert's number."""
    rows = x.flatten(0, 1)
    p = m.gate(rows).softmax(-1)
    which = p.argmax(-1)
    y = torch.zeros_like(rows)
    for e in range(3):
        i = (which == e).nonzero().flatten()
        y = y.index_add(0, i, (rows[i] @ m.up[e]).tanh() @ m.down[e] * p[i, e, None])
    return y.view(x.shape)


def weights_of_every_row(m: Any, x: Tensor) -> Tensor:
    """Every row has a weight of its own."""
    rows = x.flatten(0, 1)
    p = m.gate(rows).softmax(-1)
    which = p.argmax(-1)
    y = torch.bmm(torch.bmm(rows[:, None], m.up[which]).tanh(), m.down[which])[:, 0]
    return (y * p.amax(-1, keepdim=True)).view(x.shape)


def weights_of_every_row_by_einsum(m: Any, x: Tensor) -> Tensor:
    p = m.gate(x).softmax(-1)
    which = p.argmax(-1)
    return torch.einsum(
        "bpo,bpoi->bpi", torch.einsum("bpi,bpio->bpo", x, m.up[which]).tanh(), m.down[which]
    ) * p.amax(-1, keepdim=True)


def weights_of_every_sample(m: Any, x: Tensor) -> Tensor:
    p = m.gate(x.mean(1)).softmax(-1)
    which = p.argmax(-1)
    return ((x @ m.up[which]).tanh() @ m.down[which]) * p.amax(-1)[:, None, None]


def topk_of_weights(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    p = m.gate(rows).softmax(-1)
    w, which = p.topk(2, -1)
    y = torch.zeros_like(rows)
    for e in range(3):
        i, k = torch.where(which == e)
        y.index_add_(
            0, i, F.linear(F.linear(rows[i], m.up[e].T).tanh(), m.down[e].T) * w[i, k, None]
        )
    return y.view(x.shape)


def weights_by_a_number_of_data(m: Any, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    p = m.gate(rows).softmax(-1)
    w, which = p.topk(1, -1)
    y = torch.zeros_like(rows)
    for e in F.one_hot(which, 3).permute(2, 1, 0).sum((-1, -2)).nonzero():
        e = e[0]
        i, k = torch.where(which == e)
        y.index_add_(
            0, i, F.linear(F.linear(rows[i], m.up[e].T).tanh(), m.down[e].T) * w[i, k, None]
        )
    return y.view(x.shape)


def slots(m: Any, x: Tensor) -> Tensor:
    """Every expert has a slot for each row of a sample."""
    p = m.gate(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), 3)
    pos = mask.cumsum(1) * mask - 1
    disp = (F.one_hot(pos.clamp(min=0), x.shape[1]) * mask[..., None]).to(x)
    h = torch.einsum("bpec,bpi->ebci", disp, x)
    y = torch.einsum("ebch,eho->ebco", torch.einsum("ebci,eih->ebch", h, m.up).tanh(), m.down)
    return torch.einsum("bpec,ebco->bpo", disp * p[..., None], y)


ROUTES: dict[Wiring, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(
        (
            topk,
            topk_in_place,
            experts_that_are_hit,
            written_back,
            scattered_back,
            masked_rows,
            masked_scatter,
            all_experts,
            sorted_by_expert,
        ),
        modules,
    ),
    **dict.fromkeys(
        (
            bmm_of_expanded_rows,
            bmm_of_repeated_rows,
            weights_by_number,
            weights_of_every_row,
            weights_of_every_row_by_einsum,
            weights_of_every_sample,
            topk_of_weights,
            weights_by_a_number_of_data,
            slots,
        ),
        stacked_weights,
    ),
}
for (route, parts), positions in itertools.product(ROUTES.items(), (5, 6)):
    wired(
        f"experts, {route.__name__}, {positions} positions",
        real(positions, 4),
        lambda m, x, route=route: m.out(torch.tanh(route(m, torch.tanh(m.embed(x))))),
        lambda parts=parts: {"embed": nn.Linear(4, 4), "out": nn.Linear(4, 2), **parts()},
        sizes=(5, 6, 2, 3, 8),
        # A weight of its own for every row is no layer's.
        may=("up", "down") if "of_every" in route.__name__ else (),
    )


def lowest(x: Tensor) -> Tensor:
    """1, a number made of data."""
    return (x.detach().square() >= 0).long().amin()


for way, (pick, may) in {
    "a number of data": (lambda m, x: m.table[lowest(x)], ()),
    "a constant": (lambda m, x: m.table[torch.tensor(1)], ()),
    "a number of data, as an embedding": (lambda m, x: F.embedding(lowest(x), m.table), ("table",)),
}.items():
    wired(
        f"one row for all samples, by {way}",
        real(4),
        lambda m, x, pick=pick: m.out(x * pick(m, x)),
        lambda: {"table": weights(3, 4), "out": nn.Linear(4, 2)},
        sizes=(5, 2, 3),
        may=may,
    )

wired(
    "one row for all samples, without influence",
    real(4),
    lambda m, x: m.out(x + 0 * F.embedding(lowest(x), m.table)),
    lambda: {"table": weights(3, 4), "out": nn.Linear(4, 2)},
    sizes=(5, 2, 3),
    may=("table",),
)
wired(
    "a row for every sample, multiplied in place",
    real(4),
    lambda m, x: m.out(multiplied_in_place(torch.stack([m.row] * len(x)), x)),
    lambda: {"row": weights(4), "out": nn.Linear(4, 2)},
    may=("row",),
)


def multiplied_in_place(h: Tensor, x: Tensor) -> Tensor:
    h.mul_(x)
    return h


# -- numbers that Python reads ---------------------------------------------------------------------


def ab() -> dict[str, Any]:
    return {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}


READS: dict[str, Wiring] = {
    "positions": lambda m, x: m.b(m.a(x).tanh()) if (torch.arange(x.shape[1]) >= 0).all() else x,
    "differences of positions": lambda m, x: (
        m.b(m.a(x).tanh())
        if (torch.arange(x.shape[1])[None].expand(len(x), -1).diff(dim=1) == 1).all()
        else x
    ),
    "a sum": lambda m, x: m.b(m.a(x).tanh()) if float(x.abs().sum()) > 0 else x,
    "whether all are finite": lambda m, x: m.b(m.a(x).tanh()) if x.isfinite().all() else x,
    "whether some are NaN": lambda m, x: x if x.isnan().any().item() else m.b(m.a(x).tanh()),
    "equality": lambda m, x: m.b(m.a(x).tanh()) if torch.equal(x, x.clone()) else x,
    "the largest length": lambda m, x: m.b(m.a(x).tanh())[:, : int((x != 0).sum(1).max())],
    "a list": lambda m, x: m.b(m.a(x).tanh()) * torch.tensor(x[:, 0, 0].tolist()).to(x)[:, None, None],
    "a parameter": lambda m, x: m.b(m.a(x).tanh()) * (2 if m.b.bias[0].item() > 0 else 3),
    "a mean of positions": lambda m, x: m.b(m.a(x).tanh()) * torch.arange(x.shape[1]).float().mean().item(),
}  # fmt: skip
for way, wiring in READS.items():
    wired(f"Python reads {way}", real(4, 3), wiring, ab, sizes=(5, 6, 2, 5, 3, 5))
wired(
    "Python reads a way for every sample",
    real(4, 3),
    lambda m, x: torch.cat(
        [m.b(m.a(s[None]).tanh() if s[0, 0] > 0 else m.a(s[None]).sigmoid()) for s in x]
    ),
    ab,
    sizes=(5, 6, 2, 5, 3, 5),
    may=ANY,
)


def attended(m: Any, batch: dict[str, Tensor]) -> Tensor:
    """A mask that is left out where it masks nothing."""
    q = m.a(batch["x"])
    mask = None if batch["mask"].all() else batch["mask"][:, None]
    return m.b(F.scaled_dot_product_attention(q, q, q.tanh(), attn_mask=mask))


def zeroed(m: Any, batch: dict[str, Tensor]) -> Tensor:
    h = torch.tanh(m.a(batch["x"]))
    return m.b(h if batch["mask"].all() else h * batch["mask"][..., None])


def masks(*shortest: int) -> Inputs:
    turn = itertools.cycle(shortest)

    def inputs(n: int) -> dict[str, Tensor]:
        low = next(turn)
        return {
            "x": torch.randn(n, 4, 3),
            "mask": torch.arange(4) < torch.randint(low, 5, (n, 1)),
        }

    return inputs


for (when, shortest), wiring in itertools.product(
    {"never": (4,), "in the second batch": (4, 1), "in the first batch": (1, 4)}.items(),
    (attended, zeroed),
):
    wired(
        f"Python reads a mask, {wiring.__name__}, which masks {when}",
        masks(*shortest),
        wiring,
        ab,
        sizes=(5, 6, 5, 6, 2, 3),
        forward=lambda model, batch: model(batch),
    )

# -- data that take a detour -----------------------------------------------------------------------


def written(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Into a tensor that is made of numbers alone."""

    def copy(t: Tensor) -> Tensor:
        y = torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        write(y, t)
        return y

    return copy


def through_numpy(t: Tensor) -> Tensor:
    y = torch.empty(t.shape, dtype=t.dtype)
    y.numpy()[...] = t.cpu().numpy()
    return y.to(t)


DETOURS: dict[str, Callable[[Tensor], Tensor]] = {
    "a list": lambda t: torch.tensor(t.tolist(), dtype=t.dtype, device=t.device),
    "numpy": lambda t: torch.from_numpy(t.cpu().numpy()).to(t),
    "numpy into what lies in memory": through_numpy,
    "copy_": written(lambda y, t: y.copy_(t)),
    "an assignment": written(lambda y, t: y.__setitem__(slice(None), t)),
    "out": written(lambda y, t: torch.mul(t, 1, out=y)),
    "an operator called directly": written(lambda y, t: torch.ops.aten.copy_.default(y, t)),
    "another tensor in the same memory": written(lambda y, t: y.data.copy_(t)),
    "a view": written(lambda y, t: y.view(-1).add_(t.flatten())),
}
# Samples are last, where nobody looks for them in a tensor that is made of numbers.
for way, detour in DETOURS.items():
    wired(
        f"data copied by {way}",
        real(2, 3),
        lambda m, x, detour=detour: m.out((m.w @ detour(x.permute(1, 2, 0))).tanh().movedim(2, 0)),
        lambda: {"w": weights(4, 3), "out": nn.Linear(4, 2)},
        sizes=(5, 4, 7),
    )


def through_kept() -> Wiring:
    """Samples are copied into the first rows of a tensor that is kept from call to call."""
    kept: list[Tensor] = []

    def wiring(m: Any, x: Tensor) -> Tensor:
        if not kept or kept[0].dtype != x.dtype:
            kept[:] = [torch.zeros(9, 4, dtype=x.dtype, device=x.device)]
        kept[0][: len(x)] = x
        return m.out((m.shift + kept[0]).tanh())[: len(x)]

    return wiring


wired(
    "data copied into a tensor that is kept",
    real(4),
    through_kept(),
    lambda: {"shift": weights(4), "out": nn.Linear(4, 2)},
)


def partly_filled(fill: Callable[[Tensor], Any]) -> Wiring:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = x + 1
        fill(y[..., 0])
        return m.out(m.a(y).tanh())

    return wiring


for way, fill in {
    "fill_": lambda t: t.fill_(0.5),
    "zero_": Tensor.zero_,
    "copy_": lambda t: t.copy_(torch.zeros((), device=t.device)),
}.items():
    wired(
        f"a part of the data filled by {way}",
        real(5, 4),
        partly_filled(fill),
        lambda: {"a": nn.Linear(4, 4), "out": nn.Linear(4, 2)},
    )
for way, expand in {
    "expand": lambda t, n: t.expand(n, 4),
    "repeat": lambda t, n: t.repeat(n, 1),
    "repeat of a vector": lambda t, n: t[0].repeat(n, 1),
}.items():
    for frozen in (True, False):
        wired(
            f"a layer of a {'constant' if frozen else 'parameter'} for every sample by {way}",
            real(4),
            lambda m, x, expand=expand: m.out(
                m.a(expand(m.start.weight, len(x))).tanh() * x.sum(1, keepdim=True)
            ),
            lambda frozen=frozen: {
                "a": nn.Linear(4, 4),
                "out": nn.Linear(4, 2),
                "start": without_gradient(nn.Linear(4, 1), *(() if frozen else ("bias",))),
            },
            sizes=(5, 4, 7, 2),
        )


wired(
    "a layer of a constant for every position of every sample",
    real(3, 4),
    lambda m, x: m.out(m.a(m.start.weight.expand(3 * len(x), 4)).tanh().view(-1, 3, 4) * x),
    lambda: {
        "a": nn.Linear(4, 4),
        "out": nn.Linear(4, 2),
        "start": without_gradient(nn.Linear(4, 1)),
    },
    sizes=(5, 4, 7, 2),
)


def hooked(m: Any, x: Tensor) -> Tensor:
    w = 1 + m.w
    w.register_hook(lambda grad: grad.clamp(-1, 1))
    return m.out(F.linear(x, w).tanh())


def larger() -> Inputs:
    turn = itertools.cycle((0.001, 1.0))
    return lambda n: next(turn) * torch.randn(n, 4)


wired(
    "a hook on what is derived, which changes nothing in the first batch",
    larger(),
    hooked,
    lambda: {"w": weights(4, 4), "out": nn.Linear(4, 2)},
    sizes=(5, 5),
    may=("w",),
    must=True,
)
for way, order in {"": lambda t: t, ", samples backwards": lambda t: t.flip(0)}.items():
    wired(
        f"a token stacked as often as there are samples, and multiplied{way}",
        real(4),
        lambda m, x, order=order: order(m.out(torch.stack([m.token] * len(x)) * order(x))),
        lambda: {"token": weights(4), "out": nn.Linear(4, 2)},
        may=("token",),
        must=True,
    )


def sorted_by_numpy(m: Any, x: Tensor) -> Tensor:
    """The layer has samples in one order and in the other."""
    order = x[:, 0].detach().cpu().numpy().argsort()
    h = torch.tanh(m.left(x[order.tolist()]))
    return m.out(torch.stack([h[k] for k in order.argsort().tolist()]) * m.left(x))


def in_one_memory() -> dict[str, Tensor]:
    memory = torch.randn(24, dtype=torch.float64)
    return {"v": memory[:12].view(3, 4), "w": memory[12:].view(3, 4)}


wired(
    "two parameters in one memory",
    real(5, 4),
    lambda m, x: F.linear(x, m.v.exp()).tanh() * F.linear(x.flip(1), m.w.exp()).tanh(),
    in_one_memory,
)
wired(
    "two samples change places by numpy",
    ranked((0, 0), (0, 1)),
    sorted_by_numpy,
    lambda: {"left": nn.Linear(4, 5), "out": nn.Linear(5, 3)},
    sizes=(2, 2),
)

# -- parts that run again --------------------------------------------------------------------------


def again(part: Callable[..., Tensor], *args: Tensor) -> Tensor:
    y: Tensor = checkpoint(part, *args, use_reentrant=False)
    return y


def merged(m: Any) -> Tensor:
    return m.w + m.b @ m.a


def layer(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, merged(m)))


def merged_outside(m: Any, x: Tensor) -> Tensor:
    w = merged(m)
    return again(lambda x: torch.tanh(F.linear(x, w)), x)


CHECKPOINTED: dict[str, Wiring] = {
    "merged inside": lambda m, x: again(lambda x: layer(m, x), x),
    "merged outside": lambda m, x: merged_outside(m, x),
    "merged and passed in": lambda m, x: again(lambda x, w: F.linear(x, w).tanh(), x, merged(m)),
    "merged inside, twice": lambda m, x: again(lambda x: layer(m, layer(m, x)), x),
    "merged inside and outside": lambda m, x: again(lambda x: layer(m, x), layer(m, x)),
    "nested": lambda m, x: again(
        lambda x: again(lambda x: F.linear(x, 2 * m.w), x).tanh() @ m.b @ m.a, x
    ),
    "positions inside": lambda m, x: again(
        lambda x: layer(m, x + m.a[torch.arange(2).repeat(2)][: x.shape[1]]), x
    ),
    "token inside": lambda m, x: again(
        lambda x: layer(m, torch.cat([m.a.expand(len(x), -1, -1), x], 1)), x
    ),
    "normalised inside": lambda m, x: again(
        lambda x: F.linear(layer(m, x), F.normalize(m.w)).tanh(), x
    ),
}
for way, wiring in CHECKPOINTED.items():
    wired(
        f"checkpointed, {way}",
        real(4, 4),
        lambda m, x, wiring=wiring: m.out(wiring(m, x)),
        lambda: {
            "w": weights(4, 4),
            "b": weights(4, 2),
            "a": weights(2, 4),
            "out": nn.Linear(4, 2),
        },
        sizes=(5, 4, 2, 3, 5),
    )
