"""A page in the browser: which tokens of a clip are kept, what that costs, and what a trained classifier says of them.

    pip install -e '.[space]' && python examples/space/app.py

EVEREST_MODELS lists hub ids or folders to choose from, with spaces between. Others can be typed, but not on a Hugging
Face Space, whose visitors shall not make it load what they like.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Lock
from types import SimpleNamespace
from typing import Any, NamedTuple

# Before gradio is imported: no visit is counted elsewhere, and no run is kept in the browser.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}

import gradio as gr
import numpy as np
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens.commands import patched_model
from everest_tokens.comparing import seconds_of
from everest_tokens.demo import sample_video
from everest_tokens.drawing import nearest_running_cells
from everest_tokens.movies import save_mp4
from everest_tokens.patching import host_of
from everest_tokens.prediction import reading_of
from everest_tokens.video import first_frame, load_clip, load_views, number_frames, open_video, read_errors
from everest_tokens.visualization import Part, draw, pixels_of, selection_part

MEGABYTES, FRAMES, AREA, RATIO = 50, 3600, 1920 * 1080, 8  # the most that a video may have
KEPT_SECONDS = 600  # how long files stay on the server, so that the slider can be moved once more
REPEATS = 3  # measured runs of each way
LOADING = Lock()  # visitors who ask for one model at the same time wait for one, and its seed is its own
NO_LABELS = gr.Label(visible=False)
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
RANDOM: dict[str, dict[str, Any]] = {"ViT-S, random weights": SMALL, "ViT-B, random weights": {}}
SELECTORS = {
    "ReRo, what changes most (EVEREST)": et.ReRoSelector,
    "ReRo, first time step kept whole": partial(et.ReRoSelector, anchor="first"),
    "ReRo, the camera's motion taken out": partial(et.ReRoSelector, camera="compensate"),
    "random (ST-MAE)": et.RandomSelector,
    "tube (VideoMAE)": et.TubeSelector,
    "running cell (VideoMAE V2): ¼, ½ or ¾": nearest_running_cells,
}
ABOUT = """# Which tokens of a video does the model need?
Choose a clip and move the keep ratio. What is dropped fades to grey: only the rest reaches the transformer's blocks."""
NOTES = f"""Models with **random weights** are untrained. They rank tokens by change much as a distance between pixels
does, and a forward costs what it costs a trained model of that size. Only a trained classifier's labels are shown.

GFLOPs and milliseconds are those of one clip's forward. All and kept tokens take turns: where other visitors' requests
run at the same time, their ratio holds better than the milliseconds.

Videos have at most {MEGABYTES} MB, {FRAMES:,} frames and {AREA / 1e6:.1f} megapixels a frame, no side over {RATIO}
times the other; the browser need not play them (.avi). They and what is drawn are deleted here after
{KEPT_SECONDS // 60} to {KEPT_SECONDS // 60 + 1} minutes."""


class Loaded(NamedTuple):
    """A model that requests share: not patched, and no request may change it."""

    plain: Any
    reading: dict[str, Any]  # arguments of `load_clip`
    trained: bool  # whether its labels mean anything


@lru_cache(maxsize=2)
def load(name: str) -> Loaded:
    """Load one of `RANDOM`, a hub id, a folder or a checkpoint file. Raises ValueError for one of no use here."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if name in RANDOM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain: Any = VideoMAEForVideoClassification(VideoMAEConfig(use_mean_pooling=True, **RANDOM[name]))
        reading = {"num_frames": plain.config.num_frames, "stride": 4, "size": plain.config.image_size}
        return Loaded(plain.eval().to(device), reading, trained=False)
    model = patched_model(name).to(device)
    if model.everest.task == "pretraining":
        raise ValueError(f"{name}: a pre-training model, expected a classifier or an encoder")
    return Loaded(et.unpatch_videomae(model), reading_of(model, name), trained=True)


def patched(plain: Any, selector: Any) -> Any:
    """Patch a copy that shares the model's weights and nothing else, so that no other request notices."""
    other = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
    return et.patch_videomae(other, selector)


def read(video: str, begin: float, reading: dict[str, Any]) -> torch.Tensor:
    """Load the clip that begins at this share of what comes before the last one. Raises ValueError, as `load_clip`."""
    if os.path.getsize(video) > MEGABYTES * 2**20:
        raise ValueError(f"{video}: more than {MEGABYTES} MB")
    container, stream = open_video(video)
    packets: list[tuple[Any, bool]] = []
    with container, suppress(*read_errors()):
        all_packets = ((packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size)
        packets.extend(islice(all_packets, FRAMES + 1))
    if len(packets) > FRAMES:
        raise ValueError(f"{video}: more than {FRAMES:,} frames, cut out the part that matters")
    for seen in (stream.codec_context, first_frame(video)):  # what the file says, and what it shows
        if seen is not None and seen.width * seen.height > AREA:
            raise ValueError(f"{video}: {seen.width}×{seen.height} pixels are more than {AREA / 1e6:.1f} megapixels")
        # The short side becomes the model's, the long one as many times larger.
        if seen is not None and max(seen.width, seen.height) > RATIO * min(seen.width, seen.height):
            raise ValueError(f"{video}: of {seen.width}×{seen.height} pixels one side is over {RATIO} times the other")
    if reading["stride"] == 0:  # frames from all over the video
        return load_views(video, clips=1, crops=1, **reading)
    length, _, _ = number_frames(video, container, stream, packets)
    span = (reading["num_frames"] - 1) * reading["stride"]
    return load_clip(video, start=int(begin * max(length - span - 1, 0)), **reading)


class Chosen(NamedTuple):
    """What one request looks at: its clip (1, T, 3, H, W), its own patched copy, and what that keeps."""

    loaded: Loaded
    clip: torch.Tensor
    model: Any
    kept: et.TokenSelection

    def table(self) -> str:
        """Compare all tokens with the kept ones, in Markdown."""
        tokens, kept = self.kept.importance.shape[1], self.kept.kept.shape[1]
        flops, fewer = (et.count_flops(model).total / 1e9 for model in (self.loaded.plain, self.model))
        return f"""| | all | kept | ratio |
|:--|--:|--:|--:|
| tokens | {tokens} | {kept} | {kept / tokens:.2f} |
| GFLOPs | {flops:.3g} | {fewer:.3g} | {fewer / flops:.2f} |

Kept at each time step: {", ".join(map(str, self.kept.frame_counts[0].tolist()))}"""


def choose(video: str | None, begin: float, name: str | None, selector: str, ratio: float) -> Chosen:
    """Load and select. Raises ValueError for what can't be read, loaded or kept."""
    if not video or not name:
        raise ValueError("Choose a clip and a model.")
    with LOADING:
        loaded = load(name.strip())
    try:
        clip = read(video, begin, loaded.reading).to(next(loaded.plain.parameters()).device)
    except ValueError as error:  # names the server's folders
        raise ValueError(str(error).replace(video, Path(video).name)) from error
    model = patched(loaded.plain, SELECTORS[selector](ratio))
    kept = et.select_tokens(model, clip, generator=torch.Generator().manual_seed(0))
    if kept.importance is None:  # a selector that doesn't go by it
        kept = replace(kept, importance=et.select_tokens(patched(loaded.plain, et.ReRoSelector()), clip).importance)
    return Chosen(loaded, clip, model, kept)


def write_video(part: Part, path: Path) -> Path:
    """Write a part's first two rows, frames and kept tokens, side by side, six frames a second."""
    frames, kept = (row.images for row in part.rows[:2])  # (T, 3, H, W) in [0, 1]
    gap = frames.new_ones(*frames.shape[:3], max(frames.shape[3] // 32, 1))
    images = (255 * torch.cat([frames, gap, kept], dim=3)).round().byte().permute(0, 2, 3, 1)  # (T, H, 2W + gap, 3)
    scale = max(round(448 / frames.shape[3]), 1)
    images = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    height, width = (side // 2 * 2 for side in images.shape[1:3])  # halved colours
    shown = images[:, :height, :width].contiguous().numpy()
    save_mp4(enumerate(shown), path, SimpleNamespace(path=path, rate=6, base=Fraction(1, 6)))
    return path


def look(*settings: Any) -> Iterator[list[Any]]:
    """Yield the overlay's file, which is gone afterwards, the picture, and the table."""
    try:
        chosen = choose(*settings)
    except ValueError as error:
        yield [None, None, f"**This doesn't work:** {error}"]
        return
    pixels = pixels_of(chosen.clip, chosen.loaded.reading.get("processor"))
    part, counts = selection_part(pixels, {"kept": chosen.kept}), chosen.kept.frame_counts[0].tolist()
    captions = [f"frame {i}\n{counts[i // part.frames.step]} kept" for i in range(len(pixels))]
    lines = [Part(part.rows, part.frames[i : i + 4], captions) for i in range(0, len(part.frames), 4)]
    picture = draw(lines, columns=4, width=8)
    picture.canvas.draw()
    with TemporaryDirectory() as folder:
        file = write_video(part, Path(folder, "kept.mp4"))
        yield [file, np.asarray(picture.canvas.buffer_rgba()), chosen.table()]


def measure(*settings: Any) -> Iterator[list[Any]]:
    """Yield after each turn the times, and what a trained classifier says of all tokens and of the kept ones."""
    try:
        chosen = choose(*settings)
    except ValueError as error:
        yield [f"**This doesn't work:** {error}", NO_LABELS, NO_LABELS]
        return
    given = {"pixel_values": chosen.clip, **host_of(chosen.model).arguments(chosen.model)}
    runs = [torch.inference_mode()(partial(model, **given)) for model in (chosen.loaded.plain, chosen.model)]
    outputs = [runs[0](), runs[1](token_selection=chosen.kept)]  # warms up
    labels, seconds = [NO_LABELS, NO_LABELS], []
    if chosen.loaded.trained and hasattr(outputs[0], "logits"):
        names = chosen.loaded.plain.config.id2label
        scores = [output.logits[0].float().softmax(dim=0).tolist() for output in outputs]
        labels = [gr.Label({names[i]: score for i, score in enumerate(each)}, visible=True) for each in scores]
    for _ in range(REPEATS):
        seconds.append([seconds_of(run, chosen.clip.device) for run in runs])
        whole, part = (1e3 * median(each) for each in zip(*seconds, strict=True))
        ratio = median(part / whole for whole, part in seconds)
        yield [f"Measured: all tokens {whole:.0f} ms, the kept ones {part:.0f} ms, ratio {ratio:.2f}", *labels]


def page() -> gr.Blocks:
    """Lay out the page."""
    typed, models = "SPACE_ID" not in os.environ, [*RANDOM, *os.environ.get("EVEREST_MODELS", "").split()]
    clips = [str(sample_video().with_name(name)) for name in ("bigbuckbunny.mp4", "bikes.mp4")]
    with gr.Blocks(title="everest_tokens", delete_cache=(min(KEPT_SECONDS, 60), KEPT_SECONDS)) as blocks:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                video = gr.Video(clips[0], label="a clip: × to upload your own", sources=["upload"], height=220)
                gr.Examples([[clip] for clip in clips], video, label="or one of these")
                begin = gr.Slider(0, 1, 0, step=0.05, label="where in the video the clip begins")
                name = gr.Dropdown(models, label="model" + ", or a hub id or folder" * typed, allow_custom_value=typed)
                selector = gr.Dropdown(list(SELECTORS), label="what is kept")
                ratio = gr.Slider(0.05, 1, 0.3, step=0.05, label="keep ratio")
                button = gr.Button("Measure on this machine", variant="primary")
            with gr.Column(scale=3, min_width=300):
                overlay = gr.Video(show_label=False, autoplay=True, loop=True, interactive=False)
                table, times = gr.Markdown(), gr.Markdown()
                with gr.Row():
                    whole = gr.Label(label="says of all tokens", num_top_classes=5, visible=False)
                    part = gr.Label(label="says of the kept tokens", num_top_classes=5, visible=False)
                picture = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])
        gr.Markdown(NOTES)
        inputs, measured = [video, begin, name, selector, ratio], [times, whole, part]
        measuring = button.click(measure, inputs, measured, concurrency_limit=1)
        changes = [control.change for control in inputs]
        # At once, while a look may have to wait for the one before: a click in between is not to be lost.
        gr.on(changes, lambda: ["", NO_LABELS, NO_LABELS], None, measured, cancels=measuring, queue=False)
        looking = {"trigger_mode": "always_last", "show_progress": "minimal", "concurrency_limit": 2}
        gr.on([blocks.load, *changes], look, inputs, [overlay, picture, table], **looking)
    return blocks.queue(max_size=32)


def serve(blocks: gr.Blocks, **more: Any) -> Any:
    """Start the server, which refuses larger uploads before they are read."""
    return blocks.launch(max_file_size=f"{MEGABYTES}mb", footer_links=[], **more)


if __name__ == "__main__":
    serve(page())
