"""drawing.py: what a model and what other strategies keep of a clip."""

from __future__ import annotations

import pytest
import torch
from tiny_videomae import build_clips, build_model
from transformers import VideoMAEForPreTraining

import everest_tokens as et
from everest_tokens.drawing import kept, kept_by, strategies, unit_of
from everest_tokens.visualization import kept_map


@pytest.fixture
def model():
    return et.patch_videomae(build_model(VideoMAEForPreTraining, image_size=64))  # 4 × 4 × 4 tokens


@pytest.fixture
def clip(model):
    return build_clips(model, 1)


def test_strategies_at_one_ratio_and_the_nearest_running_cells(model, clip):
    own = model.everest.selector
    found = strategies(model, clip)
    assert [*found] == [
        "random (ST-MAE)",
        "tube (VideoMAE)",
        "running cell (VideoMAE V2)",
        "ReRo (EVEREST)",
        "ReRo, first step anchored",
        "ReRo, camera compensated",
    ]
    drawn = [kept_map(selection) for selection in found.values()]
    assert [int(each.sum()) for each in drawn] == [32] * 6  # Figure 8's 0.5
    _, tube, cells, rero, anchored, compensated = drawn
    assert (tube == tube[0]).all()  # the same places at every step
    assert (cells.view(4, 2, 2, 2, 2).sum(dim=(2, 4)) == 2).all()  # two places of every 2 × 2 cell
    assert not (cells == cells[0]).all()  # which run
    assert anchored[0].all()
    assert torch.equal(compensated, rero)  # noise: no motion explains it
    assert model.everest.selector is own
    expected = et.select_tokens(et.patch_videomae(model, et.ReRoSelector(0.5)), clip).kept[0]
    assert rero.flatten().nonzero().flatten().tolist() == expected.tolist()

    counts = [selection.kept.shape[1] for selection in strategies(model, clip, ratio=0.35).values()]
    assert counts == [22, 24, 16, 22, 22, 22]  # tube: 16 - 10 places
    assert "ReRo, first step anchored" not in strategies(model, clip, ratio=0.25)  # 16 tokens, as many as a step's


@pytest.mark.parametrize("setting", [{"anchor": "first"}, {"camera": "compensate"}])
def test_variants_are_drawn_in_their_own_rows_alone(model, setting):
    """A pan, so that each setting keeps other tokens; a quarter is as many as an anchored step has."""
    own = et.ReRoSelector(0.5, distance="l1", **setting)
    picture = torch.rand(1, 3, 16, 24).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pan = torch.stack([picture[..., :64, 4 * i : 4 * i + 64] for i in range(8)], dim=1)
    plain = kept_by(model, pan, et.ReRoSelector(0.5, distance="l1"))
    assert not torch.equal(kept_by(model, pan, own).kept, plain.kept)
    et.patch_videomae(model, own)
    assert torch.equal(strategies(model, pan)["ReRo (EVEREST)"].kept, plain.kept)
    assert strategies(model, pan, ratio=0.25)["ReRo (EVEREST)"].kept.shape[1] == 16
    assert model.everest.selector is own


def test_no_running_cells_on_an_odd_grid(caplog):
    caplog.set_level("INFO")
    model = et.patch_videomae(build_model(VideoMAEForPreTraining, image_size=48))
    assert len(strategies(model, build_clips(model, 1))) == 5
    assert "no running cells on 3×3 tokens" in caplog.text


def test_fewer_than_are_visible_can_be_drawn_and_importance_has_its_unit(model, clip):
    assert kept_by(model, clip, et.ReRoSelector(0.05)).kept.shape[1] == 3
    assert [*kept(model, clip)] == ["kept"]
    assert unit_of(et.ReRoSelector(distance="cosine")) == "−cosine"
    assert unit_of(et.ReRoSelector(distance=lambda a, b: (a - b).sum(-1))) == ""
    assert unit_of(et.TubeSelector(0.5)) == ""
