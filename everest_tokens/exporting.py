"""The `export` command: a patched model as a file that runs without this library, checked before it is done."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everest_tokens.patching import host_of
from everest_tokens.selection import compensates

EXTRA = "in a clone, pip install -e '.[onnx]'"
TOLERANCE = 1e-3  # of the largest output: other kernels round otherwise


class OfClips(nn.Module):
    """A patched model as a function of clips alone, which gives scores, or tokens where it has no classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.arguments = model, host_of(model).arguments(model)

    def forward(self, clips: Tensor) -> Tensor:
        output = self.model(clips, **self.arguments)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state


def export(model: Any, path: Path, kind: str) -> dict[str, str]:
    """Write a patched model, its selection inside the graph, for any number of clips.

    The file is put in its place once it gives what the model gives on a random clip and on a static one, whose tokens
    all tie, together and each alone.

    Args:
        model: of transformers, in eval mode.
        kind: "pt2" (torch.export) or "onnx" (torch.onnx, checked with onnxruntime).

    Returns:
        What a reader wants to know: name → text.

    Raises:
        ValueError: a model that draws at random or that the format can't express, with the part that
            it can't, or a file whose numbers are others.
        ImportError: the `onnx` extra is not installed.
    """
    if model.everest.task == "pretraining":
        raise ValueError("a pre-training model draws its visible tokens at random: export an encoder or a classifier")
    if getattr(model.everest.selector, "random", False):
        raise ValueError(f"{model.everest.selector} draws at random, and a file would draw differently")
    if kind == "onnx" and compensates(model.everest.selector):
        raise ValueError(
            "ONNX can't express camera='compensate', which solves systems of equations: export pt2, or set "
            "model.everest.selector.camera = 'ignore'"
        )
    clips = torch.randn(2, *host_of(model).example(model)[0][1:], generator=torch.Generator().manual_seed(0))
    clips[1] = clips[1, :1]
    module = OfClips(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        run, about = (_write_pt2 if kind == "pt2" else _write_onnx)(module, clips, Path(folder, path.name))
        with torch.no_grad():
            wanted, model_seconds = _timed(module, clips)
        given, file_seconds = _timed(run, clips)
        alone = torch.cat([run(clip[None]) for clip in clips])
        difference = float(max((each - wanted).abs().max() for each in (given, alone)) / wanted.abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(f"{path.name} would differ from the model by {difference:.1e} of its largest output")
        # ONNX puts the weights of a large model into a file beside it: the one that names them comes last.
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
        size = sum(file.stat().st_size for file in written)
        for file in written:
            os.replace(file, path.parent / file.name)
    shape, files = ", ".join(map(str, clips.shape[1:])), " and ".join(str(path.parent / file.name) for file in written)
    return {
        "file": f"{files}, {size / 1e6:.1f} MB, {about}",
        "takes": f"clips (B, {shape}), float32, any B",
        "difference": f"{difference:.1e} of the largest output, two clips together and each alone",
        "seconds": f"{file_seconds:.2f} for two clips, the model {model_seconds:.2f}",
    }


Writer = tuple[Callable[[Tensor], Tensor], str]


def _write_pt2(module: nn.Module, clips: Tensor, path: Path) -> Writer:
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(module, (clips,), dynamic_shapes={"clips": {0: batch}}, strict=False)
    except Exception as error:  # of many types, none of them torch's promise
        raise ValueError(f"torch.export can't express it: {_first_line(error)}") from error
    torch.export.save(program, path)
    run = torch.export.load(path).module()
    return lambda given: run(given).detach(), f"torch {torch.__version__}"


def _write_onnx(module: nn.Module, clips: Tensor, path: Path) -> Writer:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"writing ONNX needs {error.name}: {EXTRA}") from error
    batch = torch.export.Dim("batch", min=1)
    try:
        program: Any = torch.onnx.export(
            module, (clips,), dynamo=True, dynamic_shapes={"clips": {0: batch}}, output_names=["output"], verbose=False
        )
    except Exception as error:
        raise ValueError(f"ONNX can't express it: {_first_line(error)}") from error
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    opset = max(each.version for each in program.model_proto.opset_import if not each.domain)
    return lambda given: torch.from_numpy(session.run(None, {"clips": given.numpy()})[0]), f"opset {opset}"


def _first_line(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of exporters' errors, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _timed(run: Callable[[Tensor], Tensor], clips: Tensor) -> tuple[Tensor, float]:
    run(clips)
    start = time.perf_counter()
    output = run(clips)
    return output, time.perf_counter() - start
