"""examples/video_list.py against lists typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from video_list import Entry, read_list


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "list.csv"
        path.write_bytes(text.encode())
        return path

    return write


def test_every_way_to_write_a_line(write, tmp_path):
    list_file = write(
        "\ufeffa.mp4 3\n"
        "# juggling 5\n"
        "\n"
        "   \n"
        "sub/b.avi,0\r\n"
        "my videos/c d.mp4, 12\n"
        '"my videos/e f.mp4" 1\n'
        '"g,h.mp4" 2\n'
        '"i,j.mp4",4\n'
        "it's-long.mp4 7\n"
        "k.mp4\t1   2.5 10\n"
        "l.mp4,0,0,1e3\n"
        "/elsewhere/m.mp4 6"
    )
    assert read_list(list_file, labelled=True) == [
        Entry(tmp_path / "a.mp4", 3, None, None),
        Entry(tmp_path / "sub/b.avi", 0, None, None),
        Entry(tmp_path / "my videos/c d.mp4", 12, None, None),
        Entry(tmp_path / "my videos/e f.mp4", 1, None, None),
        Entry(tmp_path / "g,h.mp4", 2, None, None),
        Entry(tmp_path / "i,j.mp4", 4, None, None),
        Entry(tmp_path / "it's-long.mp4", 7, None, None),
        Entry(tmp_path / "k.mp4", 1, 2.5, 10.0),
        Entry(tmp_path / "l.mp4", 0, 0.0, 1000.0),
        Entry(Path("/elsewhere/m.mp4"), 6, None, None),
    ]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "tab\there.mp4",
            "two  spaces.mp4",
            " at its ends .mp4 ",
            'say "hi".mp4',
            "it's.mp4",
            "a,b.mp4",
            "file:b.mp4",
        ),
        *("back\\slash.mp4", "#1.mp4", "ünï ☃.mp4", "line\u2028separator.mp4", "form\x0cfeed.mp4", "\xa0.mp4", '"'),
    ],
)
@pytest.mark.parametrize("separator", [" ", ",", "\t", " , "])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_any_name_in_quotes(write, tmp_path, name, separator, end):
    quoted = '"' + name.replace('"', '""') + '"'
    list_file = write(f"\ufeff# videos{end or chr(10)}{quoted}{separator}3{end}")
    assert read_list(list_file, labelled=True) == [Entry(tmp_path / name, 3)]


@pytest.mark.parametrize(
    ("encoding", "line", "byte", "value"),
    [("latin1", 2, 2, "0xfc"), ("utf-16", 1, 1, "0xff"), ("cp1252", 2, 2, "0xfc")],
)
def test_another_encoding_is_named_by_list_line_and_byte(tmp_path, encoding, line, byte, value):
    list_file = tmp_path / "list.csv"
    list_file.write_bytes("a.mp4 1\nmüll.mp4 2\n".encode(encoding))
    problem = f"{list_file}:{line}: byte {byte} is {value}, which isn't UTF-8: save the list as UTF-8"
    with pytest.raises(ValueError, match=re.escape(problem)):
        read_list(list_file, labelled=True)


def test_without_labels(write, tmp_path):
    list_file = write('a.mp4\nb.mp4 3\nc.mp4 1.5 2.5\nd.mp4 -1 0 4\n"e e.mp4"\nf f.mp4,9\n')
    assert read_list(list_file, labelled=False) == [
        Entry(tmp_path / "a.mp4"),
        Entry(tmp_path / "b.mp4"),
        Entry(tmp_path / "c.mp4", None, 1.5, 2.5),
        Entry(tmp_path / "d.mp4", None, 0.0, 4.0),
        Entry(tmp_path / "e e.mp4"),
        Entry(tmp_path / "f f.mp4"),
    ]


def test_data_root(write, tmp_path):
    (tmp_path / "data").mkdir()
    list_file = write("x/a.mp4 0\n/b.mp4 1\n")
    entries = read_list(str(list_file), str(tmp_path / "data"), labelled=True, num_labels=2)
    assert [entry.path for entry in entries] == [tmp_path / "data/x/a.mp4", Path("/b.mp4")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4", "`path label`"),
        ("a.mp4 1 2", "`path label start end`; a path with spaces needs quotes"),
        ("my video.mp4 1", "a path with spaces needs quotes, or commas"),
        ("a.mp4 1 2 3 4", "`path label start end`"),
        (",1", "`path label`"),
        ("a.mp4 one", "an integer as the label, not 'one'"),
        ("a.mp4 1.0", "an integer as the label, not '1.0'"),
        ("a.mp4,", "an integer as the label, not ''"),
        ("a.mp4 -1", "at least 0 and at most 4 .5 labels., not -1"),
        ("a.mp4 5", "at most 4 .5 labels., not 5"),
        ("a.mp4 1 x 2", "seconds, not 'x'"),
        ("a.mp4 1 nan 2", "seconds, not 'nan'"),
        ("a.mp4 1 0 inf", "seconds, not 'inf'"),
        ("a.mp4 1 2 2", "start < end in seconds, not 2 and 2"),
        ("a.mp4 1 3 2.5", "start < end in seconds, not 3 and 2.5"),
        ("a.mp4 1 -1 2", "0 <= start < end in seconds, not -1 and 2"),
    ],
)
def test_a_wrong_line_is_named(write, line, message):
    list_file = write(f"# videos\nfine.mp4 4\n{line}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_list(list_file, labelled=True, num_labels=5)
    assert str(error.value).startswith(f"{list_file}:3: ")
    assert repr(line) in str(error.value)


@pytest.mark.parametrize("line", ["a.mp4 x", "a.mp4 5 5", "a.mp4 0 1 2 3", "a.mp4 0 -1"])  # the last one: VideoMAE V2's
def test_a_wrong_line_without_labels(write, line):
    with pytest.raises(ValueError, match=r"list\.csv:1: expected"):
        read_list(write(line), labelled=False)


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_an_empty_list(write, text):
    list_file = write(text)
    with pytest.raises(ValueError, match=re.escape(f"{list_file}: the list is empty")):
        read_list(list_file, labelled=False)


def test_missing_files(write, tmp_path):
    with pytest.raises(ValueError, match=r"no-list\.txt: no such file"):
        read_list(tmp_path / "no-list.txt", labelled=True)
    with pytest.raises(ValueError, match=r"data_root must be a folder, got .*nowhere"):
        read_list(write("a.mp4 0"), tmp_path / "nowhere", labelled=True)
