#!/usr/bin/env bash
# Builds the source distribution and, out of it, the wheel, and installs each into an environment of its own and tries it:
# no extras, no clone on the path.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m venv "$work/build"
"$work/build/bin/pip" install --quiet build
"$work/build/bin/python" -m build --outdir "$work/dist" .
cat > "$work/check.py" <<'CHECK'
import importlib.metadata
from pathlib import Path

import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import everest_tokens as et

assert "site-packages" in Path(et.__file__).parts, et.__file__
assert et.__version__ == importlib.metadata.version("everest-tokens"), et.__version__
assert Path(et.__file__).with_name("py.typed").exists(), "type checkers need py.typed"
for name in et.__all__:  # every public name loads
    assert getattr(et, name) is not None, name
config = VideoMAEConfig(image_size=32, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
model = et.patch_videomae(VideoMAEForVideoClassification(config).eval(), et.ReRoSelector(0.5))
clips = torch.randn(2, 4, 3, 32, 32)
selection = et.select_tokens(model, clips)
assert selection.visible.shape == (2, 4), selection.visible.shape
assert torch.isfinite(model(clips).logits).all()
print(f"everest_tokens {et.__version__} installs alone and runs")
CHECK
for distribution in "$work"/dist/*; do
    echo "== ${distribution##*/}"
    rm -rf "$work/alone"
    python -m venv "$work/alone"
    "$work/alone/bin/pip" install --quiet "$distribution"
    (cd "$work/alone" && bin/python "$work/check.py" && bin/everest-tokens --help > /dev/null)
done
