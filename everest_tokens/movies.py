"""Pictures that play: one clip as a GIF, or a whole video as an MP4, window by window, however long it is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everest_tokens import video
from everest_tokens.fading import CONTRAST, choose_fade, contrast, overlay
from everest_tokens.selection import TokenSelection
from everest_tokens.visualization import heat_limits, kept_map, pixels_of, with_matplotlib, wrapped

# Blue, vermilion, green, purple, orange, sky blue of Okabe and Ito, which all readers tell from each other
COLOURS = np.array([(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233)])

Images = Iterable[tuple[int, Any]]  # time of the film, (H, W, 3) uint8
Windows = Iterable[tuple[Tensor, list[tuple[int, int, Tensor]]]]  # see `Film`

logger = logging.getLogger(__name__)


def play(
    path: Path,
    out: Path,
    select: Callable[[Tensor], dict[str, TokenSelection]],
    *,
    num_frames: int,
    stride: int,
    size: tuple[int, int],
    start: int | None = None,
    unit: str = "",
    progress: Callable[..., Images] = lambda images, total: images,
) -> None:
    """Write what is kept of a video: of its clip at `start` as a .gif, or of all of it as an .mp4.

    Beside the frames are what each selection keeps of them and the importance of the first one.

    Args:
        select: clip (1, T, 3, *size) → label → selection, the same labels each time.
        num_frames, stride: T, and frames from one of a clip's to the next.
        unit: of the importance.
        progress: wraps the images, given their number as `total=`.

    Raises:
        ValueError: the video can't be read, the file can't be written, or a setting is out of range.
    """
    film, still = Film(path, num_frames, stride, size), out.suffix.lower() == ".gif"
    starts = [start] if still else [film.length * quarter // 4 for quarter in (1, 2, 3)]
    clips = [video.load_clip(path, num_frames=num_frames, stride=stride, size=size, start=at) for at in starts]
    found = [select(clip) for clip in clips]
    parts = [list(selections.values()) for selections in found]
    t, h, w = grid = parts[0][0].grid
    heat = [part[0].importance for part in parts if part[0].importance is not None]
    labels = ["frames", *found[0], *[f"importance\n{unit}".strip()] * bool(heat)]
    widest = max(720, 112 * len(labels)) if still else max(1200, 224 * len(labels))
    wide = max(widest // len(labels) // w, 1) * w  # as many pixels for each token: their borders are sharp
    film.shown = round(wide * size[0] / size[1]), wide
    windows = film.clip(clips[0], start) if still else film.windows()
    page = Page(labels, film, h * w, heat_limits(torch.cat(heat)) if heat else None)
    kept = [torch.cat([kept_map(part[i]) for part in parts]) for i in range(len(parts[0]))]
    fade = choose_fade(torch.cat([pixels_of(clip) for clip in clips]), kept)

    def images() -> Iterator[tuple[int, Any]]:
        nonlocal fade
        for clip, frames in windows:
            selections, pixels = list(select(clip).values()), pixels_of(clip)
            kept, importance = [kept_map(selection) for selection in selections], selections[0].importance
            if contrast(pixels, kept, fade) < CONTRAST:  # else it stays, so that nothing flickers
                fade = choose_fade(pixels, kept)
            for step, group in groupby(frames, lambda frame: frame[0] * t // num_frames):
                times, shown = zip(*((time, frame) for _, time, frame in group), strict=True)
                pixels = torch.stack(shown) / 255
                panels = [pixels, *(overlay(pixels, each[step : step + 1], fade) for each in kept)]
                counts = [int(each[step].sum()) for each in kept]
                for i, time in enumerate(times):
                    values = None if importance is None else importance[0].cpu().view(grid)[step]
                    yield time, page.image([panel[i] for panel in panels], values, counts, time)

    total = len(film.times)
    count = (save_gif if still else save_mp4)(progress(images(), total=total), out, film)
    if count < total:
        logger.warning("%s: damaged or cut off, %d of %d frames are drawn", path, count, total)


class Film:
    """A video's frames, upright and cut to their middle, in windows.

    Each window is a clip as the model takes it, (1, T, 3, *size), and of the frames that are shown of it the place in
    the clip, the time, and uint8 (3, *shown). Frames follow each other at the file's rate, or at its time stamps where
    by these some last longer than others; times are counted in units of `base` seconds from the first frame.
    """

    shown: tuple[int, int]

    def __init__(self, path: Path, num_frames: int, stride: int, size: tuple[int, int]) -> None:
        self.path, self.num_frames, self.size = str(path), num_frames, size
        self.stride = video.integer("stride", stride, least=1)
        container, stream = video.open_video(self.path)
        with container:
            self.rate, base = Fraction(stream.average_rate or stream.guessed_rate or 25), stream.time_base
        self.length, times, self.numbers = video.look_through(self.path)
        self.base, self.times = 1 / self.rate, list(range(self.length))
        if self.numbers and any(abs((time - times[0]) * base * self.rate - n) > 0.5 for n, time in enumerate(times)):
            self.base, self.times = base, [time - times[0] for time in times]

    def clip(self, clip: Tensor, start: int | None) -> Windows:
        """The one window of a clip that `load_clip` loaded at `start`; it plays at the file's mean rate."""
        given: dict[str, Any] = {"num_frames": self.num_frames, "stride": self.stride, "start": start}
        shown = (255 * pixels_of(video.load_clip(self.path, size=self.shown, **given))).round().byte()
        self.base, self.times = self.stride / self.rate, list(range(self.num_frames))
        return [(clip, [(i, i, frame) for i, frame in enumerate(shown)])]

    def windows(self) -> Windows:
        """All frames that decode, in windows of T · stride, of which the model takes every stride-th.

        The last window reaches back into the one before, or repeats the last frame of a video shorter than a clip.
        """
        look, show = video.Look(self.size, video.IMAGENET_MEAN, video.IMAGENET_STD), video.Look(self.shown, (0,), (1,))
        taken: deque[Tensor] = deque(maxlen=self.num_frames)
        shown: list[tuple[int, int, Tensor]] = []
        for count, (time, frame) in enumerate(self._frames()):
            if len(shown) == self.num_frames * self.stride:
                yield self._window(taken, shown)
                shown = []
            if count % self.stride == 0:
                taken.append(look.crops(frame, [0.5]))
            shown.append((count // self.stride, time, (255 * show.crops(frame, [0.5])[0]).round().byte()))
        if shown:
            yield self._window(taken, shown)

    def _window(self, taken: deque[Tensor], shown: list[tuple[int, int, Tensor]]) -> Any:
        first = max(shown[-1][0] + 1 - self.num_frames, 0)
        clip = torch.cat([*taken, *[taken[-1]] * (self.num_frames - len(taken))])[None]
        return clip, [(place - first, time, frame) for place, time, frame in shown]

    def _frames(self) -> Iterator[tuple[int, Tensor]]:
        container, stream = video.open_video(self.path)
        to_rgb = video.ToRGB(self.path, stream)
        with container, suppress(*video.read_errors()):
            stream.thread_type = "AUTO"
            for place, frame in enumerate(video.decode(container, stream)):
                number = self.numbers.get(frame.pts, -1) if self.numbers else place
                if 0 <= number < self.length:
                    yield self.times[number], to_rgb(frame).permute(2, 0, 1)[None]


class Page:
    """An image with panels side by side, a colour bar, and how many tokens each time step keeps until now.

    Args:
        labels: of the panels; those of selections, from the second one on, have the colour of their line.
        tokens: of a time step.
        limits: of the colours of a heat map, which is the last panel; None: there is none.
    """

    def __init__(self, labels: Sequence[str], film: Film, tokens: int, limits: tuple[float, float] | None) -> None:
        matplotlib, em, (tall, side) = with_matplotlib(), 16, film.shown  # in pixels, as all lengths here
        left, top, graph, gap = 5 * em, 3 * em, 6 * em, em // 2
        right = left + len(labels) * (side + gap) - gap
        size = [length + length % 2 for length in (right + (6 * em if limits else em), top + tall + graph + 4 * em)]
        figure = matplotlib.figure.Figure([length / 100 for length in size], dpi=100)
        canvas = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)

        def axes(x: int, y: int, width: int, height: int) -> Any:
            return figure.add_axes((x / size[0], 1 - (y + height) / size[1], width / size[0], height / size[1]))

        self.top, self.shown, self.limits, self.tokens, self.last = top, film.shown, limits, tokens, left
        self.end = film.times[-1] + max(film.times[-1] // max(len(film.times) - 1, 1), 1)  # the last one lasts too
        self.lefts, self.graph = range(left, right, side + gap), (top + tall + em, top + tall + em + graph, left, right)
        colours = [(0, 0, 0), *COLOURS[: len(labels) - 1 - bool(limits)] / 255, (0, 0, 0)]
        for x, label, colour in zip(self.lefts, labels, colours, strict=False):
            axis = axes(x, top, side, tall)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.6")
            axis.set_title(wrapped(label, side / em), color=colour, fontsize=11, parse_math=False)
        if limits:
            scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*limits), "cividis")
            figure.colorbar(scale, axes(right + gap, top, em, tall), ticks=limits, format="%.3g", extend="max")
        lines = axes(left, self.graph[0], right - left, graph)
        lines.set(xlim=(0, float(self.end * film.base)), ylim=(0, tokens), yticks=[0, tokens])
        lines.set(xlabel="seconds", ylabel="tokens\nkept")
        canvas.draw()
        self.blank, self.cividis = np.asarray(canvas.buffer_rgba())[..., :3].copy(), matplotlib.colormaps["cividis"]

    def image(self, panels: Sequence[Tensor], heat: Tensor | None, counts: Sequence[int], time: int) -> Any:
        """(H, W, 3) uint8 of panels (3, S, S) in [0, 1], heat (h, w) and tokens kept, at a time of the film."""
        y0, y1, left, right = self.graph
        x = left + (right - left - 2) * time // self.end
        for count, colour in zip(counts, COLOURS, strict=False):
            y = y1 - 3 - (y1 - y0 - 4) * count // self.tokens
            self.blank[y : y + 3, min(self.last, x) : x + 2] = colour
        self.last, image = x, self.blank.copy()
        image[y0:y1, x : x + 2] = 110
        tall, wide = self.shown
        places = [(slice(self.top, self.top + tall), slice(left, left + wide)) for left in self.lefts]
        for place, panel in zip(places, panels, strict=False):
            image[place] = (255 * panel).round().byte().permute(1, 2, 0).numpy()
        if heat is not None and self.limits:
            low, high = self.limits
            colours = self.cividis(((heat - low) / (high - low)).numpy(), bytes=True)[..., :3]
            rows, columns = (np.arange(n) * cells // n for n, cells in zip(self.shown, heat.shape, strict=True))
            image[places[-1]] = colours[rows][:, columns]
        return image


def save_gif(images: Images, out: Path, film: Film) -> int:
    """Write a GIF that repeats; returns the number of its frames."""
    from PIL import Image

    shown = [image for _, image in images]
    # One palette for all, and no dithering: what stands still must not flicker, and compresses away.
    palette = Image.fromarray(np.concatenate(shown)).quantize(256)
    first, *others = (Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in shown)
    # Browsers play what is shorter than 20 ms at 100, and the format ends at 655,350.
    duration = min(max(round(1000 * film.base), 20), 655350)
    with _whole(out) as part:
        first.save(part, "gif", save_all=True, append_images=others, duration=duration, loop=0)
    return len(shown)


def save_mp4(images: Images, out: Path, film: Any) -> int:
    """Write H.264 as browsers play it, without sound, holding one image at a time; returns the number of frames.

    Images have even sides. Of the film its path, rate and base are looked at.

    Raises:
        ValueError: no frame decodes, or this PyAV has no H.264 encoder.
    """
    import av

    stream: Any = None
    count = 0
    try:
        with (
            _whole(out) as part,
            av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container,
        ):
            for time, image in images:
                if stream is None:
                    stream = container.add_stream("libx264", rate=film.rate, options={"crf": "20"})
                    (stream.height, stream.width), stream.pix_fmt = image.shape[:2], "yuv420p"
                    stream.codec_context.time_base = film.base
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, film.base
                container.mux(stream.encode(frame))
                count += 1
            if stream is None:
                raise ValueError(f"{film.path}: damaged, no frame could be decoded")
            container.mux(stream.encode())
    except av.codec.codec.UnknownCodecError as error:
        raise ValueError("writing an .mp4 needs H.264, which this PyAV was built without: write a .gif") from error
    return count


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give the name to write to, which becomes `out` once all is written: a file that is there is whole."""
    with TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        yield Path(folder, out.name)
        Path(folder, out.name).replace(out)
