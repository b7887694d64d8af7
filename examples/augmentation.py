"""Augmentation of Tables 7 and 8: crops, flips and RandAugment of one clip, random erasing and mixing of a batch.

Whatever is drawn is drawn once a clip: each operation treats all of its frames alike. Token selection keeps what
changes between frames, and an augmentation that changed from frame to frame would be selected before any motion.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

T = TypeVar("T")

# --- One clip, in the worker that decoded it ---


@dataclass(frozen=True)
class TrainingGeometry:
    """MultiScaleCrop, flip and RandAugment: (clip uint8 (T, 3, H, W), generator) → uint8 (T, 3, size, size).

    All randomness comes from the generator: one in the same state gives the same clip, and torch's own is not touched.

    Args:
        size: side of the result.
        scales: the sides of MultiScaleCrop's crops, as parts of the frame's short side, in order (see `crop_sizes`);
            a crop lies at one of 13 places (see `crop_positions`).
        flip: mirror half of the clips, left to right. Not where direction is the label, as in Something-Something.
        randaugment: (magnitude, standard deviation) on timm's scale 0…10 (see `RandAugment`), or None.

    Raises:
        ValueError: a setting out of its range; on a call, a clip that isn't uint8 (T, 3, H, W), or no generator.
    """

    size: int
    scales: Sequence[float] = (1, 0.875, 0.75, 0.66)
    flip: bool = True
    randaugment: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size must be a positive integer, got {self.size!r}")
        valid = isinstance(self.scales, Sequence) and len(self.scales) > 0
        if not valid or not all(_is_number(scale) and 0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"scales must be parts of the short side, each in (0, 1], got {self.scales!r}")
        if self.randaugment is not None:
            if not isinstance(self.randaugment, Sequence) or len(self.randaugment) != 2:
                raise ValueError(f"randaugment must be (magnitude, standard deviation), got {self.randaugment!r}")
            RandAugment(*self.randaugment)  # its checks, before any video is read

    def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        _check_pixels(clip, 4, "a clip, uint8 (T, 3, H, W)")
        if not isinstance(generator, torch.Generator):  # None would draw from torch's own
            raise ValueError(f"expected a torch.Generator, got {generator!r}")
        height, width = clip.shape[-2:]
        crop = _one_of(crop_sizes(height, width, self.scales), generator)
        top, left = _one_of(crop_positions(height, width, crop), generator)
        size = [self.size, self.size]
        clip = functional.resized_crop(clip, top, left, *crop, size, InterpolationMode.BILINEAR, antialias=True)
        if self.flip and _below(2, generator):
            clip = functional.horizontal_flip(clip)
        if self.randaugment is not None:  # last, where there are fewest pixels
            clip = RandAugment(*self.randaugment)(clip, generator)
        return clip.contiguous()


def crop_sizes(height: int, width: int, scales: Sequence[float]) -> list[tuple[int, int]]:
    """The sizes (height, width) among which MultiScaleCrop draws (Wang et al. 2016, Temporal Segment Networks).

    Each side is the short side of the frame times one of `scales`, rounded down, the scale of the height at most one
    place in `scales` from that of the width. That bounds the aspect ratio: four scales give ten sizes.
    """
    # 0.29 · 100 is 28.999999999999996: rounding down must bear float error.
    sides = [max(1, math.floor(min(height, width) * scale + 1e-6)) for scale in scales]
    pairs = product(enumerate(sides), repeat=2)
    return [(tall, wide) for (row, tall), (column, wide) in pairs if abs(row - column) <= 1]


def crop_positions(height: int, width: int, crop: tuple[int, int]) -> list[tuple[int, int]]:
    """The 13 fixed places (top, left) of a crop (height, width): corners, centre, and those half-way between.

    In quarters of the room that the crop leaves: the 3 × 3 places at 0, 2 and 4, which are corners, the middles of the
    edges and the centre, and the 2 × 2 at 1 and 3. Drawing corners as often as the centre varies the input more than
    drawing places at random, which favours the middle of the frame (Wang et al. 2016).
    """
    rows, columns = height - crop[0], width - crop[1]
    if rows < 0 or columns < 0:
        raise ValueError(f"expected a crop within the frame {height} × {width}, got {crop[0]} × {crop[1]}")
    quarters = [*product((0, 2, 4), repeat=2), *product((1, 3), repeat=2)]
    return [(rows * row // 4, columns * column // 4) for row, column in quarters]


# --- RandAugment ---


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020) of a whole clip: (clip uint8 (T, 3, H, W), generator) → the same shape.

    Draws two of 15 operations with replacement, drops each with probability ½, draws its strength from
    N(magnitude, std²) clamped to 0…10, and its sign: what timm calls `rand-m{magnitude}-mstd{std}-inc1`, the variant
    whose operations all become stronger with the magnitude. Table 8 has (9, 0.5).

    Each operation is one function of all frames: where timm's go by the statistics of an image (autocontrast, equalise,
    contrast) these go by the whole clip's, since frames that are equalised one by one flicker.

    Raises:
        ValueError: a magnitude outside 0…10, a negative or infinite std.
    """

    magnitude: float
    std: float = 0.0

    def __post_init__(self) -> None:
        if not (_is_number(self.magnitude) and 0 <= self.magnitude <= _MAX_MAGNITUDE):
            raise ValueError(f"RandAugment's magnitude must be in 0…{_MAX_MAGNITUDE}, got {self.magnitude!r}")
        if not (_is_number(self.std) and 0 <= self.std < math.inf):
            raise ValueError(f"RandAugment's standard deviation must be at least 0 and finite, got {self.std!r}")

    def draw(self, generator: torch.Generator) -> list[tuple[str, float]]:
        """(name in OPERATIONS, level in −1…1) of the operations to apply, in order."""
        chosen = []
        for _ in range(2):
            name = _one_of(list(OPERATIONS), generator)
            applied, positive = _below(2, generator), _below(2, generator)
            noise = float(torch.randn((), generator=generator, device=generator.device))
            level = min(max(self.magnitude + self.std * noise, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
            if applied:
                chosen.append((name, level if positive else -level))
        return chosen

    def __call__(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        for name, level in self.draw(generator):
            clip = OPERATIONS[name](clip, level)
        return clip


_MAX_MAGNITUDE = 10
_FILL = [round(255 * mean) for mean in IMAGENET_MEAN]  # of what a rotation or shift uncovers: 0 once normalised
_ACROSS_FRAMES = (1, 0, 2, 3)  # (T, 3, H, W) ↔ (3, T, H, W)


def _affine(
    clip: Tensor, *, angle: float = 0.0, shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)
) -> Tensor:
    """Rotates about the centre, shears (tangents) about the upper left corner, shifts by parts of (width, height)."""
    width, height = clip.shape[-1], clip.shape[-2]
    return functional.affine(
        clip,
        angle=angle,
        translate=[round(shift[0] * width), round(shift[1] * height)],
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=_FILL,
        center=[0.0, 0.0] if any(shear) else None,
    )


def _as_one_image(operation: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """operation(the frames one below the other), so that it sees the statistics of all of them."""
    frames, channels, height, width = clip.shape
    image = clip.permute(_ACROSS_FRAMES).reshape(channels, frames * height, width)
    return operation(image).reshape(channels, frames, height, width).permute(_ACROSS_FRAMES)


def _factor(level: float) -> float:
    """Of brightness and its like: 1 changes nothing, the strongest are 0.1 and 1.9."""
    return max(0.1, 1 + 0.9 * level)


def _posterize(clip: Tensor, level: float) -> Tensor:
    return functional.posterize(clip, bits=max(1, 4 - int(4 * abs(level))))  # none would leave a black clip


def _solarize(clip: Tensor, level: float) -> Tensor:
    threshold = 256 - int(256 * abs(level))
    return functional.solarize(clip, threshold) if threshold < 256 else clip


def _solarize_add(clip: Tensor, level: float) -> Tensor:
    return torch.where(clip < 128, clip + int(110 * abs(level)), clip)  # at most 127 + 110: no overflow


# Level −1…1 is a magnitude of 10, downwards or upwards; those that know no direction take its absolute value.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "AutoContrast": lambda clip, level: _as_one_image(functional.autocontrast, clip),
    "Equalize": lambda clip, level: _as_one_image(functional.equalize, clip),
    "Invert": lambda clip, level: functional.invert(clip),
    "Rotate": lambda clip, level: _affine(clip, angle=30 * level),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda clip, level: functional.adjust_saturation(clip, _factor(level)),
    "Contrast": lambda clip, level: _as_one_image(lambda i: functional.adjust_contrast(i, _factor(level)), clip),
    "Brightness": lambda clip, level: functional.adjust_brightness(clip, _factor(level)),
    "Sharpness": lambda clip, level: functional.adjust_sharpness(clip, _factor(level)),
    "ShearX": lambda clip, level: _affine(clip, shear=(0.3 * level, 0)),
    "ShearY": lambda clip, level: _affine(clip, shear=(0, 0.3 * level)),
    "TranslateX": lambda clip, level: _affine(clip, shift=(0.45 * level, 0)),
    "TranslateY": lambda clip, level: _affine(clip, shift=(0, 0.45 * level)),
}


# --- A batch, on the device ---


class BatchAugmentation(nn.Module):
    """Normalises a batch where it lies and, in training, erases boxes and mixes clips. It has no state to be saved.

    Random erasing (Zhong et al. 2020) fills one box a clip with noise N(0, 1), both the same in all of its frames.
    Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) mix each clip with another of the batch; with both, a batch
    gets one or the other. All are off by default.

    Args:
        num_labels: needed for mixup and cutmix.
        erasing: probability of a clip to be erased in.
        mixup, cutmix: α of the Beta(α, α) that the mixing weight is drawn from; 0 is off.

    Raises:
        ValueError: a setting out of its range; mixup or cutmix without num_labels.
    """

    def __init__(
        self, num_labels: int | None = None, erasing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        super().__init__()
        if not (_is_number(erasing) and 0 <= erasing <= 1):
            raise ValueError(f"erasing must be a probability, got {erasing!r}")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if not (_is_number(alpha) and 0 <= alpha < math.inf):
                raise ValueError(f"{name} must be at least 0 and finite, got {alpha!r}")
        if (mixup or cutmix) and (num_labels is None or num_labels < 1):
            raise ValueError(f"mixup and cutmix need num_labels, a positive integer, got {num_labels!r}")
        self.erasing = erasing
        self.eraser = v2.RandomErasing(value=0)  # draws the boxes; the noise that fills them is made on the device
        self.mixers = nn.ModuleList()
        if mixup:
            self.mixers.append(v2.MixUp(alpha=mixup, num_classes=num_labels))
        if cutmix:
            self.mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_labels))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None, training: bool, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Normalised clips and their labels.

        Args:
            pixel_values: uint8 (B, T, 3, S, S); this module moves to their device.
            labels: int64 (B,), or None.
            training: erase and mix; otherwise only normalise, as `everest_tokens.video.load_clip` does.
            generator: a CPU generator that all randomness comes from. By default torch's own (of the CPU, whatever the
                device), whose state Trainer's checkpoints keep.

        Returns:
            float32 (B, T, 3, S, S), and the labels as they came or, after mixing, float32 (B, num_labels) summing to 1.

        Raises:
            ValueError: other pixels or labels than these; mixing without labels.
        """
        _check_pixels(pixel_values, 5, "clips, uint8 (B, T, 3, S, S)")
        if labels is not None and (labels.shape != pixel_values.shape[:1] or labels.dtype != torch.int64):
            found = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected labels int64 ({len(pixel_values)},), one a clip, got {found}")
        mixing = training and len(self.mixers) > 0
        if mixing and labels is None:
            raise ValueError("mixup and cutmix mix the labels too: expected labels, got None")

        if self.mean.device != pixel_values.device:
            self.to(pixel_values.device)
        # The operations of load_clip, one by one and in place, to give the very same numbers.
        clips = functional.to_dtype(pixel_values, torch.float32, scale=True).sub_(self.mean).div_(self.std)
        if mixing or (training and self.erasing):
            with _drawing_from(generator):
                if self.erasing:
                    self._erase(clips)
                if mixing:
                    assert labels is not None
                    clips, labels = self._mix(clips, labels)
        return clips, labels

    def _erase(self, clips: Tensor) -> None:
        """In place."""
        noise = torch.Generator(clips.device).manual_seed(_below(_SEEDS))
        for clip in clips:
            if float(torch.rand(())) >= self.erasing:
                continue
            box = self.eraser.make_params([clip])
            if box["v"] is None:  # none that fits was found
                continue
            top, left, height, width = (box[key] for key in "ijhw")
            pixels = torch.randn(3, height, width, generator=noise, device=clip.device)
            clip[..., top : top + height, left : left + width] = pixels

    def _mix(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mixer = _one_of(list(self.mixers))
        # torchvision mixes neighbours, which in repeated augmentation are views of one video: shuffle first.
        order = torch.randperm(len(clips))
        back = order.argsort().to(clips.device, non_blocking=True)
        order = order.to(clips.device, non_blocking=True)
        mixed, soft = mixer(tv_tensors.Video(clips[order]), labels[order])
        return mixed.as_subclass(Tensor)[back], soft[back]


# --- Randomness and checks ---

_SEEDS = 2**63 - 1  # numbers that seed a generator


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Within, torch's own CPU generator runs from a seed that `generator` gives; afterwards it is as it was.

    torchvision's classes draw from torch's own and from nowhere else. (torch.manual_seed would reseed the GPUs too.)
    """
    seed = _below(_SEEDS, generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _below(high: int, generator: torch.Generator | None = None) -> int:
    return int(torch.randint(high, (), generator=generator, device=generator and generator.device))


def _one_of(choices: Sequence[T], generator: torch.Generator | None = None) -> T:
    return choices[_below(len(choices), generator)]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_pixels(pixels: Tensor, ndim: int, expected: str) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != ndim or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(f"expected {expected}, got {pixels.dtype} {tuple(pixels.shape)}")
