"""Load checkpoint files of the VideoMAE family as transformers models: VideoMAE, VideoMAE V2, MME, MVD and EVEREST.

Keys are renamed by tables, sizes read off the tensors, a model without weights is built of those sizes, and its strict
`load_state_dict` decides whether every tensor has its place and its shape.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens import checkpoint_names, numerics
from everest_tokens.checkpoint_files import Tensors, read_file
from everest_tokens.checkpoint_names import DECODER, KERNEL, LAYER_SCALE, OTHER_TARGETS, bare_names, family_of, finite
from everest_tokens.positions import mvd_table, resample_table, sinusoid_table
from everest_tokens.tubelets import Grid

logger = logging.getLogger(__name__)

FAMILIES = ("videomae", "videomaev2", "mme", "mvd", "everest")
_MOST_TOKENS = 2**16  # of a clip, 256 frames of 256² and more
_MOST_BLOCKS = 128  # the family's deepest encoder has 40
_MOST_LABELS = 2**17  # transformers' config names each


class _Default(int):
    """An argument's default, told apart from the same number when a caller gives it."""


_NUM_FRAMES, _IMAGE_SIZE = _Default(16), _Default(224)
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: no tensor shows them
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}


@dataclass
class CheckpointInfo:
    """What a checkpoint file holds and what is made of it; `model.config` has the sizes."""

    family: str
    model: VideoMAEForPreTraining | VideoMAEForVideoClassification
    labels: int | None  # of the head in the file
    fresh: list[str]  # parts of the model that the file doesn't have
    ignored: list[str]  # parts of the file that the model doesn't have
    assumed: list[str]  # what neither tensors nor the file's arguments tell, and how the family was found out


def load_videomae(
    path: str | Path,
    *,
    family: str | None = None,
    num_labels: int | None = None,
    for_pretraining: bool = False,
    num_heads: int | tuple[int, int] | None = None,
    num_frames: int = _NUM_FRAMES,
    image_size: int = _IMAGE_SIZE,
) -> VideoMAEForPreTraining | VideoMAEForVideoClassification:
    """Load a `.pth`, `.pt`, `.bin` or `.safetensors` file of the VideoMAE family as the transformers model it matches.

    Its numbers are those of the original implementation: position table, layer norm eps and class token included,
    layer scale folded into the projections. What was assumed is logged.

    Args:
        path: the file. Nothing in it is ever run: beyond tensors only an `argparse.Namespace` is admitted.
        family: "videomae", "videomaev2", "mme", "mvd" or "everest" where keys and the file's `args` don't tell. A
            fine-tuned MVD file looks like a fine-tuned VideoMAE, but has another position table.
        num_labels: of the classifier. The file's head is kept if this is None or fits, else a fresh one is made.
        for_pretraining: keep the pixel decoder, if the file has one.
        num_heads: of the encoder, or (encoder, decoder), where the width is none of the families' own.
        num_frames, image_size: of the clips. Default: what a position table in the file was made for, else 16 × 224²;
            given, a table in the file is resampled.

    Returns:
        A VideoMAEForPreTraining with `for_pretraining` and a pixel decoder in the file, otherwise a
        VideoMAEForVideoClassification: float32, in eval mode, unpatched. `config.everest` says what its numbers need.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of the family, a pickle that wants more than tensors, keys or shapes that don't
            fit, numbers that aren't finite, or a clip of more than 65,536 tokens.
    """
    info = describe_checkpoint(**locals())  # the arguments, every one
    for line in info.assumed:
        logger.warning("%s: %s", path, line)
    if for_pretraining and isinstance(info.model, VideoMAEForVideoClassification):
        logger.warning("%s has no pixel decoder: loaded as a classifier, not for pre-training", path)
    if info.ignored:
        logger.info("%s: not loaded are %s", path, ", ".join(info.ignored))
    if info.fresh:
        logger.warning("%s doesn't have %s: freshly initialised", path, " and ".join(info.fresh))
    return info.model


def describe_checkpoint(
    path: str | Path,
    *,
    family: str | None = None,
    num_labels: int | None = None,
    for_pretraining: bool = False,
    num_heads: int | tuple[int, int] | None = None,
    num_frames: int = _NUM_FRAMES,
    image_size: int = _IMAGE_SIZE,
) -> CheckpointInfo:
    """Say what `load_videomae` makes of a file, by making it. Arguments and errors as there."""
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    heads = num_heads if isinstance(num_heads, tuple) and len(num_heads) == 2 else (num_heads, None)
    counts = {"num_labels": num_labels, "num_frames": num_frames, "image_size": image_size}
    for name, value in [*counts.items(), *(("num_heads (or each of a pair)", count) for count in heads)]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")

    state, arguments = read_file(Path(path))
    weights = bare_names(path, state)
    family, assumed = family_of(weights, arguments, family)
    decodes = for_pretraining and any(re.match(r"decoder\.\D", name) for name in weights)
    if decodes and (family == "mvd" or num_labels is not None):
        raise ValueError("the pixel decoder was asked for: it goes neither with num_labels nor with mvd or a cls_token")

    labels = _rows(weights, "head.weight")
    if max(labels, num_labels or 0) > _MOST_LABELS:
        raise ValueError(f"a classifier of {max(labels, num_labels or 0)} labels: expected at most {_MOST_LABELS}")
    pools = not labels or any(name.startswith("fc_norm.") for name in weights)
    absent = OTHER_TARGETS | ({} if decodes else DECODER)
    if pools and not decodes:  # as VideoMAE's own fine-tuning drops it
        absent["the pre-training encoder's norm"] = r"norm\.(weight|bias)$"
    if labels and (decodes or num_labels not in (None, labels)):
        absent["the file's classifier"] = r"head\."
    ignored = [part for part, keys in absent.items() if _drop(weights, keys)]
    weights = {name: finite(name, weights.pop(name)) for name in list(weights)}  # one by one, for the memory's sake

    kernel = weights[KERNEL]
    if kernel.ndim == 4:
        assumed.append("the patch embedding is a 2D kernel: spread over tubelets of 2 frames")
        kernel = weights[KERNEL] = (kernel / 2).unsqueeze(2).repeat(1, 1, 2, 1, 1)
    if kernel.ndim != 5 or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"expected {KERNEL} (D, C, [frames,] p, p), got {tuple(kernel.shape)}")
    width, channels, tubelet, patch, _ = kernel.shape
    table, token = weights.pop("pos_embed", None), weights.pop("cls_token", None)
    if table is not None and (table.ndim != 3 or table.shape[::2] != (1, width)):
        raise ValueError(f"expected pos_embed (1, N, {width}), got {tuple(table.shape)}")
    stored, grid = _grids(table, (tubelet, patch), (num_frames, image_size), arguments, assumed)
    sizes = _block_sizes(weights, "", width, heads[0] or _HEADS.get(width))
    if decodes:
        bridge = weights.get("encoder_to_decoder.weight", torch.empty(()))
        if bridge.ndim != 2:
            raise ValueError(f"expected encoder_to_decoder.weight (decoder width, {width}), got {tuple(bridge.shape)}")
        own = bridge.shape[0]
        sizes |= _block_sizes(weights, "decoder.", own, heads[1] or _DECODER_HEADS.get(own, heads[0]))
    config = VideoMAEConfig(
        num_frames=tubelet,
        image_size=patch,
        patch_size=patch,
        tubelet_size=tubelet,
        num_channels=channels,
        layer_norm_eps=numerics.NORM_EPS,
        qkv_bias=any(re.match(r"blocks\.\d+\.attn\.(q_bias|qkv\.bias)$", name) for name in weights),
        use_mean_pooling=pools and not decodes,
        num_labels=num_labels or labels or VideoMAEConfig().num_labels,
        **sizes,
    )
    model, fresh = _built(VideoMAEForPreTraining if decodes else VideoMAEForVideoClassification, config, grid, weights)
    position, beside = "mvd" if family == "mvd" else "sinusoid", {}
    if table is not None:
        table = beside["position_embeddings"] = resample_table(table[0], stored, grid)
        formulas = {"sinusoid": sinusoid_table(len(table), width)}  # which make a lighter folder
        formulas |= {"mvd": mvd_table(grid, width)} if width % 16 == 0 else {}
        same = (name for name, formula in formulas.items() if torch.allclose(table, formula, rtol=0, atol=1e-6))
        position = next(same, "stored")
    if token is not None:
        beside["class_token"] = token
    numbers = {"norm_eps": numerics.NORM_EPS, "position": position, "class_token": token is not None}
    numerics.equip(model, numbers, beside)
    config.everest = {"task": "pretraining" if decodes else "encoder", **numerics.numbers_of(model)}
    return CheckpointInfo(family, model, labels or None, fresh, ignored, assumed)


def _drop(weights: Tensors, keys: str) -> bool:
    """Delete what matches, and say whether anything did."""
    found = [name for name in weights if re.match(keys, name)]
    for name in found:
        del weights[name]
    return bool(found)


def _rows(weights: Tensors, name: str) -> int:
    """Say how long a tensor's first dimension is: 0 without the tensor or the dimension."""
    return next(iter(weights[name].shape), 0) if name in weights else 0


def _block_sizes(weights: Tensors, part: str, width: int, heads: int | None) -> dict[str, int]:
    """Give the sizes of the blocks of the encoder ("") or of the "decoder.", as transformers' config names them.

    Raises:
        ValueError: none or too many blocks, cosine attention, layer scale in some of them, or unknown heads.
    """
    prefix, which = f"{part}blocks.", part.rstrip(".") or "encoder"
    inside = [name for name in weights if name.startswith(prefix)]
    depth = len({found[1] for name in inside if (found := re.match(r"(\d+)\.", name.removeprefix(prefix)))})
    if not 0 < depth <= _MOST_BLOCKS:
        raise ValueError(f"missing: expected 1 to {_MOST_BLOCKS} blocks {prefix}0, {prefix}1, …, got {depth}")
    if scales := [name for name in inside if name.endswith("attn.scale")]:
        raise ValueError(f"{scales[0]}: cosine attention (VideoMAE V2's) is nothing that transformers' VideoMAE has")
    gammas = {name: tuple(weights[name].shape) for name in inside if name.endswith(tuple(LAYER_SCALE))}
    wanted = {f"{prefix}{block}.{gamma}": (width,) for block in range(depth) for gamma in LAYER_SCALE}
    if gammas and (wrong := sorted(wanted.items() ^ gammas.items())):
        raise ValueError(f"expected layer scale ({width},) in each of {prefix} or in none; missing or wrong: {wrong}")
    if heads is None:
        raise ValueError(f"no tensor shows the heads of the {which} of width {width}: give num_heads (--num-heads)")
    if width % heads:
        raise ValueError(f"num_heads={heads} doesn't divide the {which}'s width {width}")
    hidden = _rows(weights, f"{prefix}0.mlp.fc1.weight") or 4 * width
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip((part.replace(".", "_") + name for name in names), (width, depth, heads, hidden), strict=True))


def _grids(
    table: Tensor | None,
    tubelet_size: tuple[int, int],
    given: tuple[int, int],
    arguments: dict[str, Any],
    assumed: list[str],
) -> tuple[Grid, Grid]:
    """Find the grid that a position table was made for, which no tensor shows, and the grid of the model's clips."""
    (tubelet, patch), (frames, side) = tubelet_size, given
    said = _count(arguments.get("num_frames")) * (_count(arguments.get("num_segments")) or 1)
    side_said = _count(arguments.get("input_size"))
    stored = (0, 0, 0)
    if table is not None:
        rows = table.shape[1]
        guesses = [(said // tubelet, side_said // patch), (frames // tubelet, side // patch)]  # the surest first
        guesses += [(steps, math.isqrt(rows // steps)) for steps in (16 // tubelet, frames // tubelet) if steps]
        guesses += [(rows // places**2, places) for places in (224 // patch, side // patch) if places]
        fitting = next((guess for guess in guesses if guess[0] * guess[1] ** 2 == rows), None)
        if fitting is None:
            raise ValueError(f"pos_embed has {rows} rows, which fits no square clip: give num_frames or image_size")
        stored = (fitting[0], fitting[1], fitting[1])
        if fitting != guesses[0]:  # the file doesn't say
            assumed.append("the {} rows of pos_embed are taken for {}×{}×{} tubelets".format(rows, *stored))
        said, side_said = stored[0] * tubelet, stored[1] * patch
    frames = said if said and isinstance(frames, _Default) else int(frames)
    side = side_said if side_said and isinstance(side, _Default) else int(side)
    grid = (frames // tubelet, side // patch, side // patch)
    tokens = math.prod(grid)
    if frames % tubelet or side % patch or grid[0] < 2 or not 0 < tokens <= _MOST_TOKENS:
        raise ValueError(
            f"num_frames={frames} and image_size={side}, given or in the file's args, make {tokens} tokens of "
            f"{tubelet}×{patch}×{patch}: expected whole ones, two time steps and at most {_MOST_TOKENS} tokens"
        )
    return stored, grid


def _count(value: Any) -> int:
    """Read a size from the file's arguments: 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6 else 0


def _built(model_class: Any, config: VideoMAEConfig, grid: Grid, weights: Tensors) -> tuple[Any, list[str]]:
    """Build a model of one tubelet, which is made one of a clip, and load the weights.

    transformers computes its position tables in Python loops, seconds for a clip.

    Returns:
        the model, and what was made in the place of what the weights lack.
    """
    with torch.device("meta"):  # nothing is drawn at random that the file replaces
        model = model_class(config)
    config.num_frames, config.image_size = grid[0] * config.tubelet_size, grid[1] * config.patch_size
    embeddings = model.base_model.embeddings
    embeddings.num_patches = embeddings.patch_embeddings.num_patches = math.prod(grid)
    embeddings.patch_embeddings.image_size = (config.image_size, config.image_size)
    embeddings.position_embeddings = sinusoid_table(math.prod(grid), config.hidden_size)[None]
    if model_class is VideoMAEForPreTraining:
        model.position_embeddings = sinusoid_table(math.prod(grid), config.decoder_hidden_size)[None]

    fresh = []
    for name, own in (("fc_norm", "fc_norm"), ("classifier", "head")):
        module = getattr(model, name, None)
        if module is not None and not any(key.startswith(f"{own}.") for key in weights):
            fresh.append(name if own == name else f"a classifier of {config.num_labels} labels")
            module.to_empty(device="cpu")
            model._init_weights(module)
            weights |= {f"{own}.{part}": parameter.float() for part, parameter in module.state_dict().items()}
    checkpoint_names.load(model, weights)
    return model.requires_grad_(True).eval(), fresh
