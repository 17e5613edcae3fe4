"""Pictures of facts <S>, <S, P> and <S, P, O>: a glyph alone, with an attribute, in a relation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Subject, predicate and object, as many as there are.
Fact = tuple[str, ...]

SIDE = 32
GLYPH = 14  # pixels of a side, as glyphs are kept


class Spot(NamedTuple):
    """A glyph's place: its centre in half sides from the canvas' own, its side as a share of the canvas."""

    across: float = 0.0
    down: float = 0.0
    side: float = 0.75


# Of the subject and of the object.
RELATIONS = {
    "left of": (Spot(-0.47, 0, 0.38), Spot(0.47, 0, 0.38)),
    "right of": (Spot(0.47, 0, 0.38), Spot(-0.47, 0, 0.38)),
    "above": (Spot(0, -0.47, 0.38), Spot(0, 0.47, 0.38)),
    "below": (Spot(0, 0.47, 0.38), Spot(0, -0.47, 0.38)),
    "left above": (Spot(-0.47, -0.47, 0.38), Spot(0.47, 0.47, 0.38)),
    "right below": (Spot(0.47, 0.47, 0.38), Spot(-0.47, -0.47, 0.38)),
    "inside": (Spot(0, 0, 0.36), Spot(0, 0, 0.9)),
    "around": (Spot(0, 0, 0.9), Spot(0, 0, 0.36)),
}

_down, _across = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")


def _colour(*rgb: float) -> Tensor:
    return torch.tensor(rgb)[:, None, None].expand(3, SIDE, SIDE)


def _texture(bright: Tensor) -> Tensor:
    return torch.where(bright, 1.0, 0.25).expand(3, SIDE, SIDE)


# What the subject's brightness is multiplied by, (3, SIDE, SIDE).
ATTRIBUTES = {
    "red": _colour(1, 0.1, 0.1),
    "green": _colour(0.1, 1, 0.1),
    "blue": _colour(0.2, 0.2, 1),
    "yellow": _colour(1, 1, 0.1),
    "violet": _colour(1, 0.1, 1),
    "turquoise": _colour(0.1, 1, 1),
    "striped": _texture(_down % 4 < 2),
    "barred": _texture(_across % 4 < 2),
    "checked": _texture((_down // 3 + _across // 3) % 2 == 0),
    "dotted": _texture((_down % 4 < 2) & (_across % 4 < 2)),
    "rising": _texture((_down + _across) % 5 < 2),
    "falling": _texture((_down - _across) % 5 < 2),
}


def batches_of_facts(
    glyphs: Sequence[str], tasks: int, generator: torch.Generator
) -> list[list[Fact]]:
    """By task: facts with predicates and objects of its own, of all subjects; none is in two tasks.

    Three fifths of the glyphs are subjects, the others objects.
    """

    def shuffled(words: Sequence[str]) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=generator).tolist()]

    attributes, relations, nouns = map(shuffled, (list(ATTRIBUTES), list(RELATIONS), glyphs))
    ends = 3 * len(nouns) // 5
    subjects, objects = nouns[:ends], nouns[ends:]
    return [
        [
            *product(subjects[task::tasks]),
            *product(subjects, attributes[task::tasks]),
            *product(subjects, relations[task::tasks], objects[task::tasks]),
        ]
        for task in range(tasks)
    ]


def shrunk(x: Tensor) -> Tensor:
    """Glyphs (N, 1, H, W) in the size in which they are kept."""
    mode = "area" if x.shape[-1] > GLYPH else "bilinear"
    return F.interpolate(x, (GLYPH, GLYPH), mode=mode)


def paint(fact: Fact, n: int, glyphs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Pictures of a fact, (n, 3, SIDE, SIDE), each of glyphs (N, 1, GLYPH, GLYPH) drawn by chance."""
    spots = RELATIONS[fact[1]] if len(fact) == 3 else (Spot(),)
    picture = torch.zeros(n, 1, SIDE, SIDE)
    # The smaller one is put over the larger one, whose box it clears.
    for spot, word in sorted(zip(spots, fact[::2], strict=True), key=lambda each: -each[0].side):
        some = glyphs[word][torch.randint(len(glyphs[word]), (n,), generator=generator)]
        placed = place(torch.cat([some, torch.ones_like(some)], 1), spot, generator)
        picture = picture * (1 - placed[:, 1:]) + placed[:, :1]
    return picture * (ATTRIBUTES[fact[1]] if len(fact) == 2 else _colour(1, 1, 1))


def place(x: Tensor, spot: Spot, generator: torch.Generator) -> Tensor:
    """Pictures (n, C, h, w) on canvases (n, C, SIDE, SIDE), each a pixel or so away from the spot."""
    centre = torch.tensor([spot.across, spot.down])
    centre = centre + 3 / SIDE * (2 * torch.rand(len(x), 2, generator=generator) - 1)
    # From the canvas' coordinates to those of the picture.
    back = torch.cat([torch.eye(2).expand(len(x), 2, 2), -centre[:, :, None]], 2) / spot.side
    grid = F.affine_grid(back, [len(x), x.shape[1], SIDE, SIDE], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
