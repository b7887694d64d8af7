"""A host: what patching has to know of one kind of model. Attaching and detaching are the same for all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from everest_tokens.hosts.patched_class import Patched, patch_class, restore_class
from everest_tokens.hosts.running import forward_of, hook_forward, unhook_forward
from everest_tokens.hosts.stochastic_depth import restore_stochastic_depth, set_stochastic_depth
from everest_tokens.hosts.tubelet_embedding import Geometry
from everest_tokens.policy import LiveSettings, SelectionPolicy
from everest_tokens.tubelets import Grid


@dataclass(frozen=True)
class PatchOptions:
    """The settings of `patch_videomae` that concern the model rather than the selection, with its defaults."""

    drop_path: float = 0.0
    num_frames: int = 16
    tubelet_size: int = 2
    temporal_embedding: str = "sincos"
    fused_attention: bool = False


class Host:
    """One kind of model. `root` is the model that the user passes, without its wrappers.

    Attributes:
        patchable: what it covers, for messages.
        options: the fields of `PatchOptions` that it knows beside `drop_path`.
        channels_first: whether its clips are (B, C, T, H, W), else (B, T, C, H, W).
        argument: what the model calls its clips, for messages.
        prefix: how many tokens every clip has in front of the kept ones, where it can be packed.
    """

    patchable: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    channels_first: ClassVar[bool] = True
    argument: ClassVar[str] = "clips"
    prefix: ClassVar[int] = 0

    def recognises(self, root: nn.Module) -> bool:
        """Whether `root` is of this kind, as far as a look tells."""
        raise NotImplementedError

    def check(self, root: Any) -> None:
        """Raise TypeError or ValueError for an unpatched model whose parts a patch would silently replace."""

    def check_options(self, root: Any, options: PatchOptions) -> None:
        """Raise ValueError for a setting that this kind of model has no use or no place for."""
        for field in fields(options):
            value = getattr(options, field.name)
            if field.name not in ("drop_path", *self.options) and value != field.default:
                raise ValueError(f"{field.name}={value!r} has no meaning for {self.patchable}")
        rate = options.drop_path
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {rate!r}")
        for block in self.blocks(root) if rate else ():
            if not self.branch_ends(block):
                raise ValueError(f"drop_path={rate}: {type(block).__qualname__} has no stochastic depth of its own")

    def task(self, root: Any) -> str:
        """ "pretraining" for a model with a pixel decoder, else "encoder"."""
        return "encoder"

    def embeds(self, root: Any) -> Any:
        """The module that embeds clips, of the visible tokens only when it is patched: a `TubeletEmbedding` then."""
        raise NotImplementedError

    def geometry(self, root: Any, options: PatchOptions | None = None) -> Geometry:
        """What clips the model runs, patched with `options`, or as it is. Raises ValueError for impossible ones."""
        raise NotImplementedError

    def example(self, root: Any) -> tuple[tuple[int, ...], Grid, int]:
        """The shape of one clip as `forward` takes it, patched or not, its grid (τ, h, w), and a token's channels."""
        geometry = self.geometry(root)
        steps = root.everest.num_candidates(geometry.grid[0]) if hasattr(root, "everest") else geometry.grid[0]
        return (1, *geometry.clip(steps, self.channels_first).values()), geometry.grid, geometry.width

    def blocks(self, root: Any) -> Iterable[Any]:
        """The encoder's blocks."""
        raise NotImplementedError

    def branch_ends(self, block: Any) -> list[tuple[Any, str]]:
        """(module, attribute) of what ends a block's residual branches: a drop path, or a dropout to put one behind."""
        return [(block, name) for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(block, name)]

    def wraps(self, root: Any) -> list[tuple[nn.Module, type[Patched]]]:
        """(module, mixin): what must know the kept positions."""
        raise NotImplementedError

    def entries(self, root: Any) -> list[nn.Module]:
        """Modules whose class stays and whose call begins a forward."""
        return []

    def arguments(self, root: Any) -> dict[str, Any]:
        """What `forward` needs beside clips to run what the patched model runs, patched or not."""
        return {}

    def prepare_call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError where one of `entries` is called with what it can't do over the kept tokens.

        What else it needs is put into `kwargs`.
        """

    def packs(self, root: Any, selector: Any) -> list[tuple[nn.Module, type[Patched]]]:
        """(module, mixin): what else must know where clips end whose numbers of tokens differ.

        Raises TypeError or ValueError where this model can't run what such a selector keeps.
        """
        raise TypeError(
            f"{type(root).__qualname__} can't run clips of different numbers of tokens, which {selector} keeps:"
            " transformers' VideoMAE, V-JEPA 2 and ViViT can"
        )

    def check_packed(self, root: Any, selector: Any) -> None:
        """Raise where a patched model can't run clips whose numbers of tokens differ, by a selector or its name."""
        self.packs(root, selector)

    def unpack(self, module: Any, output: Any, current: forward_of) -> Any:
        """What one of `entries` gives, as what calls it takes it where the batch is packed; None for as it is."""
        return None

    def prepare(self, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
        """What this kind needs beyond swapped classes, before they are swapped."""

    def restore(self, root: Any, policy: SelectionPolicy, again: PatchOptions | None) -> None:
        """Undo `prepare`, after the classes are restored; `again`: as far as another patch won't need it.

        Raises TypeError where the model can't be given back as it is now.
        """

    def numbers(self, root: Any) -> dict[str, Any]:
        """What `config.everest` records beside the selection: what a checkpoint's numbers need."""
        return {}

    def replaces_parameters(self, root: Any, options: PatchOptions | None) -> bool:
        """Whether patching with `options`, or unpatching (None), makes a parameter that a wrapper doesn't know."""
        return False


def attach(host: Host, root: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
    """Make `root`, which is unpatched, select by `policy`."""
    policy.root, policy.host = root, host
    packed = host.packs(root, policy.selector) if policy.packs else []
    if policy.packs or isinstance(getattr(getattr(root, "config", None), "everest", None), LiveSettings):
        _give_own_config(root)
    host.prepare(root, policy, options)
    if options.drop_path:
        set_stochastic_depth([host.branch_ends(block) for block in host.blocks(root)], options.drop_path)
    wrapped, entries = [*host.wraps(root), *packed], host.entries(root)
    for module, mixin in wrapped:
        patch_class(module, mixin)
    for module in entries:
        hook_forward(module)
    for module in (root, *entries, *(module for module, _ in wrapped)):
        module.__dict__["everest"] = policy
    if hasattr(root, "config"):
        root.config.everest = policy.settings


def detach(host: Host, root: Any, again: PatchOptions | None) -> None:
    """Undo `attach`, on copies of patched modules too that something (PEFT's modules_to_save) put into the model."""
    policy = root.everest
    restore_stochastic_depth(root)
    for module in root.modules():
        unhook_forward(module)
        if isinstance(module, Patched):
            restore_class(module)
        module.__dict__.pop("everest", None)
    if getattr(getattr(root, "config", None), "everest", None) is policy.settings:
        del root.config.everest
    host.restore(root, policy, again)


@contextmanager
def all_or_nothing(root: nn.Module) -> Iterator[None]:
    """Give every module and config of a model its class and attributes back where the block raises."""
    classes = [(module, type(module)) for module in root.modules()]
    states = {id(module): vars(module) for module in root.modules()}
    for state in list(states.values()):
        if hasattr(config := state.get("config"), "__dict__"):
            states[id(config)] = vars(config)
        # Parameters, submodules and hooks lie one dict deeper.
        states |= {id(held): held for name, held in state.items() if name[0] == "_" and isinstance(held, dict)}
    before = [(state, dict(state)) for state in states.values()]
    try:
        yield
    except BaseException:
        for module, cls in classes:
            module.__class__ = cls
        for state, held in before:
            state.clear()
            state.update(held)
        raise


def _give_own_config(root: Any) -> None:
    """Models that were built from one config object need one each: it holds their settings and their attention."""
    shared, own = root.config, copy.copy(root.config)
    for module in root.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
