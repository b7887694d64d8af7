"""Checkpoint files that are broken or hostile: one clear ValueError, in time, nothing run, no memory beyond the file's.

Where memory counts, a forked child loads the file and tells by how much it grew.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import pickletools
import re
import resource
import signal
import struct
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from checkpoint_case import PIXELS, SIZES, SMALL, Call, assert_classifies, fine_tuned, pre_trained, write
from family_models import FineTuningModel, MMEPreTrainingModel, randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

import everest_tokens as et
from everest_tokens import checkpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:use_mean_pooling"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR|quantize|Validating sparse|copied tensor)"),
]
UNSAID = {"num_frames": checkpoints._NUM_FRAMES, "image_size": checkpoints._IMAGE_SIZE}  # as if not given
SECONDS = 1.0  # of CPU time
SLACK = 64 << 20  # bytes that the interpreter and allocator may take beside the file


class TooLong(BaseException):
    """Nobody takes this for a damaged file."""


def refused(path: Any, seconds: float = SECONDS, **kwargs: Any) -> str:
    """The one line of a ValueError, or "" where a whole model came back. Nothing else may happen, nor take long."""

    def too_long(*_: Any) -> None:
        raise TooLong(f"more than {seconds} CPU seconds")

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        model = et.load_videomae(path, **SIZES | kwargs)
    except ValueError as error:
        caught: ValueError = error
    else:
        assert isinstance(model, (VideoMAEForVideoClassification, VideoMAEForPreTraining))
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32, name
            assert value.isfinite().all(), name
        return ""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert type(caught) is ValueError, f"{type(caught).__name__} reached the caller: {caught}"
    assert str(caught)
    assert "\n" not in str(caught), caught
    return str(caught)


def in_a_child(path: Any, **kwargs: Any) -> tuple[str, float]:
    """(what `refused` says, bytes by which the process grew), or the error that a child of limited memory died of."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
            with open("/proc/self/statm") as sizes:
                used = int(sizes.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)  # the machine must outlive the test
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            said = refused(path, **kwargs)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        except BaseException as error:
            said, grown = f"{type(error).__name__}: {error}", float("inf")
        os.write(writes, json.dumps([said, grown * 1024]).encode())
        os._exit(0)
    os.close(writes)
    with open(reads, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return tuple(json.loads(told or '["killed", 1e99]'))


def last(name: str) -> str:
    """Of a key: what must be told, whatever prefix was stripped."""
    return ".".join(name.split(".")[-2:])


STORED = fine_tuned(use_learnable_pos_emb=True, init_values=0.1).state_dict()
DECODING = pre_trained(init_values=0.1).state_dict()
ENOUGH = re.compile(r"(?<!decoder\.)blocks\.1\.")  # what one block shows needs no second


class TestSizes:
    @pytest.mark.parametrize(
        ("args", "given"),
        [
            (Namespace(num_frames=200_000), {}),
            (Namespace(input_size=80_000), {}),
            (Namespace(num_frames=64, num_segments=99_999), {}),
            (None, {"num_frames": 8, "image_size": 80_000}),
        ],
        ids=str,
    )
    def test_clips_beyond_reason(self, tmp_path, args, given):
        """The old loader computed a table of as many rows, in Python."""
        path = write(tmp_path / "w.pth", DECODING, args=args)
        message = refused(path, **PIXELS | UNSAID | given)
        assert re.search(r"num_frames=\d+ and image_size=\d+.* \d+ tokens.*at most", message), message

    @pytest.mark.parametrize("args", [{"num_frames": 10**30, "input_size": -3, "model": ["x"]}, {"num_frames": "8"}])
    def test_arguments_that_are_no_sizes(self, tmp_path, args):
        path = write(tmp_path / "w.pth", fine_tuned(), args=args)
        assert et.load_videomae(path, num_heads=2).config.num_frames == 16

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("patch_embed.proj.weight", (32, 3, 2, 0, 0)),
            ("patch_embed.proj.weight", (0, 3, 2, 8, 8)),
            ("patch_embed.proj.weight", (32, 3, 0, 0)),
            ("pos_embed", (1, 0, 32)),
            ("head.weight", (0, 32)),
            ("blocks.0.mlp.fc1.weight", (0, 32)),
        ],
    )
    def test_nothing_of_size_zero(self, tmp_path, name, shape):
        for file in ("w.pth", "w.safetensors"):
            assert f"{name} has shape {shape}" in refused(write(tmp_path / file, STORED | {name: torch.zeros(shape)}))

    def test_more_labels_than_a_config_names(self, tmp_path):
        many = {"head.weight": torch.ones(200_000, 1), "head.bias": torch.ones(200_000)}
        assert "200000 labels" in refused(write(tmp_path / "w.pth", STORED | many))
        assert "1000000000000 labels" in refused(write(tmp_path / "w.pth", STORED), num_labels=10**12)

    @pytest.mark.parametrize("sizes", [{"num_frames": 1}, {"num_frames": 0}, {"image_size": 4}, {"image_size": -24}])
    def test_sizes_without_a_token(self, tmp_path, sizes):
        for learned in (False, True):
            path = write(tmp_path / "w.pth", fine_tuned(use_learnable_pos_emb=learned))
            assert next(iter(sizes)) in refused(path, **sizes)

    @pytest.mark.parametrize("numbers", [[128], [10**8], [10**30], range(2, 1_000)], ids=repr)
    def test_more_blocks_than_any_model(self, tmp_path, numbers):
        state = fine_tuned().state_dict() | {f"blocks.{number}.norm1.weight": torch.ones(32) for number in numbers}
        assert "blocks." in refused(write(tmp_path / "w.pth", state))


FOUR_BITS = getattr(torch, "float4_e2m1fn_x2", torch.int8)  # since 2.8


def nested(value: Any, **kwargs: Any) -> Any:
    return torch.nested.nested_tensor([value.flatten()[:3], value.flatten()[:2]], **kwargs)


class TestTensors:
    @pytest.mark.parametrize("name", ["head.weight", "pos_embed"])
    @pytest.mark.parametrize(
        "convert",
        [
            pytest.param(lambda value: value.to("meta"), id="meta"),
            pytest.param(lambda value: value.to_sparse(), id="sparse"),
            pytest.param(lambda value: value.reshape(-1, 1).to_sparse_csr(), id="compressed"),
            pytest.param(nested, id="nested"),
            pytest.param(lambda value: nested(value, layout=torch.jagged), id="jagged"),
            pytest.param(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), id="quantised"),
            pytest.param(lambda value: value.to(torch.complex64), id="complex"),
            pytest.param(lambda value: value.int(), id="integer"),
            pytest.param(lambda value: value.new_zeros(8, dtype=torch.uint8).view(FOUR_BITS), id="four bits"),
        ],
    )
    def test_of_plain_numbers_alone(self, tmp_path, name, convert):
        message = refused(write(tmp_path / "w.pth", STORED | {name: convert(STORED[name].detach())}))
        assert name in message
        assert re.search("expected|can't convert to float32", message)

    @pytest.mark.parametrize("name", sorted({re.sub("blocks.0", "blocks.1", name) for name in STORED}))
    def test_finite_numbers_alone(self, tmp_path, name):
        for file, wrong in (("w.pth", float("nan")), ("w.safetensors", -float("inf"))):
            value = STORED[name].detach().clone()
            value.view(-1)[-1] = wrong
            message = refused(write(tmp_path / file, STORED | {name: value}))
            assert message.startswith(f"{name} holds NaN or infinite")

    def test_the_first_that_is_not_finite_is_named(self, tmp_path):
        state = STORED | {name: STORED[name] / 0 for name in ("head.weight", "blocks.0.norm1.weight")}
        assert refused(write(tmp_path / "w.pth", state)).startswith("blocks.0.norm1.weight")  # first in the file

    @pytest.mark.parametrize("name", ["decoder.head.bias", "mask_token", "encoder_to_decoder.weight"])
    def test_a_decoder_that_is_not_finite(self, tmp_path, name):
        path = write(tmp_path / "w.pth", DECODING | {name: DECODING[name] * float("nan")})
        assert refused(path, **PIXELS).startswith(name)
        assert not refused(path)  # the encoder has nothing of it

    def test_class_token_and_key_bias(self, tmp_path):
        token = fine_tuned("mvd", use_cls_token=True).state_dict()
        assert refused(write(tmp_path / "w.pth", token | {"cls_token": torch.full((1, 1, 32), float("nan"))}))
        biases = {f"blocks.{block}.attn.qkv.bias": torch.cat([torch.ones(32), torch.ones(64) / 0]) for block in (0, 1)}
        state = fine_tuned("videomaev2", qkv_bias=False).state_dict() | biases
        assert "blocks.0.attn.qkv.bias" in refused(write(tmp_path / "w.pth", state))

    def test_what_float32_cannot_hold(self, tmp_path):
        large = {"blocks.0.norm1.weight": torch.full((32,), 1e300, dtype=torch.float64)}
        assert "blocks.0.norm1.weight" in refused(write(tmp_path / "w.pth", STORED | large))
        product = {"blocks.0.gamma_1": torch.full((32,), 1e30), "blocks.0.attn.proj.weight": torch.full((32, 32), 1e30)}
        assert "blocks.0.attn.proj.weight" in refused(write(tmp_path / "w.pth", STORED | product))


class TestKeysAndShapes:
    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            et.load_videomae(tmp_path / "nowhere.pth")

    @pytest.mark.parametrize("build", [fine_tuned, pre_trained])
    def test_cosine_attention(self, tmp_path, build):
        path = write(tmp_path / "w.pth", build("videomaev2", cos_attn=True))
        assert re.search(r"attn\.scale.*cosine", refused(path, **PIXELS))

    @pytest.mark.parametrize(("pretraining", "labels"), [(False, None), (False, 7), (True, None)])
    def test_every_key_is_needed(self, tmp_path, pretraining, labels):
        state, unnamed = DECODING if pretraining else fine_tuned(init_values=0.1).state_dict(), {}
        for name in itertools.filterfalse(ENOUGH.search, state):
            path = write(tmp_path / "w.pth", {other: value for other, value in state.items() if other != name})
            message = refused(path, for_pretraining=pretraining, num_labels=labels, num_heads=(2, 3))
            if labels and name.startswith("head.") and not message:  # not needed then
                continue
            if last(name) not in message and name.rpartition(".")[0] + "." not in message:
                unnamed[name] = message or "loaded"
        assert not unnamed

    def test_all_missing_keys_are_listed(self, tmp_path):
        state = fine_tuned(depth=4).state_dict()
        gone = ["blocks.1.attn.proj.bias", "blocks.2.norm1.weight", "blocks.0.mlp.fc2.bias"]
        message = refused(write(tmp_path / "w.pth", {n: v for n, v in state.items() if n not in gone}))
        assert all(name in message for name in gone), message
        whole = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
        assert "blocks.1." in refused(write(tmp_path / "w.pth", whole))

    @pytest.mark.parametrize("pretraining", [False, True])
    @pytest.mark.parametrize("change", ["shorter", "longer", "deeper", "flat", "scalar", "one"])
    def test_every_shape_counts(self, tmp_path, pretraining, change):
        state = DECODING if pretraining else fine_tuned(init_values=0.1).state_dict()
        distort = {
            "shorter": lambda value: value[:-1],
            "longer": lambda value: torch.cat([value, value[:1]]),
            "deeper": lambda value: value[None],
            "flat": lambda value: value.flatten(),
            "scalar": lambda value: value.sum(),
            "one": lambda value: value.flatten()[:1],  # which broadcasts
        }[change]
        unsaid = {}
        for name in itertools.filterfalse(ENOUGH.search, state):
            wrong = distort(state[name]).clone()
            if wrong.shape == state[name].shape or not wrong.numel():  # flat already; the mask token has one row
                continue
            message = refused(
                write(tmp_path / "w.pth", state | {name: wrong}), **PIXELS | {"for_pretraining": pretraining}
            )
            if not re.search(r"[(\[]\d+(, \d+)*,?[)\]]|\(\)|width \d+", message):
                unsaid[name] = message or "loaded"
        assert not unsaid

    @pytest.mark.parametrize(
        "added",
        [
            "extra.weight",
            "blocks.0.attn.k_bias",
            "blocks.0.adapter.weight",
            "pos_embedding",
            "norm.gamma_1",
            "classifier.weight",
            "videomae.layernorm.weight",
            "blocks.0.attn.query.weight",
            "blocks.00.norm1.bias",
            "blocks.0.attn.qkv.bias",
            "encoder.norm.weight",
            "blocks.0.mlp.gamma_1",
        ],
    )
    def test_keys_that_nothing_uses(self, tmp_path, added):
        """Names of transformers' own among them, and biases that are there twice."""
        for prefix in ("", "backbone."):
            state = {prefix + name: value for name, value in fine_tuned().state_dict().items()}
            more = {prefix + added: torch.ones(96 if "qkv" in added else 32)}
            assert last(added) in refused(write(tmp_path / "w.pth", state | more))

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("encoder.cls_token", (1, 1, 32)), ("pos_embed", (1, 36, 24)), ("encoder.fc_norm.bias", (32,))],
    )
    def test_no_pixel_decoder_goes_with_these(self, tmp_path, name, shape):
        """A class token, a stored table of the decoder's own: what would be dropped, or what no forward could run."""
        message = refused(write(tmp_path / "w.pth", DECODING | {name: torch.randn(shape)}), **PIXELS)
        assert name.removeprefix("encoder.") in message

    def test_query_biases_in_one_half_alone(self, tmp_path):
        """transformers has one setting for both."""
        for half in ("encoder", "decoder"):
            state = {n: v for n, v in DECODING.items() if not re.search("[qv]_bias", n) or n.startswith(half)}
            assert "_bias" in refused(write(tmp_path / "w.pth", state), **PIXELS)

    @pytest.mark.parametrize("rows", [20, 97])
    def test_a_decoder_of_other_things_than_pixels(self, tmp_path, rows):
        other = {"decoder.head.weight": torch.randn(rows, 24), "decoder.head.bias": torch.randn(rows)}
        assert "decoder.head" in refused(write(tmp_path / "w.pth", DECODING | other), **PIXELS)

    def test_mvds_files_have_no_pixel_decoder(self, tmp_path):
        assert "mvd" in refused(write(tmp_path / "w.pth", DECODING), **PIXELS, family="mvd")
        path = write(tmp_path / "w.pth", randomize(MMEPreTrainingModel(**SMALL)))
        assert "mme" in refused(path, family="mvd", num_labels=3)

    @pytest.mark.parametrize("name", [*itertools.filterfalse(ENOUGH.search, fine_tuned().state_dict())])
    def test_a_key_without_the_prefix_of_the_others(self, tmp_path, name):
        reference = fine_tuned()
        state = {key if key == name else f"encoder.{key}": value for key, value in reference.state_dict().items()}
        path = write(tmp_path / "w.pth", state)
        for more in ({"num_labels": 7}, {}):  # a fresh head must not hide what is missing
            message = refused(path, **more)
            assert message or name.startswith(("head.", "fc_norm."))  # these may lie outside an encoder
        if not message:
            assert_classifies(et.load_videomae(path, **SIZES), reference)


WEIGHTS = [{}, None, 3, {"patch_embed.proj.weight": 3}, {"head.weight": torch.zeros(5, 32)}, {1: torch.zeros(3)}]
WEIGHTS += [{"two\nlines": torch.zeros(3)}, {"a" * 10**6: 1}]
OTHERS = [{}, {"module": {}, "epoch": 3}, {"epoch": 3}, {"two\nlines": torch.tensor(1)}, {1: torch.zeros(3)}]
OTHERS += [[], [torch.zeros(3)], None, 3, "text", torch.zeros(3), (1, 2)]
CONTENTS = [{"model": weights} for weights in WEIGHTS] + OTHERS


class TestContents:
    @pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content)[:40])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_what_is_no_checkpoint(self, tmp_path, content, zipped):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert 0 < len(refused(tmp_path / "w.pth")) < 500

    @pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"not a checkpoint\n" * 100, b"\x80\x02.", b"\x80"])
    @pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.SAFETENSORS"])
    def test_what_is_no_file_of_tensors(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name)
        save = (tmp_path / "empty.safetensors", struct.pack("<Q", 2) + b"{}")
        save[0].write_bytes(save[1])
        assert refused(save[0])

    def test_a_reader_that_explains_itself_in_many_lines(self, tmp_path, monkeypatch):
        def load(*args: Any, **kwargs: Any) -> None:
            raise TypeError("set_() received an invalid combination of arguments:\n * (Tensor source)\n")

        monkeypatch.setattr(torch, "load", load)
        assert "invalid combination" in refused(write(tmp_path / "w.pth", {}))


PLACES = {
    "top level": lambda content, payload: payload,
    "beside the weights": lambda content, payload: content | {"rng": payload},
    "in the place of the arguments": lambda content, payload: content | {"args": payload},
    "in the arguments": lambda content, payload: content | {"args": Namespace(model="vit", lr=payload)},
    "in the weights": lambda content, payload: content | {"model": content["model"] | {"head.weight": payload}},
    "as the weights": lambda content, payload: content | {"model": payload},
    "in the optimizer": lambda content, payload: content | {"optimizer": {"state": [payload]}},
    "as a key": lambda content, payload: content | {payload: 1},
}


class TestPickles:
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
    def test_a_payload_never_runs(self, tmp_path, place, how):
        marker, path = tmp_path / "ran", tmp_path / "w.pth"
        payload = Call(os.system, f'echo > "{marker}"')
        content = PLACES[place]({"model": dict(fine_tuned(depth=1).state_dict())}, payload)
        if how == "plain pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
        message = refused(path)
        assert not marker.exists()
        assert message
        if how != "plain pickle":  # the payload would run: the file is as dangerous as it should be
            assert re.search(rf"\b{os.system.__module__}\.system\b", message), message
            assert re.search(r"safetensors|torch\.save|state_dict", message), message  # how to convert
            torch.load(path, weights_only=False)
            assert marker.exists()

    def test_a_directory_that_readers_find_in_two_places(self, tmp_path):
        """zipfile looks right before the archive's end, torch where the end says: there was another pickle there."""
        good, evil = write(tmp_path / "good.pth", fine_tuned()), tmp_path / "evil.pth"
        torch.save({"model": Call(bytearray, 1 << 30)}, evil)
        evil.write_bytes(evil.read_bytes() + good.read_bytes())
        assert zipfile.ZipFile(evil).namelist() == zipfile.ZipFile(good).namelist()
        assert "directory" in refused(evil)
        for place in (-34, -26 - 56, -1):  # where the locator, the 64-bit end and a comment are said to be
            content = bytearray(good.read_bytes())
            content[place] ^= 1
            evil.write_bytes(content)
            assert refused(evil)
        assert not refused(rezipped(good))  # a directory of 32 bits

    def test_a_whole_module_is_named(self, tmp_path):
        torch.save(fine_tuned(), tmp_path / "w.pth")
        assert "FineTuningModel" in refused(tmp_path / "w.pth")

    def test_what_training_scripts_write_needs_no_trust(self, tmp_path):
        model = fine_tuned()
        optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], betas=(0.9, 0.95))
        model(torch.zeros(1, 3, 8, 24, 24)).sum().backward()
        optimizer.step()
        nested = Namespace(a=[1, None, True], device=torch.device("cpu"), dtype=torch.bfloat16, names={"a", "b"})
        args = Namespace(
            model="vit_base_patch16_224", nested=nested, lr=0.1, names=("a", {"b": 2}), shape=torch.Size([2])
        )
        content = {"model": OrderedDict(model.state_dict()), "optimizer": optimizer.state_dict(), "args": args}
        content |= {"scheduler": {"milestones": Counter([3, 3, 5])}, "ema": dict(model.half().named_parameters())}
        before = set(torch.serialization.get_safe_globals())
        for zipped in (True, False):
            torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
            assert not refused(tmp_path / "w.pth")
        assert set(torch.serialization.get_safe_globals()) == before  # the allowance for arguments ends with the load


def rezipped(path: Any, change: Any = bytes, how: int = zipfile.ZIP_STORED, name: Any = str) -> Any:
    """A `torch.save` file with its pickle changed, its records compressed or renamed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for record, content in records.items():
            archive.writestr(name(record), change(content) if record.endswith("data.pkl") else content)
    return path


def with_key(key: bytes) -> Any:
    """Puts {key: None} into the place of {}, the first of a pickle."""
    return lambda content: content.replace(b"}", b"}" + key + b"Ns", 1)


def bomb(name: str, path: Any) -> None:
    """A small file that asks for more than a gigabyte or for years."""
    state = dict(fine_tuned().state_dict())
    row, zipped = torch.zeros(1), "legacy" not in name
    build = torch._utils._rebuild_device_tensor_from_cpu_tensor
    values: dict[str, Any] = {
        "bytes": Call(bytearray, 3 << 30),
        "tensor": Call(torch.Tensor, 1 << 15, 1 << 15),
        "copy": Call(build, row.expand(3 << 28), torch.float64, "cpu", False),
        "sparse": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), row, (1 << 40,)),
    }
    kind = name.removesuffix(" legacy").removesuffix(" capitals")
    if kind in values:
        state["head.weight"] = values[kind]
    elif kind == "expanded":
        state["head.weight"], state["head.bias"] = row.expand(1 << 25, 32), row.expand(1 << 25)
    elif kind == "shared":  # each of the blocks whole, all of them in one place
        block = {key: value for key, value in state.items() if key.startswith("blocks.0.")}
        state |= {key.replace(".0.", f".{n}.", 1): value for n in range(100) for key, value in block.items()}
    elif kind == "compressed":
        state["head.weight"] = torch.zeros(1 << 20, 32)  # 134 MB
    torch.save({"args": {}, "model": state}, path, _use_new_zipfile_serialization=zipped)
    if kind == "compressed":
        rezipped(path, how=zipfile.ZIP_DEFLATED)
    if "capitals" in name:  # torch finds the record nevertheless
        rezipped(path, name=str.upper)
    if kind == "wide key":  # t = (t, t), sixty times
        doubled = (b"r%bj%b\x86" % (struct.pack("<I", n), struct.pack("<I", n)) for n in range(10**6, 10**6 + 60))
        rezipped(path, with_key(b"N" + b"".join(doubled)))
    if kind == "deep key":
        rezipped(path, with_key(b")" + b"\x85" * 200_000))
    if kind == "declared":  # a storage a million times as long as it is
        content = path.read_bytes()
        assert b"cpuq\x08M\x00\x04" in content or b"M\x00\x04" in content
        path.write_bytes(content.replace(b"M\x00\x04", b"J\x00\x00\x00\x40"))


class TestSmallFilesThatAskForMuch:
    @pytest.mark.parametrize(
        "name",
        [
            *("bytes", "tensor", "copy", "sparse", "expanded", "shared", "compressed", "wide key", "deep key"),
            *("bytes legacy", "tensor legacy", "copy legacy", "expanded legacy", "shared legacy", "declared legacy"),
            "bytes capitals",
        ],
    )
    def test_refused_in_time_and_memory(self, tmp_path, name):
        path = tmp_path / "w.pth"
        bomb(name, path)
        said, grown = in_a_child(path)
        assert said
        assert not re.match(r"\w*Error|TooLong|killed", said), said
        assert grown <= 2 * path.stat().st_size + SLACK

    @pytest.mark.parametrize(("suffix", "dtype"), [(".pth", torch.float64), (".safetensors", torch.float32)])
    def test_a_good_file_takes_twice_its_size(self, tmp_path, suffix, dtype):
        with torch.device("meta"):
            shapes = FineTuningModel(**SMALL | {"embed_dim": 1024, "depth": 3, "mlp_ratio": 4.0}).state_dict()
        state = {name: torch.ones(value.shape, dtype=dtype) for name, value in shapes.items()}  # 150 or 300 MB
        path = write(tmp_path / f"w{suffix}", state)
        del state
        said, grown = in_a_child(path, seconds=20)
        assert not said
        assert grown <= 2 * path.stat().st_size + SLACK


TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "num_frames": 4, "embed_dim": 8, "depth": 1, "num_classes": 3}
TINY_SIZES = {"num_heads": 2, "num_frames": 4, "image_size": 8}
KINDS = ["zip", "legacy", "safetensors"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """kind → (bytes of a good file, path to write a broken one to)."""
    folder = tmp_path_factory.mktemp("broken")
    files = {}
    for kind in KINDS:
        path = folder / ("w.safetensors" if kind == "safetensors" else f"{kind}.pth")
        write(path, fine_tuned(**TINY), zipped=kind == "zip")
        assert not refused(path, **TINY_SIZES)
        files[kind] = path.read_bytes(), path
    return lambda kind: files[kind]  # so that hypothesis prints no bytes


def assert_refused_or_whole(path: Any) -> None:
    if not refused(path, **TINY_SIZES):
        model = et.load_videomae(path, **TINY_SIZES)
        assert model.classifier.weight.shape == (3, 8)
        assert model.videomae.encoder.layer[0].output.dense.weight.shape == (8, 16)
        with torch.no_grad():
            assert model(torch.zeros(1, 4, 3, 8, 8)).logits.shape == (1, 3)


NAMED = [
    "posix.system",
    "builtins.eval",
    "builtins.getattr",
    "builtins.bytearray",
    "os.mkdir",
    "torch.load",
    "torch.Size",
    "torch.bool",
    "torch.FloatStorage",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage.UntypedStorage",
    "argparse.Namespace",
    "collections.OrderedDict",
    "collections.Counter",
    "__builtin__.set",
]
FRAGMENTS = st.one_of(
    st.sampled_from([bytes([code]) for code in b"()]}t\x85\x86RbsuaeQN.\x81\x93oi021\x8f\x94"]),  # some not torch's
    st.builds(lambda op, n: op + bytes([n]), st.sampled_from([b"h", b"q", b"K"]), st.integers(0, 60)),
    st.integers(-(2**31), 2**31 - 1).map(lambda n: b"J" + struct.pack("<i", n)),
    st.integers(0, 2**32 - 1).map(lambda n: b"X" + struct.pack("<I", n) + b"head"),  # text longer than the file
    st.sampled_from(NAMED).map(lambda name: b"c%b\n%b\n" % tuple(part.encode() for part in name.rsplit(".", 1))),
)


class TestFuzzed:
    @pytest.mark.parametrize("kind", KINDS)
    @given(data=st.data())
    def test_truncated_at_any_byte(self, broken, kind, data):
        good, path = broken(kind)
        path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        assert refused(path, **TINY_SIZES)

    @pytest.mark.parametrize("kind", KINDS)
    @given(data=st.data())
    def test_any_bytes_changed(self, broken, kind, data):
        good, path = broken(kind)
        # Half of the changes where a file says what it holds: that is at its beginning and at its end.
        edge = min(1500, len(good) // 2)
        ends = st.one_of(st.integers(0, edge - 1), st.integers(len(good) - edge, len(good) - 1))
        changed = bytearray(good)
        places = st.tuples(st.one_of(ends, st.integers(0, len(good) - 1)), st.integers(1, 255))
        for position, bits in data.draw(st.lists(places, min_size=1, max_size=3)):
            changed[position] ^= bits
        path.write_bytes(changed)
        assert_refused_or_whole(path)

    @pytest.mark.parametrize("kind", KINDS)
    @given(st.binary(max_size=400), st.integers(0, 400))
    def test_any_beginning(self, broken, kind, beginning, cut):
        good, path = broken(kind)
        path.write_bytes(beginning + good[cut:])
        assert_refused_or_whole(path)

    @settings(max_examples=150)
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.lists(FRAGMENTS, max_size=6)), min_size=1, max_size=3))
    def test_odd_pickles(self, broken, changes):
        """Opcodes put anywhere between those of a good file."""
        good, path = broken("zip")
        path.write_bytes(good)

        def spliced(content: bytes) -> bytes:
            edges = [position for *_, position in pickletools.genops(content)]
            for place, fragments in sorted(changes, reverse=True, key=lambda change: change[0] % len(edges)):
                at = edges[place % len(edges)]
                content = content[:at] + b"".join(fragments) + content[at:]
            return content

        before = set(path.parent.iterdir())
        assert_refused_or_whole(rezipped(path, spliced))
        assert set(path.parent.iterdir()) == before

    def test_fuzzed_files_stay_small(self, broken):
        """Memory over a run of broken files of each kind, in one child."""
        for kind in KINDS:
            good, path = broken(kind)
            for cut in range(7):
                path.write_bytes(good[: len(good) * cut // 7] + bytes(40) + good[len(good) * cut // 7 :])
                said, grown = in_a_child(path, **TINY_SIZES)
                assert not re.match(r"\w*Error|TooLong|killed", said), said
                assert grown <= 2 * len(good) + SLACK


VALUES = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.lists(st.floats(), max_size=2),
    st.just({}),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.lists(st.integers(0, 4), max_size=6),
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]),
    ),
    st.sampled_from([torch.ones(3).to_sparse(), torch.ones(8, 8).to("meta"), torch.ones(8, requires_grad=True)]),
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "cls_token",
            "pos_embed",
            "norm.weight",
            "mask_token",
            "mask_token_img",
            "encoder.blocks.0.norm1.weight",
            "blocks.1.norm1.weight",
            "blocks.x.norm1.weight",
            "blocks.0.attn.qkv.bias",
            "blocks.0.gamma_1",
            "blocks.",
            "decoder.blocks.0.norm1.weight",
            "head",
            ".",
            "decoder.head.weight",
            "model",
            "module",
            "args",
            "blocks.99999999999.norm1.weight",
            "encoder_to_decoder.weight",
            "blocks.-1.norm1.weight",
        ]
    ),
    st.text(max_size=12),
)


class TestFuzzedDictionaries:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    @pytest.mark.parametrize("pretraining", [False, True])
    def test_any_key_dropped_added_or_replaced(self, tmp_path, pretraining, data):
        tiny = {key: value for key, value in TINY.items() if key != "num_classes"}
        reference = pre_trained(**tiny, decoder_num_heads=2, decoder_dim=4) if pretraining else fine_tuned(**TINY)
        state: dict[Any, Any] = dict(reference.state_dict())
        names = st.sampled_from(sorted(state))
        change = data.draw(st.sampled_from(["drop", "add", "replace", "reshape", "prefix"]))
        if change == "drop":
            for name in data.draw(st.sets(names, min_size=1)):
                del state[name]
        elif change == "add":
            state |= data.draw(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
        elif change == "replace":
            state |= data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
        elif change == "prefix":  # on some keys alone
            prefix = data.draw(st.sampled_from(["encoder.", "module.", "backbone.", "decoder.", "x."]))
            for name in data.draw(st.sets(names, min_size=1)):
                state[prefix + name] = state.pop(name)
        else:
            name = data.draw(names)
            shape = data.draw(st.permutations(state[name].shape))
            state[name] = state[name].reshape(data.draw(st.sampled_from([(-1,), (1, *shape), tuple(shape)])))
        torch.save({"model": state}, tmp_path / "w.pth")
        refused(tmp_path / "w.pth", **TINY_SIZES, for_pretraining=pretraining)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.recursive(
            st.one_of(VALUES, st.just(Namespace(model=3))),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.one_of(NAMES, st.integers()), inner, max_size=3),
                st.builds(lambda args: {"model": {}, "args": args}, inner),
            ),
            max_leaves=6,
        )
    )
    def test_any_content(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        assert refused(tmp_path / "w.pth")
