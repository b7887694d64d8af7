"""A host: what patching has to know of one kind of model. Attaching and detaching are the same for all."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.patched_class import Patched, patch_class, restore_class
from everest_tokens.hosts.running import forward_of, hook_forward, unhook_forward
from everest_tokens.policy import LiveSettings, SelectionPolicy
from everest_tokens.selection import TokenSelection
from everest_tokens.tubelets import Grid


class Host:
    """One kind of model. `root` is the model that the user passes, without its wrappers.

    Attributes:
        patchable: what it covers, for messages.
        options: the fields of `PatchOptions` that it knows.
        channels_first: whether its clips are (B, C, T, H, W), else (B, T, C, H, W).
    """

    patchable: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    channels_first: ClassVar[bool] = False

    def recognises(self, root: nn.Module) -> bool:
        """Whether `root` is of this kind, as far as a look tells."""
        raise NotImplementedError

    def check(self, root: Any) -> None:
        """Raise TypeError or ValueError for an unpatched model whose parts a patch would silently replace."""

    def task(self, root: Any) -> str:
        """ "pretraining" for a model with a pixel decoder, else "encoder"."""
        return "encoder"

    def embeds(self, root: Any) -> nn.Module:
        """The module that takes the clips as `root` does and embeds them, visible tokens only when it is patched."""
        raise NotImplementedError

    def grid(self, root: Any, options: PatchOptions) -> Grid:
        """The grid (τ, h, w) of the clips that the patched model will run. Raises ValueError for impossible options."""
        raise NotImplementedError

    def example(self, root: Any) -> tuple[tuple[int, ...], Grid, int]:
        """The shape of one clip as `forward` takes it, patched or not, its grid (τ, h, w), and a token's channels."""
        raise NotImplementedError

    def num_candidates(self, root: Any, grid: Grid) -> int:
        """How many time steps `root` takes for a clip of `grid`, patched or not."""
        return root.everest.num_candidates(grid[0]) if hasattr(root, "everest") else grid[0]

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        """(module, mixin): what must know the kept positions."""
        raise NotImplementedError

    def entries(self, root: Any) -> list[nn.Module]:
        """Modules whose class stays and whose call begins a forward."""
        return []

    def arguments(self, root: Any) -> dict[str, Any]:
        """What `forward` needs beside clips to run what the patched model runs, patched or not."""
        return {}

    def check_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError where one of `entries` is called with what it can't do over the kept tokens."""

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        """What this kind needs beyond swapped classes, before they are swapped."""

    def restore(self, root: Any, again: PatchOptions | None) -> None:
        """Undo `prepare`, after the classes are restored; `again`: as far as another patch won't need it."""

    def numbers(self, root: Any) -> dict[str, Any]:
        """What `config.everest` records beside the selection: what a checkpoint's numbers need."""
        return {}

    def replaces_parameters(self, root: Any, options: PatchOptions | None) -> bool:
        """Whether patching with `options`, or unpatching (None), makes a parameter that a wrapper doesn't know."""
        return False

    def check_detachable(self, root: Any) -> None:
        """Raise TypeError where the model can't be given back as it is now."""


def attach(host: Host, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
    """Make `root`, which is unpatched, select by `policy`."""
    policy.root, policy.host = root, host
    host.prepare(root, policy, options)
    wrapped, entries = host.wraps(root), host.entries(root)
    for module, mixin in wrapped:
        patch_class(module, mixin)
    for module in entries:
        hook_forward(module)
    for module in (root, *entries, *(module for module, _ in wrapped)):
        module.__dict__["everest"] = policy
    if hasattr(root, "config"):
        if isinstance(getattr(root.config, "everest", None), LiveSettings):
            _give_own_config(root)
        root.config.everest = policy.settings


def detach(host: Host, root: Any, again: PatchOptions | None) -> None:
    """Undo `attach`, on copies of patched modules too that something (PEFT's modules_to_save) put into the model."""
    policy = root.everest
    for module in root.modules():
        unhook_forward(module)
        if isinstance(module, Patched):
            restore_class(module)
        module.__dict__.pop("everest", None)
    if getattr(getattr(root, "config", None), "everest", None) is policy.settings:
        del root.config.everest
    host.restore(root, again)


def select(root: Any, clips: Tensor, generator: torch.Generator | None) -> TokenSelection:
    """Select without running the encoder."""
    with forward_of(root.everest, generator=generator, only_selects=True) as current:
        root.everest.host.embeds(root)(clips)
        selection = current.selection
    assert selection is not None  # the embedding's
    return selection


class Snapshot:
    """A model as it was, so that a patch that fails leaves no trace."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(module, type(module), _shallow(module.__dict__)) for module in root.modules()]
        configs = {id(config): config for _, _, state in self.modules if (config := state.get("config")) is not None}
        self.configs = [(config, dict(vars(config))) for config in configs.values() if hasattr(config, "__dict__")]

    def restore(self) -> None:
        """Give every module and config its class and attributes back."""
        for module, cls, state in self.modules:
            module.__class__ = cls
            for name, value in state.items():
                if isinstance(value, _Contents):
                    value.owner.clear()
                    value.owner.update(value)
                    state[name] = value.owner
            module.__dict__.clear()
            module.__dict__.update(state)
        for config, state in self.configs:
            vars(config).clear()
            vars(config).update(state)


class _Contents(dict[Any, Any]):
    """What a dict of a module (parameters, submodules, hooks) held."""

    owner: dict[Any, Any]


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    for name, value in state.items():
        copied[name] = value
        if isinstance(value, dict) and name.startswith("_"):
            copied[name] = contents = _Contents(value)
            contents.owner = value
    return copied


def _give_own_config(root: Any) -> None:
    """Two patched models that were built from one config object need one each: it holds their settings."""
    shared, own = root.config, copy.copy(root.config)
    for module in root.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
