"""Checkpoint files of the VideoMAE family as transformers models: VideoMAE, VideoMAE V2, MME, MVD and EVEREST.

Two steps: `describe_checkpoint` reads a file and says what it is, `load_videomae` builds the model of that description.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens.checkpoint_files import BESIDE, OTHER_TARGETS, Weights, matches, read_weights
from everest_tokens.hosts import checkpoint_numbers
from everest_tokens.positions import mvd_table, resample_table, sinusoid_table
from everest_tokens.selectors import Grid

logger = logging.getLogger(__name__)

FAMILIES = ("videomae", "videomaev2", "mme", "mvd", "everest")


class _Default(int):
    """An argument's default, told apart from the same number when a caller gives it."""


_NUM_FRAMES, _IMAGE_SIZE = _Default(16), _Default(224)
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # no tensor shows them
_DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_SIZES = {384: "S", 768: "B", 1024: "L", 1280: "H", 1408: "g"}
_MODULES = {  # of the file → of transformers; the attention's input projection is split below
    "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "norm": "videomae.layernorm",
    "head": "classifier",
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_LAYER_SCALE = {"attn.proj": "gamma_1", "mlp.fc2": "gamma_2"}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint file holds and what would be loaded of it.

    Attributes:
        family: and in `assumed` how it was found out.
        width, depth, heads, hidden: of the encoder's blocks.
        decoder: (width, depth, heads, hidden) of the pixel decoder that would be loaded, or None.
        channels, tubelet_size, patch_size: of the tubelet embedding.
        num_frames, image_size: of the clips that the loaded model takes.
        stored_grid: of the position table in the file, or None.
        position: "sinusoid", "mvd" or "stored", of the loaded model.
        mean_pooling: of the classifier, or None for a model with a pixel decoder.
        labels: of the head in the file, or None.
        fresh: parts of the loaded model that the file doesn't have.
        ignored: parts of the file that the loaded model doesn't have.
        assumed: what neither tensors nor the file's arguments tell.
    """

    family: str
    width: int
    depth: int
    heads: int
    hidden: int
    decoder: tuple[int, int, int, int] | None
    channels: int
    tubelet_size: int
    patch_size: int
    num_frames: int
    image_size: int
    stored_grid: Grid | None
    position: str
    class_token: bool
    mean_pooling: bool | None
    labels: int | None
    num_labels: int | None
    fresh: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        return f"ViT-{_SIZES[self.width]}" if self.width in _SIZES else f"a ViT of width {self.width}"

    @property
    def model_class(self) -> type[VideoMAEForPreTraining] | type[VideoMAEForVideoClassification]:
        return VideoMAEForVideoClassification if self.decoder is None else VideoMAEForPreTraining


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
        ValueError: not a checkpoint of the family, keys or shapes that don't fit, or a pickle that wants more.
    """
    weights = read_weights(Path(path))
    info = _described(weights, family, num_labels, for_pretraining, num_heads, num_frames, image_size)
    for line in info.assumed:
        logger.warning("%s: %s", path, line)
    if for_pretraining and info.decoder is None:
        logger.warning("%s has no pixel decoder: loaded as a classifier, not for pre-training", path)
    if info.ignored:
        logger.info("%s: not loaded are %s", path, ", ".join(info.ignored))
    if info.fresh:
        logger.warning("%s doesn't have %s: freshly initialised", path, " and ".join(info.fresh))
    return _built(weights, info)


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
    """What `load_videomae` would make of a file. Arguments and errors as there."""
    return _described(read_weights(Path(path)), family, num_labels, for_pretraining, num_heads, num_frames, image_size)


def _described(
    weights: Weights,
    family: str | None,
    num_labels: int | None,
    for_pretraining: bool,
    num_heads: int | tuple[int, int] | None,
    num_frames: int,
    image_size: int,
) -> CheckpointInfo:
    _check_arguments(family, num_labels, num_heads, num_frames, image_size)
    encoder, others = weights.encoder, weights.others
    family, assumed = _family_of(weights, family)
    if "pos_embed" not in encoder:
        segments = _quotient(weights.arguments.get("num_segments"), 1) or 1
        frames, side = (_quotient(weights.arguments.get(name), 1) for name in ("num_frames", "input_size"))
        num_frames = frames * segments if frames and isinstance(num_frames, _Default) else num_frames
        image_size = side if side and isinstance(image_size, _Default) else image_size

    kernel = encoder["patch_embed.proj.weight"]
    if kernel.ndim not in (4, 5) or kernel.shape[-1] != kernel.shape[-2]:
        raise ValueError(f"expected patch_embed.proj.weight (D, C, [frames,] p, p), got {tuple(kernel.shape)}")
    width, channels, patch = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
    tubelet = kernel.shape[2] if kernel.ndim == 5 else 2
    depth, hidden = _stack_of(encoder, "blocks.", width)
    if kernel.ndim == 4:
        assumed.append("the patch embedding is a 2D kernel: spread over tubelets of 2 frames")

    decoder = None
    bridge, decodes = others.get("encoder_to_decoder.weight"), any(matches((r"decoder\.\D",), key) for key in others)
    if for_pretraining and decodes:
        if bridge is None or not bridge.ndim:
            got = "none" if bridge is None else str(tuple(bridge.shape))
            raise ValueError(f"missing: expected encoder_to_decoder.weight (decoder width, {width}), got {got}")
        decoder_width = bridge.shape[0]
        decoder_depth, decoder_hidden = _stack_of(others, "decoder.blocks.", decoder_width)
        if num_labels is not None:
            raise ValueError(f"num_labels={num_labels} is for a classifier, but the pixel decoder was asked for")
        given = num_heads[1] if isinstance(num_heads, tuple) else _DECODER_HEADS.get(decoder_width, num_heads)
        decoder = (decoder_width, decoder_depth, _known_heads(decoder_width, given, "decoder"), decoder_hidden)
    heads = num_heads[0] if isinstance(num_heads, tuple) else num_heads

    classifier = encoder.get("head.weight", encoder.get("head.bias"))
    labels = None if classifier is None else classifier.shape[0] if classifier.ndim else 0
    keeps_head = labels is not None and num_labels in (None, labels)
    fresh: list[str] = []
    mean_pooling = None
    if decoder is None:
        pools = _has(encoder, "fc_norm.")
        mean_pooling = pools or labels is None
        fresh += ["fc_norm"] if mean_pooling and not pools else []
        if not keeps_head:
            num_labels = VideoMAEConfig().num_labels if num_labels is None else num_labels
            found = "" if labels is None else f" (the file's has {labels})"
            fresh.append(f"a classifier of {num_labels} labels{found}")

    info = CheckpointInfo(
        family=family,
        width=width,
        depth=depth,
        heads=_known_heads(width, heads or _HEADS.get(width), "encoder"),
        hidden=hidden,
        decoder=decoder,
        channels=channels,
        tubelet_size=tubelet,
        patch_size=patch,
        num_frames=int(num_frames),
        image_size=int(image_size),
        stored_grid=None,
        position="mvd" if family == "mvd" else "sinusoid",
        class_token="cls_token" in encoder,
        mean_pooling=mean_pooling,
        labels=labels,
        num_labels=None if decoder is not None else (labels if keeps_head else num_labels),
        fresh=tuple(fresh),
        ignored=_ignored_parts(weights, decoder is not None, mean_pooling),
        assumed=tuple(assumed),
    )
    _check_keys(weights, info)
    if family == "mvd" and decoder is not None:
        raise ValueError("family='mvd', but the file has a pixel decoder, which MVD's don't have")
    for which, size, count in (("encoder", width, info.heads), ("decoder", *(decoder or (1, 1, 1))[::2])):
        if size % count:
            raise ValueError(f"num_heads={count} doesn't divide the {which}'s width {size}")
    info = _with_positions(weights, info, num_frames, image_size)
    tubelets = f"tubelets of {tubelet}×{patch}×{patch}"
    if info.num_frames % tubelet or info.num_frames // tubelet < 2:
        raise ValueError(f"num_frames={info.num_frames} gives no two time steps in {tubelets}")
    if info.image_size % patch:
        raise ValueError(f"image_size={info.image_size} doesn't divide into {tubelets}")
    return info


def _check_arguments(
    family: str | None,
    num_labels: int | None,
    num_heads: int | tuple[int, int] | None,
    num_frames: int,
    image_size: int,
) -> None:
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if isinstance(num_heads, tuple) and len(num_heads) != 2:
        raise ValueError(f"num_heads must be a number or a pair (encoder, decoder), got {num_heads}")
    counts = {"num_labels": num_labels, "num_frames": num_frames, "image_size": image_size}
    for name, value in [*counts.items(), *(("num_heads", heads) for heads in _as_tuple(num_heads))]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _family_of(weights: Weights, family: str | None) -> tuple[str, list[str]]:
    """The family, and what was assumed about it."""
    others, name = weights.others, weights.arguments.get("model")
    by_keys = None
    if any(re.match(OTHER_TARGETS["MVD's decoders"][0], key) for key in others) or "cls_token" in weights.encoder:
        by_keys = "mvd"
    elif any(re.match(OTHER_TARGETS["MME's decoders"][0], key) for key in others):
        by_keys = "mme"
    if by_keys is not None and family not in (None, by_keys):
        raise ValueError(f"family={family!r} was given, but the file's keys are those of {by_keys}")
    if family is not None or by_keys is not None:
        return family or by_keys or "", []
    name = name if isinstance(name, str) else ""
    if "masked_video_student" in name or "remove_pos_emb" in weights.arguments:
        return "mvd", ["family 'mvd' by the file's args"]
    if "videoms" in name or "motion_centric_masking" in weights.arguments:
        return "everest", ["family 'everest' by the file's args"]
    if "linear_probing" in weights.arguments:
        return "mme", ["family 'mme' by the file's args"]
    line = "family 'videomae' and its sinusoid positions assumed: keys and args don't tell (family='mvd' for MVD's)"
    return "videomae", [] if "pos_embed" in weights.encoder else [line]


def _stack_of(tensors: Mapping[str, Tensor], prefix: str, width: int) -> tuple[int, int]:
    """(depth, MLP width) of a stack of blocks. Raises ValueError for what isn't one, or has cosine attention."""
    numbers = {int(found[1]) for key in tensors if (found := re.match(rf"{re.escape(prefix)}(\d+)\.", key))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"missing: expected blocks {prefix}0, {prefix}1, … without a gap, got {sorted(numbers)}")
    scales = [key for key in tensors if key.startswith(prefix) and key.endswith("attn.scale")]
    if scales:
        raise ValueError(f"{scales[0]}: cosine attention (VideoMAE V2's) is nothing that transformers' VideoMAE has")
    hidden = {tensors[key].numel() for key in tensors if key.startswith(prefix) and key.endswith("mlp.fc1.bias")}
    return len(numbers), min(hidden, default=4 * width)


def _check_keys(weights: Weights, info: CheckpointInfo) -> None:
    """Raise ValueError that lists every key of the file that is missing, unexpected or of a wrong shape."""
    encoder, width = weights.encoder, info.width
    norms = {"norm"} if info.decoder is not None or not info.mean_pooling else set()
    norms |= {norm for norm in ("norm", "fc_norm") if info.mean_pooling and _has(encoder, f"{norm}.")}
    expected: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": tuple(encoder["patch_embed.proj.weight"].shape),
        "patch_embed.proj.bias": (width,),
        **_block_shapes(encoder, "blocks.", width, info.depth, info.hidden),
        **{f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")},
    }
    if info.labels is not None and info.decoder is None:
        expected |= {"head.weight": (info.labels, width), "head.bias": (info.labels,)}
    if "pos_embed" in encoder:
        expected["pos_embed"] = tuple(encoder["pos_embed"].shape)  # looked at where it is read
    if info.class_token and info.decoder is None:
        expected["cls_token"] = (1, 1, width)
    beside: dict[str, tuple[int, ...]] = {}
    others = {key: tensor for key, tensor in weights.others.items() if not matches(BESIDE, key)}
    if info.decoder is not None:
        others, (own, depth, _, hidden) = weights.others, info.decoder
        pixels = info.channels * info.tubelet_size * info.patch_size**2
        beside |= _block_shapes(others, "decoder.blocks.", own, depth, hidden)
        beside |= {"encoder_to_decoder.weight": (own, width), "mask_token": (1, 1, own)}
        beside |= {"decoder.norm.weight": (own,), "decoder.norm.bias": (own,)}
        beside |= {"decoder.head.weight": (pixels, own), "decoder.head.bias": (pixels,)}
        if _biased(encoder) != _biased(others):
            raise ValueError(
                "attn.q_bias in the encoder's or the decoder's blocks alone: transformers has both or none"
            )

    problems: dict[str, set[str]] = {"missing": set(), "unexpected": set(), "shapes": set()}
    for shapes, found in ((expected, encoder), (beside, others)):
        problems["missing"] |= shapes.keys() - found.keys()
        problems["unexpected"] |= found.keys() - shapes.keys()
        for key in shapes.keys() & found.keys():
            if tuple(found[key].shape) != shapes[key]:
                problems["shapes"].add(f"{key} {tuple(found[key].shape)} instead of {shapes[key]}")
    said = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"the checkpoint doesn't fit a VideoMAE; {'; '.join(said)}")


def _has(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _biased(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.endswith(("attn.q_bias", "attn.qkv.bias")) for key in tensors)


def _block_shapes(
    found: Mapping[str, Tensor], prefix: str, width: int, depth: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    shapes |= {f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    optional = {
        "attn.qkv.bias": 3 * width,
        "attn.q_bias": width,
        "attn.v_bias": width,
        "gamma_1": width,
        "gamma_2": width,
    }
    names = {key.removeprefix(prefix).partition(".")[2] for key in found if key.startswith(prefix)}
    for group in (("attn.qkv.bias",), ("attn.q_bias", "attn.v_bias"), ("gamma_1", "gamma_2")):
        if names & set(group):  # in one block, then in all
            shapes |= {name: (optional[name],) for name in group}
    return {f"{prefix}{block}.{name}": shape for block in range(depth) for name, shape in shapes.items()}


def _known_heads(width: int, heads: int | None, which: str) -> int:
    if heads is None:
        raise ValueError(
            f"no tensor shows how many heads the {which} of width {width} has: give num_heads (--num-heads)"
        )
    return heads


def _ignored_parts(weights: Weights, keeps_decoder: bool, mean_pooling: bool | None) -> tuple[str, ...]:
    parts = [name for name, keys in OTHER_TARGETS.items() if any(matches(keys[:1], key) for key in weights.others)]
    if not keeps_decoder and any(matches((r"decoder\.\D",), key) for key in weights.others):
        parts.append("the pixel decoder")
    if mean_pooling and "norm.weight" in weights.encoder:
        parts.append("the pre-training encoder's norm")
    return tuple(parts)


def _with_positions(weights: Weights, info: CheckpointInfo, num_frames: int, image_size: int) -> CheckpointInfo:
    """Which clips the model takes and which position table it adds, by the table in the file if there is one."""
    table = weights.encoder.get("pos_embed")
    if table is None:
        return info
    tubelet, patch = info.tubelet_size, info.patch_size
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != info.width:
        raise ValueError(f"expected pos_embed (1, N, {info.width}), got {tuple(table.shape)}")
    tokens = table.shape[1]
    arguments = weights.arguments
    steps, side = _quotient(int(num_frames), tubelet), _quotient(int(image_size), patch)
    guesses = [  # (time steps, tokens a side), the surest first
        (_quotient(arguments.get("num_frames"), tubelet), _quotient(arguments.get("input_size"), patch)),
        (steps, side),
        *((count, math.isqrt(tokens // count)) for count in (16 // tubelet, steps) if count),
        *((tokens // count**2, count) for count in (224 // patch, side) if count),
    ]
    fitting = next((guess for guess in guesses if guess[0] * guess[1] ** 2 == tokens), None)
    if fitting is None:
        raise ValueError(f"pos_embed has {tokens} rows, which fits no square clip: give its num_frames or image_size")
    if fitting != guesses[0]:  # the file doesn't say
        line = f"the {tokens} rows of pos_embed are taken for {fitting[0]}×{fitting[1]}×{fitting[1]} tubelets"
        info = replace(info, assumed=(*info.assumed, line))
    stored: Grid = (fitting[0], fitting[1], fitting[1])
    frames = stored[0] * tubelet if isinstance(num_frames, _Default) else num_frames
    size = stored[1] * patch if isinstance(image_size, _Default) else image_size
    position = "stored"
    if (frames // tubelet, size // patch) == fitting:  # a formula that gives the table makes a lighter folder
        if info.width % 16 == 0 and _same(table[0], mvd_table(stored, info.width)):
            position = "mvd"
        elif _same(table[0], sinusoid_table(tokens, info.width)):
            position = "sinusoid"
    return replace(info, num_frames=frames, image_size=size, stored_grid=stored, position=position)


def _quotient(value: Any, divisor: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6 and value % divisor == 0
    return value // divisor if whole else 0


def _same(table: Tensor, formula: Tensor) -> bool:
    return torch.allclose(table.float(), formula, rtol=0, atol=1e-6)


def _built(weights: Weights, info: CheckpointInfo) -> VideoMAEForPreTraining | VideoMAEForVideoClassification:
    """The model of a description, with every weight of the file in it."""
    arguments: dict[str, Any] = {
        "image_size": info.image_size,
        "patch_size": info.patch_size,
        "num_channels": info.channels,
        "num_frames": info.num_frames,
        "tubelet_size": info.tubelet_size,
        "hidden_size": info.width,
        "num_hidden_layers": info.depth,
        "num_attention_heads": info.heads,
        "intermediate_size": info.hidden,
        "layer_norm_eps": checkpoint_numbers.NORM_EPS,
        "use_mean_pooling": bool(info.mean_pooling),
        "qv_bias": _biased(weights.encoder),
    }
    if info.decoder is not None:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        arguments |= {f"decoder_{name}": value for name, value in zip(names, info.decoder, strict=True)}
    if info.num_labels is not None:
        arguments["num_labels"] = info.num_labels
    with torch.device("meta"):  # nothing is drawn at random that the file replaces
        model = info.model_class(VideoMAEConfig(**arguments))
    state = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in _renamed(weights, info).items()}
    model.load_state_dict(state, strict=not info.fresh, assign=True)
    for name in ("fc_norm", "classifier"):
        module = getattr(model, name, None)
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):  # info.fresh names it
            module.to_empty(device="cpu")
            model._init_weights(module)
    _fill_tables(model, info)
    numbers = {"norm_eps": checkpoint_numbers.NORM_EPS, "position": info.position, "class_token": info.class_token}
    checkpoint_numbers.equip(model, numbers, _extra_tensors(weights, info))
    task = "encoder" if info.decoder is None else "pretraining"
    model.config.everest = {"task": task, **checkpoint_numbers.numbers_of(model)}
    return model.float().requires_grad_(True).eval()


def _fill_tables(model: Any, info: CheckpointInfo) -> None:
    """transformers' own sinusoids, which the meta device left empty."""
    tokens = model.base_model.embeddings.num_patches
    model.base_model.embeddings.position_embeddings = sinusoid_table(tokens, info.width)[None]
    if info.decoder is not None:
        model.position_embeddings = sinusoid_table(tokens, info.decoder[0])[None]


def _extra_tensors(weights: Weights, info: CheckpointInfo) -> dict[str, Tensor]:
    tensors = {}
    if info.position == "stored":
        assert info.stored_grid is not None
        side = info.image_size // info.patch_size
        grid = (info.num_frames // info.tubelet_size, side, side)
        tensors["position_embeddings"] = resample_table(weights.encoder["pos_embed"][0].float(), info.stored_grid, grid)
    if info.class_token:
        tensors["class_token"] = weights.encoder["cls_token"]
    return tensors


def _renamed(weights: Weights, info: CheckpointInfo) -> dict[str, Tensor]:
    """The weights that are loaded, under transformers' names."""
    dropped = ["pos_embed", "cls_token"]  # they travel beside the weights
    if info.mean_pooling:  # as VideoMAE's own fine-tuning drops the pre-training encoder's norm
        dropped.append("norm")
    if info.decoder is not None or info.labels != info.num_labels:
        dropped.append("head")
    found = {**weights.encoder, **({} if info.decoder is None else weights.others)}
    state: dict[str, Tensor] = {}
    for key, tensor in found.items():
        module, _, part = key.rpartition(".")
        in_block = re.match(r"(decoder\.)?blocks\.(\d+)\.(.+)", key)
        if in_block is not None:
            stack = "decoder.decoder_layers" if in_block[1] else "videomae.encoder.layer"
            gamma = found.get(f"{key.removesuffix(in_block[3])}{_LAYER_SCALE.get(in_block[3].rpartition('.')[0])}")
            for name, part_of_it in _block_part(in_block[3], tensor, gamma):
                state[f"{stack}.{in_block[2]}.{name}"] = part_of_it
        elif key == "patch_embed.proj.weight" and tensor.ndim == 4:
            inflated = (tensor.float() / info.tubelet_size).unsqueeze(2).repeat(1, 1, info.tubelet_size, 1, 1)
            state[f"{_MODULES[module]}.{part}"] = inflated
        elif key not in dropped and module not in dropped:
            state[f"{_MODULES.get(module, module)}.{part}" if module else key] = tensor
    return state


def _block_part(name: str, tensor: Tensor, gamma: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """What one tensor of a block becomes, with qkv split and layer scale folded in: (name, tensor)."""
    module, _, part = name.rpartition(".")
    attention = "attention.attention"
    if module == "attn.qkv":
        for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            if part == "weight" or which != "key":  # a key bias adds the same to all of a query's products
                yield f"{attention}.{which}.{part}", third
    elif part in ("q_bias", "v_bias"):
        yield f"{attention}.{'query' if part == 'q_bias' else 'value'}.bias", tensor
    elif module in _MODULES:
        if gamma is not None:
            scale = gamma.double()
            tensor = (scale[:, None] if part == "weight" else scale) * tensor.double()
        yield f"{_MODULES[module]}.{part}", tensor
