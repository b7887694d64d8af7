"""Token selection for video transformers: EVEREST (Hwang et al., ICML 2024) around the model that you have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everest_tokens.budgets import EnergyBudget, RunLengthSelector
    from everest_tokens.checkpoints import load_videomae
    from everest_tokens.flops import FlopCount, count_flops
    from everest_tokens.frame_sampling import InfoFrameSampler
    from everest_tokens.patching import patch_videomae, select_tokens, unpatch_videomae
    from everest_tokens.selection import TokenSelection
    from everest_tokens.selectors import RandomSelector, ReRoSelector, RunningCellSelector, TubeSelector

__version__ = "0.1.0"

__all__ = [
    "EnergyBudget",
    "FlopCount",
    "InfoFrameSampler",
    "RandomSelector",
    "ReRoSelector",
    "RunLengthSelector",
    "RunningCellSelector",
    "TokenSelection",
    "TubeSelector",
    "count_flops",
    "load_videomae",
    "patch_videomae",
    "select_tokens",
    "unpatch_videomae",
]

# Names load with their module when they are first used: nobody waits for transformers who only wants --help.
_MODULES = {
    **dict.fromkeys(("EnergyBudget", "RunLengthSelector"), "budgets"),
    "FlopCount": "flops",
    "InfoFrameSampler": "frame_sampling",
    "TokenSelection": "selection",
    "count_flops": "flops",
    "load_videomae": "checkpoints",
    **dict.fromkeys(("patch_videomae", "select_tokens", "unpatch_videomae"), "patching"),
    **dict.fromkeys(("RandomSelector", "ReRoSelector", "RunningCellSelector", "TubeSelector"), "selectors"),
}


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
