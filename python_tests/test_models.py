"""Networks against their formulas, written out by hand."""

import pytest
import torch
from torch import nn

from mas_ext import models


def with_heads(model: models.MultiHead, *classes: int) -> models.MultiHead:
    for count in classes:
        model.add_head(count)
    return model


def test_forward_is_the_formula() -> None:
    model = with_heads(models.mlp((1, 3, 4), hidden=(7, 5)), 2, 3)
    x = torch.randn(4, 1, 3, 4)
    weight_1, bias_1, weight_2, bias_2 = model.backbone.parameters()
    hidden = (x.reshape(4, 12) @ weight_1.T + bias_1).clamp(min=0)
    hidden = (hidden @ weight_2.T + bias_2).clamp(min=0)
    logits = [hidden @ head.weight.T + head.bias for head in model.heads]
    assert [each.shape for each in logits] == [(4, 2), (4, 3)]
    torch.testing.assert_close(model(x, 0), logits[0])
    torch.testing.assert_close(model(x, 1), logits[1])
    torch.testing.assert_close(model(x), torch.cat(logits, dim=1))


def test_a_task_trains_the_backbone_and_its_own_head_only() -> None:
    model = with_heads(models.mlp((6,), hidden=(5,)), 2, 2, 2)
    model(torch.randn(3, 6), 1).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"backbone.1.weight", "backbone.1.bias", "heads.1.weight", "heads.1.bias"}


def test_without_hidden_layers_it_is_linear() -> None:
    model = with_heads(models.mlp((2, 3), hidden=()), 2)
    x = torch.randn(3, 2, 3)
    head = model.heads[0]
    torch.testing.assert_close(model(x, 0), x.reshape(3, 6) @ head.weight.T + head.bias)


def test_a_head_is_what_the_backbone_is() -> None:
    model = models.MultiHead(nn.Linear(3, 4, dtype=torch.float64, device="meta"), width=4)
    model.add_head(2)
    assert model.heads[0].weight.dtype == torch.float64
    assert model.heads[0].weight.device.type == "meta"
    assert model.heads[0].weight.shape == (2, 4)


def test_heads_that_cannot_be() -> None:
    model = models.mlp((3,), hidden=(4,))
    with pytest.raises(ValueError, match="the model has no head yet: call add_head first"):
        model(torch.randn(1, 3))
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        model.add_head(0)
