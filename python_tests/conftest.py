"""What holds for every test: seeds, and that none is skipped but those that need a GPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from backends import Backend

# The same examples on every run; slow machines are no failure.
settings.register_profile("mas_ext", derandomize=True, deadline=None)
settings.load_profile("mas_ext")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(
    params=["reference", "cpu", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every implementation of the kernels in turn."""
    import backends  # loads the emulated kernels, which few tests need

    return backends.choose(request.param, monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models: threads that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _refuse_skip(report: Any) -> Any:
    allowed = hasattr(report, "wasxfail") or "cuda" in getattr(report, "keywords", ())
    if report.skipped and not allowed:
        reason = report.longrepr[2]
        report.outcome = "failed"
        report.longrepr = f"{reason}\nOnly tests marked cuda may be skipped."
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _refuse_skip((yield))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"Tests marked cuda that were not run, no GPU here: {skipped}")
