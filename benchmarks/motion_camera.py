"""The camera's motion in the task's clips, estimated once: a training sees each of them many times, and turned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from everest_tokens import camera


def turned_motion(motion: Tensor, turn: int) -> Tensor:
    """The motion (…, 2, 3) of clips, of the clips as `motion_clips.turned` turns them: the same bits as before it."""
    for bit, axis in ((1, 0), (2, 1)):  # a mirror along x, then along y
        if turn & bit:
            sign = torch.ones(3, device=motion.device)
            sign[axis] = -1
            motion = sign[:2, None] * motion * sign
    if turn & 4:  # x and y change places
        motion = motion.flip(-2)[..., [1, 0, 2]]
    return motion


@contextmanager
def known(motion: Tensor | None) -> Iterator[None]:
    """Within it the camera's motion in a batch is this one, (B, T − step, 2, 3); None has it estimated."""
    if motion is None:
        yield
        return
    with mock.patch.object(camera, "camera_motion", return_value=motion):
        yield
