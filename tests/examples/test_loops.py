"""The other repositories' pre-training loops, run as their users run them: beside a `modeling_pretrain`."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from made_videos import write_video

from everest_tokens.video import IMAGENET_STD

LOOPS = Path(__file__).parents[2] / "examples" / "loops"
FAMILY = {"videomae": "videomae", "videomae_v2": "videomaev2", "everest": "everest"}
# What stands for the clone: a model of its structure, registered with timm as the repositories register theirs.
CLONE = """
from family_models import PreTrainingModel
from timm.models import register_model

@register_model
def pretrain_{family}_tiny(pretrained=False, **kwargs):
    return PreTrainingModel("{family}", img_size=32, num_frames=16, **{options})
"""


def test_every_loop_has_a_script_of_at_most_60_lines():
    scripts = {path.stem: len(path.read_text().splitlines()) for path in LOOPS.glob("*.py")}
    assert scripts.keys() == FAMILY.keys()
    assert max(scripts.values()) <= 60


@pytest.mark.filterwarnings("ignore:Overwriting")
@pytest.mark.parametrize("loop", FAMILY)
def test_learns(loop, tmp_path, monkeypatch, capsys):
    family = FAMILY[loop]
    options = {"mcm": True} if family == "everest" else {}
    (tmp_path / "modeling_pretrain.py").write_text(CLONE.format(family=family, options=options))
    videos = [str(write_video(tmp_path / f"{number}.mp4", length=64)) for number in range(2)]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modeling_pretrain", raising=False)
    name = f"pretrain_{family}_tiny"
    monkeypatch.setattr(sys, "argv", [str(LOOPS / f"{loop}.py"), *videos, "--model", name, "--epochs", "60"])
    script = runpy.run_path(str(LOOPS / f"{loop}.py"), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 60
    assert losses[-1] < 0.97 * losses[0]
    assert timm.is_model(name)

    videos = torch.randn(1, 3, 4, 32, 48)  # the last of 2·2·3 tubelets, by hand
    last = videos[0, :, 2:, 16:, 32:] * torch.tensor(IMAGENET_STD).view(3, 1, 1, 1)
    last = (last - last.mean((1, 2, 3), keepdim=True)) / last.std((1, 2, 3), keepdim=True)
    patches = script["normalised_patches"](videos)
    assert patches.shape == (1, 12, 1536)
    assert torch.allclose(patches[0, -1], last.permute(1, 2, 3, 0).flatten(), atol=1e-4)
