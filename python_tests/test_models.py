"""The MLP against its formula, written out by hand."""

import torch

from mas_ext.models import MLP


def test_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    model = MLP(12, hidden=(7, 5), classes=(2, 3))
    x = torch.randn(4, 1, 3, 4)
    weight_1, bias_1, weight_2, bias_2 = model.backbone.parameters()
    hidden = (x.reshape(4, 12) @ weight_1.T + bias_1).clamp(min=0)
    hidden = (hidden @ weight_2.T + bias_2).clamp(min=0)
    for task, classes in enumerate((2, 3)):
        head = model.heads[task]
        logits = model(x, task)
        assert logits.shape == (4, classes)
        torch.testing.assert_close(logits, hidden @ head.weight.T + head.bias)


def test_a_task_trains_the_backbone_and_its_own_head_only() -> None:
    model = MLP(6, hidden=(5,), classes=(2, 2, 2))
    model(torch.randn(3, 6), 1).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"backbone.1.weight", "backbone.1.bias", "heads.1.weight", "heads.1.bias"}


def test_without_hidden_layers_it_is_linear() -> None:
    model = MLP(6, hidden=(), classes=(2,))
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x, 0), x @ model.heads[0].weight.T + model.heads[0].bias)
