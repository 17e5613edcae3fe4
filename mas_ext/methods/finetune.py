"""Fine-tuning: the lower bound. Nothing holds what was learned before."""

from __future__ import annotations

from mas_ext.methods.method import Method


class Finetune(Method):
    """Cross entropy on the present task alone."""
