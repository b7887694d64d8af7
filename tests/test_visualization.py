"""visualization.py: what is drawn is what is kept."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.models.videomae import modeling_videomae

from everest_tokens import TokenSelection
from everest_tokens.visualization import (
    Part,
    Row,
    candidates_part,
    draw,
    draw_moment,
    draw_selections,
    grey_out,
    kept_map,
    reconstruction_part,
)

GRID = (3, 2, 4)


def selection(*visible: int, importance: torch.Tensor | None = None, target: tuple[int, ...] = ()) -> TokenSelection:
    return TokenSelection(
        torch.tensor([visible]), torch.tensor([target]) if target else None, GRID, importance=importance
    )


def test_kept_map_is_t_major_and_holds_visible_and_target():
    kept = kept_map(selection(0, 9, target=(23,)))
    assert kept.nonzero().tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 3]]


def test_grey_out_leaves_kept_patches_and_fades_the_others():
    frames = torch.rand(3, 3, 8, 16)
    kept = kept_map(selection(0, 9))
    drawn = grey_out(frames, kept)
    assert torch.equal(drawn[0, :, :4, :4], frames[0, :, :4, :4])
    assert torch.equal(drawn[1, :, :4, 4:8], frames[1, :, :4, 4:8])
    dropped = drawn[2]
    assert torch.equal(dropped[0], dropped[1])  # grey
    assert torch.equal(dropped[0], dropped[2])
    assert dropped.min() > 0.69  # light
    assert torch.allclose(dropped[0], 0.25 * frames[2].mean(dim=0) + 0.75 * 0.93)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_columns_and_labels(dtype, tmp_path):
    frames = torch.randint(0, 256, (6, 3, 8, 16), dtype=torch.uint8)
    pixels = frames if dtype == torch.uint8 else frames / 255
    importance = torch.arange(24.0)[None]
    figure = draw_selections(pixels, {"a": selection(0, 1, importance=importance), "b": selection(5)})
    axes = np.array(figure.axes[:12]).reshape(4, 3)  # frames, two selections, importance; then the colour bar
    assert [axis.get_title() for axis in axes[0]] == ["frame 0", "frame 2", "frame 4"]
    assert [line[0].get_ylabel() for line in axes] == ["frames", "a\n2 of 24", "b\n1 of 24", "importance"]
    shown = axes[0][1].images[0].get_array()
    assert np.allclose(shown, frames[2].permute(1, 2, 0).numpy() / 255)  # the first frame of the second tubelet
    heat = axes[3][2].images[0].get_array()
    assert heat[0, 0] == 16
    assert heat[-1, -1] == 23
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_long_clips_are_thinned_out_evenly():
    chosen = TokenSelection(torch.arange(4)[None], None, (32, 2, 2))
    figure = draw_selections(torch.rand(64, 3, 8, 8), {"kept": chosen}, max_columns=5)
    assert [axis.get_title() for axis in figure.axes[:5]] == ["frame 0", "frame 16", "frame 32", "frame 46", "frame 62"]


def test_a_static_clip_has_a_heatmap_too():
    figure = draw_selections(torch.rand(3, 3, 8, 16), {"kept": selection(0, importance=torch.zeros(1, 24))})
    figure.canvas.draw()
    assert [axis.get_ylabel() for axis in figure.axes].count("importance") == 1


@pytest.mark.parametrize("shape", [(3, 8, 16), (4, 3, 8, 16), (3, 1, 8, 16)])
def test_frames_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"multiple of 3, 3, H, W.*" + str(shape[0])):
        draw_selections(torch.rand(shape), {"kept": selection(0)})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"everest-tokens\[demo\]"):
        draw_selections(torch.rand(3, 3, 8, 16), {"kept": selection(0)})


def test_a_clip_of_the_batch_is_chosen():
    both = TokenSelection(torch.tensor([[0, 1], [4, 5]]), None, GRID, importance=torch.arange(48.0).view(2, 24))
    figure = draw_selections(torch.rand(3, 3, 8, 16), {"kept": both}, clip=1)
    heat = figure.axes[6].images[0].get_array()
    assert heat[0, 0] == 24
    with pytest.raises(IndexError):
        draw_selections(torch.rand(3, 3, 8, 16), {"kept": both}, clip=2)


def test_candidates_that_were_not_drawn_are_blurred_and_the_others_framed():
    frames = torch.rand(6, 3, 24, 48)
    kept = torch.zeros(3, 2, 4, dtype=torch.bool)
    kept[0, 0, :3] = kept[2] = True
    part = candidates_part(frames, kept, torch.tensor([0, 2]))
    assert part.captions == [f"frame {i}: {count} kept" for i, count in enumerate([3, 3, 0, 0, 8, 8])]
    row = part.rows[0]
    assert row.framed.tolist() == [True, True, False, False, True, True]
    assert torch.equal(row.images[row.framed], frames[row.framed])
    blurred = row.images[2:4]
    assert torch.allclose(blurred.mean(dim=(2, 3)), 0.5 * frames[2:4].mean(dim=(2, 3)) + 0.5 * 0.93, atol=0.02)
    assert blurred.std() < 0.25 * frames[2:4].std()
    figure = draw([part])
    edges = [axis.spines["left"].get_edgecolor() for axis in figure.axes]
    assert edges[0] == edges[2] != edges[1]
    assert all(edge == edges[1] for edge in edges[3:])


def test_all_candidates_are_shown_in_lines_of_equal_length():
    part = candidates_part(torch.rand(24, 3, 16, 16), torch.ones(12, 2, 2, dtype=torch.bool), torch.arange(8))
    titles = [axis.get_title() for axis in draw([part], columns=8).axes]
    assert titles == [
        *(f"frame {i}: 4 kept" for i in range(0, 12, 2)),
        *[""] * 6,
        *(f"frame {i}: 4 kept" for i in range(12, 24, 2)),
        *[""] * 6,
    ]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("clip", [0, 1])
def test_a_perfect_prediction_reconstructs_the_targets(normalised, clip, monkeypatch):
    """The prediction is what transformers itself compares logits with."""
    config = VideoMAEConfig(
        image_size=32,
        num_frames=8,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        decoder_hidden_size=24,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=24,
        norm_pix_loss=normalised,
    )
    labels = []

    class Loss(torch.nn.MSELoss):
        def forward(self, logits, target):
            labels.append(target)
            return super().forward(logits, target)

    monkeypatch.setattr(modeling_videomae, "MSELoss", Loss)
    frames = torch.rand(2, 8, 3, 32, 32)
    target = torch.tensor([[0, 3, 5, 10], [2, 3, 14, 15]])
    others = [[i for i in range(16) if i not in row] for row in target.tolist()]
    visible = torch.tensor(others)[:, ::3]
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, target, True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    VideoMAEForPreTraining(config)((frames - mean) / std, bool_masked_pos=mask)

    selection = TokenSelection(visible, target, (4, 2, 2))
    part = reconstruction_part(frames[clip], selection, labels[0], normalised=normalised, clip=clip)
    rows = {row.label: row.images for row in part.rows}
    assert [*rows] == ["frames", "seen by the encoder\n4 of 16", "reconstructed targets\n4 of 16", "targets\n4 of 16"]
    assert torch.allclose(rows["reconstructed targets\n4 of 16"], rows["targets\n4 of 16"], atol=1e-5)
    assert torch.equal(rows["frames"], frames[clip])
    for name, index in (("seen by the encoder", visible), ("targets", target)):
        images = rows[f"{name}\n4 of 16"]
        for token in range(16):
            step, row, column = token // 4, token % 4 // 2, token % 2
            place = (slice(2 * step, 2 * step + 2), slice(None))
            place += (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            assert torch.equal(images[place], frames[clip][place]) == (token in index[clip]), (name, token)

    wrong = labels[0] + 1.0 if not normalised else labels[0] * 3
    part = reconstruction_part(frames[clip], selection, wrong, normalised=normalised, clip=clip)
    assert not torch.allclose(part.rows[2].images, part.rows[3].images, atol=0.1)
    assert part.rows[2].images.max() <= 1


@pytest.mark.parametrize(
    ("chosen", "shape", "prediction", "message"),
    [
        (selection(0), (3, 3, 8, 16), (1, 1, 48), "needs a selection with targets"),
        (selection(0, target=(2,)), (3, 3, 8, 18), (1, 1, 48), "8×18 pixels don't divide into 2×4 patches"),
        (selection(0, target=(2,)), (3, 3, 8, 16), (1, 2, 48), r"expected prediction \(B, 1, 48\), got \(1, 2, 48\)"),
        (selection(0, target=(2,)), (4, 3, 8, 16), (1, 1, 48), "multiple of 3"),
    ],
)
def test_reconstructions_that_do_not_fit(chosen, shape, prediction, message):
    with pytest.raises(ValueError, match=message):
        reconstruction_part(torch.rand(shape), chosen, torch.zeros(prediction), normalised=True)


def test_a_moment_shows_every_row_at_that_frame():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8) / 4
    heat = torch.arange(4.0)[:, None, None].expand(4, 8, 8)
    part = Part([Row("frames", images), Row("importance", heat, (0.0, 3.0))], [f"frame {i}" for i in range(4)], 2, "x")
    shorter = Part([Row("frames", images[:2]), Row("more", images[:2])], ["frame 0", "frame 1"], 1)
    figure = draw_moment([part, shorter], 3)
    values = [float(axis.images[0].get_array()[0, 0].max()) for axis in figure.axes[:4]]
    assert values == [0.75, 3, 0.25, 0.25]  # a clip that is over stands still
    assert [axis.get_title() for axis in figure.axes[:4]] == ["frames", "importance", "frames", "more"]
    assert [text.get_text() for text in figure.texts] == ["x   frame 3", "frame 1"]


def test_parts_are_lettered_and_long_names_lose_their_middle():
    name = "start" + 300 * "m" + "end.mp4"
    parts = [
        Part([Row("frames", torch.rand(2, 3, 8, 8))], ["frame 0", "frame 1"], 1, title) for title in ("x.mp4", name)
    ]
    shown = [text.get_text() for text in draw(parts).texts]
    assert shown[0] == "(a) x.mp4"
    assert shown[1].startswith("(b) startm")
    assert shown[1].endswith("mend.mp4")
    assert "…" in shown[1]
