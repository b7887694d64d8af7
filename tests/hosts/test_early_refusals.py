"""What can't be run is refused before anything is computed, and a host's library isn't loaded to find out."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from host_case import HostCase
from host_contract import VJEPA2Model, build_encoder, hosts
from timm.layers import DropPath
from torch import Tensor, nn
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

    @hosts(variants=False)
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


class MMActionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MMActionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), MMActionAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MMActionPatchEmbed(nn.Module):
    """As mmcv's: no record of the clip's size, and two results."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))
        self.adap_padding, self.norm = None, None

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


class MMActionViT(nn.Module):
    """What a patch has to know of mmaction2's `VisionTransformer` (`vit_mae`), by its structure; 8 frames of 48×64."""

    def __init__(self, learnable: bool = False, mean: bool = True, feature_map: bool = False) -> None:
        super().__init__()
        self.embed_dims, self.patch_size, self.grid_size, self.return_feat_map = 32, 16, (3, 4), feature_map
        self.patch_embed = MMActionPatchEmbed(32)
        table = torch.randn(1, 48, 32)
        if learnable:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(MMActionBlock(32) for _ in range(2))
        self.norm = nn.Identity() if mean else nn.LayerNorm(32)
        self.fc_norm = nn.LayerNorm(32) if mean else None

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        x = self.patch_embed(x)[0]
        assert (height // 16, width // 16) == self.grid_size
        return self.after_embedding(x + self.pos_embed, batch)

    def after_embedding(self, x: Tensor, batch: int) -> Tensor:
        x = self.pos_drop(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.return_feat_map:
            return x.reshape(batch, -1, *self.grid_size, self.embed_dims).permute(0, 4, 1, 2, 3)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x.mean(1))


class TestMMAction:
    KINDS = pytest.mark.parametrize("kind", [{}, {"learnable": True}, {"mean": False}], ids=str)

    def clips(self) -> Tensor:
        return torch.randn(2, 3, 8, 48, 64, dtype=torch.float64)

    @KINDS
    def test_all_tokens_are_the_models_own_numbers_and_gradients(self, kind):
        plain, clips = MMActionViT(**kind).double(), self.clips()
        model = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        for each in (plain, model):
            each(clips).square().sum().backward()
        torch.testing.assert_close(model(clips), plain(clips))
        for own, patched in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(patched.grad, own.grad)

    @KINDS
    def test_a_part_of_them_is_the_models_own_over_those_rows(self, kind):
        plain, clips = MMActionViT(**kind).double(), self.clips()
        model = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))
        selection = et.select_tokens(model, clips)
        assert (selection.grid, selection.kept.shape) == ((4, 3, 4), (2, 24))
        tokens = plain.patch_embed(clips)[0] + plain.pos_embed
        chosen = torch.stack([clip[row] for clip, row in zip(tokens, selection.visible, strict=True)])
        expected = plain.after_embedding(chosen, 2)
        torch.testing.assert_close(model(clips, token_selection=selection), expected)
        assert torch.equal(et.unpatch_videomae(model)(clips), plain(clips))
        assert vars(model).keys() == vars(plain).keys()
        assert vars(model.patch_embed).keys() == vars(plain.patch_embed).keys()

    def test_what_it_costs_and_stochastic_depth(self):
        plain = MMActionViT()
        whole, model = et.count_flops(plain), et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(0.5))
        half = et.count_flops(model)
        assert half.patch_embedding == whole.patch_embedding == 48 * 32 * 2 * 16 * 16 * 3
        linear, pairs = 2 * (4 + 4) * 32 * 32, 2 * 2 * 32
        assert (whole.encoder, half.encoder) == (48 * linear + 48**2 * pairs, 24 * linear + 24**2 * pairs)
        et.patch_videomae(model, drop_path=0.2)
        assert [type(block.drop_path) for block in model.blocks] == [DropPath, DropPath]
        model = et.unpatch_videomae(model)
        assert [type(block.drop_path) for block in model.blocks] == [nn.Identity, nn.Identity]

    def test_a_feature_map_wants_all_tokens(self):
        with pytest.raises(TypeError, match="runs over all tokens of a clip alone"):
            et.patch_videomae(MMActionViT(feature_map=True))
