"""The settings of `patch_videomae` that concern the model rather than the selection."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class PatchOptions:
    """As in `patch_videomae`, with its defaults; each host takes the ones that it knows."""

    drop_path: float = 0.0
    num_frames: int = 16
    tubelet_size: int = 2
    temporal_embedding: str = "sincos"
    fused_attention: bool = False

    def refuse_others(self, host: str, *known: str) -> None:
        """Raise ValueError for a setting that was changed and that `host` doesn't know."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in known and value != field.default:
                raise ValueError(f"{field.name}={value!r} has no meaning for {host}")
