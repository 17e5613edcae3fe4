"""What is said about unknown names, and about numbers that can't be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mas_ext._arguments import check_count, check_factor, check_positive, check_share, hint

NAN, INF = float("nan"), float("inf")


def test_the_nearest_name_or_all_of_them() -> None:
    assert hint("resnet19", ["mlp", "resnet18", "cnn"]) == "did you mean 'resnet18'?"
    assert hint("vgg", iter(["mlp", "cnn"])) == "choose from mlp, cnn"
    assert hint("vgg", ["", "mlp"]) == "choose from mlp"
    assert hint("", ["", "mlp"]) == "choose from mlp"
    assert hint("vgg", []) == "and there is none to choose from"


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_share, [0, 0.5, 1], [-0.1, 1.1, NAN, "x", None]),
        (check_factor, [0, 2.5, 1e300], [-1, NAN, INF, "x", None, 10**400]),
        (check_positive, [1e-300, 3], [0, -1, NAN, INF, "x", None]),
        (check_count, [1, 7, np.int64(3)], [0, -1, 2.0, True, "3", None, 2**63]),
    ],
)
def test_numbers(check: Callable[[Any, str], Any], good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check(value, "size") in (None, float(value))
    for value in bad:
        with pytest.raises(ValueError, match="size: got"):
            check(value, "size")


def test_a_count_from_another_number_up() -> None:
    check_count(4, "window", least=4)
    with pytest.raises(ValueError, match="window: got 3, expected a whole number from 4 up"):
        check_count(3, "window", least=4)
