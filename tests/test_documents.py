"""README and docs/: links lead somewhere, messages are those of the code, every public name has its place."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import everest_tokens as et

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]+)?\)")
MESSAGE = re.compile(r"^\| (?:warning )?`([^`]+(?:`[^`|]+)*)`[^|]* \|", re.MULTILINE)


def test_the_first_page_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files and, in Markdown, headings; other sites aren't asked."""
    for path, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        target = page.parent / path
        assert target.exists(), path
        if anchor and "api/" not in path:
            assert anchor.removeprefix("#") in headings(target), f"{path}{anchor}"


@cache
def headings(page: Path) -> set[str]:
    """Anchors as GitHub and mkdocs make them, of plain headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation_and_says_what_it_is_for():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation
        assert page.stem in ("index", "roadmap") or page.read_text().split("\n\n")[1].startswith("After this page you")


def test_every_public_name_is_on_an_api_page():
    shown = [
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert sorted(name for name in shown if name.count(".") == 1) == sorted(f"everest_tokens.{n}" for n in et.__all__)


def test_the_version_stands_in_one_place():
    stated = re.compile(rf"\bversion\b.*{re.escape(et.__version__)}|^## \[{re.escape(et.__version__)}")
    files = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "README.md", "mkdocs.yml")]
    assert [file.name for file in files if stated.search(file.read_text())] == []


@cache
def texts_of_the_code() -> list[str]:
    """Every text literal of the library and the scripts; what an f-string fills in is …, as in the page."""
    found = []
    for path in [*(ROOT / "everest_tokens").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "…"))
    return found


MESSAGES = MESSAGE.findall((DOCS / "troubleshooting.md").read_text())


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message):
    """… stands for anything."""
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in texts_of_the_code())


def test_all_messages_are_found():
    assert len(MESSAGES) > 50
