"""Few numbers that tell a tensor from another one, for ranks that compare what they have."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# How many numbers, and how many of a tensor's elements go into them at once.
SKETCH, _CHUNK = 64, 1 << 20


def sketch(t: Tensor) -> Tensor:
    """Sums of a tensor's elements with random signs, the same ones always: linear, and about as long as it is.

    Returns:
        float64 of shape (64,), on the tensor's device.
    """
    found = torch.zeros(SKETCH, dtype=torch.float64, device=t.device)
    generator = torch.Generator(t.device)
    for number, chunk in enumerate(t.flatten().split(_CHUNK)):
        generator.manual_seed(number)
        size = -(-len(chunk) // SKETCH) * SKETCH
        signed = torch.randint(0, 2, (size,), generator=generator, device=t.device).double()
        signed.mul_(2).sub_(1)[: len(chunk)].mul_(chunk)
        signed[len(chunk) :] = 0
        found += signed.view(-1, SKETCH).sum(0)
    return found


def fingerprint(t: Tensor) -> str:
    """A word that tells a tensor's values from others."""
    return hashlib.sha256(sketch(t).cpu().numpy().tobytes()).hexdigest()[:8]
