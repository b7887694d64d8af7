"""visualization.py: what is drawn is what is kept."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from everest_tokens import TokenSelection
from everest_tokens.visualization import draw_selections, grey_out, kept_map

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
