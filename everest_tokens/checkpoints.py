"""Load checkpoint files of the VideoMAE family as transformers models: VideoMAE, VideoMAE V2, MME, MVD and EVEREST.

Sizes are read off the file's tensors, a model without weights is built of those sizes, and its strict `load_state_dict`
decides whether every tensor has its place and its shape.
"""

from __future__ import annotations

import logging
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens import numerics
from everest_tokens.checkpoint_files import (
    BESIDE,
    KERNEL,
    LAYER_SCALE,
    OTHER_TARGETS,
    Tensors,
    family_of,
    finite,
    read_weights,
    transformers_parts,
)
from everest_tokens.positions import mvd_table, resample_table, sinusoid_table
from everest_tokens.tubelets import Grid

logger = logging.getLogger(__name__)

FAMILIES = ("videomae", "videomaev2", "mme", "mvd", "everest")
_MOST_TOKENS = 2**16  # of a clip, 256 frames of 256² and more
_MOST_BLOCKS = 128  # the family's deepest encoder has 40


class _Default(int):
    """An argument's default, told apart from the same number when a caller gives it."""


_NUM_FRAMES, _IMAGE_SIZE = _Default(16), _Default(224)
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: no tensor shows them
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_NAMES = (  # of transformers → of the repositories, replaced in this order; before 5.0 it has q_bias and v_bias itself
    ("videomae.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("videomae.encoder.layer.", "blocks."),
    ("decoder.decoder_layers.", "decoder.blocks."),
    ("videomae.layernorm", "norm"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("classifier", "head"),
    *((f"attention.attention.{part}.weight", f"attn.qkv.weight[{part}]") for part in ("query", "key", "value")),
    *((f"attention.attention.{part}.bias", f"attn.{part[0]}_bias") for part in ("query", "value")),
    ("attention.attention.", "attn."),
    ("attention.output.dense", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


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
    weights, arguments = read_weights(Path(path))

    family, assumed = family_of(weights, arguments, family)
    kernel = weights[KERNEL]
    if kernel.ndim == 4:
        assumed.append("the patch embedding is a 2D kernel: spread over tubelets of 2 frames")
        kernel = weights[KERNEL] = (kernel.float() / 2).unsqueeze(2).repeat(1, 1, 2, 1, 1)
    if kernel.ndim != 5 or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"expected {KERNEL} (D, C, [frames,] p, p), got {tuple(kernel.shape)}")
    width, channels, tubelet, patch, _ = kernel.shape
    sizes = {
        "patch_size": patch,
        "num_channels": channels,
        "tubelet_size": tubelet,
        "layer_norm_eps": numerics.NORM_EPS,
        "use_mean_pooling": False,
        "qkv_bias": any(re.match(r"blocks\.\d+\.attn\.(q_bias|qkv\.bias)$", name) for name in weights),
        **_sizes_of(weights, "", width, heads[0] or _HEADS.get(width)),
    }
    has_decoder = any(re.match(r"decoder\.\D", name) for name in weights)
    decodes = for_pretraining and has_decoder
    if decodes:
        if family == "mvd":
            raise ValueError("family 'mvd' (or its cls_token) and a pixel decoder, which MVD's files don't have")
        if num_labels is not None:
            raise ValueError(f"num_labels={num_labels} is for a classifier, but the pixel decoder was asked for")
        bridge = weights.get("encoder_to_decoder.weight", torch.empty(0))
        if bridge.ndim != 2:
            got = tuple(bridge.shape) if bridge.numel() else "none"
            raise ValueError(f"missing: expected encoder_to_decoder.weight (decoder width, {width}), got {got}")
        own = bridge.shape[0]
        sizes |= _sizes_of(weights, "decoder.", own, heads[1] or _DECODER_HEADS.get(own, heads[0]))

    head = weights.get("head.weight", weights.get("head.bias"))
    labels = None if head is None else torch.atleast_1d(head).shape[0]
    ignored = [part for part, keys in OTHER_TARGETS.items() if any(re.match(keys, name) for name in weights)]
    fresh, dropped = [], [r"head\."]
    if not decodes:
        pools = any(name.startswith("fc_norm.") for name in weights)
        fresh += ["fc_norm"] * (labels is None and not pools)
        if labels is None or num_labels not in (None, labels):
            num_labels = num_labels or VideoMAEConfig().num_labels
            fresh.append(f"a classifier of {num_labels} labels" + (f" (the file's has {labels})" if labels else ""))
        else:
            num_labels, dropped = labels, []
        dropped.append(BESIDE)
        ignored += ["the pixel decoder"] * has_decoder
        if pools or labels is None:  # as VideoMAE's own fine-tuning drops the pre-training encoder's norm
            dropped.append(r"norm\.(weight|bias)$")
            ignored += ["the pre-training encoder's norm"] * ("norm.weight" in weights)
        sizes |= {"use_mean_pooling": pools or labels is None, "num_labels": num_labels}
    for name in [name for name in weights if re.match("|".join(dropped), name)]:
        del weights[name]

    config = VideoMAEConfig(**sizes)
    position, table = _placed(config, weights, arguments, assumed, num_frames, image_size)
    beside = {} if table is None else {"position_embeddings": table}
    if not decodes and "cls_token" in weights:
        beside["class_token"] = finite("cls_token", weights.pop("cls_token"))
    model = _built(VideoMAEForPreTraining if decodes else VideoMAEForVideoClassification, config, weights)
    position = position or ("mvd" if family == "mvd" else "sinusoid")
    numbers = {"norm_eps": numerics.NORM_EPS, "position": position, "class_token": "class_token" in beside}
    numerics.equip(model, numbers, beside)
    config.everest = {"task": "pretraining" if decodes else "encoder", **numerics.numbers_of(model)}
    return CheckpointInfo(family, model, labels, fresh, ignored, assumed)


def _sizes_of(weights: Tensors, part: str, width: int, heads: int | None) -> dict[str, int]:
    """Give the sizes of the blocks of the encoder ("") or of the "decoder.", as transformers' config names them.

    Raises:
        ValueError: none or too many blocks, cosine attention, layer scale in some of them, or unknown heads.
    """
    prefix, which = f"{part}blocks.", part.rstrip(".") or "encoder"
    inside = [name for name in weights if name.startswith(prefix)]
    numbers = [int(found[1]) for name in inside if (found := re.match(r"(\d{1,9})\.", name.removeprefix(prefix)))]
    depth = max(numbers, default=-1) + 1
    if not 0 < depth <= _MOST_BLOCKS:
        raise ValueError(f"missing: expected 1 to {_MOST_BLOCKS} blocks {prefix}0, {prefix}1, …, got {depth}")
    if scales := [name for name in inside if name.endswith("attn.scale")]:
        raise ValueError(f"{scales[0]}: cosine attention (VideoMAE V2's) is nothing that transformers' VideoMAE has")
    gammas = {name: tuple(weights[name].shape) for name in inside if name.endswith(tuple(LAYER_SCALE.values()))}
    wanted = {f"{prefix}{block}.{gamma}": (width,) for block in range(depth) for gamma in LAYER_SCALE.values()}
    if gammas and (wrong := sorted(wanted.items() ^ gammas.items())):
        raise ValueError(f"expected layer scale ({width},) in each of {prefix} or in none; missing or wrong: {wrong}")
    if heads is None:
        raise ValueError(f"no tensor shows the heads of the {which} of width {width}: give num_heads (--num-heads)")
    if width % heads:
        raise ValueError(f"num_heads={heads} doesn't divide the {which}'s width {width}")
    hidden = torch.atleast_1d(weights.get(f"{prefix}0.mlp.fc1.weight", torch.empty(4 * width))).shape[0]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip((part.replace(".", "_") + name for name in names), (width, depth, heads, hidden), strict=True))


def _placed(
    config: VideoMAEConfig, weights: Tensors, arguments: dict[str, Any], assumed: list[str], frames: int, side: int
) -> tuple[str, Tensor | None]:
    """Set the clips' sizes in `config`, and take the position table out of the weights.

    Returns:
        which formula gives the file's table, "sinusoid" or "mvd", "stored" and the table (N, D), or "" without one.
    """
    table, width = weights.pop("pos_embed", None), config.hidden_size
    tubelet, patch = config.tubelet_size, config.patch_size
    said, side_said = _count(arguments.get("num_frames")), _count(arguments.get("input_size"))
    steps, places = frames // tubelet, side // patch
    stored: Grid = (0, 0, 0)
    if table is not None:
        if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width:
            raise ValueError(f"expected pos_embed (1, N, {width}), got {tuple(table.shape)}")
        rows = table.shape[1]
        guesses = [  # (time steps, tokens a side), the surest first
            (said // tubelet, side_said // patch),
            (steps, places),
            *((count, math.isqrt(rows // count)) for count in (16 // tubelet, steps) if count),
            *((rows // count**2, count) for count in (224 // patch, places) if count),
        ]
        fitting = next((guess for guess in guesses if guess[0] * guess[1] ** 2 == rows), None)
        if fitting is None:
            raise ValueError(f"pos_embed has {rows} rows, which fits no square clip: give num_frames or image_size")
        stored = (fitting[0], fitting[1], fitting[1])
        if fitting != guesses[0]:  # the file doesn't say
            assumed.append("the {} rows of pos_embed are taken for {}×{}×{} tubelets".format(rows, *stored))
        said, side_said = stored[0] * tubelet, stored[1] * patch
    else:
        said *= _count(arguments.get("num_segments")) or 1
    frames = said if said and isinstance(frames, _Default) else int(frames)
    side = side_said if side_said and isinstance(side, _Default) else int(side)

    tubelets = f"tubelets of {tubelet}×{patch}×{patch}"
    if frames % tubelet or frames // tubelet < 2:
        raise ValueError(f"num_frames={frames} gives no two time steps in {tubelets}")
    if side % patch:
        raise ValueError(f"image_size={side} doesn't divide into {tubelets}")
    grid: Grid = (frames // tubelet, side // patch, side // patch)
    if math.prod(grid) > _MOST_TOKENS:
        raise ValueError(
            f"num_frames={frames} and image_size={side}, given or in the file's args, make {math.prod(grid)} tokens: "
            f"expected at most {_MOST_TOKENS}"
        )
    config.num_frames, config.image_size = frames, side
    if table is None:
        return "", None
    table = finite("pos_embed", table)[0]
    if grid == stored:  # a formula that gives the table makes a lighter folder
        if torch.allclose(table, sinusoid_table(rows, width), rtol=0, atol=1e-6):
            return "sinusoid", None
        if width % 16 == 0 and torch.allclose(table, mvd_table(grid, width), rtol=0, atol=1e-6):
            return "mvd", None
    return "stored", resample_table(table, stored, grid)


def _count(value: Any) -> int:
    """Read a size from the file's arguments: 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6 else 0


def _built(model_class: Any, config: VideoMAEConfig, weights: Tensors) -> Any:
    """Build a model and load the weights, which are taken out of their dict one by one."""
    frames, side, patch = config.num_frames, config.image_size, config.patch_size
    # transformers computes its tables in Python loops, seconds for a clip: one tubelet's now, the clip's own below.
    config.num_frames, config.image_size = config.tubelet_size, patch
    with torch.device("meta"):  # nothing is drawn at random that the file replaces
        model = model_class(config)
    config.num_frames, config.image_size = frames, side
    embeddings = model.base_model.embeddings
    tokens = frames // config.tubelet_size * (side // patch) ** 2
    embeddings.num_patches = embeddings.patch_embeddings.num_patches = tokens
    embeddings.patch_embeddings.image_size = (side, side)
    embeddings.position_embeddings = sinusoid_table(tokens, config.hidden_size)[None]
    if model_class is VideoMAEForPreTraining:
        model.position_embeddings = sinusoid_table(tokens, config.decoder_hidden_size)[None]

    own = {name: _repository_name(name) for name in model.state_dict()}
    theirs = {repository: name for name, repository in own.items()}
    parts = list(transformers_parts(weights))
    state = {theirs.get(name, f"the file's {name}"): tensor for name, tensor in parts}
    if len(state) != len(parts):
        raise ValueError("attn.qkv.bias in a block that has attn.q_bias and attn.v_bias too, expected one of the two")
    for name in ("fc_norm", "classifier"):
        module = getattr(model, name, None)
        if module is not None and not any(key.startswith(f"{name}.") for key in state):
            module.to_empty(device="cpu")
            model._init_weights(module)
            state |= {f"{name}.{part}": parameter.float() for part, parameter in module.state_dict().items()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        said = textwrap.shorten(str(error).partition(":")[2], 2000)
        said = re.sub(r"(?<!file's )[\w.]+", lambda found: own.get(found[0], found[0]), said)
        raise ValueError(f"the checkpoint doesn't fit a VideoMAE: {said}") from error
    return model.requires_grad_(True).eval()


def _repository_name(text: str) -> str:
    for theirs, own in _NAMES:
        text = text.replace(theirs, own)
    return text
