"""The examples are scripts and modules in a folder, not a package."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "pictures"), str(EXAMPLES / "space")]
