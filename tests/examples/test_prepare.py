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
from prepare import DATASETS, MARK, main, prepare
from video_list import Entry, read_list

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare.py"
Row = tuple[str, int] | tuple[str, int, float, float]  # path, label and perhaps the segment


def write(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="")


def touch(root: Path, *names: str) -> None:
    for name in names:
        write(root / name)


def rows(out: Path, part: str, root: Path) -> list[Row]:
    """A list as the training scripts read it, with paths relative to root, and checked to be real files."""
    entries = read_list(out / f"{part}.csv", root, labelled=True)
    assert all(entry.path.is_file() for entry in entries)
    return [_row(entry, root) for entry in entries]


def _row(entry: Entry, root: Path) -> Row:
    path = entry.path.relative_to(root).as_posix()
    assert entry.label is not None
    if entry.start is None or entry.end is None:
        assert entry.start is None
        assert entry.end is None
        return path, entry.label
    return path, entry.label, entry.start, entry.end


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fails(name: str, root: Path, *expected: str | Path, **settings: Any) -> str:
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
    return str(caught.value)


# --- UCF101 ---


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Three classes; the published files end lines with CR LF, and HandstandPushups' videos have another capital S."""
    root = tmp_path / "ucf"
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n")
    eye, hand, yoyo = (
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g{}.avi",
        "HandstandPushups/v_HandStandPushups_g{}.avi",
        "YoYo/{}",
    )
    write(lists / "trainlist01.txt", f"{eye.format('02')} 1\r\n{hand.format('02')} 2\r\n{yoyo.format('v_b.avi')} 3\r\n")
    write(lists / "testlist01.txt", f"{eye.format('01')}\r\n{yoyo.format('v_a.avi')}\r\n")
    write(lists / "trainlist02.txt", f"{eye.format('01')} 1\r\n\r\n")
    write(lists / "testlist02.txt", f"{hand.format('02')}\r\n{eye.format('02')}\r\n")
    write(lists / "trainlist03.txt", f"{yoyo.format('v_a.avi')} 3\r\n")
    write(lists / "testlist03.txt", f"{yoyo.format('v_b.avi')}\r\n")
    touch(root, eye.format("01"), eye.format("02"), hand.format("02"), yoyo.format("v_a.avi"), yoyo.format("v_b.avi"))
    return root


UCF_SPLITS: dict[int, tuple[list[Row], list[Row]]] = {
    1: (
        [
            ("ApplyEyeMakeup/v_ApplyEyeMakeup_g02.avi", 0),
            ("HandstandPushups/v_HandStandPushups_g02.avi", 1),
            ("YoYo/v_b.avi", 2),
        ],
        [("ApplyEyeMakeup/v_ApplyEyeMakeup_g01.avi", 0), ("YoYo/v_a.avi", 2)],
    ),
    2: (
        [("ApplyEyeMakeup/v_ApplyEyeMakeup_g01.avi", 0)],
        [("HandstandPushups/v_HandStandPushups_g02.avi", 1), ("ApplyEyeMakeup/v_ApplyEyeMakeup_g02.avi", 0)],
    ),
    3: ([("YoYo/v_a.avi", 2)], [("YoYo/v_b.avi", 2)]),
}


@pytest.mark.parametrize("split", [1, 2, 3])
def test_ucf101_splits(ucf: Path, tmp_path: Path, split: int) -> None:
    out = tmp_path / "a" / "lists"
    prepare("ucf101", ucf, out, split=split)
    train, test = UCF_SPLITS[split]
    assert rows(out, "train", ucf) == train
    assert rows(out, "val", ucf) == rows(out, "test", ucf) == test
    assert sorted(file.name for file in out.iterdir()) == ["test.csv", "train.csv", "val.csv"]


def test_the_text_of_a_list(ucf: Path, tmp_path: Path) -> None:
    prepare("ucf101", ucf, tmp_path)  # split 1 if not given
    assert (tmp_path / "test.csv").read_bytes().decode() == (
        "# made by prepare.py: UCF101, split 1, test; paths are relative to the data set's folder (--data_root)\n"
        '# labels: ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]\n'
        '"ApplyEyeMakeup/v_ApplyEyeMakeup_g01.avi",0\n'
        '"YoYo/v_a.avi",2\n'
    )


def test_ucf101_as_its_archives_unpack(ucf: Path, tmp_path: Path) -> None:
    for folder in ("ApplyEyeMakeup", "HandstandPushups", "YoYo"):
        (ucf / "UCF-101").mkdir(exist_ok=True)
        (ucf / folder).rename(ucf / "UCF-101" / folder)
    prepare("ucf101", ucf, tmp_path / "lists", split=3)
    assert rows(tmp_path / "lists", "train", ucf) == [("UCF-101/YoYo/v_a.avi", 2)]


def test_ucf101_without_its_split_lists(ucf: Path) -> None:
    folder = ucf / "ucfTrainTestlist"
    (folder / "testlist02.txt").unlink()
    fails(
        *("ucf101", ucf, "UCF101, split 2: looked for classInd.txt, trainlist02.txt, testlist02.txt together"),
        *(f"{folder} (lacks testlist02.txt)", f"{ucf} (lacks classInd.txt, trainlist02.txt, testlist02.txt)"),
        split=2,
    )
    for file in list(folder.iterdir()):
        file.unlink()
    folder.rmdir()
    fails("ucf101", ucf, f"{folder} (no such folder)")


@pytest.mark.parametrize("allow_missing", [False, True])
def test_ucf101_without_its_videos(ucf: Path, tmp_path: Path, allow_missing: bool) -> None:
    only_lists = tmp_path / "only lists"
    only_lists.mkdir()
    (ucf / "ucfTrainTestlist").rename(only_lists / "ucfTrainTestlist")
    fails(
        *("ucf101", only_lists, "found none of the 3 videos of train", "v_ApplyEyeMakeup_g02.avi"),
        *(only_lists / "ApplyEyeMakeup", only_lists / "UCF-101/ApplyEyeMakeup", only_lists / "videos/ApplyEyeMakeup"),
        allow_missing=allow_missing,
    )


@pytest.mark.parametrize(
    ("file", "text", "place", "expected"),
    [
        ("classInd.txt", "1 ApplyEyeMakeup\n3 YoYo\n", "classInd.txt:2", "expected '2 <Class>', found '3 YoYo'"),
        ("classInd.txt", "1\n", "classInd.txt:1", "expected '1 <Class>', found '1'"),
        ("trainlist01.txt", "\nYoYo/v_b.avi 2\n", "trainlist01.txt:2", "'YoYo' has number 2 here and 3 in"),
        ("trainlist01.txt", "Juggling/v_b.avi 3\n", "trainlist01.txt:1", "'Juggling' is not one of the 3 classes"),
        ("testlist01.txt", "v_b.avi\n", "testlist01.txt:1", "expected '<Class>/<video>.avi'"),
        ("testlist01.txt", "", "", "the annotations name no video for val and test"),
    ],
)
def test_ucf101_with_wrong_lists(ucf: Path, file: str, text: str, place: str, expected: str) -> None:
    write(ucf / "ucfTrainTestlist" / file, text)
    fails("ucf101", ucf, place, expected)


def test_text_in_another_encoding(ucf: Path) -> None:
    (ucf / "ucfTrainTestlist" / "classInd.txt").write_bytes("1 Übung\n".encode("latin-1"))
    fails("ucf101", ucf, ucf / "ucfTrainTestlist" / "classInd.txt", "expected text in UTF-8")


# --- HMDB51 ---

# HMDB51's own names have # & ; ! @ ( ) [ ] + ' and dashes; the comma, quote, space and ü are for good measure.
STRANGE = [
    "#437_How_To_Ride_A_Bike_f_cm_np1_le_med_0.avi",
    "A&B;C!D@E(F)[G]+'H-I_1.avi",
    'a, "quoted" name with  spaces.avi',
    "für 100%=$x~y^z{0}.avi",
    "name 12.5 3.avi",
    'one inch is 1".avi',
]


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    root = tmp_path / "hmdb"
    splits = root / "testTrainMulti_7030_splits"
    for split in (1, 2, 3):  # split N trains on the first 4 - N strange names; one clip is in neither part
        write(splits / f"wave_test_split{split}.txt", f"w1.avi 1 \nw2.avi 2 \nw{split + 2}.avi 0 \n")
        uses = [1 if position < 4 - split else 2 for position in range(len(STRANGE))]
        lines = "".join(f"{name} {use} \n" for name, use in zip(STRANGE, uses, strict=True))
        write(splits / f"brush_hair_test_split{split}.txt", lines)
    touch(root, *(f"wave/w{number}.avi" for number in range(1, 6)), *(f"brush_hair/{name}" for name in STRANGE))
    return root


@pytest.mark.parametrize(("split", "in_training"), [(1, 3), (2, 2), (3, 1)])
def test_hmdb51_splits_with_strange_names(hmdb: Path, tmp_path: Path, split: int, in_training: int) -> None:
    out = tmp_path / "lists"
    prepare("hmdb51", hmdb, out, split=split)
    strange: list[Row] = [(f"brush_hair/{name}", 0) for name in STRANGE]
    assert rows(out, "train", hmdb) == [*strange[:in_training], ("wave/w1.avi", 1)]
    assert rows(out, "val", hmdb) == rows(out, "test", hmdb) == [*strange[in_training:], ("wave/w2.avi", 1)]


def test_hmdb51_beside_its_archive_folder(hmdb: Path, tmp_path: Path) -> None:
    (hmdb / "hmdb51_org").mkdir()
    for name in ("wave", "brush_hair"):
        (hmdb / name).rename(hmdb / "hmdb51_org" / name)
    (hmdb / "test_train_splits").mkdir()
    (hmdb / "testTrainMulti_7030_splits").rename(hmdb / "test_train_splits" / "testTrainMulti_7030_splits")
    prepare("hmdb51", hmdb, tmp_path / "lists", split=3)
    expected = [(f"hmdb51_org/brush_hair/{STRANGE[0]}", 0), ("hmdb51_org/wave/w1.avi", 1)]
    assert rows(tmp_path / "lists", "train", hmdb) == expected


def test_hmdb51_with_wrong_splits(hmdb: Path) -> None:
    splits = hmdb / "testTrainMulti_7030_splits"
    write(splits / "wave_test_split1.txt", "w1.avi 1\nw2.avi 3\n")
    fails("hmdb51", hmdb, f"{splits / 'wave_test_split1.txt'}:2", "expected '<video>.avi' and 0, 1 or 2", "'w2.avi 3'")
    for file in splits.glob("*_test_split1.txt"):
        file.unlink()
    fails("hmdb51", hmdb, "looked for <class>_test_split1.txt in", splits, f"{hmdb}: found none")


# --- Kinetics-400 ---

ID = ["-abc_0123XY", "zzzzzzzzzzz", "AbCdEfGhIjK"]  # YouTube's ids may begin with a dash and contain underscores


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    """CVDF's layout: flat folders, annotations (not in label order, one label quoted) and a replacement."""
    root = tmp_path / "k400"
    write(
        root / "annotations" / "train.csv",
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        f"zumba,{ID[0]},7,17,train,0\n"
        f'"massaging person\'s head",{ID[1]},123,133,train,0\n'
        f"air drumming,{ID[2]},0,10,train,0\n",
    )
    write(
        root / "annotations" / "val.csv",
        f"label,youtube_id,time_start,time_end,split\nmassaging person's head,{ID[0]},95,105,val\n",
    )
    touch(
        root,
        *(f"train/{ID[0]}_000007_000017.mp4", f"train/{ID[1]}_000123_000133.mp4", f"train/{ID[2]}_000000_000010.mp4"),
        *(f"replacement/replacement_for_corrupted_k400/{ID[1]}_000123_000133.mp4", f"val/{ID[0]}_000095_000105.mp4"),
    )
    return root


def test_k400_as_cvdf_distributes_it(kinetics: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    prepare("k400", kinetics, out)
    assert rows(out, "train", kinetics) == [
        (f"train/{ID[0]}_000007_000017.mp4", 2),
        (f"replacement/replacement_for_corrupted_k400/{ID[1]}_000123_000133.mp4", 1),
        (f"train/{ID[2]}_000000_000010.mp4", 0),
    ]
    assert rows(out, "val", kinetics) == rows(out, "test", kinetics) == [(f"val/{ID[0]}_000095_000105.mp4", 1)]


@pytest.mark.parametrize("folder", ["train/{}", "videos/train/{}"])
@pytest.mark.parametrize("spaces", [True, False])
def test_k400_annotations_with_class_folders(kinetics: Path, tmp_path: Path, folder: str, spaces: bool) -> None:
    name = "air drumming" if spaces else "air_drumming"
    file = f"{folder.format(name)}/{ID[2]}_000000_000010.mp4"
    (kinetics / file).parent.mkdir(parents=True)
    (kinetics / f"train/{ID[2]}_000000_000010.mp4").rename(kinetics / file)
    prepare("k400", kinetics, tmp_path / "lists")
    assert rows(tmp_path / "lists", "train", kinetics)[2] == (file, 0)


def test_k400_annotations_beside_the_videos(kinetics: Path, tmp_path: Path) -> None:
    (kinetics / "annotations" / "train.csv").rename(kinetics / "train.csv")
    (kinetics / "annotations" / "val.csv").rename(kinetics / "validate.csv")  # DeepMind's own name of it
    prepare("k400", kinetics, tmp_path / "lists")
    assert [row[1] for row in rows(tmp_path / "lists", "train", kinetics)] == [2, 1, 0]


@pytest.mark.parametrize("above", ["", "videos/"])
def test_k400_class_folders(tmp_path: Path, above: str) -> None:
    root = tmp_path / "k400"
    touch(
        root,
        *(f"{above}train/tapping_pen/b #1.mp4", f"{above}train/tapping_pen/a.webm", f"{above}train/tap_dancing/c.MP4"),
        *(f"{above}train/tapping_pen/.hidden.mp4", f"{above}train/tapping_pen/notes.txt", f"{above}train/zumba/d.mp4"),
        *(f"{above}val/tapping pen/e.mp4", f"{above}train/not a class.mp4"),
    )
    prepare("k400", root, tmp_path / "lists")
    assert rows(tmp_path / "lists", "train", root) == [
        (f"{above}train/tap_dancing/c.MP4", 0),
        (f"{above}train/tapping_pen/a.webm", 1),
        (f"{above}train/tapping_pen/b #1.mp4", 1),
        (f"{above}train/zumba/d.mp4", 2),
    ]
    assert rows(tmp_path / "lists", "val", root) == [(f"{above}val/tapping pen/e.mp4", 1)]


def test_k400_class_folders_with_lists_beside_them(tmp_path: Path) -> None:
    """The script's own train.csv in ROOT is no annotation file, so a second run works."""
    touch(tmp_path, "train/a/1.mp4", "val/a/2.mp4")
    for _ in range(2):
        prepare("k400", tmp_path, tmp_path)
        assert rows(tmp_path, "train", tmp_path) == [("train/a/1.mp4", 0)]


def test_k400_class_order_is_that_of_the_annotations(tmp_path: Path) -> None:
    """With a space "a b" comes before "aB" as in the annotations, with an underscore after it."""
    root = tmp_path / "k400"
    touch(root, "train/a_b/1.mp4", "train/aB/2.mp4", "val/aB/3.mp4")
    prepare("k400", root, tmp_path / "lists")
    assert sorted(rows(tmp_path / "lists", "train", root)) == [("train/aB/2.mp4", 1), ("train/a_b/1.mp4", 0)]
    assert rows(tmp_path / "lists", "val", root) == [("val/aB/3.mp4", 1)]


def test_k400_val_class_that_is_not_in_train(tmp_path: Path) -> None:
    root = tmp_path / "k400"
    touch(root, "train/a/1.mp4", "val/a/2.mp4", "val/b/3.mp4")
    fails("k400", root, root / "val" / "b", "there is no such class in", root / "train")


def test_k400_without_annotations_and_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "k400"
    touch(root, f"train/{ID[0]}_000007_000017.mp4", f"val/{ID[1]}_000007_000017.mp4")
    fails("k400", root, "Kinetics-400: looked for train.csv", root / "annotations", "train/<class>/", root / "videos")


def test_k400_with_half_of_the_annotations(kinetics: Path) -> None:
    (kinetics / "annotations" / "val.csv").unlink()
    fails("k400", kinetics, "val.csv or validate.csv", f"{kinetics / 'annotations'} (lacks val.csv)")


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("train.csv", "a.mp4,0\n", ["train.csv:1", "expected the columns label, youtube_id, time_start, time_end"]),
        ("train.csv", "", ["train.csv:1", "found None"]),
        (
            "val.csv",
            f"label,youtube_id,time_start,time_end\nzumba,{ID[0]},1,11\nzumba,{ID[1]},1.5,11\n",
            ["val.csv:3", "whole seconds", "'1.5'"],
        ),
        ("val.csv", f"label,youtube_id,time_start,time_end\nzumba,{ID[0]},1\n", ["val.csv:2", "expected a label"]),
        (
            "val.csv",
            f"label,youtube_id,time_start,time_end\nabseiling,{ID[0]},1,11\n",
            ["val.csv:2", "label 'abseiling' is not one of the 3 of", "train.csv"],
        ),
    ],
)
def test_k400_with_wrong_annotations(kinetics: Path, file: str, text: str, expected: list[str]) -> None:
    write(kinetics / "annotations" / file, text)
    fails("k400", kinetics, *expected)


# --- Something-Something V2 ---


@pytest.fixture
def something(tmp_path: Path) -> Path:
    root = tmp_path / "ssv2"
    labels = {"Holding something next to something": "1", "Pushing something": "0", "Showing that something, is": "2"}
    train = [
        {"id": id_, "label": "holding a potato", "template": template, "placeholders": ["potato"]}
        for id_, template in [
            ("78687", "Holding [something] next to [something]"),
            ("42", "Showing that [something], is"),
            ("7", "Pushing [something]"),
        ]
    ]
    validation = [{"id": "74225", "label": "x", "template": "Pushing [something]", "placeholders": ["x"]}]
    write(root / "labels.json", json.dumps(labels))
    write(root / "train.json", json.dumps(train))
    write(root / "validation.json", json.dumps(validation))
    touch(root, "videos/78687.webm", "videos/42.webm", "videos/7.webm", "videos/74225.webm")
    return root


def test_ssv2(something: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    prepare("ssv2", something, out)
    assert rows(out, "train", something) == [("videos/78687.webm", 1), ("videos/42.webm", 2), ("videos/7.webm", 0)]
    assert rows(out, "val", something) == rows(out, "test", something) == [("videos/74225.webm", 0)]
    names = '["Pushing something", "Holding something next to something", "Showing that something, is"]'
    assert f"# labels: {names}\n" in (out / "train.csv").read_text()


@pytest.mark.parametrize(
    ("annotations", "videos"),
    [
        ("labels/{}.json", "20bn-something-something-v2/{}.webm"),
        ("something-something-v2-{}.json", "videos/{}.mp4"),
        ("annotations/something-something-v2-{}.json", "videos/20bn-something-something-v2/{}.webm"),
    ],
)
def test_ssv2_in_other_folders(something: Path, tmp_path: Path, annotations: str, videos: str) -> None:
    moves = {f"{part}.json": annotations.format(part) for part in ("train", "validation", "labels")}
    moves |= {f"videos/{number}.webm": videos.format(number) for number in (78687, 42, 7, 74225)}
    for old, new in moves.items():
        (something / new).parent.mkdir(parents=True, exist_ok=True)
        (something / old).rename(something / new)
    prepare("ssv2", something, tmp_path / "lists")
    assert rows(tmp_path / "lists", "train", something)[:2] == [(videos.format(78687), 1), (videos.format(42), 2)]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "train.json",
            [{"id": "7", "template": "Eating [something]"}],
            ["entry 0: template 'Eating something' is not in"],
        ),
        ("train.json", [{"id": "7"}], ["train.json: entry 0: expected the field 'template' with a str, found None"]),
        (
            "validation.json",
            [{"id": "74225", "template": "Pushing [something]"}, "x"],
            ["entry 1", "'id'", "str or int"],
        ),
        ("train.json", {"7": "Pushing"}, ["train.json: expected a JSON list, found a dict"]),
        ("labels.json", {"Pushing something": "0", "b": "2"}, ["labels.json: expected names with the numbers 0 to 1"]),
        ("labels.json", {"Pushing something": "zero"}, ["labels.json: expected names with the numbers 0 to 0"]),
    ],
)
def test_ssv2_with_wrong_annotations(something: Path, file: str, content: Any, expected: list[str]) -> None:
    write(something / file, json.dumps(content))
    fails("ssv2", something, *expected)


def test_ssv2_with_a_file_cut_off(something: Path) -> None:
    write(something / "train.json", '[{"id": "7", "templ')
    fails("ssv2", something, f"{something / 'train.json'}: expected JSON")


def test_ssv2_without_labels(something: Path) -> None:
    (something / "labels.json").unlink()
    message = fails("ssv2", something, "looked for train.json or something-something-v2-train.json")
    assert f"{something} (lacks labels.json)" in message
    assert f"{something / 'annotations'} (no such folder)" in message


# --- Ego4D OSCC ---


def state_change(uid: str, video: str, start: float, end: float, label: bool) -> dict[str, Any]:
    """A clip as in Ego4D's annotations, where the seconds of the cut-out are other ones."""
    clip = {"clip_uid": None, "unique_id": uid, "video_uid": video, "clip_start_sec": 5.25, "clip_end_sec": 13.25}
    return {**clip, "parent_start_sec": start, "parent_end_sec": end, "state_change": label, "parent_pnr_frame": None}


@pytest.fixture
def ego4d(tmp_path: Path) -> Path:
    root = tmp_path / "v2"
    train = [
        state_change("a-1", "4e3fc1e9", 1.1543619333333333, 9.154361933333332, True),
        state_change("a-2", "4e3fc1e9", 100, 108.0, False),
    ]
    val = [state_change("b-1", "7c0c0057", 0.0, 8.0, False)]
    write(root / "annotations" / "fho_oscc-pnr_train.json", json.dumps({"version": "2", "clips": train}))
    write(root / "annotations" / "fho_oscc-pnr_val.json", json.dumps({"clips": val}))
    touch(root, "full_scale/4e3fc1e9.mp4", "full_scale/7c0c0057.mp4")
    return root


def test_oscc(ego4d: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    prepare("oscc", ego4d, out)
    assert rows(out, "train", ego4d) == [
        ("full_scale/4e3fc1e9.mp4", 1, 1.1543619333333333, 9.154361933333332),
        ("full_scale/4e3fc1e9.mp4", 0, 100.0, 108.0),
    ]
    assert rows(out, "val", ego4d) == rows(out, "test", ego4d) == [("full_scale/7c0c0057.mp4", 0, 0.0, 8.0)]
    assert '# labels: ["no state change", "state change"]\n' in (out / "train.csv").read_text()


def test_oscc_prefers_the_smaller_copies(ego4d: Path, tmp_path: Path) -> None:
    touch(ego4d, "video_540ss/4e3fc1e9.mp4")
    (ego4d / "full_scale" / "7c0c0057.mp4").rename(ego4d / "7c0c0057.mp4")
    for part in ("train", "val"):
        (ego4d / "annotations" / f"fho_oscc-pnr_{part}.json").rename(ego4d / f"fho_oscc-pnr_{part}.json")
    prepare("oscc", ego4d, tmp_path / "lists")
    assert [row[0] for row in rows(tmp_path / "lists", "train", ego4d)] == ["video_540ss/4e3fc1e9.mp4"] * 2
    assert [row[0] for row in rows(tmp_path / "lists", "val", ego4d)] == ["7c0c0057.mp4"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state_change": None}, ["clip b-1: expected the field 'state_change' with a bool, found None"]),
        ({"state_change": 1}, ["clip b-1", "'state_change' with a bool, found 1"]),
        ({"parent_end_sec": 0.0}, ["clip b-1: expected 0 <= parent_start_sec < parent_end_sec, found 0.0 and 0.0"]),
        ({"parent_start_sec": -1}, ["clip b-1", "found -1.0 and 8.0"]),
        ({"parent_start_sec": "0"}, ["clip b-1", "'parent_start_sec' with a int or float, found '0'"]),
        ({"video_uid": None}, ["clip b-1", "'video_uid' with a str"]),
        ({"unique_id": None}, ["fho_oscc-pnr_val.json: clip 0", "'unique_id' with a str"]),
    ],
)
def test_oscc_with_wrong_annotations(ego4d: Path, change: dict[str, Any], expected: list[str]) -> None:
    clip = {**state_change("b-1", "7c0c0057", 0.0, 8.0, False), **change}
    write(ego4d / "annotations" / "fho_oscc-pnr_val.json", json.dumps({"clips": [clip]}))
    fails("oscc", ego4d, *expected)


def test_oscc_without_clips_or_annotations(ego4d: Path) -> None:
    file = ego4d / "annotations" / "fho_oscc-pnr_val.json"
    write(file, "{}")
    fails("oscc", ego4d, f"{file}: expected the field 'clips' with a list, found None")
    file.unlink()
    fails(
        "oscc", ego4d, "looked for fho_oscc-pnr_train.json, fho_oscc-pnr_val.json", f"{file.parent} (lacks {file.name})"
    )


# --- missing videos, and what may be overwritten ---


def test_missing_videos_are_an_error(hmdb: Path) -> None:
    (hmdb / "wave" / "w2.avi").unlink()
    (hmdb / "brush_hair" / STRANGE[0]).unlink()
    fails(
        *("hmdb51", hmdb, "HMDB51, split 1: 2 of 8 clips have no video", f"{STRANGE[0]}, w2.avi", "--allow-missing"),
        hmdb / "brush_hair",
    )


def test_missing_videos_are_left_out(hmdb: Path, tmp_path: Path) -> None:
    (hmdb / "wave" / "w2.avi").unlink()
    (hmdb / "brush_hair" / STRANGE[0]).unlink()
    (hmdb / "brush_hair" / STRANGE[0]).mkdir()  # a folder is no video
    summary = prepare("hmdb51", hmdb, tmp_path / "lists", allow_missing=True)
    train = [(f"brush_hair/{STRANGE[1]}", 0), (f"brush_hair/{STRANGE[2]}", 0), ("wave/w1.avi", 1)]
    assert rows(tmp_path / "lists", "train", hmdb) == train
    assert rows(tmp_path / "lists", "test", hmdb) == [(f"brush_hair/{name}", 0) for name in STRANGE[3:]]
    assert f"train: left out 1 clips without a video: {STRANGE[0]} (looked for" in summary
    assert "val and test: left out 1 clips without a video: w2.avi (looked for" in summary


def test_only_the_first_missing_videos_are_named(tmp_path: Path) -> None:
    root = tmp_path / "hmdb"
    names = [f"v{number}.avi" for number in range(9)]
    write(root / "wave_test_split1.txt", "".join(f"{name} 1\n" for name in names) + "t.avi 2\n")
    touch(root, "wave/v8.avi", "wave/t.avi")
    fails("hmdb51", root, "8 of 10 clips have no video: v0.avi, v1.avi, v2.avi, v3.avi, v4.avi and 3 more (looked for")


def test_a_missing_video_is_named_once_for_all_its_clips(ego4d: Path, tmp_path: Path) -> None:
    touch(ego4d, "full_scale/other.mp4")
    clips = [state_change(f"a-{second}", "4e3fc1e9", second, second + 8, True) for second in range(3)]
    clips.append(state_change("a-3", "other", 0, 8, True))
    write(ego4d / "annotations" / "fho_oscc-pnr_train.json", json.dumps({"clips": clips}))
    (ego4d / "full_scale" / "4e3fc1e9.mp4").unlink()
    fails("oscc", ego4d, "3 of 5 clips have no video: 4e3fc1e9.mp4 (looked for 4e3fc1e9.mp4 in", ego4d / "video_540ss")
    prepare("oscc", ego4d, tmp_path / "lists", allow_missing=True)
    assert rows(tmp_path / "lists", "train", ego4d) == [("full_scale/other.mp4", 1, 0.0, 8.0)]


def test_dangling_links_are_missing(hmdb: Path) -> None:
    (hmdb / "wave" / "w1.avi").unlink()
    (hmdb / "wave" / "w1.avi").symlink_to(hmdb / "gone.avi")
    fails("hmdb51", hmdb, "1 of 8 clips have no video: w1.avi")


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_other_peoples_files_are_never_overwritten(ucf: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "lists"
    write(out / f"{part}.csv", "my own,0\n")
    with pytest.raises(ValueError, match=f"{part}.csv exists and is no list of this script: choose another OUT_DIR"):
        prepare("ucf101", ucf, out)
    assert contents(out) == {f"{part}.csv": b"my own,0\n"}


def test_annotations_are_never_overwritten(kinetics: Path) -> None:
    before = contents(kinetics)
    with pytest.raises(ValueError, match="is no list of this script"):
        prepare("k400", kinetics, kinetics / "annotations")
    assert contents(kinetics) == before


def test_own_lists_are_replaced(ucf: Path, tmp_path: Path) -> None:
    prepare("ucf101", ucf, tmp_path / "lists", split=1)
    prepare("ucf101", ucf, tmp_path / "lists", split=3)
    assert rows(tmp_path / "lists", "train", ucf) == UCF_SPLITS[3][0]
    assert len(list((tmp_path / "lists").iterdir())) == 3


def test_a_full_disk_leaves_the_earlier_lists(ucf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lists"
    prepare("ucf101", ucf, out, split=1)
    before = contents(out)
    write_text = Path.write_text

    def fail_at_the_last(file: Path, *arguments: Any, **settings: Any) -> int:
        if file.name == "test.csv":
            raise OSError("no space left on device")
        return write_text(file, *arguments, **settings)

    monkeypatch.setattr(Path, "write_text", fail_at_the_last)
    with pytest.raises(OSError, match="no space left"):
        prepare("ucf101", ucf, out, split=3)
    assert contents(out) == before
    assert len(list(out.iterdir())) == 3


def test_wrong_settings(ucf: Path, kinetics: Path, tmp_path: Path) -> None:
    fails("ucf102", ucf, "data set must be one of ucf101, hmdb51, k400, ssv2, oscc, got 'ucf102'")
    fails("ucf101", ucf, "--split must be 1, 2 or 3, got 4", split=4)
    fails("k400", kinetics, "--split 1: Kinetics-400 has no splits", split=1)
    fails("ucf101", tmp_path / "nowhere", tmp_path / "nowhere", "no such folder, expected the one that holds UCF101")
    write(tmp_path / "file")
    with pytest.raises(ValueError, match="file: not a folder, expected one for the lists"):
        prepare("ucf101", ucf, tmp_path / "file")


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such name")
NOT_UTF_8 = pytest.param(os.fsdecode(b"a\xffb.mp4"), marks=ONLY_LINUX)


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\rb.mp4", "a\u2028b.mp4", NOT_UTF_8])
def test_names_that_no_list_can_carry(tmp_path: Path, name: str) -> None:
    root = tmp_path / "k400"
    touch(root, f"train/c/{name}", "val/c/fine.mp4")
    fails("k400", root, "a list takes no names with line breaks or other bytes than UTF-8", root / "train" / "c")


def test_a_summary_says_what_came_out(ucf: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists"
    summary = prepare("ucf101", ucf, out).splitlines()
    assert summary[0] == "UCF101, split 1: 3 labels"
    assert summary[1] == f"{out / 'train.csv'}: 3 clips"
    assert "the same 2 clips" in summary[2]
    assert "UCF101 is published with 101 labels" in summary[3]
    assert summary[4] == f"the paths in them are relative to --data_root {ucf}"


# --- the command ---


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)


def test_the_command(ucf: Path, tmp_path: Path) -> None:
    result = command("ucf101", ucf, tmp_path / "lists", "--split", "2")
    assert result.returncode == 0, result.stderr
    assert "UCF101, split 2: 3 labels" in result.stdout
    assert rows(tmp_path / "lists", "test", ucf) == UCF_SPLITS[2][1]


def test_the_commands_errors(ucf: Path, hmdb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k400", str(ucf), str(tmp_path / "lists")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("prepare.py: Kinetics-400: looked for train.csv")
    (hmdb / "wave" / "w1.avi").unlink()
    assert main(["hmdb51", str(hmdb), str(tmp_path / "lists")]) == 2
    assert not (tmp_path / "lists").exists()
    assert main(["hmdb51", str(hmdb), str(tmp_path / "lists"), "--allow-missing"]) == 0
    assert "left out 1 clips" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ucf101", str(ucf), str(tmp_path / "lists"), "--split", "4"])
    assert "--split" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(ucf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        prepare("ucf101", ucf, tmp_path / "lists")
        assert ("train: looking for videos" in stream.getvalue()) is shown
        assert ("3/3" in stream.getvalue()) is shown


def test_help_describes_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in DATASETS:
        assert f"\n  {name} " in text
    for piece in ("ROOT", "OUT_DIR", "--split", "--allow-missing", "ucfTrainTestlist", "fho_oscc-pnr_{train,val}.json"):
        assert piece in text
    assert max(map(len, text.splitlines())) <= 120


def test_lists_are_plain_csv(hmdb: Path, tmp_path: Path) -> None:
    """Other tools read them too: every line that is no comment has the path, and the label as a number."""
    prepare("hmdb51", hmdb, tmp_path / "lists")
    with (tmp_path / "lists" / "train.csv").open(encoding="utf-8", newline="") as file:
        listed = list(csv.reader(line for line in file if not line.startswith("#")))
    assert listed[:3] == [[f"brush_hair/{name}", "0"] for name in STRANGE[:3]]
