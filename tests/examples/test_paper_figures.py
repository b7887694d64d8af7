"""examples/pictures: what the figures show of models and clips, and the script that learns one clip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import paper_figures as figures
import pytest
import timm
import torch
from family_models import PreTrainingModel
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification
from transformers.models.videomae import modeling_videomae

import everest_tokens as et
from everest_tokens import TokenSelection
from everest_tokens.demo import sample_video
from everest_tokens.drawing import kept_by
from everest_tokens.fading import VERMILION
from everest_tokens.visualization import kept_map, pixels_of

PICTURES = Path(figures.__file__).parent
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def config(**changes) -> VideoMAEConfig:
    """A small VideoMAE: 4 × 4 × 4 tokens."""
    sizes = {"image_size": 64, "num_frames": 8, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = {"decoder_hidden_size": 24, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    return VideoMAEConfig(**{**sizes, **decoder, "intermediate_size": 96, "decoder_intermediate_size": 48, **changes})


@pytest.fixture
def model():
    return et.patch_videomae(VideoMAEForPreTraining(config()).eval())


def random_clip(length: int = 8, size: int = 64) -> torch.Tensor:
    return (torch.rand(1, length, 3, size, size) - MEAN) / STD


def labels_of(part) -> list[str]:
    return [row.label for row in part.rows]


def kept_by_pixels(images: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """(t, 4, 4) bool: the tokens of each step whose pixels are drawn as they were."""
    same = (images == frames).all(dim=1)[::2]
    return same.view(-1, 4, 16, 4, 16).all(dim=4).all(dim=2)


def pixels_at(step: int, row: int, column: int) -> tuple[slice, ...]:
    """Of a token, in frames (T, 3, H, W)."""
    where = (slice(16 * place, 16 * place + 16) for place in (row, column))
    return (slice(2 * step, 2 * step + 2), slice(None), *where)


# --- what is drawn ---


def test_keep_ratios_are_nested_and_counted(model):
    clip = random_clip()
    part = figures.keep_ratios(model, clip)
    counted = ["keep ratio 0.5\n32 of 64", "keep ratio 0.25\n16 of 64", "keep ratio 0.15\n9 of 64"]
    assert labels_of(part) == ["frames", *counted, "importance\nL2 distance"]
    half, quarter, least = (kept_by_pixels(row.images, pixels_of(clip)) for row in part.rows[1:4])
    assert (least <= quarter).all()
    assert (quarter <= half).all()


def test_frames_that_are_drawn_sharp_are_the_steps_that_the_model_samples(model):
    clip = random_clip(12)
    clip[:, 4:8] = clip[:, 4:5]  # step 3 keeps nothing
    sampler = et.InfoFrameSampler(1.5)
    model.everest.selector.keep_ratio = 0.5
    part = figures.frames(model, clip, sampler=sampler, seed=3)
    sampled, kept = part.rows
    assert sampled.label == "sampled steps\n4 of 6"
    counts = kept_by_pixels(kept.images, pixels_of(clip)).flatten(1).sum(dim=1)
    assert counts.sum() == 48
    assert counts[3] == 0
    assert part.captions == [f"frame {i}\n{counts[i // 2]} kept" for i in range(12)]

    patched = et.patch_videomae(model, et.ReRoSelector(0.5), frame_sampler=sampler).train()
    steps = et.select_tokens(patched, clip, generator=torch.Generator().manual_seed(3)).steps[0].tolist()
    inside, frames = (..., slice(2, -2), slice(2, -2)), pixels_of(clip)  # without the coloured border
    sharp = [i for i in range(12) if torch.equal(sampled.images[i][inside], frames[i][inside])]
    assert sharp == [i for i in range(12) if i // 2 in steps]
    bordered = [i for i in range(12) if torch.equal(sampled.images[i, :, 0, 5], VERMILION)]
    assert bordered == sharp
    others = [i for i in range(12) if i not in sharp]
    assert sampled.images[others].var() < 0.1 * frames[others].var()  # blurred, and faded
    assert sampled.images[others].mean() > frames[others].mean() + 0.1


def test_all_candidates_are_shown_in_lines_of_equal_length(model):
    part = figures.frames(model, random_clip(12), sampler=et.InfoFrameSampler(1.5), title="x")
    lines = figures.in_lines(part, 4)
    assert [line.frames for line in lines] == [range(0, 6, 2), range(6, 12, 2)]
    assert [line.title for line in lines] == ["x", ""]


@pytest.mark.parametrize("kind", ["transformers", "transformers, plain pixels", "everest"])
def test_a_model_that_predicts_zeros_gives_each_target_its_own_mean(kind):
    normalised = kind != "transformers, plain pixels"
    if kind.startswith("transformers"):
        model = VideoMAEForPreTraining(config(norm_pix_loss=normalised))
    else:
        model = PreTrainingModel(kind, img_size=(64, 64))
    torch.nn.init.zeros_(model.decoder.head.weight)
    torch.nn.init.zeros_(model.decoder.head.bias)
    clip = random_clip()
    et.patch_videomae(model.eval())
    frames = pixels_of(clip)
    if kind.startswith("transformers"):
        part = figures.reconstruction(model, clip)
    else:
        selection = et.select_tokens(model, clip.transpose(1, 2))
        prediction, _ = model(clip.transpose(1, 2), token_selection=selection)
        part = figures.reconstruction_part(frames, selection, prediction.detach(), normalised=True)
    assert labels_of(part) == [
        "frames",
        "seen by the encoder\n6 of 64",
        "reconstructed targets\n13 of 64",
        "targets\n13 of 64",
    ]
    seen, targets = (kept_by_pixels(part.rows[i].images, frames) for i in (1, 3))
    assert int(seen.sum()) == 6
    assert int(targets.sum()) == 13
    assert not (seen & targets).any()
    for token in targets.nonzero().tolist():
        place = pixels_at(*token)
        mean = frames[place].mean(dim=(0, 2, 3), keepdim=True).expand(2, 3, 16, 16)
        assert torch.allclose(part.rows[2].images[place], mean if normalised else torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_reconstructs_the_targets(normalised, monkeypatch):
    """The prediction is what transformers itself compares logits with."""
    changes = {"image_size": 32, "norm_pix_loss": normalised}
    labels = []

    class Loss(torch.nn.MSELoss):
        def forward(self, logits, target):
            labels.append(target)
            return super().forward(logits, target)

    monkeypatch.setattr(modeling_videomae, "MSELoss", Loss)
    pixels = torch.rand(1, 8, 3, 32, 32)
    target = torch.tensor([[0, 3, 5, 10]])
    others = [[i for i in range(16) if i not in row] for row in target.tolist()]
    visible = torch.tensor(others)[:, ::3]
    mask = torch.zeros(1, 16, dtype=torch.bool).scatter(1, target, True)
    VideoMAEForPreTraining(config(**changes))((pixels - MEAN) / STD, bool_masked_pos=mask)

    selection = TokenSelection(visible, target, (4, 2, 2))
    part = figures.reconstruction_part(pixels[0], selection, labels[0], normalised=normalised)
    rows = {row.label: row.images for row in part.rows}
    assert [*rows] == ["frames", "seen by the encoder\n4 of 16", "reconstructed targets\n4 of 16", "targets\n4 of 16"]
    assert torch.allclose(rows["reconstructed targets\n4 of 16"], rows["targets\n4 of 16"], atol=1e-5)
    assert torch.equal(rows["frames"], pixels[0])
    for name, index in (("seen by the encoder", visible), ("targets", target)):
        images = rows[f"{name}\n4 of 16"]
        for token in range(16):
            place = pixels_at(token // 4, token % 4 // 2, token % 2)
            assert torch.equal(images[place], pixels[0][place]) == (token in index[0]), (name, token)

    wrong = labels[0] + 1.0 if not normalised else labels[0] * 3
    part = figures.reconstruction_part(pixels[0], selection, wrong, normalised=normalised)
    assert not torch.allclose(part.rows[2].images, part.rows[3].images, atol=0.1)
    assert part.rows[2].images.max() <= 1


@pytest.mark.parametrize("kind", ["classifier", "timm"])
def test_models_without_a_decoder(kind):
    if kind == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5, depth=1)
        patched, clip = et.patch_videomae(model, num_frames=8), random_clip().transpose(1, 2)
    else:
        patched, clip = et.patch_videomae(VideoMAEForVideoClassification(config(use_mean_pooling=True))), random_clip()
    assert int(kept_map(kept_by(patched, clip, et.ReRoSelector(0.6), 0)).sum()) == 38
    with pytest.raises(ValueError, match="has no pixel decoder"):
        figures.reconstruction(patched, clip)


# --- the script ---


def run(tmp_path, *options) -> Path:
    VideoMAEForPreTraining(config()).save_pretrained(tmp_path / "model")
    arguments = [*map(str, options), "--model", str(tmp_path / "model")]
    return figures.figure(figures.parser().parse_args(arguments))


@pytest.mark.parametrize("drawing", ["keep-ratios", "frames", "reconstruction"])
def test_pages_as_wide_as_those_of_a_paper(tmp_path, drawing):
    options = ["--layout", "paper", "--columns", "4"]
    out = run(tmp_path, drawing, sample_video(), sample_video(), *options, "--out", tmp_path / "x.pdf")
    content = out.read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/Type3" not in content
    width = float(content[content.index(b"/MediaBox") :].split()[3])
    assert width <= 6.75 * 72 + 0.1


def test_recorded_samplers_are_drawn_and_options_win(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda parts, **options: drawn.append(parts) or Namespaced())
    patched = et.patch_videomae(VideoMAEForPreTraining(config()), frame_sampler=et.InfoFrameSampler(1.75))
    patched.save_pretrained(tmp_path / "patched")
    arguments = ["frames", str(sample_video()), "--model", str(tmp_path / "patched"), "--out", str(tmp_path / "x.png")]
    for options, candidates in (([], 7), (["--alpha", "1.5"], 6)):
        figures.figure(figures.parser().parse_args([*arguments, *options]))
        assert drawn[-1][0].rows[0].label == f"sampled steps\n4 of {candidates}"


class Namespaced:
    def savefig(self, out: Path) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["frames", "VIDEO", "--out", "x.jpg"], "expected a name that ends in .png, .pdf, .svg, got x.jpg"),
        (["frames", "VIDEO", "--keep-ratio", "0.5", "0.2"], "frames takes one keep ratio, got 2"),
        (["frames", "VIDEO", "--alpha", "1"], "alpha must be a number above 1, got 1.0"),
        (["keep-ratios", "VIDEO", "--start", "1", "2"], "expected one start, or one for each of 1 videos, got 2"),
        (["reconstruction", "VIDEO"], "needs --model: random weights reconstruct nothing"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options, message, capsys, monkeypatch):
    arguments = [str(sample_video()) if option == "VIDEO" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["paper_figures.py", *arguments])
    assert figures.main() == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_reconstruction_of_a_clip_learned_by_heart(tmp_path):
    out = tmp_path / "reconstruction.png"
    command = [sys.executable, str(PICTURES / "reconstruction.py"), str(sample_video()), "--steps", "2"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"drawn in {out}" in done.stdout
    with Image.open(out) as picture:
        assert picture.width == 1200
    assert list(tmp_path.iterdir()) == [out]  # the folder of weights is gone
