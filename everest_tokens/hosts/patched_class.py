"""The class of a patched module: ours before its own, under its name, picklable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from everest_tokens.policy import SelectionPolicy
from everest_tokens.positions import ConstantTable

_MIXED: dict[tuple[type, type], type[nn.Module]] = {}  # one class for all modules of a kind, as theirs is


class Patched(nn.Module):
    """What `patch_class` puts before a module's own class; `super()` reaches that.

    Attributes:
        everest: the policy of the model that the module belongs to.
        patched_attributes: names of the other attributes that patching sets on the module.
    """

    everest: SelectionPolicy
    patched_attributes: ClassVar[tuple[str, ...]] = ()
    _everest_bases: tuple[type[Patched], type[nn.Module]]

    if TYPE_CHECKING:  # it has all that the module's own class has

        def __getattr__(self, name: str) -> Any: ...

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.move_constants()
        return self

    def move_constants(self) -> None:
        """Let constants that are neither parameters nor buffers follow the module: no forward copies them then."""
        for parameter in self.parameters():  # FSDP may have taken them
            for name, value in list(vars(self).items()):
                if isinstance(value, ConstantTable):
                    value.to(parameter.device)
                elif isinstance(value, Tensor) and not (value.is_meta or parameter.is_meta):
                    vars(self)[name] = value.to(parameter.device)
            return

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script, which takes no class that is made while running."""
        raise TypeError(
            f"{type(self).__qualname__} is patched: torch.jit.trace or torch.export it instead of scripting"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Made while running, the class can't be found by name: pickle and deepcopy rebuild it from the two bases."""
        return _blank, self._everest_bases, self.__dict__.copy()


def patch_class(module: nn.Module, mixin: type[Patched]) -> None:
    """Run `mixin` before the module's own class, in place."""
    module.__class__ = _mixed(mixin, type(module))
    module.move_constants()  # type: ignore[operator]


def restore_class(module: Patched) -> None:
    """Undo `patch_class`, and drop what patching set on the module."""
    for name in ("everest", *module.patched_attributes):
        module.__dict__.pop(name, None)
    module.__class__ = module._everest_bases[1]  # type: ignore[assignment]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or has again when it is unpatched."""
    return module._everest_bases[1] if isinstance(module, Patched) else type(module)


def _mixed(mixin: type[Patched], own: type[nn.Module]) -> type[nn.Module]:
    if (mixin, own) not in _MIXED:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _MIXED[mixin, own] = type(own.__name__, (mixin, own), {**names, "_everest_bases": (mixin, own)})
    return _MIXED[mixin, own]


def _blank(mixin: type[Patched], own: type[nn.Module]) -> nn.Module:
    mixed = _mixed(mixin, own)
    return mixed.__new__(mixed)
