"""The camera's motion: known motions put on known pictures, and what no motion explains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import everest_tokens as et
from everest_tokens.camera import as_seen_later, camera_motion

SIDE = 96
REST = torch.eye(2, 3)


def picture(side: int = 256, seed: int = 0) -> Tensor:
    """(3, side, side): waves of random directions, 8 to 80 pixels long, standard deviation about 1."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).float()
    waves = []
    for length in (8, 11, 16, 23, 32, 45, 64, 80):
        angle, phase = (2 * math.pi * torch.rand(3, 1, 1, generator=generator) for _ in range(2))
        along = places[..., 0] * angle.sin() + places[..., 1] * angle.cos()
        waves.append((2 * math.pi * along / length + phase).cos())
    return torch.stack(waves).sum(dim=0) / 2


def filmed(motions: Tensor, side: int = SIDE, seed: int = 0) -> Tensor:
    """(1, T, 3, side, side): the picture as a camera sees it whose frames (T, 2, 3) lead to places in the picture."""
    scene = picture(seed=seed)
    grid = F.affine_grid(motions, [len(motions), 3, side, side], align_corners=False) * (side / scene.shape[-1])
    frames = F.grid_sample(scene.expand(len(motions), -1, -1, -1), grid, mode="bicubic", align_corners=False)
    return frames.unsqueeze(0)


def path(count: int = 6, pan: tuple[float, float] = (0, 0), zoom: float = 1.0, turn: float = 0.0) -> Tensor:
    """(count, 2, 3): so many pixels, such a factor, so many degrees from one frame to the next."""
    frame = torch.arange(count) - (count - 1) / 2
    scale, angle = zoom**frame, torch.deg2rad(turn * frame)
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), frame * pan[0] * 2 / SIDE], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), frame * pan[1] * 2 / SIDE], dim=1),
    ]
    return torch.stack(rows, dim=1)


def true_motion(motions: Tensor, step: int) -> Tensor:
    """(T − step, 2, 3): where each frame's places were `step` frames earlier."""
    square = torch.cat([motions, torch.tensor([[[0.0, 0, 1]]]).expand(len(motions), -1, -1)], dim=1)
    return (torch.linalg.inv(square[:-step]) @ square[step:])[:, :2]


def pixels_off(found: Tensor, true: Tensor) -> float:
    """How far apart two motions lead a frame's corners and middle, in pixels, at most."""
    places = torch.tensor([[-0.9, -0.9, 1], [0.9, -0.9, 1], [-0.9, 0.9, 1], [0.9, 0.9, 1], [0, 0, 1]]).T
    return ((found @ places - true @ places).norm(dim=-2) * SIDE / 2).max().item()


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(
    "motions",
    [
        path(pan=(1, 0)),
        path(pan=(-2, 1.25)),
        path(pan=(0.3, -0.4)),
        path(pan=(6, -4)),
        path(zoom=1.02),
        path(turn=2),
        path(zoom=0.99, turn=1, pan=(1, -1)),
    ],
    ids=["right", "left-down", "slow", "fast", "zoom", "turn", "all"],
)
def test_a_known_motion_is_found(motions, step):
    found = camera_motion(filmed(motions), step)[0]
    assert pixels_off(found, true_motion(motions, step)) < 0.2


@pytest.mark.parametrize("step", [1, 2])
def test_earlier_frames_are_shown_as_the_later_camera_sees_them(step):
    """A pan by whole pixels leaves little but rounding; what comes in from outside is the later frame's."""
    clip = filmed(path(pan=(4, 0)))
    moved = as_seen_later(clip, step)
    assert torch.equal(moved[:, :step], clip[:, :step])
    assert (moved - clip)[:, step:].abs().max() < 0.2  # of a picture of deviation 1, which differs by 1.1 unmoved
    assert (clip[:, step:] - clip[:, :-step]).abs().mean() > 0.5
    coming_in = moved[:, step:, :, :, SIDE - 4 * step + 1 :]
    assert torch.equal(coming_in, clip[:, step:, :, :, SIDE - 4 * step + 1 :])


def test_a_shake_is_followed_from_frame_to_frame():
    generator = torch.Generator().manual_seed(5)
    motions = path(8, pan=(2, 0))
    motions[:, :, 2] += 3 * torch.randn(8, 2, generator=generator) / SIDE
    assert pixels_off(camera_motion(filmed(motions), 2)[0], true_motion(motions, 2)) < 0.2


def test_what_moves_by_itself_is_what_has_changed():
    """A faint disc of another picture crosses a panning one against the camera: its tokens are the kept ones."""
    motions = path(8, pan=(2, 1))
    clip, texture = filmed(motions), 0.4 * picture(SIDE, seed=9)
    rows, columns = torch.arange(SIDE).unsqueeze(1), torch.arange(SIDE)
    touched = torch.zeros(8, SIDE, SIDE, dtype=torch.bool)
    for frame in range(8):
        centre = 20 + 7 * frame
        touched[frame] = (rows - 48) ** 2 + (columns - centre) ** 2 < 12**2
        clip[0, frame] = torch.where(touched[frame], texture, clip[0, frame])
    grid = (4, 6, 6)

    def tokens(frames: Tensor) -> Tensor:  # pixels stand for embeddings
        blocks = frames.reshape(1, 4, 2, 3, 6, 16, 6, 16).permute(0, 1, 4, 6, 2, 3, 5, 7)
        return blocks.reshape(1, 144, -1)

    # the places where the disc is, or was one step earlier, pan included
    disc = tokens((touched[:, None].expand(-1, 3, -1, -1).float()).unsqueeze(0)).amax(dim=2)[0] > 0
    disc = disc.view(4, 36)
    near = disc | torch.cat([disc[:1], disc[:-1]])
    kept = et.ReRoSelector(keep_tokens=12)
    plain = kept(tokens(clip), grid)[0]
    moved = kept(tokens(clip), grid, previous=tokens(as_seen_later(clip, 2)))[0]
    assert near.flatten()[moved].float().mean() > 0.9
    assert near.flatten()[plain].float().mean() < 0.75


@pytest.mark.parametrize(
    "clip",
    [
        torch.randn(1, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
        torch.randn(1, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).expand(-1, 4, -1, -1, -1),
        torch.zeros(1, 4, 3, SIDE, SIDE),
        torch.full((1, 4, 3, SIDE, SIDE), 7.0),
        torch.cat([filmed(path(2), seed=1), filmed(path(2), seed=2)], dim=1),
        filmed(path(4, pan=(15, 0))),  # 30 pixels in two frames, a quarter is 24
        torch.full((1, 4, 3, SIDE, SIDE), torch.inf),
        torch.full((1, 4, 3, SIDE, SIDE), torch.nan),
    ],
    ids=["noise", "static", "black", "grey", "cut", "too-far", "infinite", "nan"],
)
def test_what_no_motion_explains_is_left_as_it_is_to_the_bit(clip):
    assert torch.equal(camera_motion(clip, 2), REST.expand(1, 2, 2, 3))
    expected = torch.cat([clip[:, :2], clip[:, :-2]], dim=1)
    assert torch.equal(as_seen_later(clip, 2).nan_to_num(3.5), expected.nan_to_num(3.5))


def test_noise_on_a_resting_camera_is_no_motion():
    clip = filmed(path()) + 0.3 * torch.randn(1, 6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(camera_motion(clip, 2), REST.expand(1, 4, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast(dtype):
    clip = filmed(path(pan=(2, 1))).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        motion, moved = camera_motion(clip, 2), as_seen_later(clip, 2)
    assert (motion.dtype, moved.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(motion, camera_motion(clip.float(), 2))
    static = filmed(path()).to(torch.float64) + 1e-12
    assert torch.equal(as_seen_later(static, 2)[:, 2:], static[:, :-2])  # not through float32


def test_clips_of_a_batch_know_nothing_of_each_other():
    clips = torch.cat([filmed(path(pan=(2, 1))), filmed(path(zoom=1.02), seed=1), filmed(path(), seed=2)])
    together, alone = camera_motion(clips, 2), torch.cat([camera_motion(clip[None], 2) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(together[2], REST.expand(4, 2, 3))
    assert as_seen_later(clips[:0], 2).shape == (0, 6, 3, SIDE, SIDE)


def test_pixels_that_want_a_gradient_get_none_from_here():
    clip = filmed(path(pan=(2, 1))).requires_grad_()
    assert not as_seen_later(clip, 2).requires_grad
    assert not camera_motion(clip, 2).requires_grad


def test_frames_too_small_to_see_a_motion_are_refused():
    with pytest.raises(ValueError, match=r"at least 8 × 8 pixels.*6, 32"):
        camera_motion(torch.randn(1, 4, 3, 6, 32), 2)
    assert camera_motion(torch.randn(1, 4, 1, 8, 200), 2).shape == (1, 2, 2, 3)
