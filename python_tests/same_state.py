"""Whether two nested states are the same to the bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def assert_same_tree(found: Any, expected: Any, path: str = "") -> None:
    """Fail where tensors, numbers or words differ, or the containers around them."""
    assert type(found) is type(expected), path
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_same_tree(found[key], value, f"{path}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_tree(a, b, f"{path}/{i}")
    elif dataclasses.is_dataclass(expected):
        assert_same_tree(vars(found), vars(expected), path)
    else:
        assert found == expected, path
