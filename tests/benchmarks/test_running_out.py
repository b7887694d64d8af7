"""benchmarks/running_out.py: what is left of memory, and that taking more raises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from running_out import available_memory, is_out_of_memory, memory_limit


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def _host(root: Path, groups: str, **files: str) -> Path:
    """A host with 1000 kB of memory left, in these control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  1000 kB\nHugePages_Total:  0\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 1000 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max\n"}, 1000 * 1024),
        (
            "0::/a/b\n",  # the limit of the group above holds
            {
                "a/b/memory.max": "max\n",
                "a/memory.max": "900000\n",
                "a/memory.current": "600000\n",
                "a/memory.stat": "anon 500000\ninactive_file 50000\n",
            },
            350_000,
        ),
        (
            "4:cpu:/\n3:memory:/job\n0::/\n",  # version 1, whose group isn't visible from within its container
            {
                "memory/memory.limit_in_bytes": "800000\n",
                "memory/memory.usage_in_bytes": "700000\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
            },
            200_000,
        ),
    ],
)
def test_available_memory_is_the_control_groups_where_that_is_less(tmp_path, groups, files, expected):
    assert available_memory(_host(tmp_path, groups, **files)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux'")
def test_a_memory_limit_holds_within_and_ends_after(monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr("running_out.available_memory", lambda: 2**28)
    with memory_limit(0.5):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        assert 2**27 < soft < 2**40
        assert hard == before[1]
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**28, dtype=torch.uint8)
        assert torch.empty(2**26, dtype=torch.uint8).numel() == 2**26
    assert is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.empty(2**28, dtype=torch.uint8).numel() == 2**28
