"""The package that is installed: its compiled kernels are there and give the right numbers."""

from __future__ import annotations

import torch

import mas_ext

assert mas_ext.info()["backend"] == "native", mas_ext.info()
model = torch.nn.Linear(3, 2, bias=False)
x = torch.randn(8, 3)
penalty = mas_ext.FusedMASPenalty(model)
penalty.consolidate([x])
# Of |W x|^2 per sample: 2 |y_i x_j|; away from the anchor by 1 everywhere.
expected = (2 * (x @ model.weight.T)[:, :, None] * x[:, None]).abs().mean(0).sum()
with torch.no_grad():
    model.weight += 1
torch.testing.assert_close(penalty(), expected)
