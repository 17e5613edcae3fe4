"""Every input that is kept, among them those that once failed, through what it is for."""

from pathlib import Path

import pytest
from fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
INPUTS = [(name, path) for name in TARGETS for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize(
    ("name", "path"), INPUTS, ids=[f"{name}-{path.name}" for name, path in INPUTS]
)
def test_it_succeeds_or_raises_what_is_documented(name: str, path: Path) -> None:
    TARGETS[name](path.read_bytes())
