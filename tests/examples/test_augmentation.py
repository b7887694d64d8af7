"""examples/augmentation.py against crops and colours worked out by hand, timm's image operations and torchvision."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from augmentation import OPERATIONS, BatchAugmentation, RandAugment, TrainingGeometry, crop_positions, crop_sizes
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torch.nn.functional import interpolate, one_hot
from torchvision.transforms.v2 import functional

from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

SCALES = (1, 0.875, 0.75, 0.66)
BY_STATISTICS = ("AutoContrast", "Contrast", "Equalize")  # those that look at more than one pixel's surroundings


def normalised(pixels: Tensor) -> Tensor:
    return functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)


def random_clip(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def map_of_places(frames: int, height: int, width: int) -> Tensor:
    """uint8 (frames, 3, height, width): each pixel says its row (red), its column (green) and its frame (blue)."""
    clip = torch.empty(frames, 3, height, width, dtype=torch.uint8)
    clip[:, 0] = torch.arange(height).view(-1, 1)
    clip[:, 1] = torch.arange(width)
    clip[:, 2] = torch.arange(frames).view(-1, 1, 1)
    return clip


def other_generators() -> tuple[Any, ...]:
    """Where Python's and numpy's own stand; torch's is looked after by `global_rng_untouched`."""
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def picture() -> Tensor:
    """uint8 (1, 3, 60, 80), smooth, so that half a pixel makes little difference; three channels of their own range."""
    blots = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    smooth = interpolate(blots, (60, 80), mode="bicubic").clamp(0, 1)
    return (smooth * torch.tensor([200, 150, 100]).view(3, 1, 1) + 20).round().to(torch.uint8)


# --- MultiScaleCrop ---


def test_the_crop_sizes_of_the_tsn_paper() -> None:
    # Wang et al. 2016: "the width and height of the cropped region are randomly selected from {256, 224, 192, 168}",
    # here with an aspect ratio of at most one scale.
    sides = (256, 224, 192, 168)
    expected = {(tall, wide) for i, tall in enumerate(sides) for wide in sides[max(i - 1, 0) : i + 2]}
    for frame in ((256, 340), (340, 256)):
        assert len(crop_sizes(*frame, SCALES)) == len(expected) == 10
        assert set(crop_sizes(*frame, SCALES)) == expected
    assert 0.29 * 100 < 29
    assert crop_sizes(100, 150, (0.29,)) == [(29, 29)]  # not a pixel short for float error
    assert crop_sizes(1, 4, (0.5,)) == [(1, 1)]


def test_the_thirteen_positions() -> None:
    # Room: 32 rows and 116 columns, in quarters 0 8 16 24 32 and 0 29 58 87 116.
    even = {(row, column) for row in (0, 16, 32) for column in (0, 58, 116)}
    assert set(crop_positions(256, 340, (224, 224))) == even | {(8, 29), (8, 87), (24, 29), (24, 87)}
    positions = crop_positions(105, 107, (100, 100))  # quarters of 5 and 7, rounded down: 0 1 2 3 5 and 0 1 3 5 7
    assert {row for row, _ in positions} == {0, 1, 2, 3, 5}
    assert {column for _, column in positions} == {0, 1, 3, 5, 7}
    assert crop_positions(8, 8, (8, 8)) == [(0, 0)] * 13
    with pytest.raises(ValueError, match="60 × 80, got 61 × 50"):
        crop_positions(60, 80, (61, 50))


def test_crops_lie_at_the_fixed_positions_each_as_often(generator: Any, check_frequencies: Any) -> None:
    geometry = TrainingGeometry(32, scales=(0.5,), flip=False)  # the crop is as large as the result: nothing is resized
    clip, draws = map_of_places(2, 64, 96), generator(0)
    corners = []
    for _ in range(400):
        crop = geometry(clip, draws)
        top, left = crop[0, 0, 0, 0].item(), crop[0, 1, 0, 0].item()
        assert torch.equal(crop, clip[..., top : top + 32, left : left + 32])
        corners.append([top, left])
    # Room: 32 rows and 64 columns.
    even = [(row, column) for row in (0, 16, 32) for column in (0, 32, 64)]
    expected = [*even, (8, 16), (8, 48), (24, 16), (24, 48)]
    check_frequencies(torch.tensor(corners), dict.fromkeys(expected, 1 / 13))


def test_crops_of_all_ten_sizes_fill_the_result(generator: Any, check_frequencies: Any) -> None:
    geometry, draws = TrainingGeometry(100, SCALES, flip=False), generator(0)
    clip = map_of_places(1, 200, 240)
    sides = torch.tensor([200, 175, 150, 132])  # floor(0.66 · 200) = 132
    found = []
    for _ in range(200):
        crop = geometry(clip, draws)[0].float()
        # From one pixel of the result to the next the map rises by side/100; away from the borders, which are repeated.
        tall = (crop[0, 90, 50] - crop[0, 10, 50]) / 80 * 100
        wide = (crop[1, 50, 90] - crop[1, 50, 10]) / 80 * 100
        nearest = [int((sides - side).abs().argmin()) for side in (tall, wide)]
        assert abs(tall - sides[nearest[0]]) < 3
        assert abs(wide - sides[nearest[1]]) < 3
        found.append(nearest)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
    check_frequencies(torch.tensor(found), dict.fromkeys(pairs, 0.1))


def test_resizing_averages_over_the_pixels_that_it_merges() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::4] = 200  # the two columns around each pixel of the result are both dark
    result = TrainingGeometry(16, scales=(1,), flip=False)(stripes, torch.Generator())
    assert result[..., 1:-1].float().sub(50).abs().max() < 5


# --- the whole geometry ---


def test_flips_mirror_whole_clips_half_of_them(generator: Any, check_frequencies: Any) -> None:
    clip = random_clip(4, 3, 8, 8)
    draws = generator(0)
    geometry = TrainingGeometry(8, scales=(1,))
    flipped = []
    for _ in range(200):
        result = geometry(clip, draws)
        flipped.append([int(torch.equal(result, clip.flip(-1)))])
        assert flipped[-1] == [1] or torch.equal(result, clip)
    check_frequencies(torch.tensor(flipped), {(0,): 0.5, (1,): 0.5})

    geometry = TrainingGeometry(8, scales=(1,), flip=False)
    assert all(torch.equal(geometry(clip, draws), clip) for _ in range(20))


def test_every_frame_is_cropped_and_flipped_as_the_first(generator: Any) -> None:
    geometry = TrainingGeometry(24)
    clip = random_clip(4, 3, 40, 56)
    for seed in range(20):
        whole = geometry(clip, generator(seed))
        apart = [geometry(frame[None], generator(seed)) for frame in clip]
        assert torch.equal(whole, torch.cat(apart))


def test_all_randomness_comes_from_the_generator(generator: Any, global_rng_untouched: Any) -> None:
    geometry = TrainingGeometry(24, randaugment=(9, 0.5))
    clip = random_clip(3, 3, 40, 56)
    others = other_generators()
    with global_rng_untouched():
        once = [geometry(clip, draws) for draws in [generator(7)] for _ in range(30)]
    assert other_generators() == others
    torch.manual_seed(1234)
    again = [geometry(clip, draws) for draws in [generator(7)] for _ in range(30)]
    assert all(map(torch.equal, once, again))


def test_the_result_is_uint8_contiguous_and_its_input_unchanged(generator: Any) -> None:
    geometry = pickle.loads(pickle.dumps(TrainingGeometry(24, randaugment=(9, 0.5))))  # as workers get it
    clip = random_clip(3, 3, 20, 16)  # smaller than the result
    before = clip.clone()
    for seed in range(30):
        result = geometry(clip, generator(seed))
        assert result.dtype == torch.uint8
        assert result.shape == (3, 3, 24, 24)
        assert result.is_contiguous()
    assert torch.equal(clip, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"size": 224.0}, "size must be a positive integer, got 224.0"),
        ({"size": 8, "scales": ()}, r"scales must be .* got \(\)"),
        ({"size": 8, "scales": (1, 1.2)}, r"in \(0, 1\], got \(1, 1.2\)"),
        ({"size": 8, "scales": 0.5}, r"in \(0, 1\], got 0.5"),
        ({"size": 8, "randaugment": 9}, "magnitude, standard deviation.*got 9"),
        ({"size": 8, "randaugment": (9,)}, r"magnitude, standard deviation.*got \(9,\)"),
        ({"size": 8, "randaugment": (11, 0.5)}, "magnitude must be in 0…10, got 11"),
        ({"size": 8, "randaugment": (9, -1)}, "standard deviation must be at least 0 and finite, got -1"),
        ({"size": 8, "randaugment": (9, float("inf"))}, "finite, got inf"),
        ({"size": 8, "randaugment": (float("nan"), 1)}, "magnitude must be in 0…10, got nan"),
    ],
)
def test_bad_settings_of_the_geometry_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingGeometry(**settings)


@pytest.mark.parametrize(
    "clip",
    [torch.zeros(2, 3, 8, 8), random_clip(3, 8, 8), random_clip(2, 1, 8, 8), random_clip(2, 8, 8, 3)],
    ids=["float", "one frame", "grey", "channels last"],
)
def test_clips_of_another_kind_are_refused(clip: Tensor, generator: Any) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(T, 3, H, W\), got torch\.(float32|uint8) \("):
        TrainingGeometry(8)(clip, generator(0))
    with pytest.raises(ValueError, match=r"expected a torch\.Generator, got None"):
        TrainingGeometry(8)(random_clip(2, 3, 8, 8), None)  # type: ignore[arg-type]


# --- RandAugment ---


def test_two_of_fifteen_operations_each_applied_half_of_the_time(generator: Any, check_frequencies: Any) -> None:
    augment, draws = RandAugment(9, 0), generator(0)
    drawn = [augment.draw(draws) for _ in range(600)]
    check_frequencies(torch.tensor([[len(chosen)] for chosen in drawn]), {(0,): 0.25, (1,): 0.5, (2,): 0.25})
    applied = [operation for chosen in drawn for operation in chosen]
    names = list(OPERATIONS)
    assert len(names) == 15
    check_frequencies(torch.tensor([[names.index(name)] for name, _ in applied]), {(i,): 1 / 15 for i in range(15)})
    assert {level for _, level in applied} == {0.9, -0.9}
    check_frequencies(torch.tensor([[int(level > 0)] for _, level in applied]), {(0,): 0.5, (1,): 0.5})


def test_the_magnitude_is_normally_distributed_and_clamped(generator: Any) -> None:
    draws = generator(0)
    levels = torch.tensor([abs(level) for _ in range(600) for _, level in RandAugment(5, 0.5).draw(draws)])
    assert levels.mean() == pytest.approx(0.5, abs=0.01)  # six standard errors of the mean of about 600
    assert levels.std() == pytest.approx(0.05, abs=0.01)
    wide = Counter(abs(level) for _ in range(200) for _, level in RandAugment(5, 1e6).draw(draws))
    assert set(wide) == {0.0, 1.0}


def test_randaugment_applies_what_it_draws_in_order(generator: Any) -> None:
    augment, clip = RandAugment(7, 1.5), random_clip(2, 3, 12, 16)
    lengths = set()
    for seed in range(30):
        expected = clip
        drawn = augment.draw(generator(seed))
        for name, level in drawn:
            expected = OPERATIONS[name](expected, level)
        assert torch.equal(augment(clip, generator(seed)), expected)
        lengths.add(len(drawn))
    assert lengths == {0, 1, 2}


INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
TIMM = {name: f"{name}Increasing" for name in INCREASING} | {f"Translate{axis}": f"Translate{axis}Rel" for axis in "XY"}


def test_the_operations_are_timms() -> None:
    assert {TIMM.get(name, name) for name in OPERATIONS} == set(auto_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("level", [0.9, -0.3, 0.99, 0.0])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_do_to_a_frame_what_timms_do_to_an_image(
    name: str, level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, timm_name = picture(), TIMM.get(name, name)
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value if level >= 0 else -value)
    to_arguments = auto_augment.LEVEL_TO_ARG[timm_name]
    arguments = () if to_arguments is None else to_arguments(10 * abs(level), {})
    result = auto_augment.NAME_TO_OP[timm_name](
        Image.fromarray(frame[0].permute(1, 2, 0).numpy()),
        *arguments,
        fillcolor=(124, 116, 104),
        resample=Image.Resampling.BILINEAR,
    )
    expected = torch.from_numpy(np.array(result)).permute(2, 0, 1).int()

    # torchvision turns and shifts the other way round than PIL; the sign is drawn anyway.
    mirrored = name in ("Rotate", "TranslateX", "TranslateY")
    ours = OPERATIONS[name](frame, -level if mirrored else level)[0].int()
    off = (ours - expected).abs().float()
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):  # interpolated, to whole pixels when shifted
        assert off.mean() < 2
        assert off.quantile(0.95) <= 6
        if level:
            assert (ours - frame[0]).abs().float().mean() > 10  # where an operation that did nothing would be found out
    else:
        assert off.max() <= 1


@pytest.mark.parametrize("level", [0.9, -0.5])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - set(BY_STATISTICS)))
def test_operations_treat_frames_alike(name: str, level: float) -> None:
    clip = random_clip(3, 3, 12, 16)
    apart = [OPERATIONS[name](frame[None], level) for frame in clip]
    assert torch.equal(OPERATIONS[name](clip, level), torch.cat(apart))


@pytest.mark.parametrize("name", BY_STATISTICS)
def test_operations_that_go_by_statistics_map_a_colour_alike_in_all_frames(name: str) -> None:
    dark, light = random_clip(1, 3, 24, 24) // 4 + 60, random_clip(1, 3, 24, 24, seed=1) // 2 + 90
    clip = torch.cat([dark, light])
    result = OPERATIONS[name](clip, 0.5)
    assert not torch.equal(result, clip)
    shared = 0
    for channel in range(3):
        pairs = torch.stack([clip[:, channel], result[:, channel]], -1).flatten(1, 2).tolist()
        maps = [dict(frame) for frame in pairs]
        common = maps[0].keys() & maps[1].keys()
        assert all(maps[0][value] == maps[1][value] for value in common)
        shared += len(common)
    assert shared > 50


def test_strengths_worked_out_by_hand() -> None:
    clip = torch.tensor([0, 30, 100, 127, 128, 200, 255], dtype=torch.uint8).view(1, 1, 1, 7).expand(1, 3, 1, 7)

    def of(name: str, level: float) -> list[int]:
        return OPERATIONS[name](clip, level)[0, 0, 0].tolist()

    assert of("Brightness", -0.5) == [0, 16, 55, 69, 70, 110, 140]  # · 0.55, rounded down
    assert of("Posterize", 0.5) == [0, 0, 64, 64, 128, 192, 192]  # two bits are left
    assert of("Posterize", 1) == [0, 0, 0, 0, 128, 128, 128]  # never none, where timm's leaves nothing
    assert of("Solarize", -0.5) == [0, 30, 100, 127, 127, 55, 0]  # inverted from 128 on
    assert of("SolarizeAdd", 1) == [110, 140, 210, 237, 128, 200, 255]  # dark ones are raised by 110
    assert of("Solarize", 0) == of("SolarizeAdd", 0) == clip[0, 0, 0].tolist()


# --- batches ---


def test_normalisation_gives_torchvisions_numbers() -> None:
    pixels = random_clip(2, 3, 3, 16, 16)
    pixels[0, 0, :, 0, 0] = torch.tensor([255, 0, 51], dtype=torch.uint8)
    labels = torch.tensor([3, 1])
    for training in (True, False):
        clips, same = BatchAugmentation()(pixels, labels, training)
        assert same is labels
        assert clips.dtype == torch.float32
        assert torch.equal(clips, normalised(pixels))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert clips[0, 0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_one_box_of_noise_a_clip_the_same_in_all_its_frames(generator: Any) -> None:
    pixels = random_clip(16, 3, 3, 32, 32)
    clean = normalised(pixels)
    clips, _ = BatchAugmentation(erasing=1.0)(pixels, None, True, generator=generator(0))
    boxes, noise = [], []
    for before, after in zip(clean, clips, strict=True):
        erased = (after != before).flatten(0, 1).any(dim=0)
        rows, columns = erased.any(dim=1).nonzero().flatten(), erased.any(dim=0).nonzero().flatten()
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left
        inside = after[..., top : top + height, left : left + width]
        assert (inside != before[..., top : top + height, left : left + width]).all()  # in all frames, the whole box
        assert torch.equal(inside, inside[:1].expand_as(inside))
        assert 0.01 < height * width / 32**2 < 0.36  # 2…33 % before the sides are rounded
        boxes.append((top, left, height, width))
        noise.append(inside[0].flatten())
    assert len(set(boxes)) > 12
    drawn = torch.cat(noise)
    assert drawn.mean() == pytest.approx(0, abs=0.1)
    assert drawn.std() == pytest.approx(1, abs=0.1)
    assert drawn.unique().numel() > 0.99 * drawn.numel()  # no two clips share it


def test_erasing_happens_with_its_probability(generator: Any, check_frequencies: Any) -> None:
    pixels, draws, augmentation = random_clip(100, 1, 3, 16, 16), generator(0), BatchAugmentation(erasing=0.25)
    clean = normalised(pixels)
    erased = [(augmentation(pixels, None, True, generator=draws)[0] != clean).flatten(1).any(1) for _ in range(5)]
    check_frequencies(torch.cat(erased).long()[:, None], {(0,): 0.75, (1,): 0.25})


def shares(kind: dict[str, float], pixels: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """The mixed clips and their labels, (B, num_labels), checked to be a distribution."""
    clips, soft = BatchAugmentation(num_labels=9, **kind)(pixels, labels, True, generator=draws)
    assert soft is not None
    assert soft.dtype == torch.float32
    assert soft.shape == (len(pixels), 9)
    assert (soft >= 0).all()
    assert soft.sum(dim=1).tolist() == pytest.approx([1.0] * len(pixels))
    return clips, soft


def test_mixup_mixes_labels_as_it_mixes_pixels(generator: Any) -> None:
    pixels, labels, draws = random_clip(5, 2, 3, 8, 8), torch.tensor([7, 0, 4, 2, 8]), generator(0)
    clean = normalised(pixels)
    weights = set()
    for _ in range(10):
        clips, soft = shares({"mixup": 0.8}, pixels, labels, draws)
        expected = torch.einsum("bl,lthwc->bthwc", soft[:, labels], clean)
        torch.testing.assert_close(clips, expected, rtol=0, atol=1e-5)
        assert ((soft > 0).sum(dim=1) == 2).all()  # with another clip, never with itself
        weights.add(round(float(soft[0, 7]), 4))
    assert len(weights) == 10


def test_cutmix_mixes_labels_by_the_area_of_a_box_that_all_frames_share(generator: Any) -> None:
    labels, draws = torch.tensor([7, 0, 4, 2, 8]), generator(0)
    colours = torch.tensor([10, 60, 110, 160, 210], dtype=torch.uint8)  # one a clip
    pixels = colours.view(5, 1, 1, 1, 1).expand(5, 4, 3, 20, 20)
    clean = normalised(pixels)
    boxes = 0
    for _ in range(20):
        clips, soft = shares({"cutmix": 1.0}, pixels, labels, draws)
        origin = (clips[:, None] == clean[None]).all(dim=3)  # (B, from which clip, T, S, S): all three channels agree
        assert torch.equal(origin, origin[:, :, :1].expand_as(origin))
        area = origin[:, :, 0].float().mean(dim=(-2, -1))
        assert area.sum(dim=1).tolist() == pytest.approx([1.0] * 5)  # nothing was blended
        torch.testing.assert_close(soft[:, labels], area)
        for clip, pasted in enumerate(origin[:, :, 0]):
            other = pasted.clone()
            other[clip] = False
            rows, columns = other.any(dim=0).any(dim=1), other.any(dim=0).any(dim=0)
            assert torch.equal(other.any(dim=0), rows[:, None] & columns)  # a rectangle
            boxes += int(rows.any())
    assert boxes > 50


def test_a_batch_is_mixed_by_one_of_two_ways(generator: Any) -> None:
    pixels = torch.tensor([0, 250], dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 1, 3, 16, 16)
    clean = normalised(pixels)
    draws, blended = generator(0), Counter()
    for _ in range(60):
        clips, _ = shares({"mixup": 1.0, "cutmix": 1.0}, pixels, torch.tensor([0, 1]), draws)
        blended[bool((clips[0] != clean[0]).logical_and(clips[0] != clean[1]).any())] += 1
    assert min(blended[True], blended[False]) > 15


def test_views_of_one_video_are_not_only_mixed_with_each_other(generator: Any) -> None:
    pixels, labels = random_clip(6, 1, 3, 4, 4), torch.arange(6)  # two neighbours each would be views of a video
    draws, partners = generator(0), Counter()
    for _ in range(200):
        _, soft = shares({"mixup": 1.0}, pixels, labels, draws)
        partners[int((soft[0] * (one_hot(labels, 9)[0] == 0)).argmax())] += 1
    assert set(partners) == {1, 2, 3, 4, 5}
    assert max(partners.values()) < 70  # 40 expected of each


EVERYTHING: dict[str, Any] = {"num_labels": 9, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}


def test_evaluation_only_normalises_and_draws_nothing(generator: Any, global_rng_untouched: Any) -> None:
    pixels, labels, draws = random_clip(4, 2, 3, 8, 8), torch.arange(4), generator(5)
    state = draws.get_state()
    with global_rng_untouched():
        clips, same = BatchAugmentation(**EVERYTHING)(pixels, labels, False, generator=draws)
        BatchAugmentation(**EVERYTHING)(pixels, labels, False)
        BatchAugmentation()(pixels, labels, True)
    assert torch.equal(clips, normalised(pixels))
    assert same is labels
    assert torch.equal(draws.get_state(), state)


def test_a_batchs_randomness_comes_from_the_generator(generator: Any, global_rng_untouched: Any) -> None:
    pixels, labels, augmentation = random_clip(4, 2, 3, 16, 16), torch.arange(4), BatchAugmentation(**EVERYTHING)
    others = other_generators()

    def run() -> list[Tensor]:
        draws = generator(3)
        return [part for _ in range(6) for part in augmentation(pixels, labels, True, generator=draws)]

    with global_rng_untouched():
        once = run()
    assert other_generators() == others
    torch.manual_seed(99)
    assert all(map(torch.equal, once, run()))
    assert len({part.numpy().tobytes() for part in once}) == 12
    torch.manual_seed(99)  # without a generator, torch's own decides and moves on
    first, second = (augmentation(pixels, labels, True)[0] for _ in range(2))
    torch.manual_seed(99)
    assert torch.equal(first, augmentation(pixels, labels, True)[0])
    assert not torch.equal(first, second)


def test_the_pixels_that_came_in_are_left_alone_and_nothing_is_saved() -> None:
    pixels, labels = random_clip(4, 2, 3, 16, 16), torch.arange(4)
    before = pixels.clone(), labels.clone()
    augmentation = BatchAugmentation(**EVERYTHING)
    augmentation(pixels, labels, True)
    assert torch.equal(pixels, before[0])
    assert torch.equal(labels, before[1])
    assert augmentation.state_dict() == {}
    assert copy.deepcopy(augmentation)(pixels, labels, False)[0].shape == pixels.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_gives_the_same_without_waiting_for_it(generator: Any) -> None:
    settings = {**EVERYTHING, "erasing": 0.0}  # the noise of a GPU is another than that of a CPU
    pixels, labels = random_clip(4, 2, 3, 16, 16), torch.arange(4)
    expected = BatchAugmentation(**settings)(pixels, labels, True, generator=generator(1))
    device_pixels, device_labels, erasing = pixels.cuda(), labels.cuda(), BatchAugmentation(**EVERYTHING).cuda()
    found = BatchAugmentation(**settings)(device_pixels, device_labels, True, generator=generator(1))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5)
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(8):
            erasing(device_pixels, device_labels, True, generator=generator(seed))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"erasing": 1.5}, "erasing must be a probability, got 1.5"),
        ({"erasing": float("nan")}, "erasing must be a probability, got nan"),
        ({"num_labels": 5, "mixup": -0.1}, "mixup must be at least 0 and finite, got -0.1"),
        ({"num_labels": 5, "cutmix": float("inf")}, "cutmix must be at least 0 and finite, got inf"),
        ({"mixup": 0.8}, "need num_labels, a positive integer, got None"),
        ({"num_labels": 0, "cutmix": 0.8}, "need num_labels, a positive integer, got 0"),
    ],
)
def test_bad_settings_of_a_batch_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(**settings)


CLIPS = random_clip(2, 2, 3, 8, 8)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (CLIPS.float(), None, r"uint8 \(B, T, 3, S, S\), got torch.float32 \(2, 2, 3, 8, 8\)"),
        (CLIPS[0], None, r"uint8 \(B, T, 3, S, S\), got torch.uint8 \(2, 3, 8, 8\)"),
        (CLIPS, torch.arange(3), r"labels int64 \(2,\), one a clip, got torch.int64 \(3,\)"),
        (CLIPS, torch.zeros(2), r"labels int64 \(2,\), one a clip, got torch.float32 \(2,\)"),
        (CLIPS, None, "expected labels, got None"),
    ],
)
def test_batches_of_another_kind_are_refused(pixels: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(num_labels=5, mixup=0.8)(pixels, labels, True)
