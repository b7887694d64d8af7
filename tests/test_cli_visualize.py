"""The `visualize` command: what it draws of files and models, and what goes wrong says so in one line."""

from __future__ import annotations

import shutil
from argparse import Namespace

import pytest
import torch
from family_models import FineTuningModel, PreTrainingModel
from PIL import Image
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VJEPA2Config,
    VJEPA2Model,
)
from transformers.models.videomae import modeling_videomae

import everest_tokens as et
from everest_tokens import commands
from everest_tokens.cli import main
from everest_tokens.commands import patched_model
from everest_tokens.demo import sample_video
from everest_tokens.video import load_clip
from everest_tokens.visualization import draw, pixels_of

SMALL = VideoMAEConfig(  # 4 × 4 × 4 tokens
    image_size=64,
    num_frames=8,
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=96,
    decoder_hidden_size=24,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=48,
    num_labels=5,
)


@pytest.fixture
def folder(tmp_path):
    VideoMAEForPreTraining(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def drawn(monkeypatch):
    """The parts of each page that the command draws."""
    pages = []
    monkeypatch.setattr(commands, "draw", lambda parts, **options: pages.append(parts) or draw(parts, **options))
    return pages


def run(tmp_path, *options) -> int:
    return main(["visualize", str(sample_video()), *map(str, options), "--out", str(tmp_path / "x.png")])


def test_what_is_drawn_is_what_select_tokens_selects(folder, tmp_path, drawn):
    assert run(tmp_path, "--model", folder, "--keep-ratio", "0.25", "--start", "10", "--stride", "2") == 0
    clip = load_clip(sample_video(), num_frames=8, stride=2, start=10, size=64)
    model = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(folder), et.ReRoSelector(0.25))
    kept = et.select_tokens(model, clip).kept[0]
    frames, shown, importance = drawn[0][0].rows
    assert torch.equal(frames.images, pixels_of(clip))
    assert [row.label for row in drawn[0][0].rows] == ["frames", "kept\n16 of 64", "importance\nL2 distance"]
    same = (shown.images == frames.images).all(dim=1)[::2].view(-1, 4, 16, 4, 16).all(dim=4).all(dim=2)
    assert same.flatten().nonzero().flatten().tolist() == kept.tolist()
    assert importance.images[::2].flatten().topk(16).indices.sort().values.tolist() == kept.tolist()


def test_several_videos_are_stacked_each_from_its_own_start(folder, tmp_path, drawn, capsys):
    other = tmp_path / ("long" * 50 + ".mp4")
    shutil.copy(sample_video(), other)
    assert run(tmp_path, other, "--model", folder, "--start", "10", "200", "--stride", "1") == 0
    assert [part.title for part in drawn[0]] == ["bikes.mp4", other.name]
    for part, start in zip(drawn[0], (10, 200), strict=True):
        clip = load_clip(sample_video(), num_frames=8, stride=1, start=start, size=64)
        assert torch.equal(part.rows[0].images, pixels_of(clip))
    shown = capsys.readouterr()
    assert "clips: 100%" in shown.err
    assert f"drawn in {tmp_path / 'x.png'}" in shown.out


def test_recorded_settings_are_drawn_and_options_win(folder, tmp_path, drawn, capsys):
    patched = et.patch_videomae(
        VideoMAEForPreTraining.from_pretrained(folder),
        et.ReRoSelector(0.4, distance="cosine"),
        frame_sampler=et.InfoFrameSampler(1.75),
    )
    patched.save_pretrained(folder)
    assert run(tmp_path, "--model", folder) == 0
    assert drawn[-1][0].rows[1].label == "kept\n25 of 64"  # 0.4
    assert drawn[-1][0].rows[2].images.abs().max() < 2.01  # cosine
    assert run(tmp_path, "--model", folder, "--keep-ratio", "0.05", "--distance", "l2") == 0  # fewer than are visible
    assert drawn[-1][0].rows[1].label == "kept\n3 of 64"
    assert drawn[-1][0].rows[2].images.max() > 2.01
    assert "random weights" not in capsys.readouterr().out


def kept_in(row, frames) -> torch.Tensor:
    """(t, 4, 4) bool: the tokens that are drawn as they were."""
    same = (row.images == frames.images).all(dim=1)[::2].view(-1, 4, 16, 4, 16)
    return same.all(dim=4).all(dim=2)


def test_an_anchored_step_is_drawn_whole(folder, tmp_path, drawn):
    assert run(tmp_path, "--model", folder, "--anchor", "middle", "--keep-ratio", "0.4") == 0
    frames, shown, _ = drawn[0][0].rows
    counts = kept_in(shown, frames).flatten(1).sum(dim=1).tolist()
    assert counts[2] == 16
    assert sum(counts) == 25  # 0.4 of 64


def test_a_compensated_camera_is_drawn_beside_an_ignored_one_and_its_path(folder, tmp_path, drawn, monkeypatch):
    """The clip's window moves 3 pixels down a frame."""
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(picture, (128, 128), mode="bicubic")[0]
    clip = torch.stack([picture[:, 10 + 3 * f : 74 + 3 * f, 20:84] for f in range(8)])[None]
    monkeypatch.setattr(commands, "load_clip", lambda *given, **more: clip)
    assert run(tmp_path, "--model", folder, "--camera", "compensate") == 0
    frames, compensated, ignored, importance, path = drawn[-1][0].rows
    labels = [row.label.split("\n")[0] for row in drawn[-1][0].rows[1:]]
    assert labels == ["kept, camera compensated", "kept, camera ignored", "importance", "camera's path, pixels"]
    for row, camera in ((compensated, "compensate"), (ignored, "ignore")):
        model = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(folder), et.ReRoSelector(camera=camera))
        selection = et.select_tokens(model, clip)
        assert kept_in(row, frames).flatten().nonzero().flatten().tolist() == selection.kept[0].tolist()
        if camera == "compensate":
            assert torch.equal(importance.images[::2].flatten(), selection.importance[0])
    assert path.images.tolist() == [pytest.approx([0, 3 * f], abs=0.2) for f in range(8)]

    model.everest.selector.camera = "compensate"
    model.save_pretrained(folder)
    assert run(tmp_path, "--model", folder) == 0
    assert len(drawn[-1][0].rows) == 5  # as recorded
    assert run(tmp_path, "--model", folder, "--camera", "ignore") == 0
    assert [row.label for row in drawn[-1][0].rows] == ["frames", "kept\n19 of 64", "importance\nL2 distance"]


def test_options_are_the_budget_s_own(tmp_path, drawn, capsys):
    """Each clip keeps what it needs under them too, and not all of its tokens."""
    model = et.patch_videomae(VideoMAEForVideoClassification(SMALL), et.EnergyBudget(0.5))
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path, "--model", tmp_path / "model", "--distance", "cosine", "--stride", "1") == 0
    model.everest.selector.distance = "cosine"
    clip = load_clip(sample_video(), num_frames=8, stride=1, size=64)
    frames, shown, _ = drawn[-1][0].rows
    kept = et.select_tokens(model, clip).kept[0].tolist()
    assert len(kept) < 64
    assert kept_in(shown, frames).flatten().nonzero().flatten().tolist() == kept
    assert run(tmp_path, "--model", tmp_path / "model", "--anchor", "first") == 2
    assert "takes no anchor: give a keep ratio too" in capsys.readouterr().err
    assert run(tmp_path, "--model", tmp_path / "model", "--anchor", "first", "--keep-ratio", "0.5") == 0
    assert drawn[-1][0].rows[1].label == "kept\n32 of 64"


def test_files_and_classifiers_are_drawn_as_what_they_are(tmp_path, drawn):
    sizes = {"img_size": (64, 64), "num_frames": 8, "embed_dim": 384, "depth": 1}  # a width that tells the heads
    decoder = {"decoder_dim": 192, "decoder_num_heads": 3, "decoder_depth": 1}
    models = {"pre.pth": PreTrainingModel(**sizes, **decoder), "fine.pth": FineTuningModel(**sizes)}
    for name, model in models.items():
        torch.save({"model": model.state_dict(), "args": Namespace(num_frames=8, input_size=64)}, tmp_path / name)
    VideoMAEForVideoClassification(SMALL).save_pretrained(tmp_path / "classifier")
    for name, label in (("pre.pth", "19"), ("fine.pth", "38"), ("classifier", "38")):  # 0.3, 0.6
        assert run(tmp_path, "--model", tmp_path / name) == 0
        assert drawn[-1][0].rows[1].label == f"kept\n{label} of 64"


def test_encoders_whose_configuration_names_its_sizes_otherwise(tmp_path, drawn):
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "mlp_ratio": 2.0}
    predictor = {f"pred_{name}": value for name, value in sizes.items()} | {"pred_num_mask_tokens": 2}
    config = VJEPA2Config(crop_size=64, frames_per_clip=8, num_pooler_layers=1, **sizes, **predictor)
    VJEPA2Model(config).save_pretrained(tmp_path / "model")
    assert run(tmp_path, "--model", tmp_path / "model") == 0
    assert drawn[-1][0].rows[1].label == "kept\n38 of 64"


def test_strategies_are_drawn_at_a_half_or_the_ratio_that_is_given(folder, tmp_path, drawn):
    for options, counts in (([], [32] * 6), (["--keep-ratio", "0.25"], [16] * 5)):
        assert run(tmp_path, "--model", folder, "--draw", "strategies", *options) == 0
        frames, *rows = drawn[-1][0].rows
        assert [int(kept_in(row, frames).sum()) for row in rows] == counts


def test_random_weights_are_announced_and_follow_the_seed(monkeypatch, caplog):
    caplog.set_level("INFO")
    # Filling a table takes seconds with transformers' loops.
    monkeypatch.setattr(modeling_videomae, "get_sinusoid_encoding_table", lambda n, d: torch.zeros(1, n, d))

    def weight(seed: int) -> torch.Tensor:
        return patched_model(None, seed=seed).videomae.embeddings.patch_embeddings.projection.weight

    first = weight(0)
    assert "random weights" in caplog.text
    assert torch.equal(first, weight(0))
    assert not torch.equal(first, weight(1))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_page_for_each_suffix(folder, tmp_path, suffix):
    out = tmp_path / f"x.{suffix}"
    assert main(["visualize", str(sample_video()), "--model", str(folder), "--out", str(out)]) == 0
    if suffix == "png":
        with Image.open(out) as picture:
            assert 1000 < picture.width <= 1200  # four steps don't fill the page
    else:
        assert out.read_bytes().startswith(b"%PDF" if suffix == "pdf" else b"<?xml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.mp4"], "missing.mp4: no such file"),
        (["VIDEO", "--out", "x.jpg"], "expected a name that ends in .png, .pdf, .svg, .gif, .mp4, got x.jpg"),
        (["VIDEO", "--out", "nowhere/x.png"], "no folder nowhere to write x.png to"),
        (["VIDEO", "--start", "1", "2"], "expected one start, or one for each of 1 videos, got 2"),
        (["VIDEO", "--start", "-1"], "start must be an integer of at least 0, got -1"),
        (["VIDEO", "--start", "9999"], "start must be below the video's length 250, got 9999"),
        (["VIDEO", "--stride", "0"], "stride must be an integer of at least 1, got 0"),
        (["VIDEO", "--columns", "0"], "columns must be at least 1, got 0"),
        (["VIDEO", "--keep-ratio", "1.5"], "keep_ratio must be a number in (0, 1], got 1.5"),
        (["VIDEO", "--keep-ratio", "0.001"], "leaves no token"),
        (["VIDEO", "--keep-ratio", "0.2", "--anchor", "first"], "anchor='first' keeps the 16 tokens of a whole"),
        (["VIDEO", "--model", "./nowhere"], "./nowhere: "),
        (["VIDEO", "--model", "no/where/at/all"], "no/where/at/all: "),
        (["VIDEO", "--model", "bert"], "bert: cannot patch BertModel"),
        (["VIDEO", "--model", "empty"], "empty: "),
        (["VIDEO", "--model", "no.pth"], "no.pth"),
        (["VIDEO", "--model", "cut"], "cut: Error while deserializing header"),
        (["no.mp4"], "no.mp4: undecodable"),
    ],
)
def test_what_goes_wrong_is_one_line_and_status_2(options, message, capsys, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    sizes = '"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8'
    (tmp_path / "bert" / "config.json").write_text(
        f'{{"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 9, {sizes}}}'
    )
    (tmp_path / "empty").mkdir()
    SMALL.save_pretrained("cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "no.pth").write_bytes(b"nothing")
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    if message.startswith("bert"):
        from transformers import AutoConfig, BertModel

        BertModel(AutoConfig.from_pretrained("bert")).save_pretrained("bert")
    arguments = [str(sample_video()) if option == "VIDEO" else option for option in options]
    if "--model" not in options:
        arguments += ["--model", str(folder)]
    assert main(["visualize", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("everest-tokens: ")
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not list(tmp_path.glob("*.png"))
