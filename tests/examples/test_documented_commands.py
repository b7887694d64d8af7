"""Every command of ours in README, docs/ and the like is one that its own parser takes, with whole names of options."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import evaluate
import pytest
from recipe import FinetuningRecipe, PretrainingRecipe, parse
from run import TRAINING_DEFAULTS

from everest_tokens import cli

ROOT = Path(__file__).parents[2]
PAGES = [path for path in ROOT.glob("*.md") if path.stem != "CHANGELOG"]  # which tells of what was
PAGES += [page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md")]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SCRIPT = re.compile(r"(?:^|\s)((?:examples/|benchmarks/|scripts/|pictures/)?[\w/]+\.(?:py|sh))(?=\s|$)")
RECIPES = {"pretrain.py": PretrainingRecipe, "finetune.py": FinetuningRecipe}


class Parsed(Exception):
    """The arguments were good; the script isn't run."""


def commands() -> dict[str, Path]:
    """Commands of ours → the page; those of fenced blocks, and of inline code that gives arguments."""
    found: dict[str, Path] = {}
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *(code for code in INLINE.findall(BLOCK.sub("", text)) if " " in code)]:
            for command in re.split(r"\s&&\s|;\s", line.split(" #")[0]):
                command = command.strip()
                if command.startswith("everest-tokens ") or (SCRIPT.search(command) and "python -c" not in command):
                    found.setdefault(command, page)
    return found


COMMANDS = commands()


def script_of(command: str, page: Path) -> Path | None:
    named = SCRIPT.search(command)
    if named is None:
        return None
    for folder in (ROOT, page.parent):
        if (folder / named[1]).is_file():
            return folder / named[1]
    raise AssertionError(f"{page.relative_to(ROOT)} names {named[1]}, which doesn't exist")


def check(command: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise SystemExit or ValueError where the command's parser doesn't take the arguments."""
    script = script_of(command, page)
    words = shlex.split(command.replace("$D", "videos"))
    name = "everest-tokens" if script is None else script.name
    arguments = words[next(number for number, word in enumerate(words) if word.endswith(name)) + 1 :]
    if script is not None and (script.suffix == ".sh" or not arguments or "…" in arguments):
        return  # a name, or a beginning of a command
    init, parse_args = argparse.ArgumentParser.__init__, argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "__init__", partialmethod(init, allow_abbrev=False))
    if script is None and arguments[1:] == []:
        arguments.append("--help")  # a command's name

    def parsed(*given: Any, **options: Any) -> Any:
        parse_args(*given, **options)
        raise Parsed

    if script is not None and script.name in RECIPES:
        parse(RECIPES[script.name], arguments, TRAINING_DEFAULTS | {"use_cpu": True})
        return
    if script is not None and script.name == "evaluate.py":
        evaluate.parse(arguments)
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    if script is None:
        with pytest.raises((Parsed, SystemExit)) as ended:
            cli.main(arguments)
        assert ended.type is Parsed or (ended.value.code == 0 and "--help" in arguments)
        return
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setitem(sys.modules, "modeling_pretrain", ModuleType("modeling_pretrain"))  # of a clone, for loops/
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_its_parser_takes_it(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command, COMMANDS[command], monkeypatch)


def test_all_kinds_are_found():
    scripts = ("examples/finetune.py", "examples/prepare.py", "benchmarks/gflops.py")
    kinds = ("everest-tokens demo", "everest-tokens convert", *(f"python {script}" for script in scripts))
    assert all(any(command.startswith(kind) for command in COMMANDS) for kind in kinds)


@pytest.mark.parametrize(
    "command",
    [
        "everest-tokens visualise a.mp4",
        "everest-tokens predict fine-tuned a.mp4 --view 5x3",
        "python examples/finetune.py examples/recipes/own.yaml --data videos --keep_ration 0.3",
        "python examples/evaluate.py examples/recipes/own.yaml --model fine-tuned --data videos --clip 2",
        "python examples/prepare.py ucf102 videos lists",
        "python examples/pictures/paper_figures.py strategies a.mp4 --keepratio 0.3",
        "python examples/finetunes.py examples/recipes/own.yaml",
    ],
)
def test_others_are_refused(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check(command, ROOT / "README.md", monkeypatch)
