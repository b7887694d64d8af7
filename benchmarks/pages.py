"""RESULTS.md as it grows: the results files that a section is made of, its notes, figures and sources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from table_text import Row, table


def documents(folder: Path, stem: str) -> list[dict[str, Any]]:
    """The results files of one script, each with its name; a GPU's come first."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob(f"{stem}*.json"))]
    return sorted(found, key=lambda document: not on_gpu(document))


def on_gpu(measured: dict[str, Any]) -> bool:
    """Whether a file or a row was measured on a GPU; what was counted from shapes has no device."""
    return not str(measured.get("device", "CPU")).startswith("CPU")


def rows_of(found: Sequence[dict[str, Any]]) -> list[Row]:
    """Their runs, each knowing its device and file.

    Raises:
        ValueError: a file without runs.
    """
    keys = ("device", "file", "date", "world_size", "settings")
    for document in found:
        if "runs" not in document:
            raise ValueError(f"{document['file']} has no runs: written by an older script, measure again")
    return [run | {key: document.get(key) for key in keys} for document in found for run in document["runs"]]


class Page:
    """A Markdown file, and the figures beside it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lines: list[str] = []
        self.noted: set[Path] = set()
        self.cited: dict[str, dict[str, Any]] = {}

    def add(self, lines: Iterable[str]) -> None:
        self.lines += lines

    def add_notes(self, paths: Iterable[Path]) -> None:
        """What stands in these files, each once on the page."""
        for path in paths:
            if path.is_file() and path not in self.noted:
                self.noted.add(path)
                self.add([*path.read_text().splitlines(), ""])

    def add_notes_on(self, found: Iterable[dict[str, Any]], folder: Path) -> None:
        """notes_NAME.md, where a file *_NAME*.json is shown."""
        files = [document["file"] for document in found]
        paths = sorted(folder.glob("notes_*.md"))
        self.add_notes(path for path in paths if any(f"_{path.stem.removeprefix('notes_')}" in file for file in files))

    def cite(self, found: Iterable[dict[str, Any]]) -> None:
        """Documents that a section shows, which `sources` lists."""
        self.cited.update((document["file"], document) for document in found)

    def sources(self) -> Iterator[str]:
        """Where the numbers come from: a line a file."""
        lines = []
        for file, one in self.cited.items():
            versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
            lines.append([f"`{file}`", f"`{one['command']}`", one.get("device", "–"), versions, one.get("date", "–")])
        yield from table(["results/", "command", "device", "versions", "date"], lines)

    def draw(self, name: str, figure: Any, alt: str) -> None:
        path = self.out.parent / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        self.add([f"![{alt}](figures/{name}.png)", ""])

    def write(self) -> None:
        self.out.write_text("\n".join(self.lines).rstrip() + "\n")
