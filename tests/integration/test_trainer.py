"""transformers' Trainer with patched models, with the code that people wrote for plain VideoMAE."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et


class Clips(Dataset):
    """Twelve clips whose label is their brightness."""

    def __init__(self, labelled: bool, frames: int = 8, masked: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(12) % 2
        noise = torch.randn(12, frames, 3, 48, 64, generator=generator)
        self.pixels = noise + 2.0 * self.labels[:, None, None, None, None]
        self.labelled, self.masked = labelled, masked

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"pixel_values": self.pixels[index], "video_name": "dropped by Trainer"}
        if self.labelled:
            item["labels"] = self.labels[index]
        if self.masked:
            item["bool_masked_pos"] = torch.arange(48) % 10 > 0
        return item


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks what tensors there are, as people's collate functions do."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0] if torch.is_tensor(items[0][key])}


def arguments(folder: Any, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "logging_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**(settings | overrides))


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestClassification:
    def test_trains_evaluates_saves_and_reloads(self, make_model, tmp_path, caplog):
        seen = []

        def compute_metrics(prediction):  # what plain VideoMAE's example scripts have: predictions is one array
            assert isinstance(prediction.predictions, np.ndarray)
            seen.append(prediction.predictions.shape)
            return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}

        model = et.patch_videomae(make_model(VideoMAEForVideoClassification, num_labels=2), et.ReRoSelector(0.5))
        trainer = Trainer(
            model,
            arguments(tmp_path / "run", gradient_accumulation_steps=2, max_steps=8),
            data_collator=collate,
            train_dataset=Clips(labelled=True),
            eval_dataset=Clips(labelled=True),
            compute_metrics=compute_metrics,
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert seen == [(12, 2)]
        assert metrics["eval_accuracy"] == 1.0
        assert metrics["eval_loss"] < 0.3
        trainer.save_model(tmp_path / "saved")

        clips = Clips(labelled=True).pixels[:3]
        model.eval()
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved")
        with caplog.at_level(logging.INFO, "everest_tokens"):
            et.patch_videomae(again)
        assert not [record for record in caplog.records if record.name.startswith("everest_tokens")]
        assert again.everest.selector.keep_ratio == 0.5
        torch.testing.assert_close(again(clips).logits, model(clips).logits)
        plain = VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(plain(clips).logits, et.unpatch_videomae(model)(clips).logits)

    def test_is_the_plain_run_at_keep_ratio_1(self, make_model, tmp_path):
        plain = make_model(VideoMAEForVideoClassification, num_labels=2)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        losses = []
        for name, model in (("plain", plain), ("patched", patched)):
            run = arguments(tmp_path / name, gradient_accumulation_steps=2, max_steps=4, logging_steps=1)
            trainer = Trainer(model, run, data_collator=collate, train_dataset=Clips(labelled=True))
            assert trainer.model_accepts_loss_kwargs  # num_items_in_batch is passed on, patched or not
            trainer.train()
            losses.append(logged_losses(trainer))
        assert len(losses[0]) == 4
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(patched.get_parameter(name), parameter, rtol=1e-2, atol=3e-4, msg=name)

    def test_bf16_and_gradient_checkpointing(self, make_model, tmp_path):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification, num_labels=2), drop_path=0.1)
        run = arguments(tmp_path, bf16=True, gradient_checkpointing=True)
        trainer = Trainer(model, run, data_collator=collate, train_dataset=Clips(labelled=True))
        trainer.train()
        assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]

    def test_frame_sampler(self, make_model, tmp_path):
        model = make_model(VideoMAEForVideoClassification, num_labels=2)
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5))
        data = Clips(labelled=True, frames=12)
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=3), data_collator=collate, train_dataset=data, eval_dataset=data
        )
        trainer.train()
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]  # the most probable steps
        assert trainer.predict(data).predictions.shape == (12, 2)

    def test_resumes(self, make_model, tmp_path):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification, num_labels=2), et.ReRoSelector(0.5))
        run = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
        data = Clips(labelled=True)
        Trainer(model, run, data_collator=collate, train_dataset=data).train()
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "checkpoint-2")
        et.patch_videomae(again)
        run = arguments(tmp_path, max_steps=4)
        trainer = Trainer(again, run, data_collator=collate, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 4
        assert again.everest.selector.keep_ratio == 0.5


class TestPreTraining:
    @pytest.mark.parametrize("masked", [False, True])
    def test_trains(self, make_model, tmp_path, masked, recwarn):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining), et.ReRoSelector(0.75), mask_ratio=0.75)
        trainer = Trainer(
            model,
            arguments(tmp_path / "run", max_steps=30, logging_steps=10),
            data_collator=collate,
            train_dataset=Clips(labelled=False, masked=masked),
        )
        trainer.train()
        losses = logged_losses(trainer)
        assert losses[-1] < losses[0]
        ignored = [warning for warning in recwarn.list if "bool_masked_pos" in str(warning.message)]
        assert len(ignored) == int(masked)
        trainer.save_model(tmp_path / "saved")
        again = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(tmp_path / "saved"))
        assert again.config.everest == model.config.everest
        clips = Clips(labelled=False).pixels[:2]
        given = et.select_tokens(model.eval(), clips)
        torch.testing.assert_close(again(clips, token_selection=given).loss, model(clips, token_selection=given).loss)
