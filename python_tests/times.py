"""How many times as many kills, sequences and interrupts as in CI: `make long`."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("MAS_EXT_TIMES") or 1)
