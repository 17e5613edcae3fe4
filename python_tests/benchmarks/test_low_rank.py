"""The benchmark of low-rank updates: all forms compute the same gradients; the page says what was measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks import low_rank

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", low_rank.FORMS)
def test_every_form_has_the_gradients(name: str) -> None:
    own = low_rank.factors(3, blocks=1)
    found, expected = low_rank.FORMS[name](*own), low_rank.exact(*own)
    assert len(found) == len(expected) == 2 * len(low_rank.BLOCK)
    assert low_rank.error(found, expected) < 1e-5
    wrong = [found[0] + 0.01 * found[0].abs().max(), *found[1:]]
    assert low_rank.error(wrong, expected) == pytest.approx(0.01, rel=0.01)


def test_page() -> None:
    found = low_rank.measure(2, 1, blocks=1, memory=False)
    assert set(found) == {*low_rank.FORMS, low_rank.NARROW_KERNEL}
    machine = {
        "cpu": "a CPU",
        "gpu": None,
        "instruction_set": "avx2",
        "torch": "2",
        "date": "today",
    }
    for form in low_rank.FORMS:
        found[form] |= {"seconds": {"median": 0.25}, "bytes": 3_000_000, "error": 2e-7}
    result = {"machine": machine, "threads": 1, "repeats": 1, "weights": 1e8, "ranks": {"2": found}}
    page = low_rank.page(result)
    assert f"| 2 | {low_rank.KERNEL} | 250 |  | 3 | 2e-07 |" in page
    assert "100 million weights" in page
    assert torch.get_num_threads() == 1
