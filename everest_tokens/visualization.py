"""Pictures of what is kept, from frames and selections (paper Figures 6, 8 and 9); no model is known here."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from everest_tokens.camera import camera_motion
from everest_tokens.fading import Fade, choose_fade, overlay
from everest_tokens.selection import TokenSelection
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(NamedTuple):
    """One image for each of a clip's T frames: (T, 3, H, W) in [0, 1], or values (T, h, w) on a colour scale.

    Or a place (T, 2) for each, drawn as two lines over the frames: to the right, and down.
    """

    label: str
    images: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """What is drawn of one clip: rows of T images with T captions, of which a page shows those at `frames`."""

    rows: list[Row]
    frames: range
    captions: list[str]
    title: str = ""


def kept_map(selection: TokenSelection, clip: int = 0) -> Tensor:
    """Mark the kept tokens of one clip: (t, h, w) bool."""
    marked = torch.zeros(math.prod(selection.grid) + 1, dtype=torch.bool)  # N fills up rows of other lengths
    marked[selection.kept[clip].cpu()] = True
    return marked[:-1].view(selection.grid)


def kept_row(label: str, frames: Tensor, kept: Tensor, fade: Fade | None = None) -> Row:
    """Fade the dropped tokens of each frame, edge them, and count the kept ones in the label.

    Args:
        frames: (T, 3, H, W) in [0, 1], equally many for each time step.
        kept: (t, h, w) bool.
        fade: of all rows that are to look alike; by default `choose_fade`'s for this one.
    """
    drawn = overlay(frames, kept, fade or choose_fade(frames, [kept]))
    return Row(f"{label}\n{int(kept.sum())} of {kept.numel()}", drawn)


def selection_part(
    frames: Tensor, selections: dict[str, TokenSelection], *, clip: int = 0, title: str = "", unit: str = ""
) -> Part:
    """Show the frames, the kept tokens of each selection, and the importance of the first.

    Args:
        frames: (T, 3, H, W), uint8 or floats in [0, 1], the frames that the model saw before normalisation; T is a
            multiple of the selections' time steps.
        selections: row label → selection of the same clip.
        clip: which clip of the selections' batch the frames are.
        unit: of the importance, such as `unit_of` a selector.

    Raises:
        ValueError: frames that don't fit the selections' grid.
    """
    grid = next(iter(selections.values())).grid
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or len(frames) % grid[0]:
        raise ValueError(f"expected frames (multiple of {grid[0]}, 3, H, W), got {tuple(frames.shape)}")
    pixels = frames.cpu().float() / 255 if frames.dtype == torch.uint8 else frames.cpu().float().clamp(0, 1)
    rows = [Row("frames", pixels)]
    kept = {label: kept_map(selection, clip) for label, selection in selections.items()}
    fade = choose_fade(pixels, list(kept.values()))
    rows += [kept_row(label, pixels, marked, fade) for label, marked in kept.items()]
    tubelet, captions = len(pixels) // grid[0], [f"frame {i}" for i in range(len(pixels))]
    importance = next(iter(selections.values())).importance
    if importance is not None:
        rows.append(Row(f"importance\n{unit}".strip(), importance[clip].cpu().view(grid).repeat_interleave(tubelet, 0)))
    return Part(rows, range(0, len(pixels), tubelet), captions, title)


def path_row(clip: Tensor) -> Row:
    """The camera's estimated path: its translations from frame to frame added up, in pixels from where it began.

    A turn or a zoom about the middle of the frame is none, and neither is what `camera_motion` takes for rest.

    Args:
        clip: (1, T, 3, H, W).
    """
    steps = camera_motion(clip, 1)[0, :, :, 2].cpu()  # the middle's, in halves of the frame
    path = torch.nn.functional.pad(steps, (0, 0, 1, 0)).cumsum(0)
    return Row("camera's path, pixels", path * torch.tensor([clip.shape[-1] / 2, clip.shape[-2] / 2]))


def draw(parts: Sequence[Part], *, columns: int = 8, width: float = 12.0, font: float = 12.0) -> Figure:
    """Draw parts below each other: a line for each row, a column for each of at most `columns` time steps.

    Evenly spaced steps are drawn of a clip with more. Colours of values end at `heat_limits`.

    Args:
        width: of the page in inches; a README shows 12 at 100 dpi well, both columns of an ICML page are 6.75.
        font: size of the text in points.

    Raises:
        ValueError: columns is below 1. ImportError: matplotlib is not installed (the `demo` extra).
    """
    matplotlib = with_matplotlib()
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    style: dict[str, Any] = {"fontsize": font, "parse_math": False}  # a file name may hold a $
    em = font / 72  # inches, as all lengths here; a letter is 0.6 em wide or less, capitals and w up to 1
    columns = min(columns, max(len(part.frames) for part in parts))
    left, gap = 11 * em, 0.4 * em
    right = (
        6.5 * em * any(row.images.ndim < 4 for part in parts for row in part.rows)
    )  # a colour scale and its numbers, or the names of lines
    wide = min((width - left - right) / columns, 17 * em) - gap
    high = wide * parts[0].rows[0].images.shape[-2] / parts[0].rows[0].images.shape[-1]
    labels = {id(row): wrapped(row.label, 10 if row.images.ndim > 2 else 6) for part in parts for row in part.rows}
    line = max(high, 2.6 * em, *(_height(label, em) for label in labels.values())) + gap
    captions = [[wrapped(caption, wide / em) for caption in part.captions] for part in parts]
    heads = [max(_height(text, em) for text in texts) + gap for texts in captions]
    heads = [head + _height("title", em) * bool(part.title) for part, head in zip(parts, heads, strict=True)]
    page = (left + columns * (wide + gap) + right, sum(heads) + line * sum(len(part.rows) for part in parts))
    figure = matplotlib.figure.Figure(page, dpi=100 if font > 10 else 300)
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)

    def frame_at(x: float, middle: float, width: float, height: float) -> Any:
        place = (x / page[0], (middle - height / 2) / page[1], width / page[0], height / page[1])
        axis = figure.add_axes(place, xticks=[], yticks=[])
        axis.spines[:].set(color="0.6", linewidth=0.05 * font)
        return axis

    top = page[1]
    for part, texts, head in zip(parts, captions, heads, strict=True):
        chosen = torch.linspace(0, len(part.frames) - 1, min(len(part.frames), columns)).round().int().tolist()
        name = _elided(part.title, (page[0] - left) / em - 1)
        figure.text(left / page[0], (top - em) / page[1], name, **style)
        top -= head
        for row in part.rows:
            if row.images.ndim == 2:
                across = len(chosen) * (wide + gap) - gap
                axis = frame_at(left, top - line / 2, across, max(high - em, 1.5 * em))
                axis.set_ylabel(labels[id(row)], rotation=0, ha="right", va="center", **style)
                _lines(axis, row.images, [part.frames[i] for i in chosen], font)
                top -= line
                continue
            limits = heat_limits(row.images) if row.images.ndim == 3 else None
            for column, frame in enumerate(part.frames[i] for i in chosen):
                axis = frame_at(left + column * (wide + gap), top - line / 2, wide, high)
                values = row.images[frame] if limits else row.images[frame].permute(1, 2, 0)
                shown = axis.imshow(values.numpy(), "cividis", clim=limits, aspect="auto")
                if row is part.rows[0]:
                    axis.set_title(texts[frame], pad=0.4 * font, **style)
                if column == 0:
                    axis.set_ylabel(labels[id(row)], rotation=0, ha="right", va="center", **style)
            if limits:
                bar = frame_at(left + len(chosen) * (wide + gap), top - line / 2, 0.6 * em, max(high - em, 1.5 * em))
                figure.colorbar(shown, bar, ticks=limits, format="%.3g", extend="max")
                bar.tick_params(labelsize=font, width=0.05 * font, length=0.3 * font)
            top -= line
    return figure


def with_matplotlib() -> Any:
    """Import what draws. Raises ImportError with the extra that brings it."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: in a clone, pip install -e '.[demo]'") from error
    return matplotlib


def heat_limits(values: Tensor) -> tuple[float, float]:
    """Where a colour scale begins and ends: the top 1 % saturate, a few tokens change much more than the rest."""
    low, most = values.min().item(), torch.quantile(values.flatten(), 0.99).item()
    return low, max(most, low + 1e-6)


def _lines(axis: Any, places: Tensor, frames: Sequence[int], font: float) -> None:
    """Draw places (T, 2) over the frames, those of `frames` below their images."""
    between = (frames[-1] - frames[0]) / (len(frames) - 1) if len(frames) > 1 else len(places)
    for name, values, style in zip(("right", "down"), places.T.tolist(), ("-", "--"), strict=True):
        axis.plot(values, style, linewidth=0.15 * font, label=name)
    low, high = places.min().item(), places.max().item()
    axis.set_xlim(frames[0] - between / 2, frames[-1] + between / 2)
    axis.set_yticks([low, high] if high - low > 1e-6 else [low])
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.tick_params(labelsize=font, width=0.05 * font, length=0.3 * font)
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "borderpad": 0, "handlelength": 1.5}
    axis.legend(**beside, handletextpad=0.4, fontsize=font, frameon=False)


def _height(text: str, em: float) -> float:
    return 1.3 * em * (text.count("\n") + 1)


def wrapped(text: str, ems: float) -> str:
    """Break lines, between words where it goes, so that none is wider than a box of that many em."""
    return "\n".join(textwrap.fill(line, max(int(ems / 0.6), 1)) for line in text.splitlines())


def _elided(text: str, ems: float) -> str:
    """Leave out as much of the middle as it takes to fit, were all letters capitals, and what isn't printable."""
    text, kept = "".join(letter if letter.isprintable() else " " for letter in text), int(ems)
    return text if len(text) <= kept else f"{text[: kept // 2]}…{text[-(kept // 2) :]}"


def pixels_of(clip: Tensor, processor: Any = None) -> Tensor:
    """Undo the normalisation of `load_clip`'s clip (1, T, 3, H, W), or of a processor's: (T, 3, H, W) in [0, 1]."""
    own = (IMAGENET_STD, IMAGENET_MEAN) if processor is None else (processor.image_std, processor.image_mean)
    scale, shift = (torch.tensor(values)[:, None, None] for values in own)
    return (clip[0].cpu() * scale + shift).clamp(0, 1)


def check_out(out: Path, *suffixes: str) -> None:
    """Raise ValueError where a picture can't be written to that name."""
    if out.suffix.lower() not in suffixes:
        raise ValueError(f"expected a name that ends in {', '.join(suffixes)}, got {out.name}")
    if not out.parent.is_dir():
        raise ValueError(f"no folder {out.parent} to write {out.name} to")
    if not os.access(out if out.exists() else out.parent, os.W_OK) or out.is_dir():
        raise ValueError(f"{out} can't be written: no permission, or a folder")
