"""Adapters for other people's loops: one module per library, imported only on request.

`avalanche`, `lightning` and `transformers` (with accelerate) call this library at the right moments and hold no
mathematics of their own. Each needs its library installed: the extra of the same name.
"""
