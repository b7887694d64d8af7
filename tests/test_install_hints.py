"""What messages and documents tell people to install can be installed as they say: no index has this project."""

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ("everest_tokens", "examples", "benchmarks", "docs", "scripts", ".ci", ".github")
TEXTS = [
    *ROOT.glob("*.md"),
    *(
        path
        for place in PLACES
        for path in (ROOT / place).rglob("*")
        if path.suffix in (".md", ".py", ".sh", ".sbatch", ".yaml", ".yml", "") and path.is_file()
    ),
]
COMMAND = re.compile(r"pip install\s+([^`\n]+)")
OWN_NAME = re.compile(r"\beverest[-_]tokens\b(?=\[|==|>=|\s|[\"']|$)")
EXTRAS = re.compile(r"\.\[([\w,-]+)\]")


def commands(text: str) -> list[str]:
    """What follows `pip install` up to the end of the line, the quotation or the next command."""
    return [re.split(r" && |;| {2,}#", found)[0] for found in COMMAND.findall(text)]


def problems(text: str) -> list[str]:
    known = set(importlib.metadata.metadata("everest-tokens").get_all("Provides-Extra") or ())
    found = [command for command in commands(text) if OWN_NAME.search(command)]
    extras = [extra for command in commands(text) for group in EXTRAS.findall(command) for extra in group.split(",")]
    return found + [extra for extra in extras if extra not in known]


def test_install_hints_name_a_clone_and_extras_that_exist():
    assert {path.relative_to(ROOT): found for path in TEXTS if (found := problems(path.read_text()))} == {}
    package = [path.read_text() for path in TEXTS if "everest_tokens" in path.parts]
    assert sum(len(commands(text)) for text in package) >= 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("""'needs PyAV: pip install "everest-tokens[video]"'""", 1),
        ("pip install everest-tokens", 1),
        ("pip install --upgrade everest_tokens==0.1.0", 1),
        ("pip install -e '.[vidoe]'", 1),
        ("pip install -e '.[demo]' && everest-tokens demo", 0),
        ("pip install decord2 -e '.[demo]'    # everest-tokens' own", 0),
        ("pip install -e .", 0),
    ],
)
def test_names_that_no_index_has_are_found(text, problem):
    assert len(problems(text)) == problem
