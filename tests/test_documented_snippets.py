"""Every Python snippet of README and docs/ runs, each page from top to bottom, with small models for the published.

Folders of the hub ids' names hold them, so that nothing is downloaded: of the published geometry, so that numbers of
tokens are right, but narrow and shallow.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import transformers
from checkpoint_case import MVD_ARGS, fine_tuned, write
from family_models import FineTuningModel
from made_videos import write_video
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from torch import Tensor

import everest_tokens as et

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "```python" in page.read_text()]
NARROW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
DECODER = {name: value for name, value in NARROW.items() if name != "num_hidden_layers"}
OF_THE_FAMILY = {"img_size": 224, "patch_size": 16, "num_frames": 16, "depth": 1}


def vit_base_patch16_224(num_classes: int) -> FineTuningModel:
    return FineTuningModel("videomae", **OF_THE_FAMILY, embed_dim=32, num_heads=2, num_classes=num_classes)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the snippets load by a hub id or a file's name."""
    folder = tmp_path_factory.mktemp("published")
    config = transformers.VideoMAEConfig(**NARROW, **{f"decoder_{name}": value for name, value in DECODER.items()})
    transformers.VideoMAEForPreTraining(config).save_pretrained(folder / "MCG-NJU" / "videomae-base")
    classifier = et.patch_videomae(transformers.VideoMAEForVideoClassification(config))
    classifier.save_pretrained(folder / "fine-tuned")
    transformers.VideoMAEImageProcessor().save_pretrained(folder / "fine-tuned")
    if hasattr(transformers, "VJEPA2Config"):
        vjepa2 = transformers.VJEPA2Config(
            **{name: value for name, value in NARROW.items() if name != "intermediate_size"},
            crop_size=256, frames_per_clip=16, num_pooler_layers=1,
        )  # fmt: skip
        path = folder / "facebook" / "vjepa2-vitl-fpc16-256-ssv2"
        transformers.VJEPA2ForVideoClassification(vjepa2).save_pretrained(path)
    of_mvd = fine_tuned("mvd", **OF_THE_FAMILY, embed_dim=384, num_heads=6)  # a width whose heads are known
    write(folder / "mvd_b_from_b_ckpt_399.pth", of_mvd, args=MVD_ARGS)
    write(folder / "fine_tuned.pth", vit_base_patch16_224(101))
    video = folder / "videos" / "test" / "shot1" / "00.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, length=64)
    return folder


@pytest.fixture
def namespace(published: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a snippet may take from its reader: clips, labels, and a patched model."""
    monkeypatch.chdir(published)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(timm, "create_model", partial(_created, timm.create_model))
    repository: Any = ModuleType("modeling_finetune")
    repository.vit_base_patch16_224 = vit_base_patch16_224
    monkeypatch.setitem(sys.modules, "modeling_finetune", repository)
    model = transformers.VideoMAEForVideoClassification.from_pretrained("fine-tuned")
    return {
        "model": et.patch_videomae(model),
        "pixel_values": _clips(16, 224),
        "videos": _clips(16, 224).transpose(1, 2),
        "clips_of_256": _clips(16, 256),
        "clips_of_24_frames": _clips(24, 224),
        "labels": torch.tensor([1, 4]),
        "frames": torch.rand(16, 3, 224, 224),
        "clips": [{"pixel_values": _clips(16, 224)[0], "labels": 1}],
        "seed": 0,
        "step": 7,
    }


def _clips(frames: int, side: int) -> Tensor:
    return torch.randn(2, frames, 3, side, side)


def _created(create_model: Any, name: str, pretrained: bool = False, **options: Any) -> Any:
    return create_model(name, embed_dim=32, depth=1, num_heads=2, **options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_runs(page, namespace):
    if "VJEPA2" in page.read_text() and not hasattr(transformers, "VJEPA2Config"):
        pytest.skip("V-JEPA 2 is of transformers 4.53 and later")
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    document.namespace.update(namespace)
    examples = list(document.examples())
    assert len(examples) == page.read_text().count("```python")
    for example in examples:
        example.evaluate()
