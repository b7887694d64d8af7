"""Markdown tables, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Columns after the first stand to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def number(value: float | None, digits: str = ".3f") -> str:
    return "–" if value is None else format(value, digits)


def with_quartiles(value: float | None, quartiles: Sequence[float] | None) -> str:
    return number(value) + (f" ({number(quartiles[0])}–{number(quartiles[1])})" if quartiles else "")


def gigabytes(value: float | None) -> str:
    return number(None if value is None else value / 1e9, ".2f")


def three_digits(value: float) -> str:
    """Never as a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def percent(values: Sequence[float]) -> str:
    """Mean over the seeds, and the least and the largest of them."""
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%}–{max(values):.1%})"


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """In order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
