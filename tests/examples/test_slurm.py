"""The batch scripts with stand-ins for Slurm's commands: what is trained with, and what a SIGTERM comes to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples" / "slurm").glob("*.sbatch"))
COMMANDS = {
    # A run that SIGTERM ends after its checkpoint, as torchrun tells it, or that ends by itself.
    "srun": """echo "$@" > arguments; echo $BASHPID > pid
trap 'echo checkpoint > checkpoint; exit 1' TERM
for _ in $(seq 300); do [[ -f finish ]] && exit $(cat finish); sleep 0.02; done""",
    "scancel": """[[ $1 == --signal=TERM && $2 == 7 ]] && kill -TERM $(cat pid)""",
    "scontrol": """if [[ $1 == requeue ]]; then echo $2 > requeued; else echo node1; fi""",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("ends", "status", "requeued"), [("SIGTERM", 1, True), ("0", 0, False), ("1", 1, False)]
)  # fmt: skip
def test_only_a_run_that_was_terminated_is_requeued(script, ends, status, requeued, tmp_path):
    for name, lines in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LISTS": "lists", "VIDEOS": "videos",
                                "SLURM_JOB_NAME": "everest", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
                                "SLURM_JOB_NODELIST": "node[1-2]"}  # fmt: skip
    with subprocess.Popen(["bash", str(script), "--epochs", "3"], cwd=tmp_path, env=environment) as batch:
        for _ in range(500):
            if (tmp_path / "pid").exists():
                break
            time.sleep(0.02)
        if ends == "SIGTERM":
            time.sleep(0.1)
            batch.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "finish").write_text(ends)
        assert batch.wait(20) == status
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "checkpoint").exists() == requeued
    arguments = (tmp_path / "arguments").read_text()
    assert "torchrun " in arguments
    assert arguments.endswith("--output_dir runs/everest --dataloader_num_workers 11 --epochs 3\n")
