"""Fine-tuning: the lower bound, which protects nothing of what was learned before."""

from __future__ import annotations

from mas_ext.methods.method import Method


class Finetune(Method):
    """The task loss on the present task alone."""
