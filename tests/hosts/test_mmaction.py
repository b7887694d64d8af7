"""What the contract doesn't say of mmaction2's VideoMAE."""

from __future__ import annotations

import copy

import pytest
from mmaction_model import MMActionViT
from timm.layers import DropPath
from torch import nn

import everest_tokens as et


def test_what_it_costs_and_stochastic_depth():
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


def test_a_feature_map_wants_all_tokens():
    with pytest.raises(TypeError, match="runs over all tokens of a clip alone"):
        et.patch_videomae(MMActionViT(feature_map=True))
