"""The penalty on low-rank updates: time and memory of the kernel, of autograd, and of products by hand.

python -m benchmarks.low_rank

The weights have the sizes of SmolLM2-135M's linear layers, 106 million in all, and random values: value and
gradients of all factors. Writes results/low_rank_cpu.json and fills in docs/how-to/language.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.files import RESULTS, ROOT, fill, machine, measured_on, save
from benchmarks.memory import process_peak
from experiments.tables import table
from mas_ext.comparison.timing import in_turns, median, paired, spread
from mas_ext.kernels.low_rank import UpdateState, low_rank_with_gradients

RESULT = RESULTS / "low_rank_cpu.json"
PAGE = ROOT / "docs" / "how-to" / "language.md"
WIDTH, NARROW, INNER = 576, 192, 1536
BLOCK = [
    *((WIDTH, WIDTH), (NARROW, WIDTH), (NARROW, WIDTH), (WIDTH, WIDTH)),
    *((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
]
BLOCKS = 30
RANKS = (8, 64)
LAM = 0.5
Factors = tuple[list[Tensor], list[Tensor], UpdateState]


def factors(rank: int, blocks: int = BLOCKS, omega: torch.dtype = torch.float32) -> Factors:
    """The updates of all layers, and anchors near them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = BLOCK * blocks
    left, right = [normal(m, rank) for m, _ in sizes], [normal(rank, n) for _, n in sizes]
    if omega == torch.uint8:
        known = [torch.randint(256, s, generator=generator, dtype=torch.uint8) for s in sizes]
    else:
        known = [torch.rand(s, generator=generator).to(omega) for s in sizes]
    ones = [1.0] * len(sizes)
    state = UpdateState(
        known,
        ones,
        [1] * len(sizes),
        ones,
        [t + 0.1 * normal(*t.shape) for t in left],
        [t + 0.1 * normal(*t.shape) for t in right],
        [1] * len(sizes),
        ones,
        torch.tensor(LAM, dtype=torch.float64),
        True,
    )
    return left, right, state


def by_autograd(left: list[Tensor], right: list[Tensor], state: UpdateState) -> list[Tensor]:
    """As one writes it: the product, its square, backward."""
    own = [[t.detach().requires_grad_() for t in side] for side in (left, right)]
    total: Any = 0
    for i, omega in enumerate(state.omega):
        update = own[0][i] @ own[1][i] - state.anchor_left[i] @ state.anchor_right[i]
        total = total + (omega * update**2).sum()
    (LAM * total).backward()
    return [t.grad for side in own for t in side if t.grad is not None]


def by_hand(left: list[Tensor], right: list[Tensor], state: UpdateState) -> list[Tensor]:
    """Layer by layer with torch's products, without autograd."""
    to_left, to_right, value = [], [], 0.0
    for i, omega in enumerate(state.omega):
        update = left[i] @ right[i]
        update.addmm_(state.anchor_left[i], state.anchor_right[i], alpha=-1)
        pull = omega * update
        value += float(torch.dot(pull.view(-1), update.view(-1)))
        pull *= 2 * LAM
        to_left.append(pull @ right[i].T)
        to_right.append(left[i].T @ pull)
    return [*to_left, *to_right]


def by_kernel(left: list[Tensor], right: list[Tensor], state: UpdateState) -> list[Tensor]:
    """The fused kernel."""
    return low_rank_with_gradients(left, right, state)[1]


KERNEL, AUTOGRAD, HAND = "kernel", "torch, by autograd", "torch, by hand"
FORMS: dict[str, Callable[..., list[Tensor]]] = {
    KERNEL: by_kernel,
    AUTOGRAD: by_autograd,
    HAND: by_hand,
}
NARROW_KERNEL = "kernel, omega of 8 bits"


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference from the float64 gradients, over each one's largest element."""
    return max(
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def exact(left: list[Tensor], right: list[Tensor], state: UpdateState) -> list[Tensor]:
    """The gradients in float64."""
    wide = state._replace(
        omega=[t.double() for t in state.omega],
        anchor_left=[t.double() for t in state.anchor_left],
        anchor_right=[t.double() for t in state.anchor_right],
    )
    return by_hand([t.double() for t in left], [t.double() for t in right], wide)


def measure(rank: int, repeats: int, blocks: int = BLOCKS, memory: bool = True) -> dict[str, Any]:
    """Seconds of each form and their ratio to the kernel's, bytes beyond the operands, and errors."""
    own = factors(rank, blocks)
    calls = {name: partial(form, *own) for name, form in FORMS.items()}
    calls[NARROW_KERNEL] = partial(by_kernel, *factors(rank, blocks, torch.uint8))
    samples = dict(zip(calls, in_turns([*calls.values()], repeats, "cpu"), strict=True))
    few = factors(rank, 1)
    found: dict[str, Any] = {}
    for name, taken in samples.items():
        found[name] = {"seconds": median(taken), "over_kernel": paired(taken, samples[KERNEL])}
        if name in FORMS:
            found[name]["error"] = error(FORMS[name](*few), exact(*few))
            if memory:
                found[name]["bytes"] = _bytes_in_a_new_process(name, rank)
    return found


def _bytes_in_a_new_process(name: str, rank: int) -> int:
    call = [sys.executable, "-m", "benchmarks.low_rank", "--peak", name, "--ranks", str(rank)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


def peak(name: str, rank: int) -> int:
    """The most bytes beyond the operands; all layers are seen once before, two of each kind."""

    def prepare() -> Callable[[], object]:
        own = factors(rank)
        FORMS[name](*factors(rank, 2))
        return partial(FORMS[name], *own)

    return process_peak(prepare)


def page(result: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    rows = []
    for rank, found in result["ranks"].items():
        for name, form in found.items():
            ratio = "" if name == KERNEL else spread(form["over_kernel"], 1)
            taken = f"{form['bytes'] / 1e6:,.0f}" if "bytes" in form else ""
            wrong = f"{form['error']:.0e}" if "error" in form else ""
            rows.append(
                [rank, name, f"{1e3 * form['seconds']['median']:,.0f}", ratio, taken, wrong]
            )
    head = ["rank", "", "ms", "times the kernel's", "MB, gradients among them", "error"]
    about = (
        f"Value and all gradients of the updates of {result['weights'] / 1e6:.0f} million weights (random "
        "values, sizes of SmolLM2-135M's linear layers) in float32; error of the gradients against float64. "
        f"{measured_on(result)}; medians of {result['repeats']} interleaved repeats, with 95 % intervals; "
        "`benchmarks/low_rank.py`."
    )
    return f"{table(head, rows)}\n\n{about}"


def main() -> None:
    """Measure, write, and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--peak", choices=FORMS, help="print the bytes that one form takes")
    parser.add_argument("--json", type=Path, default=RESULT, help="the page is of the default")
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.ranks[0]))
        return
    result = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "weights": BLOCKS * sum(m * n for m, n in BLOCK),
        "ranks": {str(rank): measure(rank, options.repeats) for rank in options.ranks},
    }
    save(result, options.json)
    print(page(result))
    if options.json == RESULT:
        fill(PAGE, {"low rank": page(result)})


if __name__ == "__main__":
    main()
