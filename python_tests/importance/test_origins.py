"""What a tape takes a tensor for: data, a constant, or derived from parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mas_ext.importance.exact.origins import Earlier, Origins
from mas_ext.importance.exact.recurrent import RULES
from mas_ext.importance.exact.tracing import Tape
from mas_ext.importance.model_state import tensors_of


def tape_of(model: nn.Module, samples: int = 5) -> Tape:
    return Tape(tensors_of(model), dict(model.named_parameters()), samples, RULES, (), False, False)


def written(z: Tensor, x: Tensor) -> Tensor:
    z.copy_(x)
    return z


def set_item(z: Tensor, x: Tensor) -> Tensor:
    z[0] = x[0]
    return z


def seen_by_nobody(z: Tensor, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        z.add_(x)
    return z


def through_a_view(z: Tensor, x: Tensor) -> Tensor:
    z[:2].add_(x[:2])
    return z


def after_a_read(z: Tensor, x: Tensor) -> Tensor:
    return torch.tensor([float(x.sum())])


DATA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the batch": lambda z, x: x,
    "computed from it": lambda z, x: z + x,
    "written": written,
    "an item": set_item,
    "added": lambda z, x: z.add_(x),
    "by an operator": lambda z, x: z.__iadd__(x),
    "out": lambda z, x: torch.add(x, 1, out=z),
    "a view": through_a_view,
    "an unseen write": seen_by_nobody,
    "its data": lambda z, x: (z.data.copy_(x), z)[1],
    "out into its data": lambda z, x: (torch.add(x, 1, out=z.data), z)[1],
    "a number read": after_a_read,
    "an array": lambda z, x: torch.tensor(x.numpy()),
    "random": lambda z, x: torch.randn(3),
    "memory": lambda z, x: torch.empty(3),
    "memory filled in part": lambda z, x: (lambda e: (e[:2].fill_(1.0), e)[1])(torch.empty(4)),
    "memory filled with data": lambda z, x: torch.empty(5, 4).copy_(x),
}
CONSTANT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda z, x: z,
    "numbers": lambda z, x: torch.tensor([1.0]),
    "cast like the batch": lambda z, x: z.double().type_as(x),
    "memory filled": lambda z, x: torch.empty(4).fill_(1.0),
    "memory filled with a constant": lambda z, x: torch.empty(5, 4).copy_(z),
    "written with a constant": lambda z, x: z.add_(1),
    "the shape of the batch": lambda z, x: torch.ones(x.shape),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case: str) -> None:
    with tape_of(nn.Linear(4, 3)) as tape:
        t = DATA[case](torch.zeros(5, 4), torch.randn(5, 4))
    assert tape.origins.of(t) is None


@pytest.mark.parametrize("case", CONSTANT)
def test_constants(case: str) -> None:
    with tape_of(nn.Linear(4, 3)) as tape:
        t = CONSTANT[case](torch.zeros(5, 4), torch.randn(5, 4))
    origin = tape.origins.of(t)
    assert origin is not None
    assert origin.sources == frozenset()


def test_what_is_made_of_parameters_has_their_names() -> None:
    model = nn.Linear(4, 3)
    with tape_of(model) as tape:
        both = model.weight.sum(1) + model.bias.exp()
        zeros = torch.zeros(3)
        zeros[:] = model.bias
    for t, names in ((both, {"weight", "bias"}), (zeros, {"bias"}), (model.weight[0], {"weight"})):
        origin = tape.origins.of(t)
        assert origin is not None
        assert origin.sources == names


def test_parameters_in_one_memory_are_all_sources() -> None:
    flat = torch.zeros(6)
    model = nn.ParameterDict({"a": nn.Parameter(flat[:2]), "b": nn.Parameter(flat[2:])})
    origin = tape_of(model).origins.of(model["a"])
    assert origin is not None
    assert origin.sources == {"a", "b"}


def test_numbers_read_of_data_alone_belong_to_a_proof() -> None:
    with tape_of(nn.Linear(4, 3)) as tape:
        bool(torch.arange(4).ge(0).all())
        assert tape.reads == []
        int(torch.full((5,), 7.0).add(torch.zeros(5)).sum())
        assert tape.reads == []
        x = torch.randn(5, 4)
        float(x.mul(0).sum())
    assert tape.reads == ["0.0"]
    assert not tape.opened
    with tape:
        x.numpy()
    assert tape.opened


def test_what_an_earlier_pass_met_is_constant_unless_it_changed() -> None:
    kept, changed, earlier = torch.ones(3), torch.ones(3), Earlier()
    passes = [Origins(nn.Linear(4, 3).parameters(), {}) for _ in range(2)]
    for origins in passes:
        origins.earlier = earlier
    assert [passes[0].look_back(t) for t in (kept, kept, changed)] == [None, None, None]
    changed.add_(1)
    assert passes[1].look_back(kept) is not None
    assert passes[1].look_back(changed) is None
