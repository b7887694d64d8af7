"""examples/pictures/reconstruction.py: it trains, saves, and draws from the folder it saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from everest_tokens.demo import sample_video

SCRIPT = Path(__file__).parents[2] / "examples" / "pictures" / "reconstruction.py"


def test_a_reconstruction_is_drawn(tmp_path):
    out = tmp_path / "reconstruction.png"
    command = [sys.executable, str(SCRIPT), str(sample_video()), "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"drawn in {out}" in done.stdout
    with Image.open(out) as picture:
        assert picture.width == 1200
    assert list(tmp_path.iterdir()) == [out]  # the folder of weights is gone
