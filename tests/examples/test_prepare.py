"""Miniature copies of the five published layouts, and the lists that must come of them, worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layouts import DATASETS, MARK
from prepare import main, prepare
from video_list import read_list

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare.py"
Row = tuple[str, int] | tuple[str, int, float | None, float | None]  # path, label and perhaps the segment


def write(file: Path, content: Any = "") -> None:
    """Text, or what is written as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")


def touch(root: Path, *names: str) -> None:
    for name in names:
        write(root / name)


def move(root: Path, **moves: str) -> None:
    for old, new in moves.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


def rows(out: Path, part: str, root: Path) -> list[Row]:
    """A list as the training scripts read it, with paths relative to root, and checked to be real files."""
    found: list[Row] = []
    for entry in read_list(out / f"{part}.csv", root, labelled=True):
        assert entry.path.is_file()
        assert entry.label is not None
        path, segment = entry.path.relative_to(root).as_posix(), (entry.start, entry.end)
        found.append((path, entry.label) if segment == (None, None) else (path, entry.label, *segment))
    return found


def lists(name: str, root: Path, out: Path, **settings: Any) -> tuple[list[Row], list[Row]]:
    """The training list and the one for testing, which must be that of validation."""
    prepare(name, root, out, **settings)
    assert sorted(file.name for file in out.glob("*.csv")) == ["test.csv", "train.csv", "val.csv"]
    assert rows(out, "val", root) == rows(out, "test", root)
    return rows(out, "train", root), rows(out, "test", root)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(name: str, root: Path, *expected: str | Path, **settings: Any) -> None:
    """prepare must fail with a message that has every expected piece, and leave no trace in a new or an old OUT_DIR."""
    new, old = root.parent / "new lists", root.parent / "old lists"
    write(old / "train.csv", f"{MARK}: an earlier run\nkept.mp4,0\n")
    before = contents(old)
    for out in (new, old):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
            prepare(name, root, out, **settings)
        for piece in expected:
            assert str(piece) in str(caught.value)
    assert not new.exists()
    assert contents(old) == before


# --- the published layouts ---

EYE, HAND = "ApplyEyeMakeup/v_ApplyEyeMakeup_g{}.avi", "HandstandPushups/v_HandStandPushups_g{}.avi"
# HMDB51's own names have # & ; ! @ ( ) [ ] + ' and dashes; the comma, quote, space and ü are for good measure.
STRANGE = [
    "#437_How_To_Ride_A_Bike_f_cm_np1_le_med_0.avi",
    "A&B;C!D@E(F)[G]+'H-I_1.avi",
    'a, "quoted" name with  spaces.avi',
    "für 100%=$x~y^z{0}.avi",
    "name 12.5 3.avi",
    'one inch is 1".avi',
]
ID = ["-abc_0123XY", "zzzzzzzzzzz", "AbCdEfGhIjK"]  # YouTube's ids may begin with a dash and contain underscores
ZUMBA = f"{ID[0]}_000007_000017.mp4"
KINETICS = "label,youtube_id,time_start,time_end"


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """Three classes; the published files end lines with CR LF, and HandstandPushups' videos have another capital S."""
    root = tmp_path / "ucf"
    published = {
        "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n",
        "trainlist01.txt": f"{EYE.format('02')} 1\r\n{HAND.format('02')} 2\r\nYoYo/v_b.avi 3\r\n",
        "testlist01.txt": f"{EYE.format('01')}\r\nYoYo/v_a.avi\r\n",
        "trainlist02.txt": f"{EYE.format('01')} 1\r\n\r\n",
        "testlist02.txt": f"{HAND.format('02')}\r\n{EYE.format('02')}\r\n",
        "trainlist03.txt": "YoYo/v_a.avi 3\r\n",
        "testlist03.txt": "YoYo/v_b.avi\r\n",
    }
    for name, text in published.items():
        write(root / "ucfTrainTestlist" / name, text)
    touch(root, EYE.format("01"), EYE.format("02"), HAND.format("02"), "YoYo/v_a.avi", "YoYo/v_b.avi")
    return root


@pytest.fixture
def hmdb51(tmp_path: Path) -> Path:
    root = tmp_path / "hmdb"
    splits = root / "testTrainMulti_7030_splits"
    for split in (1, 2, 3):  # split N trains on the first 4 - N strange names; one clip is in neither part
        write(splits / f"wave_test_split{split}.txt", f"w1.avi 1 \nw2.avi 2 \nw{split + 2}.avi 0 \n")
        uses = [1 if position < 4 - split else 2 for position in range(len(STRANGE))]
        lines = "".join(f"{name} {use} \n" for name, use in zip(STRANGE, uses, strict=True))
        write(splits / f"brush_hair_test_split{split}.txt", lines)
    touch(root, *(f"wave/w{number}.avi" for number in range(1, 6)), *(f"brush_hair/{name}" for name in STRANGE))
    return root


@pytest.fixture
def k400(tmp_path: Path) -> Path:
    """CVDF's layout: flat folders, annotations (not in label order, one label quoted) and a replacement."""
    root = tmp_path / "k400"
    train = f'zumba,{ID[0]},7,17,train,0\n"massaging person\'s head",{ID[1]},123,133,train,0\n'
    train += f"air drumming,{ID[2]},0,10,train,0\n"
    write(root / "annotations" / "train.csv", f"{KINETICS},split,is_cc\n{train}")
    write(root / "annotations" / "val.csv", f"{KINETICS},split\nmassaging person's head,{ID[0]},95,105,val\n")
    touch(
        root,
        *(f"train/{ZUMBA}", f"train/{ID[1]}_000123_000133.mp4", f"train/{ID[2]}_000000_000010.mp4"),
        *(f"replacement/replacement_for_corrupted_k400/{ID[1]}_000123_000133.mp4", f"val/{ID[0]}_000095_000105.mp4"),
    )
    return root


@pytest.fixture
def ssv2(tmp_path: Path) -> Path:
    root = tmp_path / "ssv2"
    templates = {"78687": "Holding [something] next to [something]", "42": "Showing that [something], is"}
    templates["7"] = "Pushing [something]"
    train = [
        {"id": id_, "label": "x", "template": template, "placeholders": ["x"]} for id_, template in templates.items()
    ]
    labels = {"Holding something next to something": "1", "Pushing something": "0", "Showing that something, is": "2"}
    write(root / "labels.json", labels)
    write(root / "train.json", train)
    write(root / "validation.json", [train[2] | {"id": "74225"}])
    touch(root, *(f"videos/{number}.webm" for number in (78687, 42, 7, 74225)))
    return root


def state_change(uid: str, video: str, start: float, end: float, label: bool) -> dict[str, Any]:
    """A clip as in Ego4D's annotations, where the seconds of the cut-out are other ones."""
    clip = {"clip_uid": None, "unique_id": uid, "video_uid": video, "clip_start_sec": 5.25, "clip_end_sec": 13.25}
    return {**clip, "parent_start_sec": start, "parent_end_sec": end, "state_change": label, "parent_pnr_frame": None}


@pytest.fixture
def oscc(tmp_path: Path) -> Path:
    root = tmp_path / "v2"
    train = [state_change("a-1", "4e3fc1e9", 1.1543619333333333, 9.154361933333332, True)]
    train.append(state_change("a-2", "4e3fc1e9", 100, 108.0, False))
    val = [state_change("b-1", "7c0c0057", 0.0, 8.0, False)]
    write(root / "annotations" / "fho_oscc-pnr_train.json", {"version": "2", "clips": train})
    write(root / "annotations" / "fho_oscc-pnr_val.json", {"clips": val})
    touch(root, "full_scale/4e3fc1e9.mp4", "full_scale/7c0c0057.mp4")
    return root


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> Any:
    """The root of a data set, by its name."""
    return request.getfixturevalue


def hair(*names: str, folder: str = "brush_hair") -> list[Row]:
    return [(f"{folder}/{name}", 0) for name in names]


EXPECTED: dict[tuple[str, int | None], tuple[list[Row], list[Row]]] = {
    ("ucf101", 1): (
        [(EYE.format("02"), 0), (HAND.format("02"), 1), ("YoYo/v_b.avi", 2)],
        [(EYE.format("01"), 0), ("YoYo/v_a.avi", 2)],
    ),
    ("ucf101", 2): ([(EYE.format("01"), 0)], [(HAND.format("02"), 1), (EYE.format("02"), 0)]),
    ("ucf101", 3): ([("YoYo/v_a.avi", 2)], [("YoYo/v_b.avi", 2)]),
    **{
        ("hmdb51", split): (
            [*hair(*STRANGE[:count]), ("wave/w1.avi", 1)],
            [*hair(*STRANGE[count:]), ("wave/w2.avi", 1)],
        )
        for split, count in ((1, 3), (2, 2), (3, 1))
    },
    ("k400", None): (
        [
            (f"train/{ZUMBA}", 2),
            (f"replacement/replacement_for_corrupted_k400/{ID[1]}_000123_000133.mp4", 1),
            (f"train/{ID[2]}_000000_000010.mp4", 0),
        ],
        [(f"val/{ID[0]}_000095_000105.mp4", 1)],
    ),
    ("ssv2", None): (
        [("videos/78687.webm", 1), ("videos/42.webm", 2), ("videos/7.webm", 0)],
        [("videos/74225.webm", 0)],
    ),
    ("oscc", None): (
        [
            ("full_scale/4e3fc1e9.mp4", 1, 1.1543619333333333, 9.154361933333332),
            ("full_scale/4e3fc1e9.mp4", 0, 100.0, 108.0),
        ],
        [("full_scale/7c0c0057.mp4", 0, 0.0, 8.0)],
    ),
}


@pytest.mark.parametrize(("name", "split"), EXPECTED)
def test_layouts_as_they_are_published(layout: Any, tmp_path: Path, name: str, split: int | None) -> None:
    assert lists(name, layout(name), tmp_path / "a" / "lists", split=split) == EXPECTED[name, split]


def test_the_text_of_a_list(ucf101: Path, hmdb51: Path, tmp_path: Path) -> None:
    prepare("ucf101", ucf101, tmp_path)  # split 1 if not given
    assert (tmp_path / "test.csv").read_bytes().decode() == (
        "# made by prepare.py: UCF101, split 1, test; paths are relative to the data set's folder (--data_root)\n"
        '# labels: ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]\n'
        '"ApplyEyeMakeup/v_ApplyEyeMakeup_g01.avi",0\n'
        '"YoYo/v_a.avi",2\n'
    )
    prepare("hmdb51", hmdb51, tmp_path)  # replaces them, for any tool that reads CSV
    with (tmp_path / "train.csv").open(encoding="utf-8", newline="") as file:
        listed = list(csv.reader(line for line in file if not line.startswith("#")))
    assert listed[:3] == [[f"brush_hair/{name}", "0"] for name in STRANGE[:3]]


@pytest.mark.parametrize(
    ("name", "moves", "first"),
    [
        ("ucf101", {"YoYo": "UCF-101/YoYo"}, ("UCF-101/YoYo/v_a.avi", 2)),
        (
            "hmdb51",
            {
                "brush_hair": "hmdb51_org/brush_hair",
                "testTrainMulti_7030_splits": "test_train_splits/testTrainMulti_7030_splits",
            },
            (f"hmdb51_org/brush_hair/{STRANGE[0]}", 0),
        ),
        *(
            ("k400", {f"train/{ZUMBA}": f"{folder}/{ZUMBA}"}, (f"{folder}/{ZUMBA}", 2))
            for folder in ("train/zumba", "videos/train/zumba", "videos/train")
        ),
        (
            "k400",
            {"annotations/train.csv": "train.csv", "annotations/val.csv": "validate.csv"},  # DeepMind's own name of it
            (f"train/{ZUMBA}", 2),
        ),
        *(
            (
                "ssv2",
                {f"{part}.json": annotations.format(part) for part in ("train", "validation", "labels")}
                | {f"videos/{number}.webm": videos.format(number) for number in (78687, 42, 7, 74225)},
                (videos.format(78687), 1),
            )
            for annotations, videos in (
                ("labels/{}.json", "20bn-something-something-v2/{}.webm"),
                ("something-something-v2-{}.json", "videos/{}.mp4"),
                ("annotations/something-something-v2-{}.json", "videos/20bn-something-something-v2/{}.webm"),
            )
        ),
        (
            "oscc",
            {
                "full_scale/4e3fc1e9.mp4": "4e3fc1e9.mp4",
                **{f"annotations/fho_oscc-pnr_{part}.json": f"fho_oscc-pnr_{part}.json" for part in ("train", "val")},
            },
            ("4e3fc1e9.mp4", 1, 1.1543619333333333, 9.154361933333332),
        ),
    ],
)
def test_layouts_as_archives_unpack(layout: Any, tmp_path: Path, name: str, moves: dict[str, str], first: Row) -> None:
    move(layout(name), **moves)
    split = 3 if DATASETS[name].has_splits else None
    assert lists(name, layout(name), tmp_path / "lists", split=split)[0][0] == first


def test_smaller_copies_and_folders_with_underscores_are_found(oscc: Path, k400: Path, tmp_path: Path) -> None:
    touch(oscc, "video_540ss/4e3fc1e9.mp4")
    assert {row[0] for row in lists("oscc", oscc, tmp_path / "o")[0]} == {"video_540ss/4e3fc1e9.mp4"}
    file = f"train/air_drumming/{ID[2]}_000000_000010.mp4"
    move(k400, **{f"train/{ID[2]}_000000_000010.mp4": file})
    assert lists("k400", k400, tmp_path / "k")[0][2] == (file, 0)


@pytest.mark.parametrize("above", ["", "videos/"])
def test_k400_class_folders(tmp_path: Path, above: str) -> None:
    """In the order of the annotations, in which "tap dancing" with its space comes before "tapB"."""
    root = tmp_path / "k400"
    touch(
        root,
        *(f"{above}train/tapB/b #1.mp4", f"{above}train/tapB/a.webm", f"{above}train/tap_dancing/c.MP4"),
        *(f"{above}train/tapB/.hidden.mp4", f"{above}train/tapB/notes.txt", f"{above}train/zumba/d.mp4"),
        *(f"{above}val/tap dancing/e.mp4", f"{above}train/not a class.mp4"),
    )
    for _ in range(2):  # the script's own train.csv in ROOT is no annotation file, so a second run works
        train, test = lists("k400", root, root)
        paths = ("tapB/a.webm", 1), ("tapB/b #1.mp4", 1), ("tap_dancing/c.MP4", 0), ("zumba/d.mp4", 2)
        assert train == [(f"{above}train/{path}", label) for path, label in paths]
        assert test == [(f"{above}val/tap dancing/e.mp4", 0)]


# --- layouts that are wrong ---

VAL = "annotations/fho_oscc-pnr_val.json"
WRONG: list[tuple[str, str, Any, list[str]]] = [
    ("ucf101", "classInd.txt", "1 ApplyEyeMakeup\n3 YoYo\n", [":2", "expected '2 <Class>', found '3 YoYo'"]),
    ("ucf101", "classInd.txt", "1\n", ["classInd.txt:1", "expected '1 <Class>', found '1'"]),
    ("ucf101", "trainlist01.txt", "\nYoYo/v_b.avi 2\n", ["trainlist01.txt:2", "'YoYo' has number 2 here and 3 in"]),
    ("ucf101", "trainlist01.txt", "Juggling/v_b.avi 3\n", [":1", "'Juggling' is not one of the 3 classes"]),
    ("ucf101", "testlist01.txt", "v_b.avi\n", ["testlist01.txt:1", "expected '<Class>/<video>.avi'"]),
    ("ucf101", "testlist01.txt", "", ["the annotations name no video for val and test"]),
    ("hmdb51", "wave_test_split1.txt", "w1.avi 1\nw2.avi 3\n", ["split1.txt:2", "0, 1 or 2, found 'w2.avi 3'"]),
    ("k400", "train.csv", "a.mp4,0\n", ["train.csv:1", f"expected the columns {KINETICS.replace(',', ', ')}"]),
    ("k400", "train.csv", "", ["train.csv:1", "found None"]),
    ("k400", "val.csv", f"{KINETICS}\nzumba,x,1,11\nzumba,y,1.5,11\n", ["val.csv:3", "whole seconds", "'1.5'"]),
    ("k400", "val.csv", f"{KINETICS}\nzumba,x,1\n", ["val.csv:2", "expected a label"]),
    ("k400", "val.csv", f"{KINETICS}\nabseiling,x,1,11\n", ["val.csv:2", "'abseiling' is not one of the 3 of"]),
    ("ssv2", "train.json", [{"id": "7", "template": "Eat [it]"}], ["entry 0: template 'Eat it' is not in"]),
    ("ssv2", "train.json", [{"id": "7"}], ["entry 0: expected the field 'template' with a str, found None"]),
    ("ssv2", "validation.json", ["x"], ["validation.json: entry 0", "'id'", "str or int"]),
    ("ssv2", "train.json", {"7": "Pushing"}, ["train.json: expected a JSON list, found a dict"]),
    ("ssv2", "train.json", '[{"id": "7", "templ', ["train.json: expected JSON"]),
    ("ssv2", "labels.json", {"Pushing something": "0", "b": "2"}, ["expected names with the numbers 0 to 1"]),
    ("ssv2", "labels.json", {"Pushing something": "zero"}, ["labels.json: expected names with the numbers 0 to 0"]),
    ("oscc", VAL, {}, ["val.json: expected the field 'clips' with a list, found None"]),
    *(
        ("oscc", VAL, {"clips": [state_change("b-1", "7c0c0057", 0.0, 8.0, False) | change]}, expected)
        for change, expected in (
            ({"state_change": None}, ["clip b-1: expected the field 'state_change' with a bool, found None"]),
            ({"state_change": 1}, ["clip b-1", "'state_change' with a bool, found 1"]),
            ({"parent_end_sec": 0.0}, ["expected 0 <= parent_start_sec < parent_end_sec, found 0.0 and 0.0"]),
            ({"parent_start_sec": -1}, ["clip b-1", "found -1.0 and 8.0"]),
            ({"parent_start_sec": "0"}, ["clip b-1", "'parent_start_sec' with a int or float, found '0'"]),
            ({"video_uid": None}, ["clip b-1", "'video_uid' with a str"]),
            ({"unique_id": None}, ["fho_oscc-pnr_val.json: clip 0", "'unique_id' with a str"]),
        )
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "expected"), WRONG)
def test_wrong_annotations(layout: Any, name: str, file: str, content: Any, expected: list[str]) -> None:
    root = layout(name)
    (there,) = root.rglob(Path(file).name)
    write(there, content)
    fails(name, root, *expected)


def test_text_in_another_encoding(ucf101: Path) -> None:
    (ucf101 / "ucfTrainTestlist" / "classInd.txt").write_bytes("1 Übung\n".encode("latin-1"))
    fails("ucf101", ucf101, ucf101 / "ucfTrainTestlist" / "classInd.txt", "expected text in UTF-8")


@pytest.mark.parametrize(
    ("name", "gone", "expected"),
    [
        ("ucf101", "ucfTrainTestlist/testlist01.txt", ["split 1: looked for classInd.txt, ", "(lacks testlist01.txt)"]),
        ("hmdb51", "testTrainMulti_7030_splits", ["looked for <class>_test_split1.txt in", "hmdb: found none"]),
        ("k400", "annotations/val.csv", ["val.csv or validate.csv", "annotations (lacks val.csv)"]),
        ("k400", "annotations", ["Kinetics-400: looked for train.csv", "train/<class>/", "k400/videos"]),
        ("ssv2", "labels.json", ["2-train.json", "(lacks labels.json)", "annotations (no such folder)"]),
        ("oscc", VAL, ["looked for fho_oscc-pnr_train.json, fho_oscc-pnr_val.json", "(lacks fho_oscc-pnr_val.json)"]),
    ],
)
def test_missing_annotations(layout: Any, tmp_path: Path, name: str, gone: str, expected: list[str]) -> None:
    (layout(name) / gone).rename(tmp_path / "gone")
    fails(name, layout(name), *expected)


def test_k400_val_class_that_is_not_in_train(tmp_path: Path) -> None:
    root = tmp_path / "k400"
    touch(root, "train/a/1.mp4", "val/a/2.mp4", "val/b/3.mp4")
    fails("k400", root, root / "val" / "b", "there is no such class in", root / "train")


# --- missing videos, and what may be overwritten ---


@pytest.mark.parametrize("allow_missing", [False, True])
def test_without_any_video(ucf101: Path, tmp_path: Path, allow_missing: bool) -> None:
    move(ucf101, ucfTrainTestlist="../only lists/ucfTrainTestlist")
    root = tmp_path / "only lists"
    places = (root / "ApplyEyeMakeup", root / "UCF-101/ApplyEyeMakeup", root / "videos/ApplyEyeMakeup")
    found = ("found none of the 3 videos of train", "v_ApplyEyeMakeup_g02.avi")
    fails("ucf101", root, *found, *places, allow_missing=allow_missing)


def test_missing_videos_are_an_error_or_left_out(hmdb51: Path, tmp_path: Path) -> None:
    (hmdb51 / "wave" / "w2.avi").unlink()
    (hmdb51 / "wave" / "w2.avi").symlink_to(hmdb51 / "gone.avi")  # a dangling link is no video
    (hmdb51 / "brush_hair" / STRANGE[0]).unlink()
    (hmdb51 / "brush_hair" / STRANGE[0]).mkdir()  # nor is a folder
    missing = ("HMDB51, split 1: 2 of 8 clips have no video", f"{STRANGE[0]}, w2.avi", "--allow-missing")
    fails("hmdb51", hmdb51, *missing, hmdb51 / "brush_hair")
    summary = prepare("hmdb51", hmdb51, tmp_path / "lists", allow_missing=True)
    assert rows(tmp_path / "lists", "train", hmdb51) == [*hair(STRANGE[1], STRANGE[2]), ("wave/w1.avi", 1)]
    assert rows(tmp_path / "lists", "test", hmdb51) == hair(*STRANGE[3:])
    assert f"train: left out 1 clips without a video: {STRANGE[0]} (looked for" in summary
    assert "val and test: left out 1 clips without a video: w2.avi (looked for" in summary


def test_only_the_first_missing_videos_are_named_each_once(oscc: Path) -> None:
    clips = [state_change(f"a-{i}", f"{max(i, 2)}", i, i + 8, True) for i in range(9)]
    write(
        oscc / "annotations" / "fho_oscc-pnr_train.json", {"clips": [*clips, state_change("b", "4e3fc1e9", 0, 8, True)]}
    )
    names = "2.mp4, 3.mp4, 4.mp4, 5.mp4, 6.mp4 and 2 more"
    fails("oscc", oscc, f"9 of 11 clips have no video: {names} (looked for 2.mp4 in", oscc / "video_540ss")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_other_peoples_files_are_never_overwritten(ucf101: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "lists"
    write(out / f"{part}.csv", "my own,0\n")
    with pytest.raises(ValueError, match=f"{part}.csv exists and is no list of this script: choose another OUT_DIR"):
        prepare("ucf101", ucf101, out)
    assert contents(out) == {f"{part}.csv": b"my own,0\n"}


def test_annotations_are_never_overwritten(k400: Path) -> None:
    before = contents(k400)
    with pytest.raises(ValueError, match="is no list of this script"):
        prepare("k400", k400, k400 / "annotations")
    assert contents(k400) == before


def test_a_full_disk_leaves_the_earlier_lists(ucf101: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lists"
    prepare("ucf101", ucf101, out, split=1)
    before = contents(out)
    write_text = Path.write_text

    def fail_at_the_last(file: Path, *arguments: Any, **settings: Any) -> int:
        if file.name == "test.csv":
            raise OSError("no space left on device")
        return write_text(file, *arguments, **settings)

    monkeypatch.setattr(Path, "write_text", fail_at_the_last)
    with pytest.raises(OSError, match="no space left"):
        prepare("ucf101", ucf101, out, split=3)
    assert contents(out) == before
    assert len(list(out.iterdir())) == 3


def test_wrong_settings(ucf101: Path, k400: Path, tmp_path: Path) -> None:
    fails("ucf102", ucf101, "data set must be one of ucf101, hmdb51, k400, ssv2, oscc, got 'ucf102'")
    fails("ucf101", ucf101, "--split must be 1, 2 or 3, got 4", split=4)
    fails("k400", k400, "--split 1: Kinetics-400 has no splits", split=1)
    fails("ucf101", tmp_path / "nowhere", tmp_path / "nowhere", "no such folder, expected the one that holds UCF101")
    write(tmp_path / "file")
    with pytest.raises(ValueError, match="file: not a folder, expected one for the lists"):
        prepare("ucf101", ucf101, tmp_path / "file")


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such name")
NOT_UTF_8 = pytest.param(os.fsdecode(b"a\xffb.mp4"), marks=ONLY_LINUX)


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\rb.mp4", "a\u2028b.mp4", NOT_UTF_8])
def test_names_that_no_list_can_carry(tmp_path: Path, name: str) -> None:
    root = tmp_path / "k400"
    touch(root, f"train/c/{name}", "val/c/fine.mp4")
    fails("k400", root, "a list takes no names with line breaks or other bytes than UTF-8", root / "train" / "c")


# --- the command ---


def test_the_command_and_its_summary(ucf101: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    command = [sys.executable, SCRIPT, "ucf101", ucf101, out, "--split", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "looking for videos" not in result.stderr  # progress is for terminals
    assert (rows(out, "train", ucf101), rows(out, "test", ucf101)) == EXPECTED["ucf101", 2]
    summary = result.stdout.splitlines()
    assert summary[:2] == ["UCF101, split 2: 3 labels", f"{out / 'train.csv'}: 1 clips"]
    assert "the same 2 clips" in summary[2]
    assert "UCF101 is published with 101 labels" in summary[3]
    assert summary[4:] == [f"the paths in them are relative to --data_root {ucf101}"]


def test_the_commands_errors(ucf101: Path, hmdb51: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k400", str(ucf101), str(tmp_path / "lists")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("prepare.py: Kinetics-400: looked for train.csv")
    (hmdb51 / "wave" / "w1.avi").unlink()
    assert main(["hmdb51", str(hmdb51), str(tmp_path / "lists")]) == 2
    assert not (tmp_path / "lists").exists()
    assert main(["hmdb51", str(hmdb51), str(tmp_path / "lists"), "--allow-missing"]) == 0
    assert "left out 1 clips" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ucf101", str(ucf101), str(tmp_path / "lists"), "--split", "4"])
    assert "--split" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal(ucf101: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    prepare("ucf101", ucf101, tmp_path / "lists")
    assert "train: looking for videos" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_help_describes_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in DATASETS)
    for piece in ("ROOT", "OUT_DIR", "--split", "--allow-missing", "ucfTrainTestlist", "fho_oscc-pnr_{train,val}.json"):
        assert piece in text
    assert max(map(len, text.splitlines())) <= 120
