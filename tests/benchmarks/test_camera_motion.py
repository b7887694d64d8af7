"""benchmarks/camera_motion.py: known paths are what they say, and the rows hold what was found."""

from __future__ import annotations

import json
import math

import camera_motion
import cases
import pytest
import targets
import torch
from camera_motion import Way, corners_off, kept, motion_of, moved_by, seen_through

from everest_tokens.camera import as_seen_later


def scene(rows: int, columns: int, frames: int = 1) -> torch.Tensor:
    """(frames, 3, rows, columns): a smooth picture, the same in all frames."""
    small = torch.rand(1, 3, rows // 8, columns // 8, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(small, (rows, columns), mode="bicubic")
    return picture.expand(frames, -1, -1, -1)


def test_a_pan_by_whole_pixels_cuts_frames_out_of_what_is_filmed():
    filmed = scene(64, 96, frames=5)
    seen = seen_through(Way(pan=(3, -2)).windows(5), filmed, 32)
    for frame in range(5):  # the third is the middle one
        top, left = 16 - 2 * (frame - 2), 32 + 3 * (frame - 2)
        expected = filmed[frame, :, top : top + 32, left : left + 32]
        torch.testing.assert_close(seen[frame], expected, atol=1e-4, rtol=0)


def test_a_window_that_leaves_what_is_filmed_is_refused():
    with pytest.raises(ValueError, match=r"a window of 32 pixels leaves frames of \(64, 96\)"):
        seen_through(Way(pan=(0, 9)).windows(5), scene(64, 96, 5), 32)
    with pytest.raises(ValueError, match="leaves frames"):
        seen_through(Way(zoom=1.5).windows(5), scene(64, 96, 5), 32)


def test_motions_worked_by_hand():
    """Two frames earlier: 6 of 224 / 2 pixels to the left; a window 1.02² as large; one turned by 4° less."""
    pan, zoom, turn = (motion_of(way.windows(5), 2, 224) for way in (Way(pan=(3, 0)), Way(zoom=1.02), Way(turn=2)))
    assert pan.shape == (3, 2, 3)
    cos, sin = math.cos(math.radians(4)), math.sin(math.radians(4))
    expected = [[1, 0, 6 / 112], [0, 1, 0]], [[1.0404, 0, 0], [0, 1.0404, 0]], [[cos, -sin, 0], [sin, cos, 0]]
    for found, its in zip((pan, zoom, turn), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(its).expand(3, -1, -1), atol=1e-5, rtol=0)
    rest = torch.eye(2, 3).expand(3, -1, -1)
    torch.testing.assert_close(corners_off(pan, rest, 224), torch.full((3,), 6.0))
    torch.testing.assert_close(corners_off(zoom, rest, 224), torch.full((3,), 0.0404 * 112 * math.sqrt(2)))


def test_a_shake_has_its_deviation_in_both_directions():
    shaken = Way(shake=1.5).windows(4000)[:, :2, 2]
    assert shaken.std(dim=0).tolist() == pytest.approx([1.5, 1.5], rel=0.05)


def test_the_known_motion_undone_leaves_a_static_scene_unchanged():
    way = Way(pan=(2, 0), turn=1)
    clip, motion = seen_through(way.windows(6), scene(96, 128, 6), 64), motion_of(way.windows(6), 2, 64)
    moved = moved_by(motion, clip, 2)
    assert (moved - clip).abs().max() < 0.02  # bilinear, of a picture in 0 … 1
    assert (clip[2:] - clip[:-2]).abs().mean() > 0.03
    assert torch.equal(moved[2:, :, :, -2:], clip[2:, :, :, -2:])  # outside the earlier frame
    assert (moved - as_seen_later(clip[None], 2)[0]).abs().mean() < 0.005


def test_kept_are_the_places_that_differ_from_what_they_are_compared_with():
    clip = torch.zeros(4, 3, 32, 48)  # 2 × 2 × 3 tokens
    before = clip.clone()
    before[2, :, 16:, 32:] = 1  # the last token
    before[3, :, :16, 16:32] = 0.5  # the second of the later step
    assert kept(clip, before, 0.34).tolist() == [1, 5, 7, 11]
    clip[2, :, :16, :16] = 9
    assert kept(clip, None, 0.17).tolist() == [0, 6]


def test_a_run_over_real_and_made_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(camera_motion, "RESTING", (("bigbuckbunny.mp4", 0),))
    ways = {"at rest": Way(), "pan": Way(pan=(3, 0))}
    monkeypatch.setattr(camera_motion, "WAYS", ways)
    monkeypatch.setattr(camera_motion, "CAMERA_SPEEDS", (0.0, 3.0))
    out = tmp_path / "out.json"
    camera_motion.main(["--parts", "real", "made", "--clips", "3", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["command"].startswith("python benchmarks/camera_motion.py --parts real made")
    real, made = document["runs"][:4], document["runs"][4:]
    assert [(row["way"], row["keep_ratio"]) for row in real] == [(way, ratio) for way in ways for ratio in (0.15, 0.3)]
    for row in real[:2]:  # at rest nothing is to be done
        assert row["ignore"] == row["compensate"] == row["exact"] == row["found_at_rest"] == 1
        assert row["most_pixels_off"] == 0
    for row in real[2:]:
        assert row["ignore"] + 0.2 < row["compensate"] <= 1
        assert row["exact"] > 0.95
        assert row["pixels_off"] <= row["most_pixels_off"] < 1
        assert row["found_at_rest"] == 0
    assert [(row["camera"], row["keep_ratio"]) for row in made] == [(0, 0.15), (0, 0.3), (3, 0.15), (3, 0.3)]
    # A disc's area over 64 tokens' is what its share of the tokens is about.
    assert made[0]["disc_tokens"] == pytest.approx(math.pi * 21**2 / 128**2, rel=0.25)
    assert made[0]["ignore"] == made[0]["compensate"]
    assert made[3]["ignore"] + 0.2 < made[3]["compensate"]


def test_a_clip_whose_camera_moves_is_no_source():
    with pytest.raises(ValueError, match=r"camera of bigbuckbunny\.mp4 from frame 16 on isn't found at rest"):
        camera_motion.resting_clip("bigbuckbunny.mp4", 16)


def test_the_cost_is_the_difference_of_two_embeddings_as_a_share_of_the_step(monkeypatch):
    monkeypatch.setitem(cases.SIZES, "T", (32, 2, 2, 24, 2))
    seconds = {"ignore": [1.0, 2.0, 4.0], "compensate": [1.5, 4.0, 5.0], "step": [5.0, 10.0, 10.0]}
    settings = []

    def paired(runs, repeats, **more):
        for name, run in runs.items():
            run()
            settings.append((name, shared[0].everest.selector.camera))
        return seconds

    shared, embed = [], camera_motion.embedding_of
    monkeypatch.setattr(camera_motion, "paired_seconds", paired)
    monkeypatch.setattr(camera_motion, "embedding_of", lambda *given: shared.append(given[0]) or embed(*given))
    case = cases.Case("T", "fine-tuning", 8, 64, 0.6, 2, "float32", "eager")
    row = camera_motion.cost(case, 3, torch.device("cpu"))
    assert settings == [("ignore", "ignore"), ("compensate", "compensate"), ("step", "ignore")]
    assert (row["added_seconds"], row["share"], row["step_seconds"]) == (1.0, 0.1, 10.0)  # of 0.5, 2, 1; 0.1, 0.2, 0.1
    assert row["compensate_operators"] > row["ignore_operators"] > 5
    assert row["compensate_kernels"] is None  # of a GPU


def test_what_compensating_may_cost():
    row = {"share": 0.021, "added_seconds": 0.0014, "batch_size": 32, "dtype": "bfloat16"}
    assert str(targets.camera_target(row, gpu=False)) == "share of the step ≤ 2.00 %: MISSED"
    assert str(targets.camera_target(row, gpu=True)) == "added ≤ 1.50 ms: met"
    assert targets.camera_target(row | {"batch_size": 2}, gpu=True) is None
