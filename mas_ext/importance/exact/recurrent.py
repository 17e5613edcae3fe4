"""Recurrent layers: LSTM, GRU and RNN, of several layers and directions, of sequences of several lengths.

A layer is two: W_ih x + b_ih, a linear layer of the inputs of all steps, and the recurrence, in which W_hh h
+ b_hh is added step by step. The gradients of all of these sums come from one walk backwards through the
steps; with them, W_hh is a linear layer too, whose input is h of the step before.

Rows are those of all steps, one step's after each other. Sequences of several lengths are packed, the longest
first, so that later steps have fewer rows, and row j of every step is of the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mas_ext.importance.exact.gradient_forms import PerSample, Product
from mas_ext.importance.exact.layers import Layer, Linear
from mas_ext.importance.exact.rules import RULES, register_rule
from mas_ext.importance.exact.sample_layout import SampleLayout
from mas_ext.importance.exact.tracing import Tape

__all__ = ["RULES"]  # with those below


class _Step(NamedTuple):
    """Rows from start to stop: `carried` go on from the step before, the rest from the first states."""

    start: int
    stop: int
    carried: int


@lru_cache(maxsize=64)
def _steps(sizes: tuple[int, ...], backwards: bool) -> list[tuple[int, _Step]]:
    """The steps with their numbers, in the order in which they are taken; sizes: their numbers of rows."""
    stops = torch.tensor(sizes).cumsum(0).tolist()
    order = range(len(sizes))[:: -1 if backwards else 1]
    found, before = [], 0
    for t in order:
        found.append((t, _Step(stops[t] - sizes[t], stops[t], min(before, sizes[t]))))
        before = sizes[t]
    return found


@lru_cache(maxsize=64)
def _rows_before(sizes: tuple[int, ...], backwards: bool, device: torch.device) -> Tensor:
    """For every row, where its state before is in a tensor of the first states and, behind, of all rows."""
    sequences = max(sizes)
    index, before = torch.empty(sum(sizes), dtype=torch.int64), 0
    for _, (start, stop, carried) in _steps(sizes, backwards):
        row = torch.arange(stop - start)
        index[start:stop] = torch.where(row < carried, sequences + before + row, row)
        before = start
    return index.to(device)


@dataclass(frozen=True)
class Recurrence(Layer):
    """Hidden states of all steps, from W_ih x + b_ih and the first states.

    x: (sequences + rows, gates * hidden); the first rows hold the first states, behind each other. weight:
    W_hh, (gates * hidden, hidden). y: (rows, states * hidden), h first.
    """

    sizes: tuple[int, ...]
    backwards: bool
    gates = 1
    states = 1
    by_row = True
    recurs = True

    def steps(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]:
        """A function (number of the step, states before, where the new ones go), h first; x: W_ih x + b_ih."""
        raise NotImplementedError

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with _disable_current_modes():  # steps are none of the model's calls
            return self._all_steps(x, weight, bias)

    def _all_steps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, x = self._split(x, weight)
        y = x.new_empty(len(x), self.states * weight.shape[1])
        new = [*zip(*(s.split(self.sizes) for s in y.chunk(self.states, 1)), strict=True)]
        step = self.steps(x, weight, bias)
        states: Sequence[Tensor] = [s[:0] for s in first]
        for t, (start, stop, carried) in _steps(self.sizes, self.backwards):
            if states[0].shape[0] > carried:
                states = [s[:carried] for s in states]
            if carried < stop - start:
                begin = [s[carried : stop - start] for s in first]
                states = [torch.cat(both) for both in zip(states, begin, strict=True)]
            step(t, states, new[t])
            states = new[t]
        return y

    def _split(self, x: Tensor, weight: Tensor) -> tuple[list[Tensor], Tensor]:
        """The first states, and what comes in at every row."""
        sequences, hidden = max(self.sizes), weight.shape[1]
        return [*x[:sequences].split(hidden, 1)][: self.states], x[sequences:]

    def _before(self, first: Sequence[Tensor], y: Tensor) -> list[Tensor]:
        """The states before every row."""
        pairs = [*zip(first, y.chunk(self.states, 1), strict=True)]
        if min(self.sizes) < max(self.sizes):
            rows = _rows_before(self.sizes, self.backwards, y.device)
            return [torch.cat(pair)[rows] for pair in pairs]
        each = self.sizes[0]
        if self.backwards:
            return [torch.cat([s[each:], s0]) for s0, s in pairs]
        return [torch.cat([s0, s[:-each]]) for s0, s in pairs]

    def _walk_back(
        self, carry: Callable[[int], Sequence[Tensor]], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Add to the states' gradients what comes back from the steps behind; those of the first states.

        carry: from the number of a step to the gradients of the states before it, once its own are there.
        """
        split = [g.split(self.sizes) for g in gradients]
        of_first = [g.new_zeros(max(self.sizes), g.shape[1]) for g in gradients]
        steps = _steps(self.sizes, self.backwards)[::-1]
        for (t, (_, _, carried)), (before, _) in zip(steps, [*steps[1:], steps[-1]], strict=True):
            here = self.sizes[t]
            for back, to, begin in zip(carry(t), split, of_first, strict=True):
                if carried == here == self.sizes[before]:
                    to[before].add_(back)
                    continue
                to[before][:carried].add_(back[:carried])
                begin[carried:here].add_(back[carried:])
        return of_first

    def backward_of_rows(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        of_h = reduce(torch.add, grad.chunk(self.states, 1)).clone()
        rows = of_h.split(self.sizes)
        (of_first,) = self._walk_back(lambda t: [rows[t]], [of_h])
        sums = of_h.repeat(1, self.gates)
        return sums, torch.cat([of_first.repeat(1, self.gates), sums])

    def weight_gradients(self, grad: Tensor, x: Tensor, layout: SampleLayout) -> PerSample:
        return Product(layout.features(grad), layout.features(x))

    def _first_gradients(self, x: Tensor, *parts: Tensor) -> Tensor:
        """The gradients of first states, as these lie in x."""
        states = torch.cat(parts, 1)
        return F.pad(states, (0, x.shape[1] - states.shape[1]))


class _SimpleRecurrence(Recurrence):
    """One state, h' = f(x, W_hh h + b_hh) + z h: all gradients are those of h' times a factor."""

    def factors(
        self, x: Tensor, h: Tensor, before: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """d h' / d x and d h' / d (W_hh h + b_hh), (rows, gates, hidden), and z, all elementwise."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, inputs = self._split(x, weight)
        (before,) = self._before(first, y)
        to_x, to_h, z = self.factors(inputs, F.linear(before, weight, bias), before, y)
        dh = grad.clone()
        rows, to_hs = dh[:, None].split(self.sizes), to_h.split(self.sizes)
        zs = None if z is None else z.split(self.sizes)

        def carry(t: int) -> Sequence[Tensor]:
            back = torch.mm((rows[t] * to_hs[t]).flatten(1), weight)
            return [back if zs is None else back.addcmul_(rows[t][:, 0], zs[t])]

        of_first = self._walk_back(carry, [dh])
        along_x, along_h = ((dh[:, None] * factor).flatten(1) for factor in (to_x, to_h))
        return along_h, before, torch.cat([self._first_gradients(x, *of_first), along_x])


class _Plain(_SimpleRecurrence):
    """h' = a(x + h), with a's slope from h'."""

    activation: Callable[..., Tensor]

    def steps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., None]:
        xs, transposed = (x if bias is None else x + bias).split(self.sizes), weight.t()

        def step(t: int, states: Sequence[Tensor], new: Sequence[Tensor]) -> None:
            new[0].copy_(type(self).activation(torch.addmm(xs[t], states[0], transposed)))

        return step

    def factors(
        self, x: Tensor, h: Tensor, before: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        slope = (1 - y * y if type(self).activation is torch.tanh else (y > 0).to(y.dtype))[:, None]
        return slope, slope, None


class _Tanh(_Plain):
    activation = torch.tanh


class _Relu(_Plain):
    activation = torch.relu


class _GRU(_SimpleRecurrence):
    """r, z = sigmoid(x + h), n = tanh(x_n + r h_n), h' = (1 - z) n + z h."""

    gates = 3

    def steps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., None]:
        xs = x.split(self.sizes)

        def step(t: int, states: Sequence[Tensor], new: Sequence[Tensor]) -> None:
            _, z, n = self._values(xs[t], F.linear(states[0], weight, bias))
            torch.lerp(n, states[0], z, out=new[0])

        return step

    @staticmethod
    def _values(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = x.shape[1] // 3
        r, z = (x[:, : 2 * hidden] + h[:, : 2 * hidden]).sigmoid_().chunk(2, 1)
        return r, z, torch.addcmul(x[:, 2 * hidden :], r, h[:, 2 * hidden :]).tanh_()

    def factors(
        self, x: Tensor, h: Tensor, before: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r, z, n = self._values(x, h)
        to_n = (1 - z) * (1 - n * n)
        to_r = to_n * h.chunk(3, 1)[2] * r * (1 - r)
        to_z = (before - n) * z * (1 - z)
        return torch.stack([to_r, to_z, to_n], 1), torch.stack([to_r, to_z, to_n * r], 1), z


class _LSTM(Recurrence):
    """i, f, o = sigmoid(x + h), g = tanh(x + h), c' = f c + i g, h' = o tanh(c')."""

    gates = 4
    states = 2

    def steps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., None]:
        xs, transposed = (x if bias is None else x + bias).split(self.sizes), weight.t()

        def step(t: int, states: Sequence[Tensor], new: Sequence[Tensor]) -> None:
            i, f, g, o = self._values(torch.addmm(xs[t], states[0], transposed))
            c = torch.addcmul(f.mul_(states[1]), i, g, out=new[1])
            torch.mul(o, c.tanh(), out=new[0])

        return step

    @staticmethod
    def _values(sums: Tensor) -> list[Tensor]:
        i, f, g, o = sums.chunk(4, 1)
        g = g.tanh()
        sums.sigmoid_()  # and with it i, f and o
        return [i, f, g, o]

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, inputs = self._split(x, weight)
        before, c_before = self._before(first, y)
        i, f, g, o = self._values(F.linear(before, weight, bias).add_(inputs))
        tanh_c = y.chunk(2, 1)[1].tanh()
        # Factors, from c' to the sums of i, f and g, and from h' to that of o and to c'; later the gradients
        # of sums.
        sums = torch.empty_like(inputs)
        gates = sums.unflatten(1, (4, -1))
        to_i, to_f, to_g, to_o = gates.unbind(1)
        torch.mul(g, i, out=to_i).mul_(1 - i)
        torch.mul(c_before, f, out=to_f).mul_(1 - f)
        torch.mul(i, 1 - g.square_(), out=to_g)
        torch.mul(tanh_c, o, out=to_o).mul_(1 - o)
        to_c = tanh_c.square_().neg_().add_(1).mul_(o)
        dh, dc = (t.clone() for t in grad.chunk(2, 1))
        hs, cs, along, ifg, os, to_cs, fs = (
            t.split(self.sizes) for t in (dh, dc, sums, gates[:, :3], gates[:, 3], to_c, f)
        )

        def carry(t: int) -> Sequence[Tensor]:
            c = cs[t].addcmul_(hs[t], to_cs[t])
            ifg[t].mul_(c[:, None])
            os[t].mul_(hs[t])
            return torch.mm(along[t], weight), c * fs[t]

        of_first = self._walk_back(carry, [dh, dc])
        return sums, before, torch.cat([self._first_gradients(x, *of_first), sums])


_LAYERS: dict[Callable[..., Any], type[Recurrence]] = {
    torch.lstm: _LSTM,
    torch.gru: _GRU,
    torch.rnn_tanh: _Tanh,
    torch.rnn_relu: _Relu,
    torch.lstm_cell: _LSTM,
    torch.gru_cell: _GRU,
    torch.rnn_tanh_cell: _Tanh,
    torch.rnn_relu_cell: _Relu,
}


def _direction(
    tape: Tape,
    x: Tensor,
    sizes: Sequence[int],
    first: Sequence[Tensor],
    weights: Sequence[Any],
    backwards: bool,
) -> tuple[Tensor, list[Tensor]]:
    """h of all rows, and the last states of all sequences, of one layer in one direction."""
    w_ih, w_hh, b_ih, b_hh = weights
    layer = _LAYERS[tape.func](tuple(sizes), backwards)
    x = tape.layer(Linear(), x, w_ih, b_ih)
    states = torch.cat([*first], 1)
    states = F.pad(states.to(x.dtype), (0, x.shape[1] - states.shape[1]))
    y = tape.layer(layer, torch.cat([states, x]), w_hh, b_hh)
    steps, sequences = [step for _, step in _steps(tuple(sizes), backwards)], max(sizes)
    if backwards or min(sizes) == sequences:
        last = y[steps[-1].start : steps[-1].stop]
    else:
        ends = [start for start, stop, _ in steps for _ in range(stop - start)]
        row = torch.arange(len(y)) - torch.tensor(ends)
        end = torch.empty(sequences, dtype=torch.int64).scatter_(0, row, torch.arange(len(y)))
        last = y[end.to(y.device)]
    return y[:, : w_hh.shape[1]], [*last.chunk(layer.states, 1)]


@register_rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _recurrent(tape: Tape, input: Tensor, *args: Any) -> Any:
    packed = not isinstance(args[2], bool)
    if packed:
        batch_sizes, hx, weights, biased, layers, dropout, training, both = args
        sizes, x = tape.read(batch_sizes.tolist()), input
    else:
        hx, weights, biased, layers, dropout, training, both, batch_first = args
        x = input.transpose(0, 1) if batch_first else input
        sizes, shape = [x.shape[1]] * x.shape[0], x.shape[:2]
        x = x.flatten(0, 1)
    each, directions = 4 if biased else 2, 2 if both else 1
    projected = len(weights) != each * layers * directions
    if projected or (dropout and training) or not all(map(tape.follows, weights)):
        return NotImplemented
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    last = []
    for layer in range(layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = [*weights[k * each : (k + 1) * each], None, None][:4]
            first = [s[k] for s in states]
            y, end = _direction(tape, x, sizes, first, own, k % directions == 1)
            outputs.append(y)
            last.append(end)
        x = torch.cat(outputs, 1)
    ends = [torch.stack(s) for s in zip(*last, strict=True)]
    if packed:
        return x, *ends
    y = x.view(*shape, -1)
    return y.transpose(0, 1) if batch_first else y, *ends


@register_rule(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def _cell(
    tape: Tape, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
) -> Any:  # fmt: skip
    weights = [w_ih, w_hh, b_ih, b_hh]
    if not all(map(tape.follows, weights)):
        return NotImplemented
    first = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    _, last = _direction(tape, input, [len(input)], first, weights, False)
    return tuple(last) if len(last) > 1 else last[0]
