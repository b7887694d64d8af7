"""transformers' own model tests over the models that we patch, each patched at the end of its `__init__`.

`upstream_compare.py` has pytest run this file with two environment variables: `UPSTREAM_TESTS`, the `tests` folder of
transformers' source distribution, and `KEEP_RATIO`, empty for models that stay as they are. Patching inside of
`__init__` puts it where transformers builds models: on the meta device, in a dtype context, before weights are loaded.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import math
import os
import sys
import types
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import everest_tokens as et

KEEP_RATIO = float(os.environ["KEEP_RATIO"]) if os.environ.get("KEEP_RATIO") else None
VISIBLE = 0.25  # of the tokens, in pre-training: the same number in the mask as after patching
BATCH = 3
FRAMES, SIZE = 4, 16


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of transformers' tests that its source distribution leaves out: mixins for what no host of ours does."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("tests.") else None

    def exec_module(self, module: types.ModuleType) -> None:
        def __getattr__(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


tests = types.ModuleType("tests")
tests.__path__ = [os.environ["UPSTREAM_TESTS"]]
sys.modules["tests"] = tests
sys.meta_path.append(_Absent())

from tests.test_modeling_common import ModelTesterMixin  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One model class: a small configuration, and what its encoder runs.

    Attributes:
        name: of the class in transformers.
        config: makes the configuration.
        grid: (t, h, w) of its clips.
        extra: tokens that are always kept.
        mask: whether the unpatched model needs a `bool_masked_pos`.
    """

    name: str
    config: Callable[[], Any]
    grid: tuple[int, int, int]
    extra: int = 0
    mask: bool = False


def _config(kind: str, **options: Any) -> Callable[[], Any]:
    """A small configuration; every kind calls these sizes the same."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE, "patch_size": 4}
    return lambda: getattr(transformers, f"{kind}Config")(**sizes, **options)


_videomae = _config(
    "VideoMAE",
    num_frames=FRAMES,
    tubelet_size=2,
    intermediate_size=37,
    decoder_num_attention_heads=4,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=2,
    decoder_intermediate_size=37,
)
_vjepa2 = _config(
    "VJEPA2",
    crop_size=SIZE,
    frames_per_clip=FRAMES,
    tubelet_size=2,
    pred_hidden_size=32,
    pred_num_attention_heads=4,
    pred_num_hidden_layers=2,
    num_pooler_layers=1,
)
_vivit = _config("Vivit", num_frames=FRAMES, tubelet_size=[2, 4, 4], intermediate_size=37)
_timesformer = _config("Timesformer", num_frames=FRAMES, attention_type="joint_space_time", intermediate_size=37)

CASES = [
    Case("VideoMAEModel", _videomae, (2, 4, 4)),
    Case("VideoMAEForPreTraining", _videomae, (2, 4, 4), mask=True),
    Case("VideoMAEForVideoClassification", _videomae, (2, 4, 4)),
    Case("VJEPA2ForVideoClassification", _vjepa2, (2, 4, 4)),
    Case("VivitModel", _vivit, (2, 4, 4), extra=1),
    Case("VivitForVideoClassification", _vivit, (2, 4, 4), extra=1),
    Case("TimesformerModel", _timesformer, (4, 4, 4), extra=1),
    Case("TimesformerForVideoClassification", _timesformer, (4, 4, 4), extra=1),
]


class ModelTester:
    """What the mixin asks about a case."""

    is_training = True
    batch_size = BATCH
    image_size = SIZE
    patch_size = 4

    def __init__(self, case: Case) -> None:
        self.case = case
        config = case.config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        tokens = math.prod(case.grid)
        self.mask_length, self.num_masks = tokens, tokens - int(VISIBLE * tokens)
        kept = int(VISIBLE * tokens) if case.mask else int((KEEP_RATIO or 1.0) * tokens)
        self.seq_length = kept + case.extra

    def get_config(self) -> Any:
        return self.case.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        name = getattr(transformers, self.case.name).main_input_name
        inputs = {name: torch.randn(BATCH, FRAMES, 3, SIZE, SIZE)}
        if self.case.mask:
            masked = torch.arange(self.mask_length) < self.num_masks
            inputs["bool_masked_pos"] = masked.expand(BATCH, -1).contiguous()
        return self.get_config(), inputs


def _patch_when_built(model_class: Any, building: list[Any]) -> None:
    """Patch every model of the class at the end of its `__init__`, unless it is built as a part of another."""
    original = model_class.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        building.append(self)
        try:
            original(self, *args, **kwargs)
        finally:
            building.pop()
        if not building:
            # Pre-training draws its visible tokens, in eval mode too, where these tests compare two forwards.
            visible = et.ReRoSelector(VISIBLE) if hasattr(self, "decoder") else None
            et.patch_videomae(self, et.ReRoSelector(KEEP_RATIO), visible=visible)

    model_class.__init__ = __init__


def _test_case(case: Case) -> type:
    model_class = getattr(transformers, case.name)

    def setUp(self: Any) -> None:
        self.model_tester = ModelTester(case)

    members = {"all_model_classes": (model_class,), "setUp": setUp, "test_resize_embeddings": False}
    return type(f"Test{case.name}", (ModelTesterMixin, unittest.TestCase), {**members, "__module__": __name__})


if KEEP_RATIO is not None:
    building: list[Any] = []
    for case in CASES:
        _patch_when_built(getattr(transformers, case.name), building)
for case in CASES:
    globals()[f"Test{case.name}"] = _test_case(case)
