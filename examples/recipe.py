"""Recipes: the settings of Tables 7 and 8 in YAML, overridden on the command line, checked before any data is read."""

from __future__ import annotations

import json
import logging
import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from checkpoints import unreported
from data import Data
from keep_ratios import check_ratios
from trainer_settings import chosen, settle
from transformers import HfArgumentParser, TrainingArguments, VideoMAEConfig
from transformers.trainer_utils import IntervalStrategy

import everest_tokens as et

logger = logging.getLogger(__name__)

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

    section: ClassVar[str]  # of the YAML file

    data: str | None = _setting(None, "folder of videos, Hugging Face data set or WebDataset shards, see data.py")
    train_list: str | None = _setting(None, "in place of data a list of videos, one a line: path [label] [start end]")
    data_root: str | None = _setting(None, "folder that the lists' paths are relative to; theirs if not given")
    limit: int = _setting(0, "a trial of the whole way: one epoch on so many clips, in a folder of its own; 0 is off")
    streaming: bool = _setting(False, "read a data set of the hub without downloading it")
    clips_per_epoch: int = _setting(0, "clips of a stream that make an epoch; 0: as many as it says that it has")
    shuffle_buffer: int = _setting(100, "clips of a stream, undecoded, among which each worker draws")
    backbone: str = _setting("base", f"size of the model: {', '.join(BACKBONES)}; also chooses the recipe's values")
    num_frames: int = _setting(16, "frames of a clip")
    size: int = _setting(224, "side of a frame in pixels")
    patch_size: int = _setting(16, "side of a patch in pixels, of a model that is built anew")
    stride: int = _setting(4, "frames from one sampled frame to the next; 0: one from each of equal segments")
    keep_ratio: float | None = _setting(0.3, "ρ_pre: share of the tokens that is kept")
    keep_tokens: int | None = _setting(None, "in place of keep_ratio the number of tokens that are kept")
    anchor: str | None = _setting(None, "first or middle: all tokens of that time step are among the kept")
    camera: str = _setting("ignore", "compensate: what the camera's own motion changes is no change")
    alpha: float = _setting(0.0, "α: InfoFrameSampler draws the clip from α times as many frames; 0 is off")
    flip: bool = _setting(True, "flip half of the clips")
    repeats: int = _setting(1, "clips that are cut out of each decoded video (repeated augmentation)")
    base_lr: float = _setting(1e-3, "learning rate at a total batch of 256 clips; the rate is scaled with the batch")
    batch_size: int = _setting(256, "clips in a step, over all processes and accumulated steps")
    epochs: float = _setting(100.0, "passes over the list")
    warmup_epochs: float = _setting(5.0, "epochs over which the learning rate rises")
    picture_steps: int = _setting(0, "draw what is kept of a fixed clip every so many steps, for report_to; 0 is off")
    max_bad_fraction: float = _setting(0.01, "the run ends with an error if more than this share of the list is bad")
    max_bad_steps: int = _setting(3, "the run ends with status 3 after so many steps in a row that aren't finite")


@dataclass
class PretrainingRecipe(Recipe):
    section = "pretraining"

    model: str | None = _setting(None, "folder, hub id or .pth to go on from; a new model of `backbone` if not given")
    mask_ratio: float = _setting(0.9, "1 − ρ_pre·ρ_post: the share of the tokens that the encoder doesn't see")
    decoder_depth: int = _setting(4, "blocks of the decoder of a new model")
    base_lr: float = _setting(3e-4, Recipe.__dataclass_fields__["base_lr"].metadata["help"])
    epochs: float = _setting(200.0, Recipe.__dataclass_fields__["epochs"].metadata["help"])
    warmup_epochs: float = _setting(40.0, Recipe.__dataclass_fields__["warmup_epochs"].metadata["help"])


@dataclass
class FinetuningRecipe(Recipe):
    section = "finetuning"

    model: str | None = _setting(None, "pre-trained folder, hub id or .pth; a new model of `backbone` if not given")
    family: str | None = _setting(None, "of a .pth that doesn't tell: videomae, videomaev2, mme, mvd or everest")
    num_labels: int = _setting(0, "classes of the lists; data says how many it has")
    eval_list: str | None = _setting(None, "list of videos for an evaluation after each epoch, one central clip each")
    val_fraction: float = _setting(0.0, "share of the videos that is held out for this, where none are given")
    balanced: bool = _setting(False, "draw all labels equally often")
    early_stopping: int = _setting(0, "end after so many evaluations without a better accuracy; 0 is off")
    keep_ratio: float | None = _setting(0.6, Recipe.__dataclass_fields__["keep_ratio"].metadata["help"])
    keep_ratios: list[float] = _setting([], "draw each step's share of the tokens from these, see keep_ratios.py")  # noqa: RUF009
    layer_decay: float = _setting(0.75, "factor on the learning rate from a block to the one below it")
    label_smoothing: float = _setting(0.1, "share of the target that is spread over all classes")
    drop_path: float = _setting(0.1, "stochastic depth of the last block")
    randaugment: list[float] = _setting([9.0, 0.5], "RandAugment's magnitude and standard deviation; 0 0 is off")  # noqa: RUF009
    erasing: float = _setting(0.0, "probability of erasing a box of a clip")
    mixup: float = _setting(0.0, "α of mixup; 0 is off")
    cutmix: float = _setting(0.0, "α of cutmix; 0 is off")


class SettingsParser(HfArgumentParser):
    """Takes whole names alone, and says what is wrong with a setting in one line, not after a page of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parse(kind: type[FreshOr], arguments: list[str], defaults: dict[str, Any]) -> tuple[FreshOr, TrainingArguments]:
    """Read `RECIPE.yaml [--setting value …]`.

    Args:
        kind: of recipe, PretrainingRecipe or FinetuningRecipe.
        arguments: of the command line; they win over the file.
        defaults: of transformers' TrainingArguments, which are settings too; file and command line win over them.

    Returns:
        (recipe, TrainingArguments), checked and with learning rate and batch worked out; the warm-up comes with the
        length of the list (`set_warmup`).

    Raises:
        ValueError: a setting that doesn't exist, can't be or would not be heeded, by its name.
    """
    parser = SettingsParser([kind, TrainingArguments], description=f"Settings of {kind.section}, see Tables 7 and 8.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="settings, see examples/recipes/")
    parser.set_defaults(**defaults)
    values, line, file = read_section(parser, kind.section, arguments)
    if values["limit"]:
        values |= {"epochs": 1.0, "warmup_epochs": 0.0, "output_dir": f"{values['output_dir']}-limit{values['limit']}"}
    in_force = chosen("keep_ratio", "keep_tokens", line, file)
    values["keep_tokens" if in_force == "keep_ratio" else "keep_ratio"] = None
    recipe = kind(**{item.name: values[item.name] for item in fields(kind)})
    _check(recipe)
    for name in sorted(line & {"patch_size", "decoder_depth"}) if values["model"] else ():
        raise ValueError(f"{name} is of a model that is built anew, {values['model']} has its own")
    training = TrainingArguments(**settle(values, line, file))
    training.per_device_train_batch_size = _videos_at_once(recipe, training)
    return recipe, training


def read_section(
    parser: HfArgumentParser, section: str, arguments: list[str]
) -> tuple[dict[str, Any], set[str], set[str]]:
    """The values of a parser with a positional `recipe`: its defaults, the file's section, the command line.

    Returns:
        (the values of all settings, names that the command line gives, names that the file gives).

    Raises:
        ValueError: a setting that doesn't exist, by its name and where it stands.
    """
    line, path = _given(parser, arguments)
    file, _ = _given(parser, _read(Path(path), section, line.get("backbone"), parser)) if path else ({}, None)
    return vars(parser.parse_args([])) | file | line, set(line), set(file)


def _given(parser: HfArgumentParser, arguments: list[str]) -> tuple[dict[str, Any], str | None]:
    """The settings that the arguments name, and the recipe's file."""
    nothing = object()  # argparse leaves alone what a namespace has
    blank = Namespace(**dict.fromkeys((action.dest for action in parser._actions), nothing))
    found, unknown = parser.parse_known_args(arguments, blank)
    if unknown:
        raise ValueError(f"no such setting: {' '.join(unknown)} (see --help)")
    values = {name: value for name, value in vars(found).items() if value is not nothing}
    return values, values.pop("recipe", None)


def _read(path: Path, section: str, backbone: str | None, parser: HfArgumentParser) -> list[str]:
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
    defaults = vars(parser.parse_args([]))
    for name in [*settings, *(name for values in by_backbone.values() for name in values)]:
        if name not in defaults:
            raise ValueError(f"{path}: no such setting in {section}: {name}")
    settings |= by_backbone.get(chosen, {})
    arguments: list[str] = []
    for name, value in settings.items():
        if value is None and defaults[name] is not None:
            raise ValueError(f"{path}: {name} has no value; without its line it is {defaults[name]}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return arguments


def _check(recipe: Recipe) -> None:
    """Raise ValueError, naming the setting, for values that can't be."""
    least = dict.fromkeys(
        ("num_frames", "size", "patch_size", "repeats", "batch_size", "decoder_depth", "max_bad_steps"), 1
    )
    least |= {"stride": 0, "alpha": 0, "mixup": 0, "cutmix": 0, "warmup_epochs": 0, "limit": 0, "clips_per_epoch": 0}
    least |= {"shuffle_buffer": 1, "early_stopping": 0, "picture_steps": 0}
    shares = (
        "val_fraction",
        "keep_ratio",
        "mask_ratio",
        "max_bad_fraction",
        "label_smoothing",
        "drop_path",
        "erasing",
        "layer_decay",
    )
    for name, value in vars(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if name in least and value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
        if name in ("base_lr", "epochs") and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if name in shares and value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if recipe.backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {recipe.backbone!r}")
    if recipe.data is None and recipe.train_list is None:
        raise ValueError("data is not set: a folder of videos (or train_list: a file with a video a line)")
    if recipe.data is not None and recipe.train_list is not None:
        raise ValueError("data and train_list both say what is trained on: give one of them")
    if recipe.data is None:
        for name in ("streaming", "clips_per_epoch"):
            if getattr(recipe, name):
                raise ValueError(f"{name} goes with data, not with lists")
    if recipe.batch_size % recipe.repeats:
        raise ValueError(f"batch_size {recipe.batch_size} is no multiple of repeats {recipe.repeats}")
    selection_of(recipe)  # refuses what a selector can't be
    if isinstance(recipe, FinetuningRecipe):
        if recipe.data is None and recipe.num_labels < 2:
            raise ValueError(f"num_labels must be at least 2, got {recipe.num_labels}: the classes of train_list")
        if len(recipe.randaugment) != 2:
            raise ValueError(f"randaugment must be a magnitude and a standard deviation, got {recipe.randaugment}")
        if recipe.keep_ratios:
            check_ratios(recipe.keep_ratios)
            if recipe.keep_ratio is None:
                raise ValueError(f"keep_ratios: keep_tokens {recipe.keep_tokens} says what is kept: give keep_ratio")
            if recipe.keep_ratio not in recipe.keep_ratios:
                logger.warning("keep_ratio %g, which is evaluated and saved, is none of keep_ratios", recipe.keep_ratio)


def _videos_at_once(recipe: Recipe, training: TrainingArguments) -> int:
    """Videos of a device's forward: batch_size spread over processes, accumulated steps and repeats."""
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
    return videos


def fit(training: TrainingArguments, recipe: Recipe, data: Data) -> None:
    """Fit what the data decides: labels, warm-up, and with `data` or `limit` a batch of no more clips than there are.

    Each change has a line in the log.

    Raises:
        ValueError: the data is less than a batch, or an evaluation is asked for and nothing held out.
    """
    if isinstance(recipe, FinetuningRecipe):
        if recipe.data is not None:
            if recipe.num_labels not in (0, len(data.labels)):
                logger.warning("num_labels is %d, as many as %s has", len(data.labels), recipe.data)
            recipe.num_labels = len(data.labels)
        if not data.held_out:
            if training.load_best_model_at_end or training.eval_strategy == IntervalStrategy.STEPS:
                raise ValueError("nothing is held out for the evaluation during training: give val_fraction")
            training.eval_strategy, training.do_eval = IntervalStrategy.NO, False
        if recipe.early_stopping and not (
            training.load_best_model_at_end and training.metric_for_best_model == "accuracy"
        ):
            raise ValueError("early_stopping needs load_best_model_at_end, and metric_for_best_model accuracy")
        training.restore_callback_states_from_checkpoint = bool(recipe.early_stopping)  # how many were no better
    if recipe.data is not None or recipe.limit:
        parts = training.world_size * max(1, training.n_gpu) * training.gradient_accumulation_steps * recipe.repeats
        most = data.videos * recipe.repeats // parts * parts
        if 0 < most < recipe.batch_size:
            logger.warning("batch_size is %d, there are no more clips", most)
            if training.learning_rate == recipe.base_lr * recipe.batch_size / 256:
                training.learning_rate = recipe.base_lr * most / 256
            recipe.batch_size = most
            training.per_device_train_batch_size = _videos_at_once(recipe, training)
    set_warmup(training, recipe, data.videos)


def set_warmup(training: TrainingArguments, recipe: Recipe, videos: int) -> None:
    """The warm-up in steps, now that the list's length is known. Raises ValueError for a list shorter than a batch."""
    batch = recipe.batch_size // recipe.repeats
    if videos < batch:
        what = "train_list" if recipe.data is None else f"data {recipe.data}"
        raise ValueError(f"{what} has {videos} videos, fewer than a batch of {batch}: lower batch_size")
    training.warmup_steps = round(recipe.warmup_epochs * (videos // batch))


@contextmanager
def loading(model: str) -> Iterator[None]:
    """What goes wrong within is about the setting `model`, and told in one line: a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        what = "can't be loaded" if Path(model).exists() else "is no file, no folder and no model on the hub"
        raise ValueError(f"model: {model} {what}: {' '.join(str(error).split())}") from error


def load_trained(kind: Any, model: str, new: tuple[str, ...] = (), **settings: Any) -> Any:
    """Load a folder or a hub model, of which weights under the prefixes `new` may be random and nothing else.

    Raises:
        ValueError: there is no such model, or it lacks other weights.
    """
    with loading(model), unreported():
        loaded, found = kind.from_pretrained(model, output_loading_info=True, **settings)
    others = found["mismatched_keys"]  # (name, shape, shape), or names in older versions
    names = [*found["missing_keys"], *(other if isinstance(other, str) else other[0] for other in others)]
    if random := sorted(name for name in names if not name.startswith(new)):
        some = ", ".join(random[:3]) + (", …" if len(random) > 3 else "")
        raise ValueError(f"model: {model} lacks weights of a {kind.__name__}, which would be random: {some}")
    return loaded


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
    """Keyword arguments of `patch_videomae`. Raises ValueError, naming the setting, for values that can't be."""
    sampler = et.InfoFrameSampler(recipe.alpha) if recipe.alpha else None
    selector = et.ReRoSelector(
        recipe.keep_ratio, anchor=recipe.anchor, keep_tokens=recipe.keep_tokens, camera=recipe.camera
    )
    return {"selector": selector, "frame_sampler": sampler}


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
        **{"use_mean_pooling": False, **overrides},
    )
