"""selection_pictures.py: what TensorBoard and W&B are given in training, read back from the file, or by a stand-in."""

from __future__ import annotations

import io
import itertools
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import finetune
import numpy as np
import pretrain
import pytest
import selection_pictures
import torch
from augmentation import BatchAugmentation
from clips import Sampling
from data import Data
from made_videos import write_video
from PIL import Image
from selection_pictures import SelectionPictures, check_reporting, fixed_clip
from streams import Stream
from tensorboardX.proto.event_pb2 import Event
from tiny_videomae import build_model
from training_runs import ON_CPU, TINY
from transformers import TrainerCallback, TrainingArguments, VideoMAEForPreTraining
from video_list import Entry

import everest_tokens as et


def events(folder: Path) -> list[tuple[str, int, object]]:
    """(Tag, step, number or picture) of TensorBoard's files: records of length, its checksum, data, its checksum."""
    found = []
    for file in folder.rglob("events.out.tfevents.*"):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                shown = Image.open(io.BytesIO(value.image.encoded_image_string)) if value.HasField("image") else None
                found.append((value.tag, event.step, shown or value.simple_value))
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for label in ("one", "two"):
        for number in range(4):
            write_video(root / label / f"{number}.mp4", length=24, size=(64, 64))
    return root


@pytest.mark.parametrize(("script", "more"), [(pretrain, []), (finetune, ["--alpha", "1.5", "--val_fraction", "0.25"])])
def test_tensorboard_has_curves_and_pictures(script, more, videos, tmp_path, monkeypatch):
    # tensorboardX names its files by second and host: of a run within a second the final test's would take the curves'.
    hosts = itertools.count()
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{next(hosts)}")
    settings = ["--batch_size", "2", "--max_steps", "4", "--report_to", "tensorboard", "--picture_steps", "2"]
    folders = ["--data", str(videos), "--output_dir", str(tmp_path / "run")]
    assert script.main([TINY, *folders, *settings, *more, "--save_strategy", "no", *ON_CPU]) == 0
    found = events(tmp_path / "run")
    assert [step for tag, step, _ in found if tag == "train/loss"] == [1, 2, 3, 4]
    pictures = {step: picture for tag, step, picture in found if tag == "selection"}
    assert [*pictures] == [0, 2, 4]
    assert all(picture.size[0] > 600 for picture in pictures.values())


class Trainer:
    """As much of one as the callback looks at."""

    def __init__(self, model, *callbacks) -> None:
        self.model, self.augmentation = model, BatchAugmentation()
        self.args = SimpleNamespace(device=torch.device("cpu"), report_to=["wandb"])
        self.callback_handler = SimpleNamespace(callbacks=callbacks)


def test_wandb_gets_the_picture_at_its_step_from_the_first_process_alone(monkeypatch):
    logged = []
    wandb = ModuleType("wandb")
    wandb.Image, wandb.log = lambda image: image, logged.append
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    model = et.patch_videomae(build_model(VideoMAEForPreTraining, image_size=64)).train()
    clip = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8)
    trainer = Trainer(model, TrainerCallback())
    callback, state = SelectionPictures(trainer, clip, 3), torch.get_rng_state()
    for first, step in ((True, 0), (True, 2), (True, 3), (False, 6)):
        now = SimpleNamespace(global_step=step, is_world_process_zero=first)
        call = callback.on_train_begin if step == 0 else callback.on_step_end
        call(trainer.args, now, None)
    assert [entry["train/global_step"] for entry in logged] == [0, 3]
    assert np.array_equal(logged[0]["selection"], logged[1]["selection"])  # the model is the same
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_sampled_steps_are_shown(monkeypatch):
    """Of a clip whose frames are told apart by their brightness."""
    sampler = et.InfoFrameSampler(1.5)
    model = et.patch_videomae(build_model(VideoMAEForPreTraining, image_size=64), frame_sampler=sampler).train()
    clip = (torch.arange(12, dtype=torch.uint8) * 20)[None, :, None, None, None].expand(1, 12, 3, 64, 64)
    shown = []
    part = selection_pictures.selection_part
    monkeypatch.setattr(
        selection_pictures, "selection_part", lambda frames, s: shown.append((frames, s)) or part(frames, s)
    )
    SelectionPictures(Trainer(model), clip, 1).image()
    frames, selections = shown[0]
    numbers = (frames.mean(dim=(1, 2, 3)) * 255 / 20).round().int().tolist()
    steps = selections["kept"].steps[0].tolist()
    assert numbers == [2 * step + part for step in steps for part in (0, 1)]


def test_the_clip_is_of_the_first_video_that_can_be_read(videos, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    entries = [Entry(tmp_path / "bad.mp4"), Entry(videos / "one" / "0.mp4")]
    clip = fixed_clip(Data(entries, 2), Sampling(8, 2), 32)
    assert clip.shape == (1, 8, 3, 32, 32)
    assert clip.float().std() > 0
    with pytest.raises(ValueError, match=r"none of the first videos can be read: .*bad\.mp4"):
        fixed_clip(Data(entries[:1], 1), Sampling(8, 2), 32)


def test_the_clip_of_a_stream(videos):
    """Its samples hold the files themselves."""
    file = videos / "two" / "1.mp4"
    samples = [{"mp4": {"path": "shard/1.mp4", "bytes": file.read_bytes()}}]
    clip = fixed_clip(Data(Stream(samples, "mp4", None, [], 1), 1), Sampling(8, 2), 32)
    assert torch.equal(clip, fixed_clip(Data([Entry(file)], 1), Sampling(8, 2), 32))


@pytest.mark.parametrize(
    ("report_to", "missing", "steps", "message"),
    [
        (
            "tensorboard",
            ("tensorboard", "tensorboardX"),
            0,
            r"package tensorboard: .*pip install -e '\.\[tensorboard\]'",
        ),
        ("wandb", ("wandb",), 0, r"report_to wandb needs the package wandb: .*pip install -e '\.\[wandb\]'"),
        ("none", (), 10, "picture_steps 10 draws for report_to tensorboard or wandb"),
    ],
)
def test_what_is_missing_is_named(report_to, missing, steps, message, monkeypatch, tmp_path):
    find = selection_pictures.find_spec
    monkeypatch.setattr(selection_pictures, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ValueError, match=message):
        check_reporting(TrainingArguments(str(tmp_path), report_to=report_to, use_cpu=True), steps)


def test_any_one_package_is_enough(monkeypatch, tmp_path):
    find = selection_pictures.find_spec
    monkeypatch.setattr(selection_pictures, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    check_reporting(TrainingArguments(str(tmp_path), report_to="tensorboard", use_cpu=True), 5)
