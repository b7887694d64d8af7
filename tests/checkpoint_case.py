"""Checkpoint files of small reference models, and what a model that was loaded of one has to compute.

The numbers that count are the reference modules' own outputs; nothing here is compared with what the library computes.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import OrderedDict
from typing import Any

import torch
from family_models import FineTuningModel, PreTrainingModel, randomize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et

# 4 × 3 × 3 tokens: as many rows as columns (these files know no others), but not as many steps.
SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "num_frames": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES: dict[str, Any] = {"num_heads": 2, "num_frames": 8, "image_size": 24}  # what a file of SMALL doesn't say itself
PIXELS: dict[str, Any] = SIZES | {"for_pretraining": True, "num_heads": (2, 3)}
MVD_ARGS = Namespace(model="vit_base_patch16_224", remove_pos_emb=False, lr=5e-4)


def fine_tuned(family: str = "videomae", **options: Any) -> FineTuningModel:
    return randomize(FineTuningModel(family, **(SMALL | options)))


def pre_trained(family: str = "videomae", **options: Any) -> PreTrainingModel:
    decoder = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}  # nothing as in the encoder
    return randomize(PreTrainingModel(family, **(SMALL | decoder | options)))


def write(path: Any, state: Any, *, key: str | None = "model", prefix: str = "", args: Any = None, zipped=True) -> Any:
    """A checkpoint file as the repositories' training scripts write it; `key` None is a bare state dict."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    weights = OrderedDict((prefix + name, value) for name, value in state.items())
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        return path
    content: Any = weights
    if key is not None:
        args = args or Namespace(model="vit_base_patch16_224", lr=5e-4, betas=[0.9, 0.999], output_dir="out")
        content = {key: weights, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 99}
        content |= {"scaler": {"scale": 65536.0}, "args": args}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def clips_for(reference: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """(B, C, T, H, W), as the reference modules take it; transformers takes `.transpose(1, 2)`."""
    patches = getattr(reference, "encoder", reference).patch_embed
    places = math.prod(n // patches.patch_size[0] for n in patches.img_size)
    frames = patches.num_patches * patches.tubelet_size // places
    shape = (batch, patches.proj.in_channels, frames, *patches.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classify(model: VideoMAEForVideoClassification, clips: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(features, logits); the features are what the classifier is given."""
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(clips.transpose(1, 2), **kwargs).logits
    hook.remove()
    return seen[0], logits


@torch.no_grad()
def expected_classes(reference: FineTuningModel, clips: Tensor) -> tuple[Tensor, Tensor]:
    return reference.forward_features(clips), reference(clips)


@torch.no_grad()
def expected_pixels(reference: PreTrainingModel, clips: Tensor, hidden: Tensor) -> Tensor:
    predicted = reference(clips, hidden)
    return predicted[0] if isinstance(predicted, tuple) else predicted


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest number expected."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_close(*pair, tolerance)
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = expected.abs().max().item()
    assert largest > 0
    assert (actual - expected).abs().max().item() <= tolerance * largest


def assert_classifies(model: Any, reference: FineTuningModel, batch: int = 2) -> None:
    clips = clips_for(reference, batch)
    assert_close(classify(model, clips), expected_classes(reference, clips))


def assert_predicts(model: Any, reference: PreTrainingModel) -> None:
    """The reference's pixels, under a mask that differs in every clip."""
    rank = torch.rand(2, 36, generator=torch.Generator().manual_seed(3)).argsort(1).argsort(1)
    clips, hidden = clips_for(reference), rank < 30
    with torch.no_grad():
        actual = model(clips.transpose(1, 2), bool_masked_pos=hidden).logits
        tokens = model.videomae(clips.transpose(1, 2), bool_masked_pos=hidden).last_hidden_state
        assert_close(tokens, reference.encoder(clips, hidden))
    assert_close(actual, expected_pixels(reference, clips, hidden))


def through_a_folder(model: Any, folder: Any) -> Any:
    """Saved, and loaded by transformers alone."""
    cls = VideoMAEForPreTraining if isinstance(model, VideoMAEForPreTraining) else VideoMAEForVideoClassification
    model.save_pretrained(folder)
    loaded, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    return loaded.eval()


def repatched(model: Any, folder: Any) -> Any:
    return et.patch_videomae(through_a_folder(model, folder), et.ReRoSelector(1.0))


def assert_replays(model: Any, reference: PreTrainingModel, clips: Tensor) -> None:
    """A model patched with VideoMAE's own masking predicts the reference's pixels."""
    et.patch_videomae(model, et.RandomSelector(1.0), visible=et.TubeSelector(0.25))
    pixels = clips.transpose(1, 2)
    selection = et.select_tokens(model, pixels)
    hidden = torch.ones(selection.visible.shape[0], 36, dtype=torch.bool).scatter(1, selection.visible, False)
    assert hidden.sum(1).tolist() == [24] * len(hidden)  # a quarter of 9 places is seen: ⌈2.25⌉ in each of 4 steps
    with torch.no_grad():
        actual = model(pixels, token_selection=selection).logits
    assert_close(actual, expected_pixels(reference, clips, hidden))


class Call:
    """Unpickles into a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call
