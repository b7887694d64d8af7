"""The JSON of a benchmark: where and how it was measured, then its runs, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import transformers
from processes import world_size

import everest_tokens as et

RESULTS = Path(__file__).parent / "results"


def cpu_name() -> str:
    """What Linux calls this processor, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0]}" if names else f"CPU {platform.machine()}"


def header(script: str, arguments: Sequence[str], device: torch.device, **settings: Any) -> dict[str, Any]:
    """What a document of measurements says of where and how they were made; `settings` follow."""
    run = ["torchrun", "--nproc_per_node", str(world_size())] if dist.is_initialized() else ["python"]
    cuda = device.type == "cuda"
    return {
        "command": shlex.join([*run, f"benchmarks/{script}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "world_size": world_size(),
        "machine": platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, timm, et)}
        | {"python": platform.python_version()},
        # TF32 as it is found: of matrix products, and of the convolution that embeds the tubelets.
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32 if cuda else None,
        "optimizer": "AdamW(fused)",
        **settings,
        "runs": [],
    }


def write(document: dict[str, Any], out: Path) -> None:
    """All of it or nothing: a run that is killed leaves the cases before in valid JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, out)
