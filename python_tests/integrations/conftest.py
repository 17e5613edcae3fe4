"""Tests against the real libraries, in an environment of their own: `make test-integrations`."""

from __future__ import annotations

import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import avalanche.training  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other people's warnings are theirs."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.filterwarnings("error:::mas_ext"))
