"""Optimizers with the penalty in their step, and the hooks that apply it in the steps of any other."""

from mas_ext.optim.fused import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW"]
