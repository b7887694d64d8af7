"""Recipes: the settings of Tables 7 and 8 in YAML, overridden on the command line, checked before any data is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, VideoMAEConfig

import everest_tokens as et

# width, depth, heads, decoder width, decoder heads; the paper's ViT-S/B/L, and one for trying things out on a CPU
BACKBONES = {
    "tiny": (96, 4, 3, 48, 3),
    "small": (384, 12, 6, 192, 3),
    "base": (768, 12, 12, 384, 6),
    "large": (1024, 24, 16, 512, 8),
}
FreshOr = TypeVar("FreshOr", bound="Recipe")


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """What pre-training and fine-tuning have in common. Rates and epochs are the recipe's, see Tables 7 and 8."""

    train_list: str = _setting("", "list of videos, one a line: path [label] [start end]")
    data_root: str | None = _setting(None, "folder that the lists' paths are relative to; theirs if not given")
    backbone: str = _setting("base", f"size of the model: {', '.join(BACKBONES)}; also chooses the recipe's values")
    num_frames: int = _setting(16, "frames of a clip")
    size: int = _setting(224, "side of a frame in pixels")
    patch_size: int = _setting(16, "side of a patch in pixels, of a model that is built anew")
    stride: int = _setting(4, "frames from one sampled frame to the next; 0: one from each of equal segments")
    keep_ratio: float = _setting(0.3, "ρ_pre: share of the tokens that is kept")
    alpha: float = _setting(0.0, "α: InfoFrameSampler draws the clip from α times as many frames; 0 is off")
    flip: bool = _setting(True, "flip half of the clips")
    repeats: int = _setting(1, "clips that are cut out of each decoded video (repeated augmentation)")
    base_lr: float = _setting(1e-3, "learning rate at a total batch of 256 clips; the rate is scaled with the batch")
    batch_size: int = _setting(256, "clips in a step, over all processes and accumulated steps")
    epochs: float = _setting(100.0, "passes over the list")
    warmup_epochs: float = _setting(5.0, "epochs over which the learning rate rises")
    max_bad_fraction: float = _setting(0.01, "the run ends with an error if more than this share of the list is bad")


@dataclass
class PretrainingRecipe(Recipe):
    model: str | None = _setting(None, "folder, hub id or .pth to go on from; a new model of `backbone` if not given")
    mask_ratio: float = _setting(0.9, "1 − ρ_pre·ρ_post: the share of the tokens that the encoder doesn't see")
    decoder_depth: int = _setting(4, "blocks of the decoder of a new model")
    base_lr: float = _setting(3e-4, Recipe.__dataclass_fields__["base_lr"].metadata["help"])
    epochs: float = _setting(200.0, Recipe.__dataclass_fields__["epochs"].metadata["help"])
    warmup_epochs: float = _setting(40.0, Recipe.__dataclass_fields__["warmup_epochs"].metadata["help"])


@dataclass
class FinetuningRecipe(Recipe):
    model: str = _setting("", "pre-trained folder, hub id or .pth of the VideoMAE family")
    family: str | None = _setting(None, "of a .pth that doesn't tell: videomae, videomaev2, mme, mvd or everest")
    num_labels: int = _setting(0, "classes of the data set")
    eval_list: str | None = _setting(None, "list of videos for an evaluation after each epoch, one central clip each")
    keep_ratio: float = _setting(0.6, Recipe.__dataclass_fields__["keep_ratio"].metadata["help"])
    layer_decay: float = _setting(0.75, "factor on the learning rate from a block to the one below it")
    label_smoothing: float = _setting(0.1, "share of the target that is spread over all classes")
    drop_path: float = _setting(0.1, "stochastic depth of the last block")
    randaugment: list[float] = _setting([9.0, 0.5], "RandAugment's magnitude and standard deviation; 0 0 is off")  # noqa: RUF009
    erasing: float = _setting(0.0, "probability of erasing a box of a clip")
    mixup: float = _setting(0.0, "α of mixup; 0 is off")
    cutmix: float = _setting(0.0, "α of cutmix; 0 is off")


class SettingsParser(HfArgumentParser):
    """Says what is wrong with a setting in one line, not after a page of usage."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parse(kind: type[FreshOr], section: str, arguments: list[str], defaults: dict[str, Any]) -> tuple[FreshOr, Any]:
    """Read `RECIPE.yaml [--setting value …]`.

    Args:
        section: of the YAML file, "pretraining" or "finetuning".
        arguments: of the command line; they win over the file.
        defaults: of transformers' TrainingArguments, which are settings too; file and command line win over them.

    Returns:
        (recipe, TrainingArguments), checked and with learning rate, batch and warm-up worked out as far as the length
        of the list doesn't matter.

    Raises:
        ValueError: a setting that doesn't exist or can't be, by its name.
    """
    parser = SettingsParser([kind, TrainingArguments], description=f"Settings of {section}, see Tables 7 and 8.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="settings, see examples/recipes/")
    parser.set_defaults(**defaults)
    values = read_section(parser, section, arguments)
    recipe = kind(**{item.name: values[item.name] for item in fields(kind)})
    training = TrainingArguments(**{item.name: values[item.name] for item in fields(TrainingArguments) if item.init})
    _check(recipe)
    _work_out(recipe, training, rate_given=any(item.startswith("--learning_rate") for item in arguments))
    return recipe, training


def read_section(parser: HfArgumentParser, section: str, arguments: list[str]) -> dict[str, Any]:
    """The values of a parser with a positional `recipe`: its defaults, the file's section, the command line.

    Raises:
        ValueError: a setting that doesn't exist, by its name and where it stands.
    """
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ValueError(f"no such setting: {' '.join(unknown)} (see --help)")
    known = {action.dest for action in parser._actions}
    from_file = _read(Path(given.recipe), section, _backbone_in(arguments), known) if given.recipe else []
    rest = [argument for argument in arguments if argument != given.recipe]
    return vars(parser.parse_args([*from_file, *rest]))


def _backbone_in(arguments: list[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == "--backbone" and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith("--backbone="):
            return argument.partition("=")[2]
    return None


def _read(path: Path, section: str, backbone: str | None, known: set[str]) -> list[str]:
    """A section of a YAML file as command-line arguments, with the values of the backbone."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no readable recipe: {' '.join(str(error).split())}") from error
    settings = content.get(section) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no section {section!r}")
    by_backbone = settings.pop("by_backbone", None) or {}
    chosen = backbone or settings.get("backbone") or Recipe.backbone
    for name in [*settings, *(name for values in by_backbone.values() for name in values)]:
        if name not in known:
            raise ValueError(f"{path}: no such setting in {section}: {name}")
    settings |= by_backbone.get(chosen, {})
    arguments: list[str] = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
    return arguments


def _check(recipe: Recipe) -> None:
    """Raise ValueError, naming the setting, for values that can't be."""
    least = dict.fromkeys(("num_frames", "size", "patch_size", "repeats", "batch_size", "decoder_depth"), 1)
    least |= {"stride": 0, "alpha": 0, "mixup": 0, "cutmix": 0, "warmup_epochs": 0}
    shares = ("keep_ratio", "mask_ratio", "max_bad_fraction", "label_smoothing", "drop_path", "erasing", "layer_decay")
    for name, value in vars(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name in least and value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if name in ("base_lr", "epochs") and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if name in shares and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if recipe.backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {recipe.backbone!r}")
    if not recipe.train_list:
        raise ValueError("train_list is not set: a file with a video a line")
    if recipe.batch_size % recipe.repeats:
        raise ValueError(f"batch_size {recipe.batch_size} is no multiple of repeats {recipe.repeats}")
    if isinstance(recipe, FinetuningRecipe):
        if not recipe.model:
            raise ValueError("model is not set: a pre-trained folder, hub id or .pth to fine-tune")
        if recipe.num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, got {recipe.num_labels}: the classes of train_list")
        if len(recipe.randaugment) != 2:
            raise ValueError(f"randaugment must be a magnitude and a standard deviation, got {recipe.randaugment}")


def _work_out(recipe: Recipe, training: TrainingArguments, rate_given: bool) -> None:
    """lr = base_lr · batch / 256, and how the batch is spread over processes and accumulated steps."""
    parts = training.world_size * max(1, training.n_gpu) * training.gradient_accumulation_steps
    share, rest = divmod(recipe.batch_size, parts)
    if share == 0 or rest:
        raise ValueError(
            f"batch_size {recipe.batch_size} can't be spread over {training.world_size} processes ×"
            f" {training.gradient_accumulation_steps} accumulated steps: expected a multiple of {parts}"
        )
    videos, rest = divmod(share, recipe.repeats)
    if rest:
        raise ValueError(
            f"batch_size {recipe.batch_size}: {share} clips a step, no multiple of repeats {recipe.repeats}"
        )
    training.per_device_train_batch_size = videos
    training.num_train_epochs = recipe.epochs
    if not rate_given:
        training.learning_rate = recipe.base_lr * recipe.batch_size / 256
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not training.fp16:
        training.bf16 = True


def set_warmup(training: TrainingArguments, recipe: Recipe, videos: int) -> None:
    """The warm-up in steps, now that the list's length is known. Raises ValueError for a list shorter than a batch."""
    batch = recipe.batch_size // recipe.repeats
    if videos < batch:
        raise ValueError(f"train_list has {videos} videos, fewer than a batch of {batch}: lower batch_size")
    training.warmup_steps = round(recipe.warmup_epochs * (videos // batch))


@contextmanager
def loading(model: str) -> Iterator[None]:
    """What goes wrong within is about the setting `model`, and told in one line: a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        what = "can't be loaded" if Path(model).exists() else "is no file, no folder and no model on the hub"
        raise ValueError(f"model: {model} {what}: {' '.join(str(error).split())}") from error


def check_fit(model: Any, recipe: Any) -> None:
    """Raise ValueError for a model that takes other clips than the recipe gives."""
    takes, gives = (model.config.num_frames, model.config.image_size), (recipe.num_frames, recipe.size)
    if takes != gives:
        raise ValueError(
            f"model: {recipe.model} takes {takes[0]} frames of {takes[1]}² pixels, the recipe gives"
            f" num_frames {gives[0]} and size {gives[1]}"
        )


def frames_of(model: Any) -> int:
    """Frames that a patched model takes, more with a frame sampler than its own."""
    tubelet = model.config.tubelet_size
    return tubelet * model.everest.num_candidates(model.config.num_frames // tubelet)


def selection_of(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `patch_videomae`."""
    sampler = et.InfoFrameSampler(recipe.alpha) if recipe.alpha else None
    return {"selector": et.ReRoSelector(recipe.keep_ratio), "frame_sampler": sampler}


def config_of(recipe: Recipe, **overrides: Any) -> VideoMAEConfig:
    """A new model's."""
    width, depth, heads, decoder_width, decoder_heads = BACKBONES[recipe.backbone]
    return VideoMAEConfig(
        image_size=recipe.size,
        patch_size=recipe.patch_size,
        num_frames=recipe.num_frames,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=decoder_width,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_width,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
        **overrides,
    )
