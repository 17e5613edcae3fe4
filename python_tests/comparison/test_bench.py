"""`mas-ext bench`: sizes as published, forms that compute the same, and a table of all of them."""

from __future__ import annotations

import pytest
import torch

from mas_ext.comparison import bench as module
from mas_ext.comparison.bench import Form, after_tasks, bench, forms, parameters_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("mlp", 6, 478_410),
        ("resnet18", 62, 11_689_512),
        ("vit_b", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
    ],
)
def test_sizes_are_the_published_ones(model: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        found = [p for part in module.SIZES[model]() for p in part.parameters()]
    assert len(found) == tensors
    assert sum(p.numel() for p in found) == parameters


def every_form(tasks: list[int]) -> tuple[torch.nn.Module, list[Form]]:
    network = parameters_of("mlp", "cpu", "float32")
    penalties, history = after_tasks(network, tasks)
    return network, forms(network, penalties, history)


def test_forms_compute_the_gradient_of_the_penalty() -> None:
    """Omega of task t is uniform plus t / 100, and every anchor is where the parameters were."""
    network, found = every_form([1, 3])
    start = [p.detach().clone() for p in network.parameters()]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.rand(p.shape, generator=generator).double() for p in start]
    assert [(form.name, form.tasks) for form in found] == [
        ("add_grad_", 1),
        ("add_grad_", 3),
        ("penalty() + backward", 1),
        ("proximal_", 1),
        ("eager autograd", 1),
        ("eager autograd", 3),
        ("official code, gradient only", 1),
        ("torch._foreach", 1),
    ]
    for form in found:
        for p, x in zip(network.parameters(), start, strict=True):
            assert p.grad is not None
            p.grad.zero_()
            p.detach().copy_(x + 0.5)
        form.call()
        for p, x, w in zip(network.parameters(), start, noise, strict=True):
            assert p.grad is not None
            distance = (x + 0.5).double() - x.double()
            omega = w if form.tasks == 1 else 3 * w + 0.03
            if form.name == "proximal_":
                c = 2 * 1.0 * 0.5 * omega
                torch.testing.assert_close(p.double(), x + 0.5 - c / (1 + c) * distance)
            else:
                torch.testing.assert_close(p.grad.double(), 2 * 0.5 * omega * distance)


def test_table_has_a_line_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "eager_fits", lambda tasks, theta: tasks < 3)
    lines = bench("mlp", "cpu", "bfloat16", [3, 2], 2).splitlines()
    assert lines[0].startswith("mlp: 478,410 parameters, bfloat16, cpu, 1 threads, 2 repeats")
    rows = [line.split("  ")[0] for line in lines[2:-1]]
    assert rows == ["add_grad_"] * 3 + [
        "penalty() + backward",
        "proximal_",
        "eager autograd",
        "eager autograd",
        "official code, gradient only",
        "torch._foreach",
    ]
    assert [line.split()[1] for line in lines[2:5]] == ["1", "2", "3"]
    assert lines[2].endswith("1.00 (1.00 to 1.00)")
    assert lines[-1] == "eager autograd, 3 tasks: left out, needs more than half of the memory"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got 'lenet', expected one of 'mlp', 'resnet18'"):
        bench("lenet", "cpu", "float32", [1], 1)
    with pytest.raises(ValueError, match="device: got 'tpu', expected one of 'cpu'"):
        bench("mlp", "tpu", "float32", [1], 1)
    with pytest.raises(ValueError, match="dtype: got 'int8', expected one of 'float32'"):
        bench("mlp", "cpu", "int8", [1], 1)
    with pytest.raises(ValueError, match="tasks: got 0, expected a whole number from 1 up"):
        bench("mlp", "cpu", "float32", [0], 1)
