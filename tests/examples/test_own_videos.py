"""A folder of one's own videos: what is found in it, what is left out, and how it is split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_videos import find_videos, first_few, split_off
from video_list import Entry


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(root: Path, entries: list[Entry]) -> list[tuple[str, int | None]]:
    return [(entry.path.relative_to(root).as_posix(), entry.label) for entry in entries]


class TestFindVideos:
    def test_labels_are_folders_in_sorted_order(self, tmp_path):
        touch(tmp_path, "b/1.mp4", "a/2.MOV", "a/deep/er/1.avi", "B/x y,'z'.webm")
        found = find_videos(tmp_path, labelled=True)
        assert found.labels == ["B", "a", "b"]
        assert names(tmp_path, found.train) == [("B/x y,'z'.webm", 0), ("a/2.MOV", 1), ("a/deep/er/1.avi", 1),
                                                ("b/1.mp4", 2)]  # fmt: skip
        assert found.val == found.test == []
        assert not found.skipped

    def test_what_is_no_video_is_left_out_and_counted(self, tmp_path):
        touch(tmp_path, "a/1.mp4", "b/1.mp4", ".DS_Store", "a/._1.mp4", ".cache/2.mp4", "b/.git/3.mp4", "b/notes.txt",
              "readme.md", "loose.mp4", "empty/none.txt")  # fmt: skip
        found = find_videos(tmp_path, labelled=True)
        assert names(tmp_path, found.train) == [("a/1.mp4", 0), ("b/1.mp4", 1)]
        assert found.labels == ["a", "b"]
        assert found.skipped == {
            "hidden": 4,  # two files, two folders
            "other files": 3,
            "videos without a label": 1,
            "folders without videos": 1,
        }

    def test_a_folder_that_is_split(self, tmp_path):
        touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "val/b/2.mp4", "test/a/3.mp4", "classes.txt", ".hidden")
        found = find_videos(tmp_path, labelled=True)
        assert names(tmp_path, found.train) == [("train/a/1.mp4", 0), ("train/b/1.mp4", 1)]
        assert names(tmp_path, found.val) == [("val/b/2.mp4", 1)]
        assert names(tmp_path, found.test) == [("test/a/3.mp4", 0)]
        assert found.skipped == {"hidden": 1, "other files": 1}

    def test_train_may_be_a_label(self, tmp_path):
        touch(tmp_path, "train/1.mp4", "tram/1.mp4")
        assert find_videos(tmp_path, labelled=True).labels == ["train", "tram"]

    def test_without_labels_every_video_counts(self, tmp_path):
        touch(tmp_path, "1.mp4", "a/2.mp4", "a/b/3.mkv", "a/4.txt")
        found = find_videos(tmp_path, labelled=False)
        assert names(tmp_path, found.train) == [("1.mp4", None), ("a/2.mp4", None), ("a/b/3.mkv", None)]
        assert found.labels == []
        assert found.skipped == {"other files": 1}

    def test_without_labels_what_is_split_off_is_not_trained_on(self, tmp_path):
        touch(tmp_path, "train/1.mp4", "val/2.mp4", "test/3.mp4")
        assert names(tmp_path, find_videos(tmp_path, labelled=False).train) == [("train/1.mp4", None)]

    def test_labels_of_a_model_say_the_places(self, tmp_path):
        touch(tmp_path, "a/1.mp4")
        assert names(tmp_path, find_videos(tmp_path, labelled=True, labels=["b", "a"]).train) == [("a/1.mp4", 1)]
        with pytest.raises(ValueError, match="labels that the model wasn't trained on: a"):
            find_videos(tmp_path, labelled=True, labels=["b", "c"])

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        touch(tmp_path, "elsewhere/1.mp4", "videos/b/2.mp4", "videos/b/deep/3.mp4")
        (tmp_path / "videos" / "a").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "videos" / "b" / "deep" / "circle").symlink_to(tmp_path / "videos" / "b")
        found = find_videos(tmp_path / "videos", labelled=True)
        assert names(tmp_path / "videos", found.train) == [("a/1.mp4", 0), ("b/2.mp4", 1), ("b/deep/3.mp4", 1)]

    @pytest.mark.parametrize(
        ("files", "labelled", "message"),
        [
            ([], True, "two labels at least; got none"),
            (["1.mp4", "2.mp4"], True, "got none (2 videos without a label)"),
            (["a/1.mp4", "b/1.txt"], True, "got a (1 folders without videos, 1 other files)"),
            (["train/a/1.mp4", "train/b/1.mp4", "val/c/1.mp4"], True, "labels that .* lacks: c"),
            (["a/1.txt"], False, "holds no videos (1 other files)"),
        ],
    )
    def test_what_cannot_be_trained_on_is_an_error(self, tmp_path, files, labelled, message):
        touch(tmp_path, *files)
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            find_videos(tmp_path, labelled=labelled)

    def test_no_folder_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="none is no folder"):
            find_videos(tmp_path / "none", labelled=True)


def videos(counts: dict[int, int], parts: int = 1) -> list[Entry]:
    return [
        Entry(Path(f"/videos/{label}/{number}.mp4"), label, float(part), part + 1.0)
        for label, count in counts.items()
        for number in range(count)
        for part in range(parts)
    ]


class TestSplitOff:
    @given(
        counts=st.dictionaries(st.integers(0, 9), st.integers(1, 30), min_size=1, max_size=5),
        parts=st.integers(1, 3),
        fraction=st.floats(0.01, 0.99),
        seed=st.integers(0, 2**31),
    )
    def test_by_file_and_within_each_label(self, counts, parts, fraction, seed):
        entries = videos(counts, parts)
        if max(counts.values()) == 1:
            with pytest.raises(ValueError, match="no label has two videos"):
                split_off(entries, fraction, seed)
            return
        rest, held_out = split_off(entries, fraction, seed)
        assert sorted(rest + held_out, key=entries.index) == entries
        assert rest == sorted(rest, key=entries.index)
        assert not {entry.path for entry in rest} & {entry.path for entry in held_out}
        taken = Counter(path.parent.name for path in {entry.path for entry in held_out})
        for label, count in counts.items():
            assert abs(taken[str(label)] - fraction * count) <= 0.5 or taken[str(label)] in (1, count - 1)
            assert (taken[str(label)] >= 1) == (count > 1)
            assert taken[str(label)] < count

    def test_the_seed_decides(self):
        entries = videos({0: 20, 1: 20})
        splits = [split_off(entries, 0.25, seed) for seed in (0, 0, 1)]
        assert splits[0] == splits[1] != splits[2]
        assert Counter(entry.label for entry in splits[0][1]) == {0: 5, 1: 5}

    def test_a_link_to_a_file_is_on_its_side(self, tmp_path):
        touch(tmp_path, *(f"{number}.mp4" for number in range(6)))
        for number in range(6):
            (tmp_path / f"link{number}.mp4").symlink_to(tmp_path / f"{number}.mp4")
        entries = [Entry(path, 0) for path in sorted(tmp_path.iterdir())]
        rest, held_out = split_off(entries, 0.5, 0)
        assert len(held_out) == 6
        assert {entry.path.resolve() for entry in rest}.isdisjoint(entry.path.resolve() for entry in held_out)

    def test_without_labels(self):
        entries = [Entry(Path(f"/{number}.mp4")) for number in range(10)]
        assert len(split_off(entries, 0.2, 0)[1]) == 2

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
    def test_a_share_that_is_none_is_an_error(self, fraction):
        with pytest.raises(ValueError, match="val_fraction must be between 0 and 1"):
            split_off(videos({0: 4}), fraction, 0)


def test_a_few_have_all_labels():
    entries = videos({0: 10, 1: 2, 2: 5})
    few = first_few(entries, 8)
    assert Counter(entry.label for entry in few) == {0: 3, 1: 2, 2: 3}
    assert few == sorted(few, key=entries.index)
    assert first_few(entries, 100) == entries
