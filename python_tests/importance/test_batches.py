"""Batches of every form: their input, their size, and parts of them."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mas_ext import estimate_importance
from mas_ext.importance import batches


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(UserDict[str, Any]):
    """As tokenizers return it: a dictionary whose items are attributes, too."""

    def __init__(self, data: dict[str, Any], kind: str) -> None:
        super().__init__(data)
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


X, Y = torch.arange(8.0).view(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "kept"),
    [
        ((X, Y), tuple),
        ([X, Y], list),
        (Pair(X, Y), Pair),
        ({"x": X, "y": Y}, dict),
        (OrderedDict(x=X, y=Y), dict),
        (MappingProxyType({"x": X, "y": Y}), dict),
        (UserDict({"x": X, "y": Y}), UserDict),
        (Encoding({"x": X, "y": Y}, "plain"), Encoding),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else "",
)
def test_a_part_of_any_batch(batch: Any, kept: type) -> None:
    assert batches.first(batch) is X
    assert batches.size(batch) == 4
    part = batches.between(batch, 1, 3)
    assert type(part) is kept
    values = list(part.values() if hasattr(part, "values") else part)
    assert torch.equal(values[0], X[1:3])
    assert torch.equal(values[1], Y[1:3])
    # The batch itself is as it was.
    assert batches.first(batch) is X
    assert batches.size(batch) == 4


def test_an_encoding_reaches_the_model_whole() -> None:
    model = nn.Linear(2, 3)
    seen = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch.kind, batch.x.shape[1]))
        output: Tensor = model(batch.x)
        return output

    encoded = [Encoding({"x": X[:3], "text": "three"}, "a"), Encoding({"x": X[3:]}, "b")]
    omega = estimate_importance(model, encoded, forward=forward)
    expected = estimate_importance(model, [X])
    assert set(seen) == {("a", 2), ("b", 2)}
    for name, t in expected.items():
        assert t.sum() > 0
        torch.testing.assert_close(omega[name], t)
    by_default = estimate_importance(model, encoded)
    for name, t in expected.items():
        torch.testing.assert_close(by_default[name], t)


@pytest.mark.parametrize("mapping", [UserDict, MappingProxyType, dict])
def test_a_mapping_of_other_lengths_is_refused(mapping: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) in a batch of 4 samples"):
        batches.size(mapping({"x": X, "y": Y[:3]}))
    with pytest.raises(TypeError, match="starting with str"):
        batches.size(mapping({"text": "no tensor", "x": X}))
    with pytest.raises(TypeError, match="starting with NoneType"):
        batches.size(mapping({}))
