"""Memory that holding large language models takes, by setting: computed from shapes, nothing is measured.

python -m benchmarks.large_models

Fills in docs/how-to/language.md. For small shapes, python_tests/benchmarks/test_large_models.py compares what
it computes with the bytes of a penalty's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.files import ROOT, fill
from experiments.tables import table

PAGE = ROOT / "docs" / "how-to" / "language.md"
RANK = 8


class Shape(NamedTuple):
    """Sizes of a model of Llama's kind.

    keys: width of keys, and of values. tied: whether the output layer's weight is the embedding's.
    """

    hidden: int
    inner: int
    blocks: int
    keys: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the linear layers in the blocks."""
        square, narrow = (self.hidden, self.hidden), (self.keys, self.hidden)
        wide = (self.inner, self.hidden)
        return [square, narrow, narrow, square, wide, wide, wide[::-1]] * self.blocks

    @property
    def adapted(self) -> int:
        """The weights of those layers, which LoRA updates."""
        return sum(m * n for m, n in self.linear)

    @property
    def factors(self) -> int:
        """The elements of A and B of all of them."""
        return sum(RANK * (m + n) for m, n in self.linear)

    @property
    def parameters(self) -> int:
        """All of them."""
        norms = self.hidden * (2 * self.blocks + 1)
        return self.adapted + norms + self.vocabulary * self.hidden * (1 if self.tied else 2)


# Llama 3.2 1B, Llama 2 7B and 70B.
SHAPES = {
    "1 B": Shape(2048, 8192, 16, 512, 128256, tied=True),
    "7 B": Shape(4096, 11008, 32, 4096, 32000),
    "70 B": Shape(8192, 28672, 80, 1024, 32000),
}


def full(bytes_of_each: float) -> Callable[[Shape], float]:
    """So many bytes for each parameter."""
    return lambda shape: bytes_of_each * shape.parameters


def lora(bytes_of_each: float, bytes_of_factors: float = 4) -> Callable[[Shape], float]:
    """So many bytes for each adapted weight, and for each element of the factors."""
    return lambda shape: bytes_of_each * shape.adapted + bytes_of_factors * shape.factors


# Sums over samples take 4 bytes, and those of the batch that is added 4 more; of 8 sweeps each has an eighth of
# them, and what was found is kept in bfloat16.
SETTINGS: dict[str, Callable[[Shape], float]] = {
    "weights in bfloat16, for comparison": full(2),
    "all trained, float32, or bfloat16 without `anchor_dtype`": full(8),
    "all trained, bfloat16, `anchor_dtype=torch.bfloat16`": full(6),
    "the same, `omega_dtype=torch.uint8`": full(3),
    "LoRA": lora(4),
    "LoRA, `omega_dtype=torch.uint8`": lora(1),
    "while it consolidates, all trained: on top": full(8),
    "while it consolidates, LoRA: on top": lora(8, 0),
    "the same with `omega_dtype=torch.uint8` and `sweeps=8`": lora(8 / 8 + 2, 0),
}


def page() -> str:
    """The table, and what it is of."""
    rows = [
        [name, *(f"{taken(shape) / 1e9:,.3g}" for shape in SHAPES.values())]
        for name, taken in SETTINGS.items()
    ]
    sizes = ", ".join(f"{s.parameters / 1e9:.3g}" for s in SHAPES.values())
    return (
        table(["GB", *SHAPES], rows)
        + f"\n\nComputed for shapes of Llama with {sizes} billion parameters, LoRA of rank {RANK} on the "
        "linear layers of all blocks, factors in float32; `benchmarks/large_models.py`."
    )


def main() -> None:
    """Fill in the page."""
    fill(PAGE, {"large models": page()})
    print(page())


if __name__ == "__main__":
    main()
