"""The folder of a fine-tuned model: what others read in it is what was trained with, and counts made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from made_videos import write_frames
from motion_videos import moving_shape
from pipelines import decodes, for_pipeline
from product import Scores, score, write_product
from transformers import AutoImageProcessor, VideoMAEConfig, VideoMAEForVideoClassification, pipeline

import everest_tokens as et
from everest_tokens.video import load_clip

LABELS = ["apple, red", "pear", "plum"]
RECORDED: dict[str, Any] = {
    "section": "finetuning", "data": "/somewhere/private/fruit", "model": None, "stride": 4, "keep_ratio": 0.5,
    "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "base_lr": 1e-3,
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    return et.patch_videomae(VideoMAEForVideoClassification(config), et.ReRoSelector(0.5))


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# Labels and predictions of seven videos, one of them unreadable, counted by hand.
TRUE, SEEN, PREDICTED = [0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, -100, 2, 2], [0, 1, 0, 1, 2, 0, 0]


def counted(num_labels: int = 3) -> Scores:
    return score(TRUE, np.array(SEEN), np.eye(num_labels)[PREDICTED])


class TestScores:
    def test_by_hand(self):
        scores = counted(4)
        assert scores.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
        assert scores.videos.tolist() == [3, 2, 2, 0]
        np.testing.assert_allclose(scores.per_class, [2 / 3, 1 / 2, 0, np.nan])
        assert scores.metrics() == {"videos": 7, "unreadable": 1, "accuracy": pytest.approx(3 / 7),
                                    "mean_class_accuracy": pytest.approx((2 / 3 + 1 / 2) / 3)}  # fmt: skip


class TestWriteProduct:
    def test_the_processor_makes_the_clips_that_were_trained_with(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_product(tmp_path, model, RECORDED, None)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        frames = [np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8) for i in range(4)]
        pixels = processor([frames], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 4, 3, 32, 32)
        small = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
        from torchvision.transforms.v2 import functional

        small = functional.center_crop(functional.resize(small, [32, 42], antialias=True), [32, 32])
        mean, std = (torch.tensor(RECORDED[name]).view(3, 1, 1) for name in ("mean", "std"))
        torch.testing.assert_close(pixels[0], (small / 255 - mean) / std, atol=1.1 / 255 / 0.2, rtol=0)

    def test_tables_say_what_was_counted(self, model, tmp_path):
        write_product(tmp_path, model, RECORDED, counted())
        assert rows(tmp_path / "confusion.csv") == [
            ["label", *LABELS], ["apple, red", "2", "1", "0"], ["pear", "0", "1", "0"], ["plum", "2", "0", "0"],
        ]  # fmt: skip
        assert rows(tmp_path / "per_class.csv") == [
            ["label", "videos", "correct", "accuracy"],
            ["apple, red", "3", "2", "0.6667"], ["pear", "2", "1", "0.5"], ["plum", "2", "0", "0.0"],
        ]  # fmt: skip
        assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == pytest.approx(3 / 7)
        assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize(
        "given",
        [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token", "hf_secret"]],
    )
    def test_the_token_is_nowhere(self, model, tmp_path, monkeypatch, given):
        monkeypatch.setattr("sys.argv", ["finetune.py", "own.yaml", *given, "--hub_model_id", "me/mine"])
        write_product(tmp_path, model, RECORDED, None)
        assert all(b"hf_secret" not in path.read_bytes() for path in tmp_path.iterdir())
        command = json.loads((tmp_path / "run.json").read_text())["command"]
        assert "***" in command
        assert command.endswith("--hub_model_id me/mine")

    def test_the_card_is_the_hubs(self, model, tmp_path):
        write_product(tmp_path, model, RECORDED, counted())
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.pipeline_tag == "video-classification"
        assert card.data.library_name == "transformers"
        assert card.data.base_model is None
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {"accuracy": 0.4286, "mean_class_accuracy": 0.3889}
        assert "42.9 % of 7 held-out videos" in card.text
        assert "keeping 0.5 of a\nclip's tokens" in card.text
        assert "private" not in card.content
        assert "license" not in card.data.to_dict()

    @pytest.mark.parametrize(("ratios", "said"), [([0.3], "kept 0.3 of"), ([0.6, 0.25, 1.0], "kept 0.6, 0.25 or 1 of")])
    def test_a_card_tells_the_ratios_of_training_and_how_to_set_one(self, model, tmp_path, ratios, said):
        write_product(tmp_path, model, RECORDED | {"keep_ratios": ratios}, None)
        text = ModelCard.load(tmp_path / "README.md").text
        assert f"Each step of its training {said} the tokens" in text
        (code,) = (block.partition("```")[0] for block in text.split("```python\n") if "keep_ratio =" in block)
        names = {"pipe": SimpleNamespace(model=model)}
        exec(code, names)
        assert model.everest.selector.keep_ratio == min(ratios)

    def test_a_card_names_the_hubs_model_that_it_began_from(self, model, tmp_path):
        write_product(tmp_path, model, RECORDED | {"model": "MCG-NJU/videomae-base"}, None)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == "MCG-NJU/videomae-base"
        assert "how well it does is not known" in card.text
        assert not (tmp_path / "metrics.json").exists()

    def test_the_cards_code_runs(self, model, tmp_path, monkeypatch):
        """Its blocks one after the other, on a video, with the way to decode that works here."""
        folder = tmp_path / "fine"
        model.save_pretrained(folder)
        write_product(folder, model, RECORDED, None)
        write_frames(tmp_path / "video.mp4", moving_shape("up", 0))
        monkeypatch.chdir(tmp_path)
        blocks = (folder / "README.md").read_text().split("```python\n")[1:]
        names: dict[str, Any] = {}
        path, frames = 'pipe("video.mp4")', "pipe(video)"
        assert [block.count(path) + block.count(frames) for block in blocks] == [1, 1, 0]
        for block in blocks:
            code = block.partition("```")[0]
            if (frames if decodes() else path) in code:
                code = "\n".join(code.splitlines()[:-1]) if path in code else ""
            exec(code, names)
        video = for_pipeline(tmp_path / "video.mp4", 4)
        assert {answer["label"] for answer in names["pipe"](video)} == set(LABELS)
        assert names["pipe"].model.everest.selector.keep_ratio == 0.5
        clip = load_clip("video.mp4", num_frames=4, stride=4, size=32, mean=RECORDED["mean"], std=RECORDED["std"])
        assert names["pipe"].model(clip).logits.shape == (1, 3)

    def test_a_pipeline_gives_a_frame_sampler_its_candidates(self, model, tmp_path):
        model.everest.frame_sampler = et.InfoFrameSampler(1.5)
        model.save_pretrained(tmp_path)
        write_product(tmp_path, model, RECORDED, None)
        video = write_frames(tmp_path / "video.mp4", moving_shape("up", 0))
        pipes = [pipeline("video-classification", str(tmp_path), **more) for more in ({}, {"num_frames": 6})]
        for pipe in pipes:
            et.patch_videomae(pipe.model)
        with pytest.raises(ValueError, match=r"num_frames=6\)"):
            pipes[0](for_pipeline(video, 4))
        assert {answer["label"] for answer in pipes[1](for_pipeline(video, 6))} == set(LABELS)

    def test_push_to_hub_sends_a_folder_that_loads(self, model, tmp_path, monkeypatch):
        """transformers' own, with the hub's two calls answered by a local folder."""

        def create_commit(self: Any, repo_id: str, operations: Any, **_: Any) -> None:
            for operation in operations:
                with operation.as_file() as file:
                    (tmp_path / operation.path_in_repo).write_bytes(file.read())

        monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        monkeypatch.setattr(HfApi, "repo_exists", lambda self, name, **_: False, raising=False)
        model.push_to_hub("somebody/fruit")
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path)
        assert et.patch_videomae(again).everest.selector.keep_ratio == 0.5
        assert again.config.id2label == dict(enumerate(LABELS))
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_the_command_is_one_that_a_shell_takes(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.argv", ["finetune.py", "--data", "my videos"])
        write_product(tmp_path, model, RECORDED, None)
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["command"].endswith("finetune.py --data 'my videos'")
        assert torch.__version__.startswith(run["versions"]["torch"])

    def test_many_labels_are_drawn(self, model, tmp_path):
        model.config.id2label = {number: f"label {number}" for number in range(300)}
        scores = Scores(np.eye(300, dtype=np.int64), np.ones(300, np.int64))
        write_product(tmp_path, model, RECORDED, scores)
        assert "(300 in all" in (tmp_path / "README.md").read_text()
