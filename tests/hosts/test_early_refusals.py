"""What can't be run is refused before anything is computed, and a host's library isn't loaded to find out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from host_case import HostCase
from host_contract import hosts, kinds
from host_models import VJEPA2Model, build_encoder
from torch.utils._python_dispatch import TorchDispatchMode

import everest_tokens as et


class Products(TorchDispatchMode):
    """Counts the products and convolutions that run: no forward does without, a check needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("addmm", "mm", "bmm", "convolution")
        return func(*args, **(kwargs or {}))


def products_of(call: Any, refused: type[Exception] | None = None, match: str | None = None) -> int:
    with Products() as counted:
        if refused is None:
            call()
        else:
            with pytest.raises(refused, match=match):
                call()
    return counted.count


class TestNothingRuns:
    @hosts()
    def test_before_a_selection_is_refused(self, case: HostCase):
        model, clips, good = case.patched(), case.clips(), case.selection()
        assert products_of(lambda: case.run(model, clips, good)) > 0
        t, h, w = case.grid
        target = {} if good.target is None else {"target": good.target[:1]}
        beyond = good.visible.clone()
        beyond[:, -1] = t * h * w
        for change in (
            {"visible": good.visible[:1], **target},
            {"grid": (h, t, w + 1)},
            {"visible": good.visible.int()},
            {"visible": good.visible.double()},
            {"visible": beyond},
            {"steps": torch.arange(t).expand(2, t)},
        ):
            given = dataclasses.replace(good, **change)
            assert products_of(lambda given=given: model(clips, token_selection=given), ValueError) == 0, change

    @kinds()
    def test_before_time_steps_that_are_none_are_refused(self, case: HostCase):
        model, t = case.patched(frame_sampler=et.InfoFrameSampler(2.0)), case.grid[0]
        clips = case.clips(frames=2 * case.clip[case.time])
        good = et.select_tokens(model, clips)
        for steps in (good.steps + 2 * t, good.steps - 2 * t, good.steps.flip(1), good.steps[:, 1:]):
            given = dataclasses.replace(good, steps=steps)
            assert products_of(lambda given=given: model(clips, token_selection=given), ValueError, "steps must") == 0

    @hosts()
    def test_before_a_batch_without_clips_is_refused(self, case: HostCase):
        """Or there is an empty result: `test_no_clip` says where there must be one."""
        model, clips = case.patched(), case.clips(batch=0)
        if not model.everest.runs_without_clips:
            assert products_of(lambda: model(clips), ValueError, "at least one clip") == 0
        else:
            assert case.run(model, clips).shape[0] == 0

    @pytest.mark.skipif(VJEPA2Model is object, reason="transformers has V-JEPA 2 from 4.53 on")
    @pytest.mark.parametrize("asked", [{}, {"skip_predictor": False}], ids=["default", "asked"])
    def test_before_vjepa2s_predictor_is_refused(self, asked):
        model = et.patch_videomae(build_encoder("VJEPA2Model"))
        clips = torch.randn(1, 8, 3, 48, 48)
        assert products_of(lambda: model(clips, **asked), ValueError, "skip_predictor=True") == 0
        assert products_of(lambda: model(clips, None, None, False), ValueError, "skip_predictor=True") == 0
        assert products_of(lambda: model(clips, skip_predictor=True)) > 0


HOSTS_OF_OTHERS = """
import sys
for name in {missing}:
    sys.modules[name] = None  # as if it weren't installed
import everest_tokens as et
et.patch_videomae, et.select_tokens, et.count_flops
assert not {{"transformers", "timm"}} & {{name for name, module in sys.modules.items() if module}}
{then}
"""


def run(missing: list[str], then: str = "") -> None:
    code = HOSTS_OF_OTHERS.format(missing=missing, then=then)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class TestLibraries:
    def test_the_names_load_neither(self):
        run([])

    def test_timms_hosts_without_transformers(self):
        run(
            ["transformers"],
            """
import timm, torch
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
et.patch_videomae(model, num_frames=4)
assert et.select_tokens(model, torch.randn(1, 3, 4, 32, 32)).kept.shape == (1, 4)
try:
    et.patch_videomae(torch.nn.Linear(2, 2))
except TypeError as error:
    assert "timm" in str(error) and "transformers' V" not in str(error), error
""",
        )
