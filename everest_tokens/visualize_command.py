"""The `visualize` command: from video files and the name of a model to one picture or animation."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everest_tokens.animation import SUFFIXES, save_animation
from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.pictures import SWEEP, ModelPictures
from everest_tokens.selectors import RandomSelector
from everest_tokens.video import load_clip
from everest_tokens.visualization import Part, draw_moment
from everest_tokens.visualization import draw as draw_page

logger = logging.getLogger(__name__)

_STILL = (".png", ".pdf", ".svg")
_NO_DECODER = "has no pixel decoder, so that nothing is reconstructed"


def visualize(
    videos: Sequence[Path],
    *,
    draw: str = "selection",
    model: str | None = None,
    keep_ratios: Sequence[float] | None = None,
    distance: str | None = None,
    alpha: float | None = None,
    stride: int = 4,
    starts: Sequence[int] | None = None,
    seed: int = 0,
    columns: int = 8,
    fps: float = 5.0,
    layout: str = "readme",
    out: Path | None = None,
) -> Path:
    """Draw one clip of each video, one below the other, into one file; returns its path. See `visualize --help`.

    A video that is too short has its last frame repeated.

    Raises:
        ValueError: an option, a video or the model is unusable. ImportError: the `demo` extra is not installed.
    """
    out = Path(f"everest-{draw}.png") if out is None else out
    suffix, ratios, starts = out.suffix.lower(), keep_ratios or (), starts or ()
    _check_files(videos, out)
    for ratio in ratios:
        RandomSelector(ratio)  # raises for one that is out of range, as the next line does
    InfoFrameSampler() if alpha is None else InfoFrameSampler(alpha)
    if len(ratios) > 1 and draw != "keep-ratios":
        raise ValueError(f"--draw {draw} takes one keep ratio, got {len(ratios)}: --draw keep-ratios for several")
    if len(starts) not in (0, 1, len(videos)):
        raise ValueError(f"expected one start, or one for each of {len(videos)} videos, got {len(starts)}")
    limits = {"start": (min(starts, default=0), 0), "stride": (stride, 1), "columns": (columns, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 < fps <= 50:
        raise ValueError(f"fps must be above 0 and at most 50, got {fps}")
    if suffix in SUFFIXES and layout != "readme":
        raise ValueError(f"--layout {layout} is for still pictures ({', '.join(_STILL)}), got {out.name}")
    if draw == "reconstruction" and model is None:
        raise ValueError("--draw reconstruction needs --model: random weights reconstruct nothing")
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the command needs tqdm: in a clone, pip install -e '.[demo]'") from error

    loaded = load_model(model, for_pretraining=draw == "reconstruction", seed=seed)
    keep_ratio = ratios[0] if ratios and draw != "keep-ratios" else None
    pictures = ModelPictures(loaded, keep_ratio=keep_ratio, distance=distance, alpha=alpha, seed=seed)
    config, num_frames = loaded.config, loaded.config.num_frames
    if draw == "frames":
        num_frames = config.tubelet_size * pictures.sampler.num_candidates(num_frames // config.tubelet_size)
    method = getattr(pictures, draw.replace("-", "_"))
    options = {"ratios": ratios or SWEEP} if draw == "keep-ratios" else {}
    parts: list[Part] = []
    for number, video in enumerate(tqdm(videos, desc="clips", disable=len(videos) == 1)):
        start = starts[number % len(starts)] if starts else None
        # Mean 0 and deviation 1 leave the pixels in [0, 1].
        clip = load_clip(
            video,
            num_frames=num_frames,
            stride=stride,
            size=config.image_size,
            start=start,
            mean=(0,) * 3,
            std=(1,) * 3,
        )
        parts.append(method(clip[0], video.name if len(videos) > 1 else "", **options))
    if suffix in SUFFIXES:
        moments = tqdm(range(num_frames), desc="frames", leave=False)
        save_animation([_rendered(draw_moment(parts, moment)) for moment in moments], out, fps)
    else:
        import matplotlib

        figure = draw_page(parts, layout=layout, columns=columns)
        with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: publishers refuse Type 3
            figure.savefig(out)
    return out


def load_model(name: str | None, *, for_pretraining: bool = False, seed: int = 0) -> Any:
    """The model to draw from: a folder or hub id of transformers, or a checkpoint file of the VideoMAE family.

    Args:
        name: None for a ViT-B's tubelet embedding with random weights, without blocks.
        for_pretraining: whether it must have a pixel decoder.

    Raises:
        ValueError: not to be found, no VideoMAE, or without the pixel decoder.
    """
    import transformers

    from everest_tokens.checkpoints import describe_checkpoint, load_videomae

    if name is None:
        logger.info("no --model: a ViT-B's tubelet embedding with random weights selects")
        transformers.set_seed(seed)
        config = transformers.VideoMAEConfig(num_hidden_layers=0, decoder_num_hidden_layers=0)
        return transformers.VideoMAEForPreTraining(config)
    path = Path(name)
    if path.is_file():
        decodes = hasattr(describe_checkpoint(path, for_pretraining=True).model, "decoder")
        if for_pretraining and not decodes:
            raise ValueError(f"{name} {_NO_DECODER}")
        return load_videomae(path, for_pretraining=decodes)
    if not path.exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{name}: no such folder or file")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        classes = ("VideoMAEForPreTraining", "VideoMAEForVideoClassification")
        kind = next((kind for kind in classes if kind in (config.architectures or ())), "VideoMAEModel")
        if config.model_type == "videomae" and (kind == classes[0] or not for_pretraining):
            return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{name} " + (_NO_DECODER if config.model_type == "videomae" else "is no VideoMAE"))


def _check_files(videos: Sequence[Path], out: Path) -> None:
    for video in videos:
        if not video.is_file():
            raise ValueError(f"{video}: no such file")
    if out.suffix.lower() not in (*_STILL, *SUFFIXES):
        raise ValueError(f"expected a name that ends in {', '.join((*_STILL, *SUFFIXES))}, got {out.name}")
    if not out.parent.is_dir():
        raise ValueError(f"no folder {out.parent} to write {out.name} to")


def _rendered(figure: Any) -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
