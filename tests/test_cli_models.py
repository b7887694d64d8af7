"""`everest-tokens predict`, `export` and `benchmark` on a small fine-tuned folder."""

from __future__ import annotations

import json
import re

import pytest
import torch
from host_models import VJEPA2Model, build_encoder
from made_videos import write_video
from tiny_videomae import build_model
from transformers import (
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VivitImageProcessor,
)

import everest_tokens as et
from everest_tokens import cli, commands, comparing, exporting, prediction
from everest_tokens.comparing import compare
from everest_tokens.exporting import export
from everest_tokens.video import load_clip, load_views, view_indices
from everest_tokens.visualization import draw as drawing
from everest_tokens.visualization import pixels_of

LABELS = ["catch", "throw", "wait"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fine-tuned")
    model = build_model(VideoMAEForVideoClassification, num_labels=3)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: number for number, label in enumerate(LABELS)}
    et.patch_videomae(model, et.ReRoSelector(0.5)).save_pretrained(path)
    height, width = model.config.image_size
    VideoMAEImageProcessor(
        size={"shortest_edge": width}, crop_size={"height": height, "width": width}, image_mean=[0.4, 0.5, 0.6]
    ).save_pretrained(path)
    (path / "recipe.json").write_text(json.dumps({"stride": 2}))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for part in ("a", "b"):
        (root / part).mkdir()
    return [write_video(root / part / "1.mp4", length=length) for part, length in (("a", 40), ("b", 30))]


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def by_hand(folder, clip):
    model = VideoMAEForVideoClassification.from_pretrained(folder)
    with torch.no_grad():
        return et.patch_videomae(model.eval())(clip).logits.softmax(dim=1).mean(dim=0)


class TestPredict:
    def test_labels_scores_and_what_could_not_be_read(self, folder, videos, tmp_path, capsys):
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        status, out, err = run(capsys, "predict", folder, videos[0], tmp_path / "broken.mp4", videos[1], "--json")
        first, broken, second = json.loads(out)
        assert status == 1
        assert "broken.mp4" in broken["problem"]
        assert "broken.mp4" in err
        processor = VideoMAEImageProcessor.from_pretrained(folder)
        for video, found in zip(videos, (first, second), strict=True):
            scores = by_hand(folder, load_clip(video, num_frames=8, stride=2, processor=processor))  # as trained
            best = scores.argsort(descending=True).tolist()
            assert found["video"] == str(video)
            assert [label for label, _ in found["top"]] == [LABELS[number] for number in best]
            assert found["label"] == LABELS[best[0]]
            assert found["score"] == pytest.approx(scores.max().item(), abs=2e-6)
            assert found["milliseconds"] > 0 < found["reading_milliseconds"]

    def test_views_are_averaged(self, folder, videos, capsys):
        status, out, _ = run(capsys, "predict", folder, videos[0], "--views", "2x3", "--top", 1, "--json")
        processor = VideoMAEImageProcessor.from_pretrained(folder)
        views = load_views(videos[0], clips=2, crops=3, num_frames=8, stride=2, processor=processor)
        assert status == 0
        assert len(views) == 6
        [found] = json.loads(out)
        assert found["top"] == [[found["label"], found["score"]]]
        assert found["score"] == pytest.approx(by_hand(folder, views).max().item(), abs=2e-6)

    def test_lines_for_a_reader_and_pictures(self, folder, videos, tmp_path, capsys):
        status, out, _ = run(capsys, "predict", folder, *videos, "--heatmap", tmp_path / "drawn")
        assert status == 0
        assert all(re.search(rf"{video}: \w+ 0\.\d+, .* \(\d+ ms\)", out) for video in videos)
        assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"a-1.mp4.png", "b-1.mp4.png"}

    def test_pictures_are_of_the_frames_that_a_sampler_draws(self, folder, videos, tmp_path, capsys, monkeypatch):
        model = VideoMAEForVideoClassification.from_pretrained(folder)
        model = et.patch_videomae(model, et.ReRoSelector(0.5), frame_sampler=et.InfoFrameSampler(2.0)).eval()
        model.save_pretrained(tmp_path / "sampled")
        parts = []
        monkeypatch.setattr(commands, "draw", lambda drawn: parts.extend(drawn) or drawing(drawn))
        status, _, _ = run(capsys, "predict", tmp_path / "sampled", videos[0], "--stride", 1, "--heatmap", tmp_path)
        assert status == 0
        height, width = model.config.image_size
        clip = load_clip(videos[0], num_frames=16, stride=1, size=(height, width))
        steps = et.select_tokens(model, clip).steps[0]
        assert len(steps) == 4
        frames = pixels_of(clip)[[2 * step + i for step in steps.tolist() for i in range(2)]]
        torch.testing.assert_close(parts[0].rows[0].images, frames)

    def test_pixels_are_those_of_the_folders_processor(self, videos, tmp_path):
        """ViViT's puts them into [-1, 1] before it normalises them; another leaves them as they are."""
        frames = load_clip(videos[0], num_frames=8, stride=1, size=32, mean=(0, 0, 0), std=(1, 1, 1))[0]
        whole = [(255 * frame).round().byte() for frame in frames]
        for processor in (
            VivitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            VideoMAEImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
            ),
            VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False),
        ):
            processor.save_pretrained(tmp_path)
            look = prediction._processor(str(tmp_path))
            ours = load_clip(videos[0], num_frames=8, stride=1, processor=look)
            theirs = processor([whole], return_tensors="pt")["pixel_values"].float()
            scale = float(theirs.abs().max())
            assert torch.allclose(ours / scale, theirs / scale, atol=0.01), type(processor)

    def test_a_folder_in_half_precision_and_videos_of_one_name(self, folder, videos, tmp_path, capsys):
        VideoMAEForVideoClassification.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
        twin = tmp_path / "a" / "1.mp4"
        twin.parent.mkdir()
        twin.write_bytes(videos[0].read_bytes())
        drawn = tmp_path / "drawn"
        status, out, _ = run(capsys, "predict", tmp_path / "half", videos[0], twin, "--heatmap", drawn, "--json")
        first, second = json.loads(out)
        assert status == 0
        assert first["score"] == second["score"]
        assert {path.name for path in drawn.iterdir()} == {"a-1.mp4.png", "a-1.mp4-2.png"}

    @pytest.mark.parametrize("option", [("--views", "0x3"), ("--views", "5x2"), ("--top", 0), ("--stride", -1)])
    def test_settings_that_can_not_be(self, folder, videos, option, capsys):
        status, out, err = run(capsys, "predict", folder, videos[0], *option)
        assert (status, out) == (2, "")
        assert str(option[0]).strip("-") in err


def test_views_of_segments_take_each_frame_in_turn():
    assert view_indices(12, 3, 0, 2) == [[1, 5, 9], [3, 7, 11]]
    assert view_indices(12, 3, 0, 1) == [[2, 6, 10]]
    assert view_indices(20, 3, 4, 3) == [[0, 4, 8], [5, 9, 13], [11, 15, 19]]


class TestExport:
    def test_a_program_for_any_number_of_clips(self, folder, tmp_path, capsys):
        status, out, _ = run(capsys, "export", folder, "--out", tmp_path / "model.pt2")
        assert status == 0
        assert re.search(r"difference +\d\.\de-\d\d of the largest output", out)
        clips = torch.randn(3, 8, 3, 48, 64)
        exported = torch.export.load(tmp_path / "model.pt2").module()(clips)
        assert torch.allclose(exported.softmax(dim=1).mean(dim=0), by_hand(folder, clips), atol=1e-5)
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]

    def test_onnx(self, folder, tmp_path, capsys):
        onnxruntime = pytest.importorskip("onnxruntime")
        status, out, _ = run(capsys, "export", folder, "--format", "onnx", "--out", tmp_path / "model.onnx")
        assert status == 0
        assert re.search(r"opset \d+", out)
        clips = torch.randn(3, 8, 3, 48, 64)
        [scores] = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"clips": clips.numpy()})
        assert torch.allclose(torch.from_numpy(scores).softmax(dim=1).mean(dim=0), by_hand(folder, clips), atol=1e-5)

    def test_the_weights_of_a_large_model_come_along(self, folder, tmp_path, capsys, monkeypatch):
        onnxruntime = pytest.importorskip("onnxruntime")
        from torch.onnx._internal.exporter import _onnx_program

        if not hasattr(_onnx_program, "_LARGE_MODEL_THRESHOLD"):
            pytest.skip("this torch decides elsewhere which model is large")
        monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 10_000)
        status, out, _ = run(capsys, "export", folder, "--format", "onnx", "--out", tmp_path / "model.onnx")
        files = sorted(path.name for path in tmp_path.iterdir())
        assert status == 0
        assert files == ["model.onnx", "model.onnx.data"]
        assert "model.onnx.data" in out
        clips = torch.randn(1, 8, 3, 48, 64)
        [scores] = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"clips": clips.numpy()})
        assert torch.allclose(torch.from_numpy(scores).softmax(dim=1).mean(dim=0), by_hand(folder, clips), atol=1e-5)

    def test_an_encoder_whose_forward_needs_more_than_clips(self, tmp_path, capsys):
        if VJEPA2Model is object:
            pytest.skip("transformers has V-JEPA 2 from 4.53 on")
        build_encoder("VJEPA2Model").save_pretrained(tmp_path / "encoder")
        assert run(capsys, "export", tmp_path / "encoder", "--out", tmp_path / "model.pt2")[0] == 0
        tokens = torch.export.load(tmp_path / "model.pt2").module()(torch.randn(1, 8, 3, 48, 48))
        assert tokens.shape == (1, 21, 32)  # 0.6 of 4·3·3
        assert run(capsys, "benchmark", tmp_path / "encoder", "--repeats", 1)[0] == 0

    def test_what_can_not_be_expressed_is_named_and_nothing_is_left(self, folder, tmp_path):
        pytest.importorskip("onnxruntime")
        model = VideoMAEForVideoClassification.from_pretrained(folder)
        et.patch_videomae(model.eval(), et.ReRoSelector(0.5, lambda a, b: torch.special.bessel_j0(a - b).sum(-1)))
        with pytest.raises(ValueError, match="bessel_j0"):
            export(model, tmp_path / "model.onnx", "onnx")
        assert not list(tmp_path.iterdir())

    def test_a_file_with_other_numbers_is_not_kept(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(folder).eval())
        with pytest.raises(ValueError, match="would differ"):
            export(model, tmp_path / "model.pt2", "pt2")
        assert not list(tmp_path.iterdir())

    def test_models_that_draw_are_refused(self, tmp_path):
        drawing = et.patch_videomae(build_model(VideoMAEForVideoClassification), et.RandomSelector(0.5))
        for model in (et.patch_videomae(build_model(VideoMAEForPreTraining)), drawing):
            with pytest.raises(ValueError, match="random"):
                export(model, tmp_path / "model.pt2", "pt2")

    def test_what_onnx_has_no_operator_for_is_refused_before_any_work(self, tmp_path, monkeypatch):
        model = build_model(VideoMAEForVideoClassification).eval()
        et.patch_videomae(model, et.ReRoSelector(0.5, camera="compensate"))
        monkeypatch.setattr(model, "forward", lambda *_: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match="ONNX can't express camera='compensate'"):
            export(model, tmp_path / "model.onnx", "onnx")
        assert not list(tmp_path.iterdir())


class TestBenchmark:
    @pytest.mark.parametrize("training", [False, True])
    def test_fewer_tokens_take_less_memory(self, folder, training, capsys):
        options = ["--training"] * training
        status, out, _ = run(capsys, "benchmark", folder, "--keep-ratios", 0.25, 0.5, "--repeats", 2, *options)
        rows = re.findall(r"(unpatched|[\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) MiB +([\d.]+)$", out, re.MULTILINE)
        assert status == 0
        assert [row[0] for row in rows] == ["unpatched", "0.25", "0.5"]
        assert float(rows[0][2]) == float(rows[0][4]) == 1

    def test_the_weights_are_shared_and_stay(self, folder):
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(folder).eval())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        costs = compare(model, [0.25, 1.0], repeats=1, training=True)
        assert list(costs) == [None, 0.25, 1.0]
        assert all(len(seconds) == 1 for seconds, _ in costs.values())
        assert costs[0.25][1] < costs[1.0][1]
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.everest.selector.keep_ratio == 0.5

    def test_a_turn_of_short_runs_takes_a_fifth_of_a_second(self, folder, monkeypatch):
        """Whatever runs takes 0.05 s here: four runs a turn, of which one took a quarter of that."""
        model = et.patch_videomae(VideoMAEForVideoClassification.from_pretrained(folder).eval())
        monkeypatch.setattr(comparing, "seconds_of", lambda run, device: (run(), 0.05)[1])
        turns: list[int] = []
        monkeypatch.setattr(comparing, "_repeat", lambda run, times: turns.append(times))
        costs = compare(model, [0.25], repeats=3)
        assert {ratio: seconds for ratio, (seconds, _) in costs.items()} == {r: [0.0125] * 3 for r in (None, 0.25)}
        assert turns == [4] * 6

    def test_bad_settings_and_pre_training_models(self, folder):
        model = et.patch_videomae(build_model(VideoMAEForVideoClassification))
        for settings in ({"batch_size": 0}, {"repeats": 0}):
            with pytest.raises(ValueError, match=next(iter(settings))):
                compare(model, [0.5], **settings)
        with pytest.raises(ValueError, match="keep_ratio"):
            compare(model, [1.5])
        with pytest.raises(ValueError, match="pre-training"):
            compare(et.patch_videomae(build_model(VideoMAEForPreTraining)), [0.5])

    def test_a_budget_is_refused_by_what_it_is(self, tmp_path, capsys):
        et.patch_videomae(build_model(VideoMAEForVideoClassification), et.EnergyBudget()).save_pretrained(tmp_path)
        for options in ([], ["--keep-ratios", 0.5]):
            status, _, err = run(capsys, "benchmark", tmp_path, "--repeats", 1, *options)
            assert status == 2
            assert "random clips don't tell what EnergyBudget(cover=0.9" in err
