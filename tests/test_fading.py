"""fading.py: kept tokens stand out from dropped ones by luminance, measured here in the drawn pixels themselves."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from everest_tokens.demo import sample_video
from everest_tokens.fading import VERMILION, Fade, choose_fade, contrast, luminance, overlay
from everest_tokens.video import load_clip
from everest_tokens.visualization import pixels_of

SIDE = 8  # of a token in pixels


def relative_luminance(image: np.ndarray) -> np.ndarray:
    """WCAG 2's, of (…, 3) in [0, 1]."""
    linear = np.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def ratio(one: float, two: float) -> float:
    return (max(one, two) + 0.05) / (min(one, two) + 0.05)


def measured(frames: torch.Tensor, kept: torch.Tensor) -> tuple[float, float, Fade]:
    """Contrast of kept to dropped tokens in the overlay, of the same pixels kept to dropped, and the fade."""
    fade = choose_fade(frames, [kept])
    light, before = (
        relative_luminance(images.permute(0, 2, 3, 1).double().numpy())
        for images in (overlay(frames, kept, fade), frames)
    )
    mask = kept.repeat_interleave(len(frames) // len(kept), 0)
    mask = mask.repeat_interleave(frames.shape[-2] // kept.shape[1], 1)
    mask = mask.repeat_interleave(frames.shape[-1] // kept.shape[2], 2).numpy()
    faded = relative_luminance(overlay(frames, kept & False, fade).permute(0, 2, 3, 1).double().numpy())
    return ratio(light[mask].mean(), light[~mask].mean()), ratio(before.mean(), faded.mean()), fade


def test_luminance_is_wcags():
    grey = torch.tensor([0x00, 0x76, 0x77, 0xFF])[:, None, None, None].expand(-1, 3, 1, 1) / 255
    black, darker, dark, white = luminance(grey).flatten().tolist()
    assert ratio(white, black) == pytest.approx(21)
    assert ratio(white, darker) == pytest.approx(4.54, abs=0.005)  # the darkest greys that WCAG lets on white, and not
    assert ratio(white, dark) == pytest.approx(4.48, abs=0.005)


def random_kept(share: float) -> torch.Tensor:
    return torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(1)) < share


@pytest.mark.parametrize(("share", "side"), [(0.1, 8), (0.3, 8), (0.6, 16)])
@pytest.mark.parametrize("grey", [0.0, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.54, 0.6, 0.8, 1.0])
def test_uniform_clips_of_any_grey_reach_3_to_1(grey, share, side):
    """Dropped tokens are exactly as light as kept ones, so that all contrast is the overlay's."""
    drawn, alike, fade = measured(torch.full((8, 3, 6 * side, 6 * side), grey), random_kept(share))
    assert drawn >= 3
    assert alike >= 3
    if not 0.4 <= grey <= 0.54:
        assert fade.end == (1.0 if grey < 0.4 else 0.0)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("start", [6, 204])
def test_real_clips_lightened_and_darkened_reach_3_to_1(power, start):
    frames = pixels_of(load_clip(sample_video(), num_frames=4, stride=2, size=96, start=start)) ** power
    kept = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    drawn, alike, fade = measured(frames, kept)
    assert drawn >= 3
    assert alike >= 3
    if power in (0.25, 0.5, 4.0):
        assert fade.end == (0.0 if power < 1 else 1.0)


def test_the_kept_tokens_decide_where_they_differ_from_the_clip():
    """A dark clip whose kept tokens are light is faded to black: to white they would not stand out."""
    kept = torch.zeros(1, 6, 6, dtype=torch.bool)
    kept[0, :2, :2] = True
    frames = torch.full((1, 3, 6 * SIDE, 6 * SIDE), 0.38)
    frames[..., : 2 * SIDE, : 2 * SIDE] = 0.9
    drawn, _, fade = measured(frames, kept)
    assert fade.end == 0
    assert drawn >= 3


def test_where_it_cannot_be_reached_the_better_direction_is_taken():
    kept = torch.zeros(1, 6, 6, dtype=torch.bool)
    kept[0, :2, :2] = True
    frames = torch.full((1, 3, 6 * SIDE, 6 * SIDE), 0.9)
    frames[..., : 2 * SIDE, : 2 * SIDE] = 0.05  # black would hide it, white the rest
    fade = choose_fade(frames, [kept])
    assert contrast(frames, [kept], fade) < 3
    assert contrast(frames, [kept], fade) >= max(contrast(frames, [kept], Fade(end, 0.0)) for end in (0.0, 1.0)) - 1e-6


def test_kept_pixels_are_left_others_are_grey_and_edges_lie_on_dropped_ones_alone():
    frames = torch.rand(2, 3, 6 * SIDE, 6 * SIDE)
    kept = torch.zeros(1, 6, 6, dtype=torch.bool)
    kept[0, 2, 3] = True
    drawn = overlay(frames, kept, Fade(0.0, 0.25))
    rows, columns = slice(2 * SIDE, 3 * SIDE), slice(3 * SIDE, 4 * SIDE)
    assert torch.equal(drawn[..., rows, columns], frames[..., rows, columns])
    edge = (drawn == VERMILION[:, None, None]).all(dim=1)
    expected = torch.zeros(6 * SIDE, 6 * SIDE, dtype=torch.bool)
    expected[2 * SIDE - 1 : 3 * SIDE + 1, 3 * SIDE - 1 : 4 * SIDE + 1] = True  # a pixel wide
    expected[rows, columns] = False
    assert torch.equal(edge, expected.expand(2, -1, -1))
    rest = drawn.permute(0, 2, 3, 1)[:, :SIDE, :SIDE]
    luma = frames.permute(0, 2, 3, 1)[:, :SIDE, :SIDE] @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert torch.allclose(rest, 0.25 * luma[..., None].expand_as(rest))


def test_a_step_keeps_all_frames_of_its_tubelet_and_nothing_or_all_can_be_kept():
    frames = torch.rand(4, 3, 2 * SIDE, 2 * SIDE)
    kept = torch.tensor([True, False])[:, None, None].expand(2, 2, 2)
    drawn = overlay(frames, kept, choose_fade(frames, [kept]))
    assert torch.equal(drawn[:2], frames[:2])
    assert not (drawn[2:] == frames[2:]).any()
    everything = kept | True
    assert torch.equal(overlay(frames, everything, choose_fade(frames, [everything])), frames)
    assert choose_fade(frames, [kept & False]).share == pytest.approx(0.3)


def test_the_edge_differs_from_black_white_and_grey_for_all_readers():
    """3:1 to black and to white, so that it shows in grey too, and coloured for readers who see no red or no green."""
    edge = relative_luminance(VERMILION.double().numpy())
    assert ratio(edge, 0) >= 3
    assert ratio(edge, 1) >= 3
    # Viénot et al. 1999, of linear RGB: what dichromats see. A hue is left.
    linear = np.where(VERMILION <= 0.04045, VERMILION / 12.92, ((VERMILION + 0.055) / 1.055) ** 2.4)
    for matrix in (
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],  # protanopes
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],  # deuteranopes
    ):
        assert colorsys.rgb_to_hsv(*np.clip(np.array(matrix) @ linear, 0, 1))[1] > 0.5
