"""Memory that runs out: on the CPU too it raises, so that a benchmark can record it and go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# How it is said where it isn't torch.OutOfMemoryError: by torch's allocator on the CPU, C++, CUDA and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the host, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def memory_limit(share: float) -> Iterator[None]:
    """Within it this process can take `share` of the host's available memory; more raises. On Linux alone.

    Linux hands out more memory than there is and kills whoever then uses it, so that nothing is left to report. Under
    the limit (RLIMIT_DATA, the soft one) torch's allocator is refused, and raises what `is_out_of_memory` knows.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    mapped = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(mapped.split()[1]) * 1024 + int(share * available_memory())
    for other in before:
        limit = limit if other == resource.RLIM_INFINITY else min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that can still be used: the machine's or, if fewer, its control group's. Linux."""
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, most, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, most, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        groups = mount / group.lstrip("/")
        for folder in (groups, *groups.parents):  # a limit above holds for all groups below
            if mount not in (folder, *folder.parents) or not (folder / most).is_file():
                continue
            limit = (folder / most).read_text().strip()
            if limit != "max":
                available = min(available, int(limit) - int((folder / used).read_text()) + _cached(folder))
    return available


def _cached(group: Path) -> int:
    """Bytes of files that a control group's usage counts and that the kernel gives back when asked."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("total_inactive_file", fields["inactive_file"]))
