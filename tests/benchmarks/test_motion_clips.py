"""benchmarks/motion_clips.py: what is seen in the rendered clips, found without the code that rendered them.

Most tests render from `charts` instead of photographs: every pixel of a chart says where in which chart it stands, so
that a clip shows exactly where each of its pixels comes from.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import replace

import motion_clips
import pytest
import torch
from motion_clips import TEST_PHOTOS, TRAINING_PHOTOS, Task, make_clips, photographs, places, turned
from scipy.stats import binomtest, chi2_contingency, chisquare
from torch import Tensor

import everest_tokens as et

# (down, right) by label, as the eyes see it
COMPASS = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
DIRECTIONS = torch.nn.functional.normalize(torch.tensor(COMPASS, dtype=torch.float32))
SIDE, CHARTS = 160, 3
CLEAN = Task(noise=0.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def charts() -> Tensor:
    """uint8 (CHARTS, SIDE, SIDE, 3): a pixel's value is (row, column, chart)."""
    along = torch.arange(SIDE)
    rows, columns = along[:, None].expand(SIDE, SIDE), along.expand(SIDE, SIDE)
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, i)], -1) for i in range(CHARTS)]).byte()


def flat(value: int) -> Tensor:
    """Photographs on which neither background nor disc can be seen."""
    return torch.full((2, 64, 64, 3), value, dtype=torch.uint8)


def wrapped(lengths: Tensor, period: int) -> Tensor:
    """Into [−period/2, period/2)."""
    return (lengths + period / 2) % period - period / 2


def backgrounds(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Clips of charts (n, T, 3, S, S) → what the frame's corner shows (n, T, 2), and where no disc is (n, T, S, S)."""
    size = clips.shape[-1]
    y, x = torch.arange(size)[:, None], torch.arange(size)
    row, column, chart = clips.long().unbind(2)
    origin = ((row - y) % SIDE * SIDE + (column - x) % SIDE) * CHARTS + chart  # (n, T, S, S)
    common = origin.flatten(2).mode(dim=-1).values
    corner = torch.stack([common // CHARTS // SIDE, common // CHARTS % SIDE], dim=-1)
    return corner, origin == common[..., None, None]


def objects(clips: Tensor) -> Tensor:
    """bool (n, T, S, S): where a clip differs from what it shows most of the time, where the moving disc is."""
    usual = clips.mode(dim=1, keepdim=True).values  # per pixel: a disc stays on one for less than half of the frames
    return (clips != usual).any(dim=2)


def centres(masks: Tensor) -> Tensor:
    """The middle of each mask on a frame with joined edges, as a mean of angles: (…, S, S) → (…, 2)."""
    size = masks.shape[-1]
    angle = torch.arange(size) * (2 * math.pi / size)
    along = []
    for other in (-1, -2):
        weight = masks.sum(other).double()  # (…, S)
        along.append(torch.atan2((weight * angle.sin()).sum(-1), (weight * angle.cos()).sum(-1)) * size / (2 * math.pi))
    return torch.stack(along, dim=-1) % size


def discs(middles: Tensor, size: int, radius: int) -> Tensor:
    """bool (…, S, S): the pixels within `radius` of each middle (…, 2), around the frame's edges."""
    along = torch.arange(size)
    away = [wrapped(along - middles[..., i, None], size) for i in (0, 1)]
    return away[0][..., :, None] ** 2 + away[1][..., None, :] ** 2 <= radius**2 + 1e-3


def steps(middles: Tensor, size: int) -> Tensor:
    """(n, T, 2) → (n, T − 1, 2), how far to the next frame's by the shorter way."""
    return wrapped(middles.diff(dim=1), size)


@pytest.mark.parametrize("task", [CLEAN, replace(CLEAN, size=60, frames=20, radius=5, speed=2.0)])
def test_a_rendered_disc_moves_as_its_label_says(task):
    clips, labels = make_clips(task, charts(), 96, seeded(0))
    assert set(labels.tolist()) == set(range(8))
    masks = objects(clips)
    middles = centres(masks)
    # It is whole in every frame, and round, with joined edges.
    assert torch.equal(masks, discs(middles.round(), task.size, task.radius))
    moved = steps(middles, task.size)
    assert (moved - task.speed * DIRECTIONS[labels][:, None]).abs().max() < 1.01  # whole pixels
    mean = moved.mean(dim=1)
    torch.testing.assert_close(mean, (task.speed * DIRECTIONS[labels]).double(), atol=1.01 / (task.frames - 1), rtol=0)
    # Its texture moves with it: what stands in its middle is the same in every frame.
    row, column = middles.round().long().unbind(-1)
    n, t = torch.arange(len(clips))[:, None], torch.arange(task.frames)
    texture = clips[n, t, :, row % task.size, column % task.size]
    assert torch.equal(texture, texture[:, :1].expand_as(texture))


def test_a_second_disc_rests_and_both_have_textures_of_their_own():
    clips, _ = make_clips(CLEAN, charts(), 64, seeded(1))
    corner, background = backgrounds(clips)
    others = ~background & ~objects(clips)
    assert len(torch.unique(corner[:, 0], dim=0)) > 50  # each clip has a place of its own
    assert torch.equal(corner, corner[:, :1].expand_as(corner))  # and no camera moves
    # What else isn't background is one disc, the same in all frames but where the object hides it.
    whole = others.any(dim=1)
    expected = discs(centres(whole).round(), CLEAN.size, CLEAN.radius)
    seen = whole.flatten(1).sum(1) == expected.flatten(1).sum(1)
    assert seen.sum() > 40  # in the rest, a part of it is hidden all the time
    assert torch.equal(whole[seen], expected[seen])
    chart = clips[:, 0, 2].flatten(1)
    assert (
        chart.min(dim=1).values != chart.max(dim=1).values
    ).sum() > 20  # discs from other charts than the background


@pytest.mark.parametrize("task", [Task(), Task(frames=24, action=0.5, size=36, speed=2.0)])
def test_one_frame_says_nothing_of_the_label(task):
    labels = torch.randint(8, (30_000,), generator=seeded(2))
    paths = places(task, labels, seeded(3))
    assert paths.dtype == torch.int64
    assert paths.min() == 0
    assert paths.max() == task.size - 1
    for frame in (0, task.frames // 2, task.frames - 1):
        row, column = paths[:, frame].unbind(-1)
        cell = row // 6 * (task.size // 6) + column // 6
        table = torch.zeros(8, (task.size // 6) ** 2, dtype=torch.int64)
        table.index_put_((labels, cell), torch.ones_like(labels), accumulate=True)
        assert chi2_contingency(table.numpy()).pvalue > 1e-3
        counts = torch.bincount(row * task.size + column, minlength=task.size**2)
        assert chisquare(counts.numpy()).pvalue > 1e-3  # and uniform, pixel by pixel


@pytest.mark.parametrize(("frames", "action", "moving"), [(48, 1 / 3, 16), (16, 0.5, 8), (20, 0.33, 7), (16, 0.01, 1)])
def test_the_object_moves_during_its_action_only(frames, action, moving):
    task = Task(frames=frames, action=action)
    assert moving == max(round(action * frames), 1)
    paths = places(task, torch.randint(8, (4000,), generator=seeded(4)), seeded(5))
    changes = (paths.diff(dim=1) != 0).any(dim=-1)  # (n, T − 1), at a frame if it moves before the next
    start = changes.byte().argmax(dim=1)
    start = torch.where(changes.any(dim=1), start, frames - 1)  # it moves after the last frame: nobody sees it
    frame = torch.arange(frames - 1)
    # `moving` frames in a row; what it does in the last frame of the clip isn't seen.
    assert torch.equal(changes, (frame >= start[:, None]) & (frame < start[:, None] + moving))
    counts = torch.bincount(start, minlength=frames - moving + 1)
    assert len(counts) == frames - moving + 1
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("deviation", [0.0, 4.0, 24.0])
def test_noise_is_drawn_anew_for_each_pixel_and_frame(deviation):
    clips, _ = make_clips(Task(noise=deviation), flat(128), 8, seeded(7))
    error = clips.double() - 128
    if deviation == 0:
        assert not error.any()
        return
    assert error.std().item() == pytest.approx(math.hypot(deviation, math.sqrt(1 / 12)), rel=0.01)  # rounded to bytes
    assert error.mean().abs() < 0.05 * deviation
    for axis in range(5):  # a neighbour along clips, frames, channels, rows and columns knows nothing of it
        ahead, behind = (error.narrow(axis, start, error.shape[axis] - 1).flatten() for start in (0, 1))
        assert torch.corrcoef(torch.stack([ahead, behind]))[0, 1].abs() < 0.01


def test_flicker_changes_whole_frames():
    clips, _ = make_clips(replace(CLEAN, flicker=0.1), flat(100), 100, seeded(8))
    pixels = clips.flatten(2)
    assert torch.equal(pixels, pixels[..., :1].expand_as(pixels))
    brightness = pixels[..., 0].double()
    assert brightness.std().item() == pytest.approx(10, rel=0.1)
    assert brightness.mean().item() == pytest.approx(100, abs=1.5)
    pair = torch.stack([brightness[:, :-1].flatten(), brightness[:, 1:].flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.1


@pytest.mark.parametrize("speed", [0.5, 3.0])
def test_the_camera_pans_in_one_direction(speed):
    task = replace(CLEAN, camera=speed)
    clips, _ = make_clips(task, charts(), 100, seeded(9))
    corner, _ = backgrounds(clips)
    shift = wrapped(corner - corner[:, :1], SIDE)  # (n, T, 2) whole pixels
    travelled = speed * torch.arange(task.frames)
    half = math.hypot(0.5, 0.5) + 1e-3  # what rounding to whole pixels makes of both axes, at most
    assert ((shift.norm(dim=-1) - travelled).abs() <= half).all()
    last = shift[:, -1:] / shift[:, -1:].norm(dim=-1, keepdim=True)
    aside = shift[..., 0] * last[..., 1] - shift[..., 1] * last[..., 0]
    assert (aside.abs() <= 2 * half).all()
    assert ((shift * last).sum(-1) >= travelled - 2 * half).all()  # not there and back
    assert len(torch.unique((last > 0).byte(), dim=0)) == 4  # all quadrants


def test_the_camera_rests_in_a_share_of_the_clips():
    clips, labels = make_clips(replace(CLEAN, camera=3.0, resting=0.25), charts(), 400, seeded(9))
    corner, _ = backgrounds(clips)
    travelled = wrapped(corner - corner[:, :1], SIDE).norm(dim=-1)  # (n, T)
    rests = (travelled == 0).all(dim=1)
    assert (travelled[~rests, 1:] > 0).all()
    assert binomtest(int(rests.sum()), 400, 0.25).pvalue > 1e-3
    assert chi2_contingency([torch.bincount(labels[rests == one], minlength=8) for one in (0, 1)]).pvalue > 1e-3


def test_the_cameras_direction_says_nothing_of_the_label():
    task = Task(frames=2, size=6, radius=1, noise=0.0, camera=20.0)
    clips, labels = make_clips(task, charts(), 4000, seeded(10))
    corner, _ = backgrounds(clips)
    down, right = wrapped(corner[:, 1] - corner[:, 0], SIDE).unbind(-1)
    octant = (torch.atan2(down, right) / (math.pi / 4)).floor().long() % 8
    table = torch.zeros(8, 8, dtype=torch.int64).index_put_((labels, octant), torch.ones_like(labels), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > 1e-3
    assert chisquare(table.sum(dim=1).numpy()).pvalue > 1e-3  # labels are uniform


def test_the_tint_of_the_resting_disc_is_its_label():
    """On flat photographs nothing but the tint can be seen: where it is, the resting disc is."""
    task = replace(CLEAN, colours=8)
    clips, labels = make_clips(task, flat(128), 500, seeded(17))
    assert labels.shape == (500, 2)
    tinted = (clips != 128).any(dim=2)  # (n, T, S, S)
    whole = tinted.any(dim=1)
    expected = discs(centres(whole).round(), task.size, task.radius)
    seen = whole.flatten(1).sum(1) == expected.flatten(1).sum(1)
    assert seen.sum() > 450  # in the rest, the object hides a part of it all the time
    assert torch.equal(whole[seen], expected[seen])
    # At rest: a pixel is tinted in every frame in which the object, untinted, doesn't hide it, and of one colour.
    assert torch.equal(clips.mode(dim=1).values.ne(128).any(dim=1)[seen], whole[seen])
    hidden = (whole[:, None] & ~tinted).flatten(2).any(dim=2)
    assert hidden.any(dim=1).float().mean() > 0.2
    for clip, mask, (_, colour) in zip(clips, tinted, labels.tolist(), strict=True):
        (pixel,) = clip.permute(0, 2, 3, 1)[mask].unique(dim=0).tolist()
        pure = [255 * value for value in colorsys.hsv_to_rgb(colour / 8, 1, 1)]
        share = [(value - 128) / (hue - 128) for value, hue in zip(pixel, pure, strict=True) if abs(hue - 128) > 50]
        assert share == pytest.approx([motion_clips.TINT] * len(share), abs=0.5 / 50)
        assert 8 * colorsys.rgb_to_hsv(*pixel)[0] % 8 == pytest.approx(colour, abs=0.1)
    table = torch.zeros(8, 8, dtype=torch.int64).index_put_(tuple(labels.T), torch.tensor(1), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > 1e-3  # says nothing of the direction
    assert chisquare(table.sum(dim=0).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_disc_has_its_colour(turn):
    clips, labels = make_clips(replace(CLEAN, colours=6), flat(128), 60, seeded(18))
    seen, new = turned(clips, labels, turn)
    assert torch.equal(new[:, 0], turned(clips, labels[:, 0], turn)[1])
    assert torch.equal(new[:, 1], labels[:, 1])
    for clip, (_, colour) in zip(seen, new.tolist(), strict=True):
        pixels = clip.permute(0, 2, 3, 1)
        pixel = pixels[(pixels != 128).any(dim=-1)][0].tolist()
        assert 6 * colorsys.rgb_to_hsv(*pixel)[0] % 6 == pytest.approx(colour, abs=0.1)


def test_clips_without_colours_are_those_that_were_measured():
    """To the bit: the digest is of the clips before there were colours, with which the results were made."""
    clips, labels = make_clips(replace(CLEAN, camera=1.5, frames=20, action=0.5), charts(), 200, seeded(3))
    found = hashlib.sha256(clips.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    assert found[:16] == "6bbe40904d76f377"


def test_no_photograph_both_trains_and_tests():
    assert not set(TRAINING_PHOTOS) & set(TEST_PHOTOS)
    training, test = photographs(TRAINING_PHOTOS), photographs(TEST_PHOTOS)
    for photos, names in ((training, TRAINING_PHOTOS), (test, TEST_PHOTOS)):
        assert photos.dtype == torch.uint8
        assert photos.shape == (len(names), motion_clips.PHOTO_SIDE, motion_clips.PHOTO_SIDE, 3)
        for name, photo in zip(names, photos, strict=True):
            grey = name in ("brick", "grass", "gravel", "camera")
            assert (photo == photo[..., :1]).all() == grey, name
    every = torch.cat([training, test]).float()
    for i, photo in enumerate(every):
        for other in every[:i]:
            assert (photo - other).abs().mean() > 10


def test_the_same_seed_gives_the_same_clips_and_chunks_dont_show():
    task = Task(frames=4, size=24, radius=4)
    clips, labels = make_clips(task, charts(), 300, seeded(12))
    assert clips.dtype == torch.uint8
    assert clips.shape == (300, 4, 3, 24, 24)
    assert clips.is_contiguous()
    assert labels.dtype == torch.int64
    assert labels.shape == (300,)
    again = make_clips(task, charts(), 300, seeded(12))
    assert torch.equal(clips, again[0])
    assert torch.equal(labels, again[1])
    fewer = make_clips(task, charts(), motion_clips._CHUNK, seeded(12))
    assert torch.equal(clips[: motion_clips._CHUNK], fewer[0])
    other = make_clips(task, charts(), 300, seeded(13))
    assert not torch.equal(clips, other[0])
    assert not torch.equal(labels, other[1])
    assert len(torch.unique(clips.flatten(1), dim=0)) == 300  # no chunk twice


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_clip_moves_as_its_new_label_says(turn):
    clips, labels = make_clips(CLEAN, charts(), 64, seeded(14))
    assert set(labels.tolist()) == set(range(8))
    there = centres(objects(clips))
    seen, new = turned(clips, labels, turn)
    middles = centres(objects(seen))
    moved = steps(middles, CLEAN.size).mean(dim=1)
    torch.testing.assert_close(moved, (CLEAN.speed * DIRECTIONS[new]).double(), atol=0.1, rtol=0)
    # The picture is the one that the bits say: left and right, up and down, rows and columns.
    row, column = there.unbind(-1)
    if turn & 1:
        column = CLEAN.size - 1 - column
    if turn & 2:
        row = CLEAN.size - 1 - row
    if turn & 4:
        row, column = column, row
    assert wrapped(middles - torch.stack([row, column], dim=-1), CLEAN.size).abs().max() < 1e-4
    assert torch.equal(seen[:, 0].flatten(2).sort(dim=-1).values, clips[:, 0].flatten(2).sort(dim=-1).values)


def tubelets(clips: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixels of each tubelet of two frames, t-major: (n, T, 3, S, S) → (n, N, D), and the grid."""
    n, frames, _, size, _ = clips.shape
    grid = (frames // 2, size // patch, size // patch)
    split = clips.reshape(n, grid[0], 2, 3, grid[1], patch, grid[2], patch).permute(0, 1, 4, 6, 2, 3, 5, 7)
    return split.reshape(n, math.prod(grid), -1).float(), grid


def touched(masks: Tensor, patch: int) -> Tensor:
    """bool (n, N): tokens in which one of the masks of its own step or the step before has a pixel."""
    n, frames, size, _ = masks.shape
    cells = masks.reshape(n, frames // 2, 2, size // patch, patch, size // patch, patch)
    cells = cells.any(dim=2).any(dim=3).any(dim=-1)  # (n, t, h, w)
    change = cells[:, 1:] | cells[:, :-1]
    return torch.cat([change[:, :1], change], dim=1).flatten(1)  # the first step has the second's importance


@pytest.mark.parametrize(("size", "patch"), [(96, 12), (48, 8)])
def test_rero_keeps_the_tokens_along_the_path_and_no_others(size, patch):
    task = replace(CLEAN, size=size)
    clips, _ = make_clips(task, charts(), 12, seeded(15))
    middles = centres(objects(clips)).round()
    along_path = touched(discs(middles, size, task.radius), patch)
    tokens, grid = tubelets(clips, patch)
    _, background = backgrounds(clips)
    resting = touched(~background & ~objects(clips), patch) & ~along_path
    for i, path in enumerate(along_path):
        count = int(path.sum())
        assert 0 < count < path.numel()
        selector = et.ReRoSelector(count / path.numel())
        kept = selector(tokens[i : i + 1], grid)[0]
        assert torch.equal(kept, path.nonzero().flatten())
        assert not resting[i, kept].any()
    assert resting.any(dim=1).sum() > 3  # there was a resting disc to be left out


def test_rero_finds_the_object_over_real_photographs():
    task = replace(CLEAN, size=96)
    photos = photographs(TEST_PHOTOS)
    clips, labels = make_clips(task, photos, 32, seeded(16))
    # Where the disc's texture has the background's colour no pixel changes; the same draws from charts show all of it.
    drawn, same = make_clips(task, charts()[torch.arange(len(photos)) % CHARTS], 32, seeded(16))
    assert torch.equal(labels, same)
    along_path = touched(discs(centres(objects(drawn)).round(), task.size, task.radius), 12)
    tokens, grid = tubelets(clips, 12)
    importance = et.ReRoSelector().importance(tokens, grid)
    assert not importance[~along_path].any()
    kept = et.ReRoSelector(0.05)(tokens, grid)
    assert importance.gather(1, kept).gt(0).all()
    assert along_path.gather(1, kept).all()
    assert along_path.float().mean() < 0.2  # random tokens would come to this


def test_windows_without_motion_counted_frame_by_frame():
    """By looking at the object's places in every window of every start, instead of comparing the ends."""
    task = Task(frames=12, action=1 / 3, speed=3.0)
    for window in (2, 4, 7, 12):
        moved = total = 0
        for start in range(task.frames - 4 + 1):
            travelled = [min(max(frame - start, 0), 4) for frame in range(task.frames)]
            for first in range(task.frames - window + 1):
                total += 1
                moved += len(set(travelled[first : first + window])) > 1
        assert motion_clips.share_with_motion(task, window) == moved / total


def test_the_moving_discs_pixels_are_those_that_change():
    """Without noise a frame differs from the one before where the disc is or was, and nowhere else."""
    task = Task(noise=0)
    clips, labels, disc = motion_clips.make_chunk(task, charts(), 4, seeded(3))
    plain, same = make_clips(task, charts(), 4, seeded(3))
    assert torch.equal(clips, plain)
    assert torch.equal(labels, same)
    around = torch.arange(-task.radius, task.radius + 1)
    area = int((around[:, None] ** 2 + around**2 <= task.radius**2).sum())
    assert disc.shape == (4, task.frames, task.size, task.size)
    assert (disc.sum(dim=(2, 3)) == area).all()
    changed = (clips[:, 1:] != clips[:, :-1]).any(dim=2)
    assert not changed[~(disc[:, 1:] | disc[:, :-1])].any()
    assert changed.any()
