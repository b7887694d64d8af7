"""Token selection for video transformers: EVEREST (Hwang et al., ICML 2024) around the model that you have."""

from everest_tokens.checkpoints import load_videomae
from everest_tokens.flops import FlopCount, count_flops
from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.patching import patch_videomae, select_tokens, unpatch_videomae
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import RandomSelector, ReRoSelector, RunningCellSelector, TubeSelector

__version__ = "0.1.0"

__all__ = [
    "FlopCount",
    "InfoFrameSampler",
    "RandomSelector",
    "ReRoSelector",
    "RunningCellSelector",
    "TokenSelection",
    "TubeSelector",
    "count_flops",
    "load_videomae",
    "patch_videomae",
    "select_tokens",
    "unpatch_videomae",
]
