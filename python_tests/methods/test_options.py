"""Options of methods: what can't be used is refused when a method is made, or before its first step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mas_ext.methods import METHODS, create, options

NAN, INF = float("nan"), float("inf")
# Of no option's type, whatever the option.
NONSENSE: list[Any] = [b"x", {"a": 1}, {1}, object(), [b"x"], 1j, [[1.0]]]


@pytest.mark.parametrize(("name", "option"), [(n, o) for n in METHODS for o in options(n)])
def test_nonsense_is_refused_by_name(name: str, option: str) -> None:
    for value in NONSENSE:
        with pytest.raises(ValueError, match=f"{option}: got"):
            create(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ewc-dr", "at_most", 0.0),
        ("ewc-dr", "importance", "local"),
        ("ewc-dr", "labels", "drawn"),
        *(("si", "xi", value) for value in (0.0, -1.0)),
        *(("rwalk", "alpha", value) for value in (0.0, 1.1)),
        ("rwalk", "interval", 0),
        ("rwalk", "eps", 0.0),
        ("rwalk", "labels", "drawn"),
        *((name, "alpha", (0.0, 1.0)) for name in ("imm-mean", "imm-mode")),
        *(("imm-mean", "alpha", value) for value in ((-1.0, 2.0), (NAN,))),
        *(("imm-mode", "dropout", value) for value in (1.0, -0.1)),
        ("lwf", "lam", -1.0),
        ("lwf", "temperature", 0.0),
        ("lwf", "warm_up", -1),
        ("lwf", "distance", "l2"),
        ("ebll", "alpha", -0.5),
        ("ebll", "code", 0),
        ("ebll", "epochs", 0),
        ("ebll", "temperature", 0.0),
        ("lwf-mas", "distillation", -1.0),
        ("replay", "samples", 0),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, option: str, value: Any) -> None:
    told = "method" if option == "importance" else option  # of estimate_fisher
    with pytest.raises(ValueError, match=f"^{told}: got"):
        create(name, **{option: value})


@pytest.mark.parametrize("name", [n for n in METHODS if "max_samples" in options(n)])
@pytest.mark.parametrize("value", [0, -1, 2.5, "x", True, NAN, [3]])
def test_a_number_of_samples_is_a_whole_number_from_1(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="max_samples: got"):
        create(name, max_samples=value)


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in METHODS for o, d in options(n).items() if type(d) is float],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF, True, "1", None, [1.0]])
def test_a_number_is_finite(name: str, option: str, value: Any) -> None:
    if (option, value) == ("at_most", None):  # no limit
        assert getattr(create(name, at_most=None), option) is None
        return
    with pytest.raises(ValueError, match=f"{option}: got"):
        create(name, **{option: value})


@pytest.mark.parametrize("value", [10**400, np.float64("inf"), np.float32("nan")])
def test_a_number_is_one_that_a_float_holds(value: Any) -> None:
    with pytest.raises(ValueError, match="lam: got"):
        create("mas", lam=value)


def test_numbers_of_numpy_are_numbers() -> None:
    for kind in (np.float64, np.float32, np.int64):
        assert create("mas", lam=kind(3)).options()["lam"] == 3.0
    assert create("mas", max_samples=np.int64(3)).options()["max_samples"] == 3


def test_a_whole_number_is_a_number() -> None:
    assert create("mas", lam=3).options()["lam"] == 3.0
    assert create("imm-mean", alpha=[1, 2.5]).options()["alpha"] == [1, 2.5]
