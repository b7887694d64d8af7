"""The page's functions: what they show is right, is each visitor's own, and is deleted."""

from __future__ import annotations

import importlib.metadata
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the space extra is not installed")

import app
import av
import gradio as gr
import numpy as np
import torch
from gradio_client import Client, handle_file
from made_videos import write_video
from space_case import CAMERA, CELL, FIRST, MODEL, RANDOM, RERO, TINY, TUBE, half_moving, settings, with_tiny_model
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from everest_tokens.video import load_clip


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tiny_model(monkeypatch)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_moving(tmp_path_factory.mktemp("videos") / "half.mp4")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    VideoMAEForVideoClassification(VideoMAEConfig(**TINY)).save_pretrained(folder)
    return folder


def shown(function: Any, given: list[Any]) -> list[Any]:
    """What the page shows at last."""
    return list(function(*given))[-1]


def text_of(results: list[Any]) -> str:
    return next(each for each in results if isinstance(each, str) and not each.endswith(".mp4"))


def row_of(table: str, name: str) -> list[str]:
    return next(line.strip("| ").split(" | ")[1:] for line in table.splitlines() if line.startswith(f"| {name} "))


def counts_of(table: str) -> list[int]:
    return [int(count) for count in table.rpartition(": ")[2].split(", ")]


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_the_overlay_shows_what_moves_beside_the_clip_and_is_gone_afterwards(video):
    """Half of the tokens move, so a keep ratio of a half keeps these: the left half of what is kept is grey."""
    looking = app.look(*settings(video))
    file, picture, table = next(looking)
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")  # which browsers play
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    side, middles = 7 * 64, np.s_[56::112, 56::112]  # enlarged; the tokens' middles, far from what the codec blurs
    source = load_clip(video, num_frames=8, size=64, start=0, mean=[0] * 3, std=[1] * 3)[0]
    for frame, pixels in zip(frames, source, strict=True):
        assert frame.shape == (side, 2 * side + 7 * 2, 3)
        clip, kept = frame[:, :side][middles], frame[:, -side:][middles]  # (4, 4, 3)
        np.testing.assert_allclose(clip, 255 * pixels[:, 8::16, 8::16].permute(1, 2, 0), atol=12)
        np.testing.assert_allclose(kept[:, 2:], clip[:, 2:], atol=12)
        assert np.ptp(kept[:, :2], axis=2).max() < 12  # grey
        light, dark = ((part.mean(axis=2) / 255) ** 2.2 for part in (kept[:, 2:], kept[:, :2]))
        lighter, darker = sorted([light.mean(), dark.mean()], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 2.5  # 3:1 before the codec, over all time steps
    assert picture.ndim == 3
    assert row_of(table, "tokens") == ["64", "32", "0.50"]
    assert counts_of(table) == [8, 8, 8, 8]
    assert list(looking) == []
    assert not Path(file).parent.exists()


@pytest.mark.parametrize(
    ("selector", "counts"),
    [(RERO, None), (FIRST, None), (CAMERA, None), (RANDOM, None), (TUBE, [5] * 4), (CELL, [4] * 4)],
)
def test_every_selector_keeps_its_share(video, selector, counts):
    """⌊0.3·64⌋ = 19; a tube hides ⌊0.7·16⌋ = 11 of 16 places; the running cell next to 0.3 keeps a quarter."""
    table = app.choose(*settings(video, selector, 0.3)).table()
    found = counts_of(table)
    assert sum(found) == (19 if counts is None else sum(counts))
    assert counts in (None, found)
    assert selector != FIRST or found[0] == 16
    assert row_of(table, "tokens")[1] == str(sum(found))


def test_visitors_at_the_same_time_get_what_they_asked_for(video, monkeypatch):
    asked = [settings(video, RERO, 0.2), settings(video, TUBE, 0.8)]
    alone = [app.choose(*given) for given in asked]
    plain, both_patched, patched = app.load(MODEL).plain, threading.Barrier(2), app.patched
    first_time = threading.local()

    def patched_at_once(*given: Any) -> Any:
        model = patched(*given)
        if not hasattr(first_time, "over"):
            first_time.over = both_patched.wait(timeout=60)  # neither has selected yet
        return model

    monkeypatch.setattr(app, "patched", patched_at_once)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda given: app.choose(*given), asked))
    for mine, expected in zip(found, alone, strict=True):
        assert mine.kept.kept.tolist() == expected.kept.kept.tolist()
        assert mine.table() == expected.table()
    assert app.load(MODEL).plain is plain
    assert type(plain).__module__.startswith("transformers.")  # not patched


def test_visitors_who_come_at_once_wait_for_one_model(video, monkeypatch):
    made = []

    class Slow(VideoMAEForVideoClassification):
        def __init__(self, *given: Any) -> None:
            made.append(given)
            time.sleep(0.2)
            super().__init__(*given)

    monkeypatch.setattr(app, "VideoMAEForVideoClassification", Slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda given: app.choose(*given), [settings(video)] * 2))
    assert len(made) == 1


def test_times_are_medians_and_the_ratio_is_that_of_pairs(video, monkeypatch):
    """Pairs of 1:0.5, 2:0.4 and 8:2 seconds: medians 2 and 0.5, the ratios 0.5, 0.2 and 0.25."""
    times = iter([1.0, 0.5, 2.0, 0.4, 8.0, 2.0])
    monkeypatch.setattr(app, "seconds_of", lambda run, device: next(times))
    turns = list(app.measure(*settings(video)))
    assert [text for text, *_ in turns] == [
        "Measured: all tokens 1000 ms, the kept ones 500 ms, ratio 0.50",
        "Measured: all tokens 1500 ms, the kept ones 450 ms, ratio 0.35",
        "Measured: all tokens 2000 ms, the kept ones 500 ms, ratio 0.25",
    ]
    assert [label.visible for label in turns[-1][1:]] == [False, False]  # random weights say nothing


def test_a_trained_classifier_says_what_it_sees(video, classifier):
    model = VideoMAEForVideoClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = model(load_clip(video, num_frames=8, size=64, start=0)).logits.softmax(dim=1)[0].tolist()
    _, *labels = shown(app.measure, settings(video, TUBE, 1.0, str(classifier)))  # all of the tokens are kept
    for label in labels:
        said = {each["label"]: each["confidence"] for each in label.value["confidences"]}
        assert said == pytest.approx({f"LABEL_{i}": score for i, score in enumerate(expected)}, abs=1e-5)
    _, whole, part = shown(app.measure, settings(video, TUBE, 0.1, str(classifier)))
    assert whole.value == labels[0].value
    assert part.value != whole.value


def test_where_the_clip_begins(video, monkeypatch):
    """Of 40 frames the first clip of 8 frames, 4 apart, begins at 0 and the last at 11."""
    starts: list[Any] = []
    monkeypatch.setattr(app, "load_clip", lambda path, start, **reading: starts.append(start))
    monkeypatch.setattr(app, "load_views", lambda path, **reading: starts.append("all over"))
    for begin in (0, 0.5, 1):
        app.read(str(video), begin, {"num_frames": 8, "stride": 4})
    app.read(str(video), 0.5, {"num_frames": 8, "stride": 0})
    assert starts == [0, 5, 11, "all over"]


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (("MEGABYTES", 0), "half.mp4: more than 0 MB"),
        (("FRAMES", 39), "half.mp4: more than 39 frames"),
        (("AREA", 64 * 63), "half.mp4: 64×64 pixels are more than 0.0 megapixels"),
    ],
)
def test_videos_beyond_the_limits(video, monkeypatch, limit, problem):
    monkeypatch.setattr(app, *limit)
    for function in (app.look, app.measure):
        said = text_of(shown(function, settings(video)))
        assert problem in said
        assert str(video.parent) not in said


def test_what_is_no_use_is_said(video, tmp_path):
    text, folder, decoder = tmp_path / "notes.mp4", tmp_path / "empty", tmp_path / "decoder"
    wide = write_video(tmp_path / "wide.mp4", length=2, size=(576, 64))
    text.write_text("no video")
    folder.mkdir()
    VideoMAEForPreTraining(VideoMAEConfig(**TINY)).save_pretrained(decoder)
    for given, problem in [
        (settings(text), ":** notes.mp4: undecodable"),
        (settings(wide), ":** wide.mp4: of 576×64 pixels one side is over 8 times the other"),
        (settings(None), "Choose a clip"),
        (settings(video, model=""), "Choose a clip and a model"),
        (settings(video, model=str(folder)), f"{folder}: "),
        (settings(video, model=str(decoder)), f"{decoder}: a pre-training model"),
        (settings(video, FIRST, 0.2), "expected keep_ratio of at least 0.2657"),
    ]:
        for function in (app.look, app.measure):
            results = shown(function, given)
            assert problem in text_of(results)
            assert function is app.measure or results[:2] == [None, None]  # nothing of what was asked before


def test_nothing_is_left_when_the_server_stops(video, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = app.page()
    assert blocks.delete_cache == (60, 600)
    before = files_in(tmp_path)  # of the clips to choose from
    _, url, _ = app.serve(blocks, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False, download_files=False)
        for ratio, kept in ((0.2, "12"), (0.9, "57")):
            given = [handle_file(str(video)), *settings(video, ratio=ratio)[1:]]
            table = text_of(client.predict(*given, api_name="/look"))
            assert row_of(table, "tokens")[1] == kept
        assert len(files_in(tmp_path) - before) == 5  # the upload, two videos, two pictures
    finally:
        blocks.close()
    assert files_in(tmp_path) - before == set()


@pytest.mark.parametrize("on_space", [False, True])
def test_visitors_of_a_space_choose_from_a_list(monkeypatch, on_space):
    monkeypatch.setenv("EVEREST_MODELS", "some/model other/model")
    monkeypatch.setattr(gr, "Examples", lambda *given, **more: None)  # takes a second
    if on_space:
        monkeypatch.setenv("SPACE_ID", "some/space")
    names = next(block for block in app.page().blocks.values() if isinstance(block, gr.Dropdown))
    assert [name for name, _ in names.choices] == [MODEL, "some/model", "other/model"]
    assert names.allow_custom_value != on_space


def test_the_requirements_of_a_space_are_those_of_the_demo():
    needed = [line for line in importlib.metadata.requires("everest-tokens") or [] if "everest-tokens" not in line]
    needed = [line for line in needed if "extra ==" not in line or re.search("'(demo|video)'", line)]
    listed = Path(app.__file__).with_name("requirements.txt").read_text().splitlines()
    assert {line for line in listed if line[0] != "#"} == {line.partition(";")[0].strip() for line in needed}
