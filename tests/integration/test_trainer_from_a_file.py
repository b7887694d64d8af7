"""transformers' Trainer with models that were loaded from a checkpoint of the VideoMAE family."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_models import FineTuningModel, PreTrainingModel, randomize
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainingArguments,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    default_data_collator,
)

import everest_tokens as et

BATCH = 4


def clips_for(model: Any, batch: int) -> Tensor:
    """(B, 3, 8, H, W)."""
    size = getattr(model, "encoder", model).patch_embed.img_size
    return torch.randn(batch, 3, 8, *size, generator=torch.Generator().manual_seed(1))


SQUARE: dict[str, Any] = {"img_size": 24, "patch_size": 8}  # 4 × 3 × 3 tokens
SIZES: dict[str, Any] = {"num_heads": 2, "num_frames": 8, "image_size": 24}
RATE = 0.01


def write_checkpoint(path: Path, reference: nn.Module) -> Path:
    torch.save({"model": reference.state_dict(), "epoch": 3, "args": Namespace(lr=1e-3)}, path)
    return path


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def examples(clips: Tensor, **columns: Tensor) -> list[dict[str, Tensor]]:
    """A dataset as transformers takes it, (T, C, H, W)."""
    rows = {"pixel_values": clips.transpose(1, 2), **columns}
    return [{name: values[index] for name, values in rows.items()} for index in range(len(clips))]


class TestTrainerFromAFile:
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
        path = write_checkpoint(tmp_path / "checkpoint.pth", reference)
        model = et.load_videomae(path, family=family, **SIZES)
        assert type(model) is VideoMAEForVideoClassification
        et.patch_videomae(model, et.ReRoSelector(1.0))
        clips, labels = clips_for(reference, BATCH), torch.tensor([1, 4, 0, 2])
        trainer = Trainer(
            model,
            arguments(tmp_path / "run"),
            train_dataset=examples(clips, labels=labels),
            data_collator=default_data_collator,
        )
        trainer.train()
        assert trainer.state.global_step == 2

        # the very steps of the repository's class: it is elementwise, so transformers' split qkv doesn't matter
        untrained = copy.deepcopy(reference)
        optimiser = torch.optim.SGD(reference.parameters(), lr=RATE)
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(reference(clips), labels).backward()
            optimiser.step()
        pixels = clips.transpose(1, 2)
        with torch.no_grad():
            expected = reference(clips)
            assert not torch.allclose(expected, untrained(clips), rtol=1e-2, atol=1e-2)
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
            assert et.select_tokens(saved, pixels).kept.shape == (BATCH, 18)
            torch.testing.assert_close(saved(pixels).logits, model(pixels).logits, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(saved(pixels).logits, again(pixels).logits, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("family", ["videomae", "everest"])
    def test_pretraining(self, family, tmp_path):
        reference = randomize(PreTrainingModel(family, **SQUARE, decoder_num_heads=3))
        path = write_checkpoint(tmp_path / "checkpoint.pth", reference)
        model = et.load_videomae(path, family=family, for_pretraining=True, **{**SIZES, "num_heads": (2, 3)})
        assert type(model) is VideoMAEForPreTraining
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)
        clips = clips_for(reference, BATCH)
        pixels = clips.transpose(1, 2)
        selection = et.select_tokens(model, pixels)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = Trainer(
            model, arguments(tmp_path / "run"), train_dataset=examples(clips), data_collator=default_data_collator
        )
        trainer.train()
        assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())

        again = VideoMAEForPreTraining.from_pretrained(tmp_path / "run" / "checkpoint-2")
        et.patch_videomae(again)
        assert again.everest.settings == model.everest.settings
        assert again.decoder.norm.eps == 1e-6
        with torch.no_grad():
            expected = model.eval()(pixels, token_selection=selection)
            actual = again(pixels, token_selection=selection)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=1e-6)
