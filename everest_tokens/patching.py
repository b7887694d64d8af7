"""One call makes a model select its tokens, one call undoes it: dispatch to the hosts and bookkeeping."""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.hosts.base import Host, PatchOptions, all_or_nothing, attach, detach
from everest_tokens.hosts.running import forward_of
from everest_tokens.hosts.trial_run import trial_run
from everest_tokens.policy import LiveSettings, SelectionPolicy, selector_from
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import ReRoSelector, Selector

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

# A float of its own identity: 0.9 that a caller passes must win over a recorded value, this default must not.
_MASK_RATIO = float("0.9")
# Hosts, each behind the module without which no model of its kind can exist: nobody waits for what isn't used.
_HOSTS = {
    "transformers_videomae.TransformersVideoMAE": "transformers.models.videomae.modeling_videomae",
    "transformers_encoders.VJEPA2": "transformers.models.vjepa2.modeling_vjepa2",
    "transformers_encoders.Vivit": "transformers.models.vivit.modeling_vivit",
    "transformers_encoders.Timesformer": "transformers.models.timesformer.modeling_timesformer",
    "timm_vit.TimmViT": "timm",
    "videomae_family.VideoMAEFamily": "torch",
    "videomae_family.MMActionViT": "torch",
}
_SELECTION_KEYS = {"selector", "mask_ratio", "visible", "frame_sampler"}
_KEEP_RATIO = {"pretraining": 0.3, "encoder": 0.6}  # ρ_pre of Tables 7 and 8


def patch_videomae(
    model: Model,
    selector: Selector | None = None,
    *,
    mask_ratio: float = _MASK_RATIO,
    visible: Selector | None = None,
    frame_sampler: InfoFrameSampler | None = None,
    drop_path: float = 0.0,
    num_frames: int = 16,
    tubelet_size: int = 2,
    temporal_embedding: str = "sincos",
    fused_attention: bool = False,
) -> Model:
    """Let only the informative tokens of a video reach the model's encoder and decoder (paper §4.1, Eq. 2 and 3).

    In place: parameters, state dict, classes' names, config class, outputs and forward parameters stay as they are (a
    timm model's patch projection becomes a new, 5-D parameter). Patching a patched model replaces the first patch. A
    setting of the selection that is not given (None, for all but `mask_ratio`) is taken from the patch before, or from
    `config.everest`, where a folder saved from a patched model of the same task keeps it, else it is the paper's
    default. `model.everest.frame_sampler = None` takes a restored sampler out. Several threads may run one model. A
    model whose forward can't run over fewer tokens is refused, and left as it was: patching ends with a forward of a
    copy without weights (0.2 CPU-seconds for ViT-L).

    Args:
        model: transformers' VideoMAEForPreTraining, VideoMAEForVideoClassification or VideoMAEModel, its V-JEPA 2
            (without the predictor), ViViT, or TimeSformer with joint attention; a model of the VideoMAE family's own
            repositories or mmaction2's VideoMAE; a timm VisionTransformer or Eva. PEFT, DDP and compiled wrappers are
            looked through.
        selector: (tokens (B, N, D), grid (t, h, w)) → kept (B, K) int64. Default: `ReRoSelector` with ρ_pre = 0.3 for a
            model with a pixel decoder, 0.6 for the others.
        mask_ratio: in pre-training ⌊(1 − mask_ratio)·N⌋ of the kept tokens are visible, 1 − ρ_pre·ρ_post of the paper.
        visible: a selector that chooses the visible tokens instead; the other kept tokens are the targets.
        frame_sampler: the model then takes tubelet_size·⌊α·τ⌋ frames and draws its τ time steps among them (§4.2).
        drop_path: stochastic depth of the last encoder block, rising linearly from 0 at the first; training only.
        num_frames, tubelet_size: timm only: frames of a clip, and how many of them the image's patch embedding is
            spread over.
        temporal_embedding: timm only: "sincos" adds a fixed table over the time steps to the image's position
            embedding, at its root mean square; "none" adds nothing.
        fused_attention: the family's own models only: `scaled_dot_product_attention` in their blocks.

    Returns:
        The model it was given; `model.everest` is the live `SelectionPolicy`.

    Raises:
        TypeError: a model that can't be patched (any more), or a selector with parameters or buffers.
        ValueError: settings that can't work on the model's clips, or recorded ones that can't be rebuilt.
    """
    root = unwrap(model)
    _refuse_sharded(root, "patch_videomae")
    host = host_of(root)
    host.check(root)
    _refuse_parts(root)
    options = PatchOptions(drop_path, num_frames, tubelet_size, temporal_embedding, fused_attention)
    host.check_options(root, options)
    if host.replaces_parameters(root, options):
        _refuse_ddp(model, "patch_videomae")

    task = host.task(root)
    recorded, numbers = _recorded(root, task)
    if mask_ratio is _MASK_RATIO and recorded:
        mask_ratio = recorded["mask_ratio"]
    parts: dict[str, Any] = {"selector": selector, "visible": visible, "frame_sampler": frame_sampler}
    for name, part in parts.items():
        if part is None and recorded and (recorded[name] is not None or name == "selector"):
            parts[name] = selector_from(recorded[name], name)
    parts["selector"] = ReRoSelector(_KEEP_RATIO[task]) if parts["selector"] is None else parts["selector"]
    policy = SelectionPolicy(task, mask_ratio=mask_ratio, **parts)
    policy.settings.update(host.numbers(root) if is_patched(root) else numbers)  # a live model's own win
    policy.check(host.geometry(root, options).grid)
    if policy.packs and drop_path:
        raise ValueError(f"drop_path={drop_path} would drop a whole packed batch at once, with {policy.selector!r}")

    with all_or_nothing(root):
        if is_patched(root):
            detach(host, root, options)
        attach(host, root, policy, options)
        trial_run(host, root)
    return model


def host_of(root: nn.Module) -> Host:
    """The host that knows this kind of model. Raises TypeError for a model that no host knows."""
    if is_patched(root):
        return root.everest.host  # type: ignore[union-attr, return-value]
    for name, library in _HOSTS.items():
        if isinstance(root, nn.Module) and library in sys.modules and _host(name).recognises(root):
            return _host(name)
    installed = (name for name, library in _HOSTS.items() if find_spec(library.partition(".")[0]))
    patchable = "; ".join(_host(name).patchable for name in installed)
    raise TypeError(f"cannot patch {type(root).__qualname__}; patchable are {patchable}")


@cache
def _host(name: str) -> Host:
    module, cls = name.split(".")
    return getattr(import_module(f"everest_tokens.hosts.{module}"), cls)()


def unpatch_videomae(model: Model) -> Model:
    """Give the model back exactly as it was before `patch_videomae`, its trained weights aside.

    What a converted checkpoint's numbers need (position table, norm eps, class token), patching restores for good.

    Raises:
        ValueError: the model is not patched. TypeError: it is FSDP-sharded.
    """
    root = _patched(model, "unpatch_videomae")
    host = host_of(root)
    if host.replaces_parameters(root, None):
        _refuse_ddp(model, "unpatch_videomae")
    with all_or_nothing(root):
        detach(host, root, None)
    return model


def select_tokens(
    model: nn.Module, pixel_values: Tensor, *, generator: torch.Generator | None = None
) -> TokenSelection:
    """What the patched model would select from these clips, without running its encoder.

    Args:
        model: a patched model, in `train()` or `eval()` as it is to be run (the frame sampler's draw differs).
        pixel_values: what the model's forward takes.
        generator: makes the random choices reproducible.

    Returns:
        A `TokenSelection` with its importance, to be looked at or passed back as `model(..., token_selection=)`.

    Raises:
        ValueError: the model is not patched, or pixels that its forward would refuse. TypeError: it is FSDP-sharded.
    """
    root = _patched(model, "select_tokens")
    with torch.no_grad(), forward_of(root.everest, generator=generator, only_selects=True) as current:
        host_of(root).embeds(root)(pixel_values)
    # Autocast caches the weights it casts: cast under no_grad they would get no gradient in a forward that follows.
    torch.clear_autocast_cache()
    return current.selection


def is_patched(root: Any) -> bool:
    """Whether `root` is the model that was patched, no part of one."""
    policy = getattr(root, "everest", None)
    return isinstance(policy, SelectionPolicy) and policy.root is root


def _patched(model: nn.Module, function: str) -> Any:
    root = unwrap(model)
    if not is_patched(root):
        raise ValueError(f"{type(root).__qualname__} is not patched: call patch_videomae(model) first")
    _refuse_sharded(root, function)
    return root


def unwrap(model: nn.Module) -> Any:
    """The model inside torch.compile, DDP and PEFT wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def _refuse_ddp(model: Any, function: str) -> None:
    """DDP would not synchronise the gradient of a projection that it doesn't know."""
    if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"the patch projection becomes a new parameter: call {function} on the model inside DistributedDataParallel"
            " and wrap it anew"
        )


def _refuse_parts(root: nn.Module) -> None:
    """A model has one policy, its parts included, and what an instance-level forward calls a patch wouldn't reach."""
    for name, module in root.named_modules():
        policy = module.__dict__.get("everest")
        if isinstance(policy, SelectionPolicy) and policy.root is not root:
            part = f"its part {name}" if name else "this model, or the model that it is part of,"
            raise TypeError(f"{part} is patched already: unpatch that first")
        if "forward" in module.__dict__:
            where = name or type(root).__qualname__
            how = "call patch_videomae before accelerate.prepare"
            if hasattr(module, "_hf_hook"):
                how = "load it without device_map, call patch_videomae, then accelerate's dispatch_model"
            raise TypeError(f"{where} has an instance-level forward, which a patch would not reach: {how}")


def _refuse_sharded(root: Any, function: str) -> None:
    """A sharded model's weights are whole only within its forward, and its classes are no longer the host's."""
    for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
        if {base.__name__ for base in type(module).__mro__} & {"FSDPModule", "FullyShardedDataParallel"}:
            raise TypeError(f"{name or type(root).__qualname__} is FSDP-sharded: call {function} before sharding it")


def _recorded(root: Any, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `config.everest` says of the selection, for the same task, and of the checkpoint's numbers; else empty."""
    live = root.everest.settings if is_patched(root) else None
    recorded = getattr(getattr(root, "config", None), "everest", live)
    if recorded is None or recorded is live:
        return live or {}, {}
    if not isinstance(recorded, dict):
        raise ValueError(f"config.everest must be a dict, got {recorded!r}: delete it to start from the defaults")
    numbers = {key: value for key, value in recorded.items() if key not in _SELECTION_KEYS | {"task"}}
    if isinstance(recorded, LiveSettings):
        whose, numbers = "written by another model that shares this config", {}
    elif not _SELECTION_KEYS & recorded.keys():  # of a converted checkpoint, never patched
        return {}, numbers
    elif recorded.get("task") != task:
        whose = f"recorded for {recorded.get('task')}, not for {task}"
    else:
        if missing := _SELECTION_KEYS - recorded.keys():
            raise ValueError(f"config.everest lacks {', '.join(sorted(missing))}: delete it to start from the defaults")
        return recorded, numbers
    logger.warning("config.everest was %s: the paper's defaults apply where nothing is given", whose)
    return {}, numbers
