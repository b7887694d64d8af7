"""What is loaded when: nothing heavy by the import, by --help or --version; each public name by its first use."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import everest_tokens as et

HEAVY = ("torch", "transformers", "timm", "matplotlib", "av", "torchcodec", "torchvision", "einops", "numpy")


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a new process has loaded after the code."""
    return set(in_a_new_process(f"{code}\nimport sys\nprint('\\n', *sys.modules)").splitlines()[-1].split()) & {*HEAVY}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", "--help"], ["visualize", "--help"], ["--version"]])
def test_nothing_heavy_is_loaded_before_it_is_needed(arguments):
    code = "import everest_tokens"
    if arguments:
        run = f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0"
        code = f"from everest_tokens.cli import main\n{run}"
    assert loaded_by(code) == set()


def test_selectors_need_torch_alone():
    assert loaded_by("import everest_tokens as et; et.ReRoSelector(), et.InfoFrameSampler()") <= {
        "torch",
        "numpy",
        "einops",
    }


def test_version():
    shown = subprocess.run([sys.executable, "-m", "everest_tokens", "--version"], capture_output=True, text=True)
    assert shown.stdout == f"everest-tokens {et.__version__}\n"


def test_every_public_name():
    namespace: dict[str, object] = {}
    exec("from everest_tokens import *", namespace)
    assert {name for name in namespace if name != "__builtins__"} == set(et.__all__)
    assert {name for name in dir(et) if name[0] != "_"} == set(et.__all__)
    for name in et.__all__:
        assert getattr(et, name).__name__ == name
        assert getattr(et, name) is namespace[name]


def test_type_checkers_see_what_is_loaded():
    """The imports that only they read are those that happen."""
    tree = ast.parse(Path(et.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == {name: f"everest_tokens.{module}" for name, module in et._MODULES.items()}
    assert set(seen) == set(et.__all__)


def test_other_names():
    assert not hasattr(et, "nonsense")
    with pytest.raises(AttributeError, match="module 'everest_tokens' has no attribute 'patch'"):
        _ = et.patch
    with pytest.raises(ImportError, match="cannot import name 'patch'"):
        exec("from everest_tokens import patch")


def save_selection(path: Path) -> str:
    """Code that loads a selection without arbitrary pickles."""
    torch.save(et.TokenSelection(torch.tensor([[1, 3, 4]]), None, (2, 1, 3)), path)
    return f"import torch; print(torch.load({str(path)!r}, weights_only=True).visible.tolist())"


def test_unpickling_in_a_new_process(tmp_path):
    path = tmp_path / "pickled"
    selector = et.RunningCellSelector(0.25)
    path.write_bytes(pickle.dumps((selector, [getattr(et, name) for name in et.__all__])))
    load = save_selection(tmp_path / "selection.pt")  # nobody names its class there
    shown = in_a_new_process(f"import pickle; print(*pickle.load(open({str(path)!r}, 'rb'))); {load}")
    assert repr(selector) in shown
    assert shown.endswith("[[1, 3, 4]]\n")


def test_a_saved_selection_loads_once_its_class_is_imported(tmp_path):
    load = save_selection(tmp_path / "selection.pt")
    assert in_a_new_process(f"from everest_tokens import TokenSelection; {load}") == "[[1, 3, 4]]\n"


class Kept(torch.nn.Module):
    def forward(self, tokens: torch.Tensor, selection: et.TokenSelection) -> torch.Tensor:
        return tokens[:, selection.visible[0]]


def test_an_export_that_takes_a_selection_loads_first_of_all(tmp_path):
    path = tmp_path / "kept.pt2"
    selection = et.TokenSelection(torch.tensor([[1, 3, 4]]), None, (2, 1, 3))
    torch.export.save(torch.export.export(Kept(), (torch.rand(1, 6, 2), selection)), path)
    code = f"""
import torch
import everest_tokens as et
program = torch.export.load({str(path)!r}).module()
tokens = torch.arange(12.0).view(1, 6, 2)
print(program(tokens, et.TokenSelection(torch.tensor([[0, 2, 5]]), None, (2, 1, 3))).tolist())
"""
    assert in_a_new_process(code).splitlines()[-1] == "[[[0.0, 1.0], [4.0, 5.0], [10.0, 11.0]]]"
