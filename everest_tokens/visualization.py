"""Pictures of what is kept, from frames and selections; no model is known here (paper Figures 3, 6, 8, 9 and 10).

A `Part` is what is drawn of one clip: rows of one image a frame. `*_part` build them, `draw` sets them on a page,
`draw_moment` shows all rows at one frame, for animations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from everest_tokens.selection import TokenSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER_WHITE = 0.93  # what dropped tokens fade to: lighter than most frames, so that kept ones stand out
_FRAMED = "#d55e00"  # vermilion of Okabe and Ito's colours, told from the pictures' own by colour-blind readers too


@dataclass(frozen=True)
class Row:
    """One image for each of a clip's T frames.

    Attributes:
        label: what it shows.
        images: (T, 3, H, W) in [0, 1], or (T, H, W), values on a colour scale.
        scale: the ends of that scale.
        framed: (T,) bool, the images to put a coloured frame around.
    """

    label: str
    images: Tensor
    scale: tuple[float, float] | None = None
    framed: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """What is drawn of one clip.

    Attributes:
        rows: of T images each.
        captions: T of them.
        tubelet: frames of one time step, of which a page shows the first.
        title: of the clip, "" for none.
        whole: whether a page shows all time steps, in several lines if need be, or evenly spaced ones.
    """

    rows: list[Row]
    captions: list[str]
    tubelet: int
    title: str = ""
    whole: bool = False


@dataclass(frozen=True)
class Layout:
    """A page: width in inches, font size in points, and the most inches that an image and a label may be wide."""

    width: float
    font: float
    dpi: int
    image: float
    label: float


LAYOUTS = {
    "readme": Layout(12.0, 12.0, 100, 2.8, 1.6),  # 1200 pixels, which a README shows at about 900
    "paper": Layout(6.75, 7.0, 300, 1.5, 0.95),  # both columns of an ICML page
}


def kept_map(selection: TokenSelection, clip: int = 0) -> Tensor:
    """Which tokens of one clip are kept: (t, h, w) bool."""
    return _marked(selection.kept, selection, clip)


def _marked(index: Tensor, selection: TokenSelection, clip: int) -> Tensor:
    """Positions (B, M) of a selection's grid → (t, h, w) bool, for one clip."""
    marked = torch.zeros(math.prod(selection.grid), dtype=torch.bool)
    marked[index[clip].cpu()] = True
    return marked.view(selection.grid)


def grey_out(frames: Tensor, kept: Tensor, shown: Tensor | None = None) -> Tensor:
    """Fade the dropped tokens of each frame to a light grey.

    Args:
        frames: (T, 3, H, W) in [0, 1], equally many for each time step.
        kept: (t, h, w) bool.
        shown: other pixels than the frames' to show where tokens are kept.

    Returns:
        (T, 3, H, W) in [0, 1].
    """
    mask = _enlarged(kept, frames)[:, None]
    faded = 0.25 * frames.mean(dim=1, keepdim=True) + 0.75 * _PAPER_WHITE
    return (frames if shown is None else shown) * mask + faded * (1 - mask)


def _enlarged(values: Tensor, frames: Tensor) -> Tensor:
    """One value a token (t, h, w) → one a pixel of the frames (T, H, W), float32."""
    enlarged = interpolate(values[:, None].float(), frames.shape[-2:], mode="nearest-exact")[:, 0]
    return enlarged.repeat_interleave(len(frames) // len(values), 0)


def selection_part(frames: Tensor, selections: dict[str, TokenSelection], *, clip: int = 0, title: str = "") -> Part:
    """The frames, the kept tokens of each selection, and the importance heatmap of the first (Figures 6, 8, 9).

    Args:
        frames: (T, 3, H, W), uint8 or floats in [0, 1], the frames that the model saw before normalisation; T is a
            multiple of the selections' time steps.
        selections: row label → selection of the same clip.
        clip: which clip of the selections' batch the frames are.

    Raises:
        ValueError: frames that don't fit the selections' grid.
    """
    first = next(iter(selections.values()))
    pixels = _pixels(frames, first.grid[0])
    rows = [Row("frames", pixels)]
    rows += [_masked(label, pixels, kept_map(selection, clip)) for label, selection in selections.items()]
    if first.importance is not None:
        heat = first.importance[clip].cpu()
        # A few tokens change much more than the rest: end the scale where only the top 1 % saturate.
        low, high = heat.min().item(), torch.quantile(heat, 0.99).item()
        heat = _enlarged(heat.view(first.grid), pixels)
        rows.append(Row("importance", heat, scale=(low, max(high, low + 1e-6))))
    return Part(rows, [f"frame {i}" for i in range(len(pixels))], len(pixels) // first.grid[0], title)


def candidates_part(frames: Tensor, kept: Tensor, steps: Tensor, *, title: str = "") -> Part:
    """Which time steps were drawn from more candidates: the others are blurred and faded (§4.2, Figures 3 and 10).

    Args:
        frames: (T, 3, H, W), as in `selection_part`, of all candidates.
        kept: (⌊α·τ⌋, h, w) bool, the kept tokens of the candidate clip; c_i of them are written above step i.
        steps: (τ,) int64, the steps drawn: a row of `TokenSelection.steps`.
    """
    pixels = _pixels(frames, len(kept))
    tubelet = len(pixels) // len(kept)
    drawn = torch.isin(torch.arange(len(kept)), steps.cpu()).repeat_interleave(tubelet)
    small = [max(side // 12, 1) for side in pixels.shape[-2:]]
    blurred = interpolate(interpolate(pixels, small, mode="area"), pixels.shape[-2:], mode="bilinear")
    shown = torch.where(drawn[:, None, None, None], pixels, 0.5 * blurred + 0.5 * _PAPER_WHITE)
    counts = kept.flatten(1).sum(dim=1).repeat_interleave(tubelet).tolist()
    captions = [f"frame {i}: {count} kept" for i, count in enumerate(counts)]
    label = f"sampled steps\n{len(steps)} of {len(kept)}"
    return Part([Row(label, shown, framed=drawn), _masked("kept", pixels, kept)], captions, tubelet, title, whole=True)


def reconstruction_part(
    frames: Tensor,
    selection: TokenSelection,
    prediction: Tensor,
    *,
    normalised: bool,
    clip: int = 0,
    title: str = "",
) -> Part:
    """What a pre-training model sees, what it predicts of the targets, and the targets themselves (Eq. 3).

    A model trained with `norm_pix_loss` predicts each patch relative to the patch's own mean and standard deviation.
    These are taken from the frames, as in VideoMAE's own pictures: brightness and contrast of such a reconstruction are
    the original's, only the structure is the model's.

    Args:
        frames: (T, 3, H, W), as in `selection_part`.
        prediction: (B, M, frames·height·width·3), the model's, in the order of `selection.target`.
        normalised: whether it is relative to each patch's mean and standard deviation.

    Raises:
        ValueError: a selection without targets, or frames or a prediction that don't fit it.
    """
    if selection.target is None:
        raise ValueError("a reconstruction needs a selection with targets: that of a model for pre-training")
    t, h, w = selection.grid
    pixels = _pixels(frames, t)
    if pixels.shape[-2] % h or pixels.shape[-1] % w:
        raise ValueError(f"frames of {pixels.shape[-2]}×{pixels.shape[-1]} pixels don't divide into {h}×{w} patches")
    size = {"f": len(pixels) // t, "p": pixels.shape[-2] // h, "q": pixels.shape[-1] // w}
    patches = rearrange(pixels, "(t f) c (h p) (w q) -> (t h w) (f p q) c", **size).clone()
    target = selection.target[clip].cpu()
    own = patches[target]  # (M, frames·height·width, 3)
    if prediction.ndim != 3 or prediction.shape[1:] != (len(own), own[0].numel()):
        raise ValueError(f"expected prediction (B, {len(own)}, {own[0].numel()}), got {tuple(prediction.shape)}")
    restored = prediction[clip].detach().cpu().float().view_as(own)
    if normalised:
        restored = restored * (own.var(dim=1, unbiased=True, keepdim=True).sqrt() + 1e-6) + own.mean(1, keepdim=True)
    patches[target] = restored.clamp(0, 1)
    painted = rearrange(patches, "(t h w) (f p q) c -> (t f) c (h p) (w q)", t=t, h=h, **size)
    targets = _marked(selection.target, selection, clip)
    rows = [
        Row("frames", pixels),
        _masked("seen by the encoder", pixels, _marked(selection.visible, selection, clip)),
        _masked("reconstructed targets", pixels, targets, painted),
        _masked("targets", pixels, targets),
    ]
    return Part(rows, [f"frame {i}" for i in range(len(pixels))], size["f"], title)


def _masked(label: str, frames: Tensor, kept: Tensor, shown: Tensor | None = None) -> Row:
    """A row of kept tokens, labelled with their number."""
    return Row(f"{label}\n{int(kept.sum())} of {kept.numel()}", grey_out(frames, kept, shown))


def _pixels(frames: Tensor, steps: int) -> Tensor:
    """Frames as float32 in [0, 1], a multiple of `steps` of them."""
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or len(frames) % steps:
        raise ValueError(f"expected frames (multiple of {steps}, 3, H, W), got {tuple(frames.shape)}")
    pixels = frames.cpu().float()
    return pixels / 255 if frames.dtype == torch.uint8 else pixels.clamp(0, 1)


def draw_selections(
    frames: Tensor, selections: dict[str, TokenSelection], *, clip: int = 0, max_columns: int = 8
) -> Figure:
    """`selection_part` on a page; arguments and errors as there and in `draw`."""
    return draw([selection_part(frames, selections, clip=clip)], columns=max_columns)


def draw(parts: Sequence[Part], *, layout: str = "readme", columns: int = 8) -> Figure:
    """A page of still images, one part below the other: a line for each row, a column for each time step.

    Args:
        layout: "readme" (1200 pixels wide) or "paper" (6.75 inches at 300 dpi); few columns make it narrower.
        columns: the most images in a line; of a longer clip evenly spaced time steps are drawn, or, of a `whole` part,
            all in lines of equal length.

    Raises:
        ImportError: matplotlib is not installed (the `demo` extra).
    """
    lines: list[_Line] = []
    for number, part in enumerate(parts):
        title = f"({chr(97 + number % 26)}) {part.title}" if len(parts) > 1 else part.title
        for positions in _positions(part, columns):
            captions = [part.captions[i] for i in positions]
            for row in part.rows:
                lines.append(_Line([row] * len(positions), positions, captions, row.label, title))
                captions, title = [], ""  # above the first row, and the first line, only
    return _typeset(lines, LAYOUTS[layout])


def draw_moment(parts: Sequence[Part], frame: int) -> Figure:
    """All rows at one frame, side by side, a line for each part: one image of an animation, at 100 pixels an inch."""
    lines = []
    for part in parts:
        i = min(frame, len(part.captions) - 1)
        heading = f"{part.title}   {part.captions[i]}".strip()
        lines.append(_Line(part.rows, [i] * len(part.rows), [row.label for row in part.rows], "", heading))
    return _typeset(lines, replace(LAYOUTS["readme"], image=2.24))  # 224 pixels, as the models see them


def _positions(part: Part, columns: int) -> list[list[int]]:
    """The frames that each line shows."""
    firsts = list(range(0, len(part.captions), part.tubelet))
    if not part.whole:
        return [[firsts[i] for i in torch.linspace(0, len(firsts) - 1, min(len(firsts), columns)).round().int()]]
    length = math.ceil(len(firsts) / math.ceil(len(firsts) / columns))
    return [firsts[i : i + length] for i in range(0, len(firsts), length)]


@dataclass(frozen=True)
class _Line:
    """Images side by side: the one at `positions[i]` of `rows[i]`, under `captions[i]`."""

    rows: list[Row]
    positions: list[int]
    captions: list[str]
    label: str
    heading: str


def _typeset(lines: list[_Line], page: Layout) -> Figure:
    """Set lines on a page whose margins are as wide as the text in them, whatever the text."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: in a clone, pip install -e '.[demo]'") from error
    figure = Figure(dpi=page.dpi)
    FigureCanvasAgg(figure)
    style: dict[str, Any] = {"fontsize": page.font, "parse_math": False}  # a file name may hold a $

    def width(text: str) -> float:
        artist = figure.text(0, 0, text, **style)
        extent = artist.get_window_extent()
        artist.remove()
        return extent.width / page.dpi

    em = page.font / 72  # inches, as all lengths here
    gap, leading = 0.4 * em, 1.25 * em
    labels = [_wrapped(line.label, page.label, width) for line in lines]
    ends = [f"{value:.3g}" for line in lines for value in line.rows[-1].scale or ()]  # of the colour scales
    left = max(map(width, labels)) + (1.4 * em if any(labels) else gap)
    right = max(map(width, ends)) + 2.5 * em if ends else gap
    columns = max(len(line.rows) for line in lines)
    image = max(min(page.image, (page.width - left - right + gap) / columns - gap), em)
    total = left + columns * (image + gap) - gap + right

    captions = [[_wrapped(text, image, width) for text in line.captions] for line in lines]
    heights = [image * line.rows[0].images.shape[-2] / line.rows[0].images.shape[-1] for line in lines]
    above = [
        (2 * em if line.heading else 0) + (gap + leading * max(map(_height, texts)) if texts else 0)
        for line, texts in zip(lines, captions, strict=True)
    ]
    below = [gap + max(leading * _height(text) - high, 0) for text, high in zip(labels, heights, strict=True)]
    height = sum(heights) + sum(above) + sum(below) + gap
    figure.set_size_inches(total, height)

    def add_axes(x: float, y: float, wide: float, high: float, **options: Any) -> Any:
        return figure.add_axes((x / total, y / height, wide / total, high / height), **options)

    top, scales = height - gap, []
    for number, line in enumerate(lines):
        if line.heading:
            heading = "".join(letter if letter.isprintable() else " " for letter in line.heading)
            heading = _elided(heading, total - 2 * gap, width)
            figure.text(gap / total, (top - 0.4 * em) / height, heading, va="top", **style)
        bottom = top - above[number] - heights[number] - (below[number] - gap) / 2
        for column, (row, i) in enumerate(zip(line.rows, line.positions, strict=True)):
            axis = add_axes(left + column * (image + gap), bottom, image, heights[number], xticks=[], yticks=[])
            values = row.images[i] if row.scale else row.images[i].permute(1, 2, 0)
            low, high = row.scale or (None, None)
            shown = axis.imshow(values.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto")
            framed = row.framed is not None and bool(row.framed[i])
            axis.spines[:].set(color=_FRAMED if framed else "0.6", linewidth=(0.25 if framed else 0.05) * page.font)
            if captions[number]:
                axis.set_title(captions[number][column], pad=0.4 * page.font, **style)
            if column == 0:
                axis.set_ylabel(labels[number], rotation=0, ha="right", va="center", labelpad=0.5 * page.font, **style)
        if line.rows[-1].scale:
            place = left + len(line.rows) * (image + gap), bottom, 0.8 * em, heights[number]
            scales.append((place, shown, line.rows[-1].scale))
        top -= above[number] + heights[number] + below[number]
    for place, shown, limits in scales:
        axis = add_axes(*place)
        figure.colorbar(shown, cax=axis, ticks=limits, format="%.3g", extend="max")
        axis.tick_params(labelsize=page.font, width=0.05 * page.font, length=0.3 * page.font, pad=0.2 * page.font)
        for text, side in zip(axis.get_yticklabels(), ("bottom", "top"), strict=True):
            text.set_verticalalignment(side)  # within the bar's height
    return figure


def _height(text: str) -> int:
    return text.count("\n") + 1


def _wrapped(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Break lines between words so that none is wider than `width` inches; a word that is, is elided."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            word = _elided(word, width, measure)
            joined = f"{line} {word}".strip()
            if line and measure(joined) > width:
                lines.append(line)
                joined = word
            line = joined
        lines.append(line)
    return "\n".join(lines)


def _elided(text: str, width: float, measure: Callable[[str], float]) -> str:
    """Leave out as much of the middle as it takes to fit into `width` inches."""
    shown, kept = text, len(text)
    while kept > 1 and measure(shown) > width:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shown
