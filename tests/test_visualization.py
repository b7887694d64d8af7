"""visualization.py: what is drawn is what is kept, and no text leaves the page or touches anything."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from everest_tokens import TokenSelection
from everest_tokens.visualization import Part, Row, draw, kept_map, kept_row, path_row, selection_part

GRID = (3, 2, 4)


def selection(*visible: int, importance: torch.Tensor | None = None, target: tuple[int, ...] = ()) -> TokenSelection:
    return TokenSelection(
        torch.tensor([visible]), torch.tensor([target]) if target else None, GRID, importance=importance
    )


def test_kept_map_is_t_major_and_holds_visible_and_target():
    kept = kept_map(selection(0, 9, target=(23,)))
    assert kept.nonzero().tolist() == [[0, 0, 0], [1, 0, 1], [2, 1, 3]]


def test_kept_patches_are_left_and_the_others_fade():
    frames = torch.rand(3, 3, 8, 16)
    kept = kept_map(selection(0, 9))
    label, drawn = kept_row("kept", frames, kept)
    assert label == "kept\n2 of 24"
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
    figure = draw([selection_part(pixels, {"a": selection(0, 1, importance=importance), "b": selection(5)})])
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
    figure = draw([selection_part(torch.rand(64, 3, 8, 8), {"kept": chosen})], columns=5)
    assert [axis.get_title() for axis in figure.axes[:5]] == ["frame 0", "frame 16", "frame 32", "frame 46", "frame 62"]


def test_a_static_clip_has_a_heatmap_too():
    figure = draw([selection_part(torch.rand(3, 3, 8, 16), {"kept": selection(0, importance=torch.zeros(1, 24))})])
    figure.canvas.draw()
    assert [axis.get_ylabel() for axis in figure.axes].count("importance") == 1


@pytest.mark.parametrize("shape", [(3, 8, 16), (4, 3, 8, 16), (3, 1, 8, 16)])
def test_frames_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"multiple of 3, 3, H, W.*" + str(shape[0])):
        selection_part(torch.rand(shape), {"kept": selection(0)})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
        draw([selection_part(torch.rand(3, 3, 8, 16), {"kept": selection(0)})])


def test_a_clip_of_the_batch_is_chosen():
    both = TokenSelection(torch.tensor([[0, 1], [4, 5]]), None, GRID, importance=torch.arange(48.0).view(2, 24))
    part = selection_part(torch.rand(3, 3, 8, 16), {"kept": both}, clip=1)
    assert part.rows[-1].images.flatten().tolist() == [*range(24, 48)]
    with pytest.raises(IndexError):
        selection_part(torch.rand(3, 3, 8, 16), {"kept": both}, clip=2)


def strips(title: str, label: str, length: int = 4, width: int = 48) -> Part:
    images, heat = torch.rand(2 * length, 3, 32, width), torch.rand(2 * length, 2, 3)
    rows = [Row("frames", images), Row(label, images), Row("importance", 1234.5 * heat)]
    rows.append(Row("camera's path, pixels", torch.tensor([-0.123, 100.0]).expand(2 * length, -1).cumsum(0)))
    return Part(rows, range(0, 2 * length, 2), [f"frame {i}" for i in range(2 * length)], title)


@pytest.mark.parametrize("titles", [[""], ["b.mp4", "a $\\frac$ name\nof_" + 60 * "WwwW" + " that goes on" + ".mp4"]])
@pytest.mark.parametrize(
    ("columns", "width", "font", "side"),
    [(1, 12.0, 12.0, 48), (4, 6.75, 7.0, 32), (8, 12.0, 12.0, 32), (16, 6.75, 7.0, 48)],
)
def test_no_text_leaves_the_page_or_touches_anything(titles, columns, width, font, side):
    figure = draw(
        [strips(title, "running cell (VideoMAE V2)\n1176 of 1568", 16, side) for title in titles],
        columns=columns,
        width=width,
        font=font,
    )
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert len(texts) >= len(titles) * (columns + 10) - 1
    boxes = [box_of(text) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
        assert text.get_fontsize() == font
        for axis in figure.axes:
            assert not overlap(box, axis.get_window_extent()), text
    for (text, one), (other, two) in combinations(zip(texts, boxes, strict=True), 2):
        assert not overlap(one, two), (text, other)
    for one, two in combinations([axis.get_window_extent() for axis in figure.axes], 2):
        assert not overlap(one, two)
    for picture in [axis.get_window_extent() for axis in figure.axes if axis.images]:
        assert picture.width / picture.height == pytest.approx(side / 32, rel=0.02)  # as the frames


def box_of(text):
    box, lines = text.get_window_extent(), text.get_text().split("\n")
    filled = [i for i, line in enumerate(lines) if line]  # the others leave room for a title or a caption
    line = box.height / len(lines)
    return Bbox.from_extents(box.x0, box.y1 - line * (filled[-1] + 1), box.x1, box.y1 - line * filled[0])


def overlap(one, two) -> bool:
    wide = min(one.x1, two.x1) - max(one.x0, two.x0)
    high = min(one.y1, two.y1) - max(one.y0, two.y0)
    return wide > 0.5 and high > 0.5  # pixels


def test_parts_have_titles_and_long_names_lose_their_middle():
    name = "start" + 300 * "m" + "end.mp4"
    figure = draw([strips("x.mp4", "kept"), strips(name, "kept")])
    shown = [text.get_text() for text in figure.texts]
    assert shown[0] == "x.mp4"
    assert shown[1].startswith("startm")
    assert shown[1].endswith("mend.mp4")
    assert "…" in shown[1]


def test_a_clip_in_several_lines_is_all_on_the_page():
    """The lines are parts with the same rows: two of three rows each, twice as high as one."""
    importance = torch.arange(24.0)[None]
    part = selection_part(torch.rand(6, 3, 8, 8), {"kept": selection(0, importance=importance)})
    lines = [Part(part.rows, frames, part.captions) for frames in (range(0, 3), range(3, 6))]
    one, both = draw(lines[:1]), draw(lines)
    assert both.get_figheight() == pytest.approx(2 * one.get_figheight())
    assert all(0 <= axis.get_position().y0 < axis.get_position().y1 <= 1 for axis in both.axes)


def test_shorter_clips_leave_places_free():
    figure = draw([strips("x", "kept", 4), strips("y", "kept", 2)])
    titles = [title for axis in figure.axes if (title := axis.get_title().strip())]
    assert titles == ["frame 0", "frame 2", "frame 4", "frame 6", "frame 0", "frame 2"]


def test_the_colour_scale_is_the_whole_clips_and_saturates_at_the_top():
    heat = torch.arange(1000.0).view(5, 10, 20)
    figure = draw([Part([Row("heat", heat)], range(5), [f"{i}" for i in range(5)])], columns=3)
    for axis in figure.axes[:3]:
        low, high = axis.images[0].get_clim()
        assert low == 0
        assert high == pytest.approx(989.0, abs=0.1)


def test_the_cameras_path_is_where_the_picture_was_cut_out():
    """A window moves over a picture: 2 pixels to the right and 1 up a frame, then it rests."""
    picture = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(picture, (192, 192), mode="bicubic")[0]
    rights, downs = (0, 2, 4, 6, 6), (0, -1, -2, -3, -3)
    frames = [picture[:, 50 + d : 146 + d, 40 + r : 136 + r] for r, d in zip(rights, downs, strict=True)]
    row = path_row(torch.stack(frames)[None])
    assert row.label == "camera's path, pixels"
    assert row.images.T.numpy() == pytest.approx(np.array([rights, downs]), abs=0.1)


def test_lines_stand_below_the_frames_that_are_shown():
    images, path = torch.rand(8, 3, 16, 16), torch.stack([torch.arange(8.0), torch.zeros(8)], dim=1)
    part = Part([Row("frames", images), Row("path", path)], range(0, 8, 2), [f"{i}" for i in range(8)])
    figure = draw([part])
    *columns, axis = figure.axes
    right, down = axis.lines
    assert (right.get_label(), down.get_label()) == ("right", "down")
    assert right.get_ydata().tolist() == list(range(8))
    assert down.get_ydata().tolist() == [0.0] * 8
    figure.canvas.draw()
    for column, frame in zip(columns, (0, 2, 4, 6), strict=True):
        box = column.get_window_extent()
        assert axis.transData.transform((frame, 0))[0] == pytest.approx((box.x0 + box.x1) / 2, abs=3)


def test_no_columns():
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        draw([strips("", "kept")], columns=0)
