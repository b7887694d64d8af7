"""Copies of the test process: nothing is imported anew, which takes longer than most of what they do."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable

from accelerate.state import AcceleratorState


def forked(job: Callable[[], int], processes: int = 1) -> list[int]:
    """Exit statuses of copies of this process that do a job, the ranks of one run where there are several.

    On one thread each: accelerate would start more, for which a copied process waits for ever.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}

    def work(rank: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        if processes > 1:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        AcceleratorState._reset_state(reset_partial_state=True)  # what runs before have left of theirs
        sys.exit(job())

    gc.collect()  # a video that is closed in the copy, as garbage, waits for decoding threads that aren't copied
    ranks = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    latest = time.monotonic() + 300
    while any(rank.is_alive() for rank in ranks):
        assert time.monotonic() < latest, [rank.kill() for rank in ranks]
        if any(rank.exitcode for rank in ranks) and processes > 1:
            time.sleep(1)  # as torchrun does when one of them has failed
            for rank in ranks:
                rank.kill()
        for rank in ranks:
            rank.join(0.1)
    return [rank.exitcode for rank in ranks]
