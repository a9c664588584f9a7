"""How many inputs the fuzzing at full counts makes: ``make fuzz`` sets ``GRAFTC_FUZZ``."""

from __future__ import annotations

import os

FUZZ = int(os.environ.get("GRAFTC_FUZZ", "20000"))
"""For each reader of headers, of JSON or of rows."""

MODELS = max(1, FUZZ // 20)
"""For each reader that opens a model."""
