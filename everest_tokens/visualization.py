"""Pictures of what is kept: frames, the same frames with dropped tokens greyed out, importance (paper Figure 6)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from everest_tokens.selection import TokenSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER_WHITE = 0.93  # what dropped tokens fade to: lighter than most frames, so that kept ones stand out


def kept_map(selection: TokenSelection, clip: int = 0) -> Tensor:
    """Which tokens of one clip are kept: (t, h, w) bool."""
    kept = torch.zeros(math.prod(selection.grid), dtype=torch.bool)
    kept[selection.kept[clip].cpu()] = True
    return kept.view(selection.grid)


def grey_out(frames: Tensor, kept: Tensor) -> Tensor:
    """Fade the dropped tokens of each frame to a light grey.

    Args:
        frames: (t, 3, H, W) in [0, 1], one frame for each time step.
        kept: (t, h, w) bool.

    Returns:
        (t, 3, H, W) in [0, 1].
    """
    mask = _enlarged(kept, frames)[:, None]
    faded = 0.25 * frames.mean(dim=1, keepdim=True) + 0.75 * _PAPER_WHITE
    return frames * mask + faded * (1 - mask)


def _enlarged(values: Tensor, frames: Tensor) -> Tensor:
    """One value a token (t, h, w) → one a pixel of the frames (t, H, W), float32."""
    return interpolate(values[:, None].float(), frames.shape[-2:], mode="nearest-exact")[:, 0]


def draw_selections(
    frames: Tensor, selections: dict[str, TokenSelection], *, clip: int = 0, max_columns: int = 8
) -> Figure:
    """A row of frames, a row of kept tokens for each selection, and the importance heatmap of the first.

    Args:
        frames: (T, 3, H, W), uint8 or floats in [0, 1], the frames that the model saw before normalisation; T is a
            multiple of the selections' time steps, and the first frame of each step is drawn.
        selections: row label → selection of the same clip.
        clip: which clip of the selections' batch the frames are.
        max_columns: of a longer clip, evenly spaced time steps are drawn.

    Raises:
        ValueError: frames that don't fit the selections' grid.
        ImportError: matplotlib is not installed (the `demo` extra).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "everest-tokens[demo]"') from error

    first = next(iter(selections.values()))
    steps = first.grid[0]
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) % steps:
        raise ValueError(f"expected frames (multiple of {steps}, 3, H, W), got {tuple(frames.shape)}")
    pixels = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float().clamp(0, 1)
    drawn = torch.linspace(0, steps - 1, min(steps, max_columns)).round().long()
    tubelet = len(frames) // steps
    pixels = pixels[drawn * tubelet]

    rows: list[tuple[str, Tensor]] = [("frames", pixels)]
    for label, selection in selections.items():
        kept = kept_map(selection, clip)
        rows.append((f"{label}\n{int(kept.sum())} of {kept.numel()}", grey_out(pixels, kept[drawn])))
    heat = None if first.importance is None else first.importance[clip].cpu().view(first.grid)[drawn]

    columns, lines = len(drawn), len(rows) + (heat is not None)
    aspect = pixels.shape[-2] / pixels.shape[-1]
    cell = 12.0 / (columns + 1.2)  # inches; the margin on the left holds the labels, the one on the right the scale
    figure = Figure(figsize=(12.0, lines * cell * aspect + 0.35), dpi=100, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, step in zip(axes[0], drawn.tolist(), strict=True):
        axis.set_title(f"frame {step * tubelet}", fontsize=10)
    for line, (label, images) in zip(axes, rows, strict=False):
        _label(line[0], label)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
    if heat is not None:
        # A few tokens change much more than the rest: end the scale where only the top 1 % saturate.
        low, high = heat.min().item(), torch.quantile(heat.flatten(), 0.99).item()
        _label(axes[-1][0], "importance")
        for axis, image in zip(axes[-1], _enlarged(heat, pixels), strict=True):
            drawing = axis.imshow(image.numpy(), cmap="cividis", vmin=low, vmax=max(high, low + 1e-6))
        figure.colorbar(drawing, ax=list(axes[-1]), fraction=0.02, pad=0.01, extend="max")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _label(axis: Any, text: str) -> None:
    axis.set_ylabel(text, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
