"""transformers' Trainer with patched models, with the code that people wrote for plain VideoMAE."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_models import FineTuningModel, PreTrainingModel, randomize
from transformers import Trainer, TrainingArguments, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et


def examples(pixels: torch.Tensor, **columns: torch.Tensor) -> list[dict[str, Any]]:
    """A dataset of clips (N, T, C, H, W)."""
    rows = {"pixel_values": pixels, **columns}
    return [{"video_name": "no column", **{key: rows[key][index] for key in rows}} for index in range(len(pixels))]


def twelve(labelled: bool = True, frames: int = 8, masked: bool = False) -> list[dict[str, Any]]:
    """Twelve clips whose label is their brightness."""
    labels = torch.arange(12) % 2
    noise = torch.randn(12, frames, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    columns = {"labels": labels} if labelled else {}
    if masked:
        columns["bool_masked_pos"] = (torch.arange(48) % 10 > 0).expand(12, -1)
    return examples(noise + 2.0 * labels[:, None, None, None, None], **columns)


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks what tensors there are, as people's collate functions do."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0] if torch.is_tensor(items[0][key])}


def trainer_for(
    model: Any, folder: Any, data: Any, evaluated: bool = False, metrics: Any = None, **options: Any
) -> Any:
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
    return Trainer(
        model,
        TrainingArguments(**(settings | options)),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data if evaluated else None,
        compute_metrics=metrics,
    )


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
        options = {"gradient_accumulation_steps": 2, "max_steps": 8, "evaluated": True, "metrics": compute_metrics}
        trainer = trainer_for(model, tmp_path / "run", twelve(), **options)
        trainer.train()
        metrics = trainer.evaluate()
        assert seen == [(12, 2)]
        assert metrics["eval_accuracy"] == 1.0
        assert metrics["eval_loss"] < 0.3
        trainer.save_model(tmp_path / "saved")

        clips = collate(twelve()[:3])["pixel_values"]
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
        for model in (plain, patched):
            options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1}
            trainer = trainer_for(model, tmp_path, twelve(), **options)
            assert trainer.model_accepts_loss_kwargs  # num_items_in_batch is passed on, patched or not
            trainer.train()
            losses.append(logged_losses(trainer))
        assert len(losses[0]) == 4
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(patched.get_parameter(name), parameter, rtol=1e-2, atol=3e-4, msg=name)

    def test_bf16_and_gradient_checkpointing(self, make_model, tmp_path):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification, num_labels=2), drop_path=0.1)
        trainer = trainer_for(model, tmp_path, twelve(), bf16=True, gradient_checkpointing=True)
        trainer.train()
        assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]

    def test_frame_sampler(self, make_model, tmp_path):
        model = make_model(VideoMAEForVideoClassification, num_labels=2)
        et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(1.5))
        data = twelve(frames=12)
        trainer = trainer_for(model, tmp_path, data, evaluated=True, max_steps=3)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]  # the most probable steps
        assert trainer.predict(data).predictions.shape == (12, 2)

    def test_resumes(self, make_model, tmp_path):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification, num_labels=2), et.ReRoSelector(0.5))
        trainer_for(model, tmp_path, twelve(), max_steps=2, save_strategy="steps", save_steps=2).train()
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "checkpoint-2")
        trainer = trainer_for(et.patch_videomae(again), tmp_path, twelve(), max_steps=4)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.state.global_step == 4
        assert again.everest.selector.keep_ratio == 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_pretraining(make_model, tmp_path, masked, recwarn):
    model = et.patch_videomae(make_model(VideoMAEForPreTraining), et.ReRoSelector(0.75), mask_ratio=0.75)
    trainer = trainer_for(model, tmp_path / "run", twelve(False, masked=masked), max_steps=30, logging_steps=10)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    ignored = [warning for warning in recwarn.list if "bool_masked_pos" in str(warning.message)]
    assert len(ignored) == int(masked)
    trainer.save_model(tmp_path / "saved")
    again = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(tmp_path / "saved"))
    assert again.config.everest == model.config.everest
    clips = collate(twelve()[:2])["pixel_values"]
    given = et.select_tokens(model.eval(), clips)
    torch.testing.assert_close(again(clips, token_selection=given).loss, model(clips, token_selection=given).loss)


SQUARE = {"img_size": 24, "patch_size": 8}  # 4 × 3 × 3 tokens
SIZES = {"num_heads": 2, "num_frames": 8, "image_size": 24}
RATE = 0.01
RUN = {
    "max_steps": 2,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "save_strategy": "steps",
    "save_steps": 2,
}
CLIPS = torch.randn(4, 3, 8, 24, 24, generator=torch.Generator().manual_seed(1))


class TestFromAFile:
    """Models that were loaded from a checkpoint of the VideoMAE family."""

    @staticmethod
    def write(folder: Path, reference: Any) -> Path:
        torch.save({"model": reference.state_dict(), "epoch": 3, "args": Namespace(lr=1e-3)}, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"

    @pytest.mark.filterwarnings("ignore:use_mean_pooling=False")
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("videomae", {}),
            ("videomae", {"use_learnable_pos_emb": True}),
            ("mme", {"use_mean_pooling": False}),
            ("mvd", {"use_cls_token": True}),
        ],
        ids=str,
    )
    def test_classifier(self, family, options, tmp_path):
        reference = randomize(FineTuningModel(family, **SQUARE, **options))
        if family == "mme":
            reference.random_masking = lambda x, mask_ratio: x  # its order is random, and the first token is pooled
        if reference.pos_embed.requires_grad:  # a table of its own, or a wrong one would not show
            reference.pos_embed.data.normal_(generator=torch.Generator().manual_seed(5))
        model = et.load_videomae(self.write(tmp_path, reference), family=family, **SIZES)
        assert type(model) is VideoMAEForVideoClassification
        et.patch_videomae(model, et.ReRoSelector(1.0))
        labels, pixels = torch.tensor([1, 4, 0, 2]), CLIPS.transpose(1, 2)
        trainer = trainer_for(model, tmp_path / "run", examples(pixels, labels=labels), **RUN)
        trainer.train()
        assert trainer.state.global_step == 2

        # the very steps of the repository's class: it is elementwise, so transformers' split qkv doesn't matter
        untrained = copy.deepcopy(reference)
        optimiser = torch.optim.SGD(reference.parameters(), lr=RATE)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(reference(CLIPS), labels).backward()
            optimiser.step()
        with torch.no_grad():
            expected = reference(CLIPS)
            assert not torch.allclose(expected, untrained(CLIPS), rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(model.eval()(pixels).logits, expected, rtol=1e-3, atol=1e-3)

            # Trainer's checkpoint and save_model, each with the selection that it had
            again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
            if family == "mvd" or options.get("use_learnable_pos_emb"):
                assert not torch.allclose(again(pixels).logits, model(pixels).logits, rtol=1e-2, atol=1e-2)
            et.patch_videomae(again)
            torch.testing.assert_close(again(pixels).logits, model(pixels).logits, rtol=1e-6, atol=1e-6)
            model.everest.selector.keep_ratio = 0.5
            trainer.save_model(str(tmp_path / "saved"))
            saved = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(tmp_path / "saved"))
            assert et.select_tokens(saved, pixels).kept.shape == (4, 18)
            torch.testing.assert_close(saved(pixels).logits, model(pixels).logits, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(saved(pixels).logits, again(pixels).logits, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("family", ["videomae", "everest"])
    def test_pretraining(self, family, tmp_path):
        reference = randomize(PreTrainingModel(family, **SQUARE, decoder_num_heads=3))
        sizes = {**SIZES, "num_heads": (2, 3), "for_pretraining": True}
        model = et.load_videomae(self.write(tmp_path, reference), family=family, **sizes)
        assert type(model) is VideoMAEForPreTraining
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        pixels = CLIPS.transpose(1, 2)
        selection = et.select_tokens(model, pixels)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer_for(model, tmp_path / "run", examples(pixels), **RUN).train()
        assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())

        again = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(tmp_path / "run" / "checkpoint-2"))
        assert again.everest.settings == model.everest.settings
        assert again.decoder.norm.eps == 1e-6
        with torch.no_grad():
            expected, actual = (each(pixels, token_selection=selection) for each in (model.eval(), again))
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-6)
