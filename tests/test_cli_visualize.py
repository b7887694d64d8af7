"""What the `visualize` command draws, from files and from models: pictures, visualize_command and animation."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from itertools import combinations

import av
import numpy as np
import pytest
import timm
import torch
from family_models import FineTuningModel, PreTrainingModel
from matplotlib.text import Text
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens import visualize_command
from everest_tokens.animation import save_animation
from everest_tokens.cli import main
from everest_tokens.demo import sample_video
from everest_tokens.pictures import ModelPictures
from everest_tokens.visualization import draw, draw_moment

DRAWINGS = ["selection", "strategies", "keep-ratios", "frames", "reconstruction"]


def config(**changes) -> VideoMAEConfig:
    """A small VideoMAE: 4 × 4 × 4 tokens."""
    return VideoMAEConfig(
        **{
            "image_size": 64,
            "num_frames": 8,
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "decoder_hidden_size": 24,
            "decoder_num_attention_heads": 2,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 48,
            "num_labels": 5,
            **changes,
        }
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VideoMAEForPreTraining(config()).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def moving_square(length: int = 8) -> torch.Tensor:
    """A white 16 × 16 square that jumps one token to the right every second frame: (T, 3, 64, 64) in [0, 1]."""
    frames = torch.full((length, 3, 64, 64), 0.25)
    for i in range(length):
        column = i // 2 % 4 * 16
        frames[i, :, 16:32, column : column + 16] = 1
    return frames


def rows_of(part) -> dict[str, torch.Tensor]:
    return {row.label.split("\n")[0]: row.images for row in part.rows}


def counts_of(part) -> dict[str, str]:
    return dict(row.label.split("\n") for row in part.rows if "\n" in row.label)


def kept_by_pixels(images: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """(t, 4, 4) bool: the tokens of each step whose pixels are drawn as they were."""
    same = (images == frames).all(dim=1)[::2]
    return same.view(-1, 4, 16, 4, 16).all(dim=4).all(dim=2)


# What is drawn


def test_selection_draws_what_select_tokens_selects(model):
    frames = torch.rand(8, 3, 64, 64, generator=torch.manual_seed(1))
    part = ModelPictures(model, keep_ratio=0.25).selection(frames)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    patched = et.patch_videomae(model, et.ReRoSelector(0.25))
    kept = et.select_tokens(patched, ((frames - mean) / std)[None]).kept[0]
    drawn = kept_by_pixels(rows_of(part)["kept"], frames)
    assert drawn.flatten().nonzero().flatten().tolist() == kept.tolist()
    assert counts_of(part) == {"kept": "16 of 64"}
    assert [row.label for row in part.rows][-1] == "importance"


def test_where_the_square_was_and_is_changes_and_nothing_else(model):
    frames = moving_square()
    # Steps 1, 2 and 3 change in two tokens of row 1 each, and step 0 takes its importance from step 1: 8 tokens.
    part = ModelPictures(model, keep_ratio=8 / 64).selection(frames)
    expected = [(0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (2, 1, 1), (2, 1, 2), (3, 1, 2), (3, 1, 3)]
    assert [*map(tuple, kept_by_pixels(rows_of(part)["kept"], frames).nonzero().tolist())] == expected
    heat = rows_of(part)["importance"][::2, 8::16, 8::16]
    assert [*map(tuple, (heat > 0).nonzero().tolist())] == expected


def test_strategies_at_one_ratio_and_the_nearest_running_cells(model):
    frames = torch.rand(8, 3, 64, 64)
    part = ModelPictures(model).strategies(frames)
    rows = {label: kept_by_pixels(images, frames) for label, images in rows_of(part).items()}
    assert [*rows] == ["frames", "random (ST-MAE)", "tube (VideoMAE)", "running cell (VideoMAE V2)", "ReRo (EVEREST)"]
    assert [int(kept.sum()) for kept in rows.values()] == [64, 32, 32, 32, 32]  # Figure 8's 0.5
    tube, cells = rows["tube (VideoMAE)"], rows["running cell (VideoMAE V2)"]
    assert (tube == tube[0]).all()  # the same places at every step
    assert (cells.view(4, 2, 2, 2, 2).sum(dim=(2, 4)) == 2).all()  # two places of every 2 × 2 cell
    assert not (cells == cells[0]).all()  # which run

    part = ModelPictures(model, keep_ratio=0.35).strategies(frames)
    assert [*counts_of(part).values()] == ["22 of 64", "24 of 64", "16 of 64", "22 of 64"]  # tube: 16 - 10 places


def test_no_running_cells_on_an_odd_grid(caplog):
    caplog.set_level("INFO")
    part = ModelPictures(VideoMAEForPreTraining(config(image_size=48))).strategies(torch.rand(8, 3, 48, 48))
    assert len(part.rows) == 4
    assert "no running cells on 3×3 tokens" in caplog.text


def test_keep_ratios_are_nested_and_counted(model):
    frames = torch.rand(8, 3, 64, 64)
    part = ModelPictures(model).keep_ratios(frames)
    assert counts_of(part) == {
        "keep ratio 0.5": "32 of 64",
        "keep ratio 0.25": "16 of 64",
        "keep ratio 0.15": "9 of 64",
    }
    half, quarter, least = (kept_by_pixels(row.images, frames) for row in part.rows[1:4])
    assert (least <= quarter).all()
    assert (quarter <= half).all()
    assert part.rows[-1].label == "importance"


def test_frames_that_are_drawn_sharp_are_the_steps_that_the_model_samples(model):
    frames = torch.rand(12, 3, 64, 64)
    frames[4:8] = frames[4]  # step 3 keeps nothing
    sampler = et.InfoFrameSampler(1.5)
    part = ModelPictures(model, alpha=1.5, keep_ratio=0.5, seed=3).frames(frames)
    sampled, kept = part.rows
    assert sampled.label == "sampled steps\n4 of 6"
    counts = kept_by_pixels(kept.images, frames).flatten(1).sum(dim=1)
    assert counts.sum() == 48
    assert counts[3] == 0
    assert part.captions == [f"frame {i}: {counts[i // 2]} kept" for i in range(12)]

    patched = et.patch_videomae(model, et.ReRoSelector(0.5), frame_sampler=sampler).train()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    generator = torch.Generator().manual_seed(3)
    steps = et.select_tokens(patched, ((frames - mean) / std)[None], generator=generator).steps[0].tolist()
    framed = [i for i in range(6) if sampled.framed[2 * i] and sampled.framed[2 * i + 1]]
    sharp = [i for i in range(6) if torch.equal(sampled.images[2 * i : 2 * i + 2], frames[2 * i : 2 * i + 2])]
    assert framed == sharp == steps
    assert int(sampled.framed.sum()) == 8
    others = [i for i in range(12) if i // 2 not in steps]
    assert sampled.images[others].var() < 0.1 * frames[others].var()  # blurred, and faded
    assert sampled.images[others].mean() > frames[others].mean() + 0.1


@pytest.mark.parametrize("kind", ["transformers", "transformers, plain pixels", "videomae", "everest"])
def test_a_model_that_predicts_zeros_gives_each_target_its_own_mean(kind):
    torch.manual_seed(0)
    normalised = kind != "transformers, plain pixels"
    if kind.startswith("transformers"):
        model = VideoMAEForPreTraining(config(norm_pix_loss=normalised))
    else:
        model = PreTrainingModel(kind, img_size=(64, 64))
    torch.nn.init.zeros_(model.decoder.head.weight)
    torch.nn.init.zeros_(model.decoder.head.bias)
    frames = torch.rand(8, 3, 64, 64)
    part = ModelPictures(model).reconstruction(frames)
    labels = [row.label for row in part.rows]
    assert labels == ["frames", "seen by the encoder\n6 of 64", "reconstructed targets\n13 of 64", "targets\n13 of 64"]
    seen, targets = (kept_by_pixels(part.rows[i].images, frames) for i in (1, 3))
    assert int(seen.sum()) == 6
    assert int(targets.sum()) == 13
    assert not (seen & targets).any()
    for step, row, column in targets.nonzero().tolist():
        place = (slice(2 * step, 2 * step + 2), slice(None))
        place += (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
        mean = frames[place].mean(dim=(0, 2, 3), keepdim=True).expand(2, 3, 16, 16)
        assert torch.allclose(part.rows[2].images[place], mean if normalised else torch.zeros(()), atol=1e-5)


# Models


def test_the_model_stays_as_it_was():
    for patch in (False, True):
        model = VideoMAEForPreTraining(config()).train()
        if patch:
            et.patch_videomae(model, et.ReRoSelector(0.4), frame_sampler=et.InfoFrameSampler(1.5))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        cls, settings = type(model), str(getattr(model.config, "everest", None))
        state = torch.get_rng_state()
        pictures = ModelPictures(model, keep_ratio=0.5, distance="l1", alpha=1.8)
        pictures.strategies(torch.rand(8, 3, 64, 64, generator=torch.Generator()))
        pictures.reconstruction(torch.rand(8, 3, 64, 64, generator=torch.Generator()))
        assert torch.equal(torch.get_rng_state(), state)
        assert type(model) is cls
        assert model.training
        assert str(getattr(model.config, "everest", None)) == settings
        assert hasattr(model, "everest") == patch
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_settings_of_another_model_that_shares_the_config_are_not_drawn():
    shared = config()
    et.patch_videomae(VideoMAEForPreTraining(shared), et.ReRoSelector(0.5))
    part = ModelPictures(VideoMAEForPreTraining(shared)).selection(torch.rand(8, 3, 64, 64))
    assert counts_of(part) == {"kept": "19 of 64"}  # 0.3


def test_half_precision(model):
    part = ModelPictures(model.bfloat16()).reconstruction(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8))
    assert [row.images.dtype for row in part.rows] == 4 * [torch.float32]


@pytest.mark.parametrize("kind", ["classifier", "timm"])
def test_other_models_are_drawn_too(kind):
    if kind == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=1)
        frames, steps = torch.rand(16, 3, 64, 64), 8
    else:
        model = VideoMAEForVideoClassification(config(use_mean_pooling=True))
        frames, steps = torch.rand(8, 3, 64, 64), 4
    part = ModelPictures(model).selection(frames)
    assert counts_of(part) == {"kept": f"{int(0.6 * 16 * steps)} of {16 * steps}"}  # fine-tuning's 0.6
    with pytest.raises(ValueError, match="has no pixel decoder"):
        ModelPictures(model).reconstruction(frames)


def test_recorded_settings_are_drawn_and_options_win(folder, tmp_path, monkeypatch, capsys):
    patched = et.patch_videomae(
        VideoMAEForPreTraining.from_pretrained(folder),
        et.ReRoSelector(0.4, distance="cosine"),
        frame_sampler=et.InfoFrameSampler(1.75),
    )
    patched.save_pretrained(tmp_path / "patched")
    drawn = []
    monkeypatch.setattr(visualize_command, "draw_page", lambda parts, **_: drawn.append(parts) or draw(parts))

    def labels(*options: str) -> list[str]:
        arguments = [str(sample_video()), "--model", str(tmp_path / "patched"), "--out", str(tmp_path / "x.png")]
        assert main(["visualize", *arguments, *options]) == 0
        return [row.label for row in drawn[-1][0].rows]

    assert "kept\n25 of 64" in labels()  # 0.4
    cosine = drawn[-1][0].rows[-1].scale
    assert -1.01 < cosine[0] <= cosine[1] < 1.01
    assert "kept\n16 of 64" in labels("--keep-ratio", "0.25", "--distance", "l2")
    assert drawn[-1][0].rows[-1].scale[1] > 1.01
    assert labels("--draw", "frames")[0] == "sampled steps\n4 of 7"
    assert labels("--draw", "frames", "--alpha", "1.5")[0] == "sampled steps\n4 of 6"
    assert "ReRo (EVEREST)\n25 of 64" in labels("--draw", "strategies")
    assert "ReRo (EVEREST)\n16 of 64" in labels("--draw", "strategies", "--keep-ratio", "0.25")
    assert labels("--draw", "keep-ratios", "--keep-ratio", "0.5", "0.25")[1:3] == [
        "keep ratio 0.5\n32 of 64",
        "keep ratio 0.25\n16 of 64",
    ]
    assert "seen by the encoder\n6 of 64" in labels("--draw", "reconstruction")
    assert "random weights" not in capsys.readouterr().out


# Pages


@pytest.mark.parametrize("drawing", DRAWINGS)
@pytest.mark.parametrize("layout", ["readme", "paper", "animation"])
def test_no_text_leaves_the_page_or_touches_anything(model, drawing, layout):
    pictures = ModelPictures(model)
    frames = torch.rand(12 if drawing == "frames" else 8, 3, 64, 64)
    long = "a $\\frac$ name\nof_" + 60 * "wwww" + " that goes on " + 20 * "and on " + ".mp4"
    parts = [getattr(pictures, drawing.replace("-", "_"))(frames, title) for title in ("b.mp4", long)]
    parts[0].rows[0] = type(parts[0].rows[0])(long + long, parts[0].rows[0].images)  # a label, and a tall one
    figure = draw_moment(parts, 3) if layout == "animation" else draw(parts, layout=layout)
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert len(texts) >= 6
    boxes = [text.get_window_extent() for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
        assert text.get_fontsize() >= 7
        for axis in figure.axes:
            assert not overlap(box, axis.get_window_extent()), text
    for (text, one), (other, two) in combinations(zip(texts, boxes, strict=True), 2):
        assert not overlap(one, two), (text, other)
    for one, two in combinations([axis.get_window_extent() for axis in figure.axes], 2):
        assert not overlap(one, two)


def overlap(one, two) -> bool:
    wide = min(one.x1, two.x1) - max(one.x0, two.x0)
    high = min(one.y1, two.y1) - max(one.y0, two.y0)
    return wide > 0.5 and high > 0.5  # pixels


@pytest.mark.parametrize(("layout", "width"), [("readme", 1200), ("paper", 2025)])
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_page_for_each_suffix(folder, tmp_path, layout, width, suffix):
    out = tmp_path / f"x.{suffix}"
    assert main(["visualize", str(sample_video()), "--model", str(folder), "--out", str(out), "--layout", layout]) == 0
    if suffix == "png":
        with Image.open(out) as picture:
            assert picture.width == width
    elif suffix == "pdf":
        content = out.read_bytes()
        assert f"/MediaBox [ 0 0 {width * 72 / (100 if layout == 'readme' else 300):g}".encode() in content
        assert b"/Type3" not in content
    else:
        assert f'width="{width * 72 / (100 if layout == "readme" else 300):g}pt"' in out.read_text()


def test_several_videos_are_stacked_each_from_its_own_start(folder, tmp_path, monkeypatch, capsys):
    other = tmp_path / ("long" * 50 + ".mp4")
    shutil.copy(sample_video(), other)
    drawn = []
    monkeypatch.setattr(visualize_command, "draw_page", lambda parts, **_: drawn.append(parts) or draw(parts))
    arguments = ["visualize", str(sample_video()), str(other), "--model", str(folder), "--start", "10", "200"]
    assert main([*arguments, "--stride", "1", "--out", str(tmp_path / "x.png")]) == 0
    assert [part.title for part in drawn[0]] == ["bikes.mp4", other.name]
    for part, start in zip(drawn[0], (10, 200), strict=True):
        clip = et.video.load_clip(sample_video(), num_frames=8, stride=1, start=start, size=64)[0]
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        assert torch.allclose(part.rows[0].images, (clip * std + mean).clamp(0, 1), atol=1e-5)
    assert "clips: 100%" in capsys.readouterr().err


# Animations


@pytest.mark.parametrize(("drawing", "length"), [("selection", 8), ("frames", 12)])
def test_gif_and_mp4_play_the_whole_clip(folder, tmp_path, drawing, length):
    arguments = ["visualize", str(sample_video()), "--draw", drawing, "--model", str(folder), "--fps", "4"]
    assert main([*arguments, "--out", str(tmp_path / "x.gif")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "x.mp4")]) == 0
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == length
        assert gif.info["duration"] == 250
        assert gif.info["loop"] == 0
        size = gif.size
        shown = [np.asarray(frame.convert("RGB"), dtype=int) for frame in frames_of(gif)]
    columns = 3 if drawing == "selection" else 2
    assert columns * 224 < size[0] < columns * 224 + 130
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 4
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(decoded) == length
    assert decoded[0].shape == (size[1] // 2 * 2, size[0] // 2 * 2, 3)
    for one, two in zip(shown, decoded, strict=True):  # the same frames, in the same order
        assert np.abs(one[: two.shape[0], : two.shape[1]] - two).mean() < 6
    assert np.abs(shown[0] - shown[-1]).mean() > 6


def frames_of(gif):
    for i in range(gif.n_frames):
        gif.seek(i)
        yield gif


def test_an_animation_shows_its_images_in_order(tmp_path):
    images = [np.full((33, 47, 3), 20 * i, dtype=np.uint8) for i in range(10)]
    for suffix in (".gif", ".mp4"):
        save_animation(images, tmp_path / f"x{suffix}", fps=12.5)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.size == (47, 33)
        assert [frame.convert("RGB").getpixel((9, 9))[0] for frame in frames_of(gif)] == list(range(0, 200, 20))
    with av.open(str(tmp_path / "x.mp4")) as container:
        values = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert values[0].shape == (32, 46, 3)
    assert np.abs(np.array([value.mean() for value in values]) - np.arange(0, 200, 20)).max() < 4


# Options and errors


def test_random_weights_are_announced_and_follow_the_seed(tmp_path, capsys):
    def picture(*options: str) -> bytes:
        out = tmp_path / "x.png"
        arguments = ["visualize", str(sample_video()), "--draw", "strategies", "--columns", "2", "--out", str(out)]
        assert main([*arguments, *options]) == 0
        with Image.open(out) as image:
            return image.tobytes()

    first = picture()
    assert "random weights" in capsys.readouterr().out
    assert picture() == first
    assert picture("--seed", "1") != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.mp4"], "missing.mp4: no such file"),
        (["VIDEO", "--out", "x.jpg"], "expected a name that ends in .png, .pdf, .svg, .gif, .mp4, got x.jpg"),
        (["VIDEO", "--out", "nowhere/x.png"], "no folder nowhere to write x.png to"),
        (["VIDEO", "--keep-ratio", "1.5"], "keep_ratio must be a number in (0, 1], got 1.5"),
        (["VIDEO", "--keep-ratio", "0.5", "0.2"], "--draw selection takes one keep ratio, got 2"),
        (["VIDEO", "--draw", "frames", "--alpha", "1"], "alpha must be a number above 1, got 1.0"),
        (["VIDEO", "--stride", "0"], "stride must be at least 1, got 0"),
        (["VIDEO", "--columns", "0"], "columns must be at least 1, got 0"),
        (["VIDEO", "--start", "-1"], "start must be at least 0, got -1"),
        (["VIDEO", "--start", "1", "2"], "expected one start, or one for each of 1 videos, got 2"),
        (["VIDEO", "--fps", "0"], "fps must be above 0 and at most 50, got 0.0"),
        (["VIDEO", "--out", "x.gif", "--layout", "paper"], "--layout paper is for still pictures"),
        (["VIDEO", "--draw", "reconstruction"], "needs --model: random weights reconstruct nothing"),
        (["VIDEO", "--model", "./nowhere"], "./nowhere: no such folder or file"),
        (["VIDEO", "--model", "no/where/at all"], "no/where/at all: no such folder or file"),
    ],
)
def test_bad_options_are_one_line_and_status_2_before_anything_is_loaded(
    options, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in ("ModelPictures", "load_clip"):
        monkeypatch.setattr(visualize_command, name, lambda *_, **__: pytest.fail("loaded"))
    arguments = [str(sample_video()) if option == "VIDEO" else option for option in options]
    assert main(["visualize", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("everest-tokens: ")
    assert message in error


def test_bad_models_and_clips_are_one_line_and_status_2(folder, tmp_path, capsys):
    VideoMAEForVideoClassification(config()).save_pretrained(tmp_path / "classifier")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.pth").write_bytes(b"nothing")
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    video = str(sample_video())
    cases = {
        "classifier has no pixel decoder": [video, "--draw", "reconstruction", "--model", str(tmp_path / "classifier")],
        "bert is no VideoMAE": [video, "--model", str(tmp_path / "bert")],
        "empty": [video, "--model", str(tmp_path / "empty")],
        "no.pth": [video, "--model", str(tmp_path / "no.pth")],
        "no.mp4": [str(tmp_path / "no.mp4"), "--model", str(folder)],
        "alpha 1.1 gives 4 candidates": [video, "--draw", "frames", "--alpha", "1.1", "--model", str(folder)],
        "start must be below": [video, "--start", "9999", "--model", str(folder)],
        "leaves no token": [video, "--keep-ratio", "0.001", "--model", str(folder)],
    }
    for message, arguments in cases.items():
        capsys.readouterr()
        assert main(["visualize", *arguments, "--out", str(tmp_path / "x.png")]) == 2, message
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("everest-tokens: ")
        assert message in line
    assert not (tmp_path / "x.png").exists()


def test_a_checkpoint_file_is_drawn_as_what_it_is(tmp_path, monkeypatch, capsys):
    sizes = {"img_size": (64, 64), "num_frames": 8, "embed_dim": 384, "depth": 1}  # a width that tells the heads
    arguments = Namespace(num_frames=8, input_size=64)
    decoder = {"decoder_dim": 192, "decoder_num_heads": 3, "decoder_depth": 1}
    models = {"pre.pth": PreTrainingModel(**sizes, **decoder), "fine.pth": FineTuningModel(**sizes)}
    for name, model in models.items():
        torch.save({"model": model.state_dict(), "args": arguments}, tmp_path / name)
    drawn = []
    monkeypatch.setattr(visualize_command, "draw_page", lambda parts, **_: drawn.append(parts) or draw(parts))

    def run(name: str, drawing: str) -> int:
        options = ["--draw", drawing, "--model", str(tmp_path / name), "--out", str(tmp_path / "x.png")]
        return main(["visualize", str(sample_video()), *options])

    assert run("pre.pth", "selection") == 0
    assert counts_of(drawn[-1][0]) == {"kept": "19 of 64"}  # 0.3
    assert run("pre.pth", "reconstruction") == 0
    assert run("fine.pth", "selection") == 0
    assert counts_of(drawn[-1][0]) == {"kept": "38 of 64"}  # 0.6
    capsys.readouterr()
    assert run("fine.pth", "reconstruction") == 2
    assert "fine.pth has no pixel decoder" in capsys.readouterr().err


def test_a_clip_beyond_the_end_repeats_the_last_frame(folder, tmp_path):
    arguments = ["visualize", str(sample_video()), "--start", "249", "--model", str(folder)]
    assert main([*arguments, "--out", str(tmp_path / "x.gif")]) == 0
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 8


def test_help_shows_what_the_options_default_to(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["visualize", "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for default in (
        "(default: selection)",
        "(default: 4)",
        "(default: 0)",
        "(default: 8)",
        "(default: readme)",
        "or 1.5",
    ):
        assert default in words
    for figure in ("Figure 6", "Figure 8", "Figure 9", "Figures 3 and 10"):
        assert figure in words


@pytest.mark.parametrize(
    ("module", "suffix"), [("matplotlib.figure", "png"), ("tqdm", "png"), ("PIL", "gif"), ("av", "mp4")]
)
def test_without_an_optional_package_the_extra_is_named(folder, tmp_path, monkeypatch, capsys, module, suffix):
    monkeypatch.setattr(visualize_command, "load_clip", lambda *_, **__: torch.rand(1, 8, 3, 64, 64))
    if module in ("PIL", "av"):
        monkeypatch.setattr(visualize_command, "_rendered", lambda figure: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / f"x.{suffix}"
    assert main(["visualize", str(sample_video()), "--model", str(folder), "--out", str(out)]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err
