"""checkpoints.py: the VideoMAE family's files as transformers models, against reference modules that wrote the files.

The numbers that count are the reference modules' own outputs; nothing here is compared with what the library computes.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from family_models import (
    FineTuningModel,
    MMEPreTrainingModel,
    MVDPreTrainingModel,
    PreTrainingModel,
    mvd_table,
    randomize,
    sinusoid_table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et

pytestmark = [
    pytest.mark.filterwarnings("ignore:use_mean_pooling"),  # of a few files, which their reference reads as well
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),  # of files that are broken on purpose
    pytest.mark.filterwarnings("ignore:Validating sparse"),
]

# 4 × 3 × 3 tokens: as many rows as columns (these files know no others), but not as many steps.
SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "num_frames": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIZES: dict[str, Any] = {"num_heads": 2, "num_frames": 8, "image_size": 24}  # what a file of SMALL doesn't say itself
MVD_ARGS = Namespace(model="vit_base_patch16_224", remove_pos_emb=False, lr=5e-4)
LOGGER = "everest_tokens.checkpoints"


def fine_tuned(family: str = "videomae", **options: Any) -> FineTuningModel:
    return randomize(FineTuningModel(family, **(SMALL | options)))


def pre_trained(family: str = "videomae", **options: Any) -> PreTrainingModel:
    decoder = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 3}  # nothing as in the encoder
    return randomize(PreTrainingModel(family, **(SMALL | decoder | options)))


def write(
    path: Any, state: dict[str, Any], *, key: str | None = "model", prefix: str = "", args: Any = None, zipped=True
) -> Any:
    """A checkpoint file as the repositories' training scripts write it; `key` None is a bare state dict."""
    weights = OrderedDict((prefix + name, value) for name, value in state.items())
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        return path
    content: Any = weights
    if key is not None:
        args = args or Namespace(model="vit_base_patch16_224", lr=5e-4, betas=[0.9, 0.999], output_dir="out")
        content = {key: weights, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 99}
        content |= {"scaler": {"scale": 65536.0}, "args": args}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def clips_for(reference: nn.Module, batch: int = 2, seed: int = 1) -> Tensor:
    """(B, C, T, H, W), as the reference modules take it; transformers takes `.transpose(1, 2)`."""
    patches = getattr(reference, "encoder", reference).patch_embed
    frames = (
        patches.num_patches * patches.tubelet_size // math.prod(n // patches.patch_size[0] for n in (patches.img_size))
    )
    shape = (batch, patches.proj.in_channels, frames, *patches.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classify(model: VideoMAEForVideoClassification, clips: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(features, logits); the features are what the classifier is given."""
    seen: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(clips.transpose(1, 2), **kwargs).logits
    hook.remove()
    return seen[0], logits


@torch.no_grad()
def expected_classes(reference: FineTuningModel, clips: Tensor) -> tuple[Tensor, Tensor]:
    return reference.forward_features(clips), reference(clips)


@torch.no_grad()
def expected_pixels(reference: PreTrainingModel, clips: Tensor, hidden: Tensor) -> Tensor:
    predicted = reference(clips, hidden)
    return predicted[0] if isinstance(predicted, tuple) else predicted


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest number expected."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_close(*pair, tolerance)
        return
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    largest = expected.abs().max().item()
    assert largest > 0
    assert (actual - expected).abs().max().item() <= tolerance * largest


def random_mask(clips: int, tokens: int, hidden: int) -> Tensor:
    """(B, N) bool, True = hidden, different in every clip."""
    rank = torch.rand(clips, tokens, generator=torch.Generator().manual_seed(3)).argsort(1).argsort(1)
    return rank < hidden


def through_a_folder(model: Any, folder: Any) -> Any:
    """Saved, and loaded by transformers alone."""
    cls = VideoMAEForPreTraining if isinstance(model, VideoMAEForPreTraining) else VideoMAEForVideoClassification
    model.save_pretrained(folder)
    loaded, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, nothing left over
    return loaded.eval()


def assert_replays(model: Any, reference: PreTrainingModel, clips: Tensor) -> None:
    """A model patched with VideoMAE's own masking predicts the reference's pixels."""
    et.patch_videomae(model, et.RandomSelector(1.0), visible=et.TubeSelector(0.25))
    pixels = clips.transpose(1, 2)
    selection = et.select_tokens(model, pixels)
    hidden = torch.ones(selection.visible.shape[0], 36, dtype=torch.bool).scatter(1, selection.visible, False)
    assert hidden.sum(1).tolist() == [24] * len(hidden)  # a quarter of 9 places is seen: ⌈2.25⌉ in each of 4 steps
    with torch.no_grad():
        actual = model(pixels, token_selection=selection).logits
    assert_close(actual, expected_pixels(reference, clips, hidden))


def assert_same_weights(actual: nn.Module, expected: nn.Module, but: str = "") -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    differing = {name for name in expected if not torch.equal(actual[name], expected[name])}
    assert not {name for name in differing if not (but and name.startswith(but))}
    assert bool(differing) == bool(but)


CLASSIFIERS = [
    pytest.param("videomae", {}, id="videomae"),
    pytest.param("videomaev2", {}, id="videomaev2"),
    pytest.param("mme", {}, id="mme"),
    pytest.param("mvd", {}, id="mvd"),
    pytest.param("everest", {}, id="everest"),
    pytest.param("mvd", {"use_cls_token": True}, id="mvd-class-token"),
    pytest.param("mvd", {"use_cls_token": True, "use_mean_pooling": False}, id="mvd-class-token-pooled"),
    pytest.param("mvd", {"use_mean_pooling": False}, id="mvd-first-token"),
    pytest.param("videomae", {"use_mean_pooling": False}, id="first-token"),
    pytest.param("videomae", {"use_learnable_pos_emb": True}, id="learned-positions"),
    pytest.param("mvd", {"use_learnable_pos_emb": True, "use_cls_token": True}, id="mvd-learned-and-class-token"),
    pytest.param("videomaev2", {"init_values": 0.1}, id="layer-scale"),
    pytest.param("videomaev2", {"qkv_bias": False}, id="no-qkv-bias"),
    pytest.param("videomaev2", {"patch_size": 14, "img_size": 28, "mlp_ratio": 48 / 11}, id="giant"),
    pytest.param("everest", {"tubelet_size": 4, "in_chans": 1}, id="grey-in-fours"),
]


class TestFineTuned:
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize(("family", "options"), CLASSIFIERS)
    def test_numbers_of_the_reference(self, tmp_path, family, options, suffix):
        reference = fine_tuned(family, **options)
        path = write(tmp_path / f"weights{suffix}", reference.state_dict())
        sizes = SIZES | {"image_size": reference.patch_embed.img_size[0]}
        model = et.load_videomae(path, family=family, **sizes)
        assert isinstance(model, VideoMAEForVideoClassification)
        assert not model.training
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
        clips = clips_for(reference)
        expected = expected_classes(reference, clips)
        assert_close(classify(model, clips), expected)

        patched = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(1.0))
        assert_close(classify(patched, clips), expected)

    @pytest.mark.parametrize(("family", "options"), CLASSIFIERS[3:6] + CLASSIFIERS[9:10])
    def test_patching_copying_and_saving_in_any_order(self, tmp_path, family, options):
        reference = fine_tuned(family, **options)
        clips = clips_for(reference)
        expected = expected_classes(reference, clips)
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), family=family, **SIZES)
        assert_close(classify(copy.deepcopy(model), clips), expected)
        assert_close(classify(pickle.loads(pickle.dumps(model)), clips), expected)
        assert_close(classify(copy.deepcopy(model).double(), clips.double()), tuple(n.double() for n in expected), 1e-5)
        patched = et.patch_videomae(model, et.ReRoSelector(1.0))
        assert_close(classify(patched, clips), expected)
        assert_close(classify(copy.deepcopy(patched), clips), expected)
        again = et.patch_videomae(through_a_folder(patched, tmp_path / "patched"))
        assert again.everest.selector.keep_ratio == 1.0  # as recorded
        assert_close(classify(again, clips), expected)
        third = et.patch_videomae(through_a_folder(again, tmp_path / "again"))
        assert_close(classify(third, clips), expected)
        assert_close(classify(et.unpatch_videomae(patched), clips), expected)
        fourth = et.patch_videomae(through_a_folder(patched, tmp_path / "unpatched"), et.ReRoSelector(1.0))
        assert_close(classify(fourth, clips), expected)

    @pytest.mark.parametrize("learned", [False, True])
    def test_a_plain_folder_saved_anew_is_right_or_refused(self, tmp_path, learned):
        """transformers drops what it has no place for: then patching must not go on with other numbers."""
        reference = fine_tuned("mvd", use_learnable_pos_emb=learned, use_cls_token=True)
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), **SIZES)
        plain = through_a_folder(model, tmp_path / "first")
        plain.save_pretrained(tmp_path / "second")
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "second").eval()
        try:
            patched = et.patch_videomae(again, et.ReRoSelector(1.0))
        except ValueError as error:
            refusal = str(error)
        else:
            clips, refusal = clips_for(reference), "everest.safetensors"
            assert_close(classify(patched, clips), expected_classes(reference, clips))
        assert "everest.safetensors" in refusal

    def test_the_class_token_is_trained_and_saved(self, tmp_path):
        reference = fine_tuned("mvd", use_cls_token=True)
        clips, labels = clips_for(reference), torch.tensor([1, 4])
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), **SIZES)
        known = {name for name, _ in VideoMAEForVideoClassification(model.config).named_parameters()}
        (token,) = (p for name, p in model.named_parameters() if name not in known)
        nn.functional.cross_entropy(reference(clips), labels).backward()
        model(clips.transpose(1, 2), labels=labels).loss.backward()
        assert_close(token.grad, reference.cls_token.grad, 1e-4)
        with torch.no_grad():
            token += 1
            reference.cls_token += 1
        expected = expected_classes(reference, clips)
        assert_close(classify(model, clips), expected)
        reloaded = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(1.0))
        assert_close(classify(reloaded, clips), expected)

    @pytest.mark.parametrize(("family", "learned"), [("mvd", False), ("videomae", True)])
    def test_the_backbone_alone_from_a_folder(self, tmp_path, family, learned):
        reference, tokens = fine_tuned(family, use_learnable_pos_emb=learned), []
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), family=family, **SIZES)
        model.save_pretrained(tmp_path / "folder")
        backbone = VideoMAEModel.from_pretrained(tmp_path / "folder").eval()
        et.patch_videomae(backbone, et.ReRoSelector(1.0))
        clips = clips_for(reference)
        reference.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
        with torch.no_grad():
            reference(clips)
            assert_close(backbone(clips.transpose(1, 2)).last_hidden_state, tokens[0])

    def test_defaults_of_patching_stand(self, tmp_path):
        path = write(tmp_path / "w.pth", fine_tuned().state_dict())
        model = et.load_videomae(path, **SIZES)
        assert et.patch_videomae(copy.deepcopy(model)).everest.selector.keep_ratio == 0.6
        folder = through_a_folder(model, tmp_path / "folder")
        assert et.patch_videomae(folder).everest.selector.keep_ratio == 0.6

    @pytest.mark.parametrize(("family", "options"), [("mvd", {}), ("mvd", {"use_cls_token": True}), ("videomae", {})])
    def test_kept_tokens_keep_their_positions(self, tmp_path, family, options):
        reference = fine_tuned(family, **options)
        clips = clips_for(reference)
        path = write(tmp_path / "w.pth", reference.state_dict())
        model = et.load_videomae(path, family=family, **SIZES)
        patched = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(0.5))
        selection = et.select_tokens(patched, clips.transpose(1, 2))
        assert selection.visible.shape == (2, 18)
        with torch.no_grad():
            tokens = reference.patch_embed(clips) + reference.pos_embed
            features = reference.run_tokens(tokens[torch.arange(2)[:, None], selection.visible])
            expected = features, reference.run_head(features)
        assert_close(classify(patched, clips, token_selection=selection), expected)

    @pytest.mark.parametrize("reloaded", [False, True])
    @pytest.mark.parametrize("learned", [False, True])
    def test_eps_where_it_decides(self, tmp_path, learned, reloaded):
        """Variances around eps itself: 1e-5 or 1e-12 in the place of 1e-6 changes the features by 20 % and more."""
        reference = fine_tuned(use_learnable_pos_emb=learned)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.startswith(("pos_embed", "patch_embed")) or re.search(r"attn\.proj|mlp\.fc2", name):
                    parameter *= 0.003  # what is added to the tokens; the norms' outputs are as large as ever
            if not learned:  # the sinusoid has no tiny variance, but its mean can be taken out
                reference.patch_embed.proj.bias -= reference.pos_embed[0].mean(0)
        # The pooled tokens: the sums are small beside their terms, so in double precision.
        clips = clips_for(reference).double()
        path = write(tmp_path / "w.pth", reference.state_dict())
        model = et.load_videomae(path, **SIZES)
        if reloaded:
            model = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(1.0))
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
        expected = expected_classes(reference.double(), clips)
        assert_close(classify(model.double(), clips), expected, 1e-4)
        norms = [reference.fc_norm] + [m for m in reference.modules() if isinstance(m, nn.LayerNorm)]
        for norm in norms if learned else norms[:1]:
            for wrong in (1e-5, 1e-12):
                norm.eps = wrong
                change = (expected_classes(reference, clips)[0] - expected[0]).abs().max() / expected[0].abs().max()
                norm.eps = 1e-6
                assert change > 1e-3, "an eps that changes nothing proves nothing"

    def test_key_bias_and_query_bias_in_one(self, tmp_path):
        reference = fine_tuned()
        state = reference.state_dict()
        for block in ("blocks.0.attn.", "blocks.1.attn."):
            query, value = state.pop(block + "q_bias"), state.pop(block + "v_bias")
            state[block + "qkv.bias"] = torch.cat([query, torch.randn(32), value])  # softmax ignores a key's bias
        model = et.load_videomae(write(tmp_path / "w.pth", state), **SIZES)
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize("family", ["mme", None])
    def test_an_image_kernel_is_spread_over_the_tubelet(self, tmp_path, family):
        reference = fine_tuned("mme")
        kernel = reference.patch_embed.proj.weight
        with torch.no_grad():
            kernel.copy_(kernel[:, :, :1].expand_as(kernel))
        state = reference.state_dict() | {"patch_embed.proj.weight": kernel[:, :, 0].detach() * 2}  # over two frames
        model = et.load_videomae(write(tmp_path / "w.pth", state), family=family, **SIZES)
        assert model.config.tubelet_size == 2
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_other_precisions_become_float32(self, tmp_path, dtype, suffix):
        reference = fine_tuned(init_values=0.1, use_learnable_pos_emb=True).to(dtype)
        path = write(tmp_path / f"w{suffix}", reference.state_dict())
        model = et.load_videomae(path, **SIZES)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference.float(), clips))

    def test_float32_whatever_the_default(self, tmp_path):
        path = write(tmp_path / "w.pth", fine_tuned("mvd", use_cls_token=True).state_dict())
        torch.set_default_dtype(torch.float64)
        try:
            model = et.load_videomae(path, num_labels=7, **SIZES)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}

    def test_copies_save_their_own_weights(self, tmp_path):
        reference = fine_tuned("mvd", use_cls_token=True, use_learnable_pos_emb=True)
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), **SIZES)
        copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        clips = clips_for(reference)
        for name, twin in copies.items():
            reloaded = et.patch_videomae(through_a_folder(twin, tmp_path / name), et.ReRoSelector(1.0))
            assert_close(classify(reloaded, clips), expected_classes(reference, clips))

    def test_backbone_tokens(self, tmp_path):
        reference = fine_tuned()
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), **SIZES)
        clips, tokens = clips_for(reference), []
        reference.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
        with torch.no_grad():
            reference(clips)
            assert_close(model.videomae(clips.transpose(1, 2)).last_hidden_state, tokens[0])


class TestContainers:
    """Every place that the repositories keep weights at, and every prefix that wrappers leave on their keys."""

    @pytest.mark.parametrize("key", ["model", "module", None])
    @pytest.mark.parametrize(
        "prefix",
        ["", "encoder.", "backbone.", "encoder.model.", "encoder_q.encoder.model.", "module.", "_orig_mod."],
    )
    def test_classifier(self, tmp_path, key, prefix):
        reference = fine_tuned(use_learnable_pos_emb=True)
        path = write(tmp_path / "w.pth", reference.state_dict(), key=key, prefix=prefix)
        clips = clips_for(reference)
        model = et.load_videomae(path, **SIZES)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize("key", ["model", "module", None])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_pixel_decoder(self, tmp_path, key, prefix):
        reference = pre_trained()
        path = write(tmp_path / "w.pth", reference.state_dict(), key=key, prefix=prefix)
        model = et.load_videomae(path, for_pretraining=True, num_heads=(2, 3), num_frames=8, image_size=24)
        clips, hidden = clips_for(reference), random_mask(2, 36, 30)
        with torch.no_grad():
            actual = model(clips.transpose(1, 2), bool_masked_pos=hidden).logits
        assert_close(actual, expected_pixels(reference, clips, hidden))

    @pytest.mark.parametrize("kind", ["legacy", "parameters", "one storage", "safetensors", "str path"])
    def test_ways_of_writing_tensors(self, tmp_path, kind):
        reference = fine_tuned()
        state: dict[str, Any] = dict(reference.state_dict())
        if kind == "parameters":
            state = dict(reference.named_parameters())
        if kind == "one storage":
            flat = torch.cat([value.flatten() for value in state.values()])
            sizes = [value.numel() for value in state.values()]
            state = {
                name: part.view(value.shape)
                for (name, value), part in zip(state.items(), flat.split(sizes), strict=True)
            }
        path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
        write(path, state, zipped=kind != "legacy")
        model = et.load_videomae(str(path) if kind == "str path" else path, **SIZES)
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))


class TestPreTrained:
    @pytest.mark.parametrize("family", ["videomae", "videomaev2", "everest"])
    @pytest.mark.parametrize(
        "options", [{}, {"init_values": 0.1, "qkv_bias": False}, {"patch_size": 4, "img_size": 12, "tubelet_size": 2}]
    )
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_pixels_of_the_reference(self, tmp_path, family, options, suffix):
        reference = pre_trained(family, **options)
        path = write(tmp_path / f"w{suffix}", reference.state_dict())
        sizes = {"num_frames": 8, "image_size": options.get("img_size", 24), "num_heads": (2, 3)}
        model = et.load_videomae(path, family=family, for_pretraining=True, **sizes)
        assert isinstance(model, VideoMAEForPreTraining)
        assert not model.training
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
        clips, hidden = clips_for(reference), random_mask(2, 36, 30)
        with torch.no_grad():
            actual = model(clips.transpose(1, 2), bool_masked_pos=hidden)
            tokens = model.videomae(clips.transpose(1, 2), bool_masked_pos=hidden).last_hidden_state
            assert_close(tokens, reference.encoder(clips, hidden))
        assert_close(actual.logits, expected_pixels(reference, clips, hidden))

        reloaded = through_a_folder(model, tmp_path / "folder")
        assert_replays(reloaded, reference, clips)
        assert {m.eps for m in reloaded.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
        assert_replays(model, reference, clips)

    def test_stored_positions_of_the_encoder(self, tmp_path):
        reference = pre_trained()
        reference.encoder.pos_embed = torch.randn(1, 36, 32)
        path = write(tmp_path / "w.pth", reference.state_dict() | {"encoder.pos_embed": reference.encoder.pos_embed})
        model = et.load_videomae(path, for_pretraining=True, num_heads=(2, 3), num_frames=8, image_size=24)
        clips, hidden = clips_for(reference), random_mask(2, 36, 30)
        with torch.no_grad():
            actual = model(clips.transpose(1, 2), bool_masked_pos=hidden).logits
        assert_close(actual, expected_pixels(reference, clips, hidden))
        assert_replays(through_a_folder(model, tmp_path / "folder"), reference, clips)

    def test_eps_of_the_decoder(self, tmp_path):
        reference = pre_trained()
        path = write(tmp_path / "w.pth", reference.state_dict())
        model = et.load_videomae(path, for_pretraining=True, num_heads=(2, 3), num_frames=8, image_size=24)
        reloaded = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.RandomSelector(1.0)).double()
        pixels = clips_for(reference).double().transpose(1, 2)
        selection = et.select_tokens(reloaded, pixels)
        hidden = torch.ones(2, 36, dtype=torch.bool).scatter(1, selection.visible, False)
        expected = expected_pixels(reference.double(), pixels.transpose(1, 2), hidden)
        with torch.no_grad():
            loaded = model.double()(pixels, bool_masked_pos=hidden).logits
            patched = reloaded(pixels, token_selection=selection).logits
        reference.decoder.norm.eps = 1e-5
        wrong = (expected_pixels(reference, pixels.transpose(1, 2), hidden) - expected).abs().max()
        for actual in (loaded, patched):
            assert (actual - expected).abs().max() < wrong / 5

    @pytest.mark.parametrize(
        ("family", "build"),
        [
            ("videomae", pre_trained),
            ("videomaev2", lambda: pre_trained("videomaev2", init_values=0.1)),
            ("everest", lambda: pre_trained("everest")),
            ("mme", lambda: randomize(MMEPreTrainingModel(**SMALL))),
            ("mvd", lambda: randomize(MVDPreTrainingModel(**SMALL))),
            ("mvd", lambda: randomize(MVDPreTrainingModel(**SMALL, use_cls_token=True))),
        ],
        ids=["videomae", "videomaev2", "everest", "mme", "mvd", "mvd-class-token"],
    )
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_its_encoder_as_a_classifier(self, tmp_path, caplog, family, build, suffix):
        """As the repositories' fine-tuning scripts start: the encoder's blocks, mean pooling, a new norm and head."""
        pretrained = build()
        path = write(tmp_path / f"w{suffix}", pretrained.state_dict())
        with caplog.at_level(logging.INFO, LOGGER):
            model = et.load_videomae(path, family=family, num_labels=7, **SIZES)
        assert isinstance(model, VideoMAEForVideoClassification)
        assert model.config.num_labels == 7
        assert len([r for r in caplog.records if re.search("head|classifier", r.getMessage())]) == 1

        encoder = getattr(pretrained, "encoder", pretrained)
        reference = fine_tuned(
            family,
            num_classes=7,
            use_cls_token=getattr(pretrained, "cls_token", None) is not None,
            init_values=0.1 if family == "videomaev2" else 0.0,
        )
        weights = {name: value for name, value in encoder.state_dict().items() if name in reference.state_dict()}
        fresh = set(reference.state_dict()) - set(weights)
        assert fresh == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
        reference.load_state_dict(weights, strict=False)
        with torch.no_grad():
            reference.fc_norm.reset_parameters()
            for own, theirs in zip(reference.head.parameters(), model.classifier.parameters(), strict=True):
                own.copy_(theirs)
        clips = clips_for(reference)
        expected = expected_classes(reference, clips)
        assert_close(classify(model, clips), expected)
        reloaded = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(1.0))
        assert_close(classify(reloaded, clips), expected)

    @pytest.mark.parametrize(
        "build",
        [
            fine_tuned,
            lambda: randomize(MMEPreTrainingModel(**SMALL)),
            lambda: randomize(MVDPreTrainingModel(**SMALL)),
        ],
        ids=["fine-tuned", "mme", "mvd"],
    )
    def test_no_pixel_decoder_to_load(self, tmp_path, caplog, build):
        path = write(tmp_path / "w.pth", build().state_dict())
        with caplog.at_level(logging.WARNING, LOGGER):
            plain = et.load_videomae(path, num_labels=5, **SIZES)
            said_anyway = {record.getMessage() for record in caplog.records}
            asked = et.load_videomae(path, num_labels=5, for_pretraining=True, **SIZES)
        said = [r for r in caplog.records if r.getMessage() not in said_anyway]
        assert len(said) == 1
        assert said[0].levelno == logging.WARNING
        assert "decoder" in said[0].getMessage()
        assert isinstance(asked, VideoMAEForVideoClassification)
        assert asked.config.num_labels == plain.config.num_labels == 5

    def test_a_decoder_of_other_things_than_pixels(self, tmp_path):
        state = pre_trained().state_dict()
        state |= {"decoder.head.weight": torch.randn(20, 24), "decoder.head.bias": torch.randn(20)}
        path = write(tmp_path / "w.pth", state)
        try:
            model = et.load_videomae(path, for_pretraining=True, **SIZES)
        except ValueError:
            return  # as good
        assert not isinstance(model, VideoMAEForPreTraining)


class TestPositions:
    @pytest.mark.parametrize(
        ("options", "asked", "found"),
        [
            ({"num_frames": 16}, {}, (16, 24)),
            ({"num_frames": 12, "img_size": 224, "patch_size": 56}, {}, (12, 224)),
            ({}, {"num_frames": 8}, (8, 24)),
            ({}, {"image_size": 24}, (8, 24)),
            ({}, {"num_frames": 8, "image_size": 24}, (8, 24)),
        ],
    )
    def test_sizes_follow_from_the_stored_table(self, tmp_path, options, asked, found):
        reference = fine_tuned(use_learnable_pos_emb=True, **options)
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), num_heads=2, **asked)
        assert (model.config.num_frames, model.config.image_size) == found
        assert model.config.everest["position"] == "stored"
        clips = clips_for(reference, batch=1)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize(
        ("frames", "size"), [(8, 32), (16, 32), (8, 24), (24, 40), (16, 16)], ids=lambda number: str(number)
    )
    def test_a_stored_table_at_another_size(self, tmp_path, frames, size):
        stored = fine_tuned(use_learnable_pos_emb=True, num_frames=16)  # 8 × 3 × 3
        path = write(tmp_path / "w.pth", stored.state_dict())
        asked = {"num_frames": frames} if frames != 16 else {}
        asked |= {"image_size": size} if size != 24 else {}
        model = et.load_videomae(path, num_heads=2, **asked)
        assert (model.config.num_frames, model.config.image_size) == (frames, size)

        reference = fine_tuned(use_learnable_pos_emb=True, num_frames=frames, img_size=size)
        table = resampled(stored.pos_embed, (8, 3), (frames // 2, size // 8))
        state = stored.state_dict() | {"pos_embed": table}
        reference.load_state_dict(state)
        clips = clips_for(reference)
        expected = expected_classes(reference, clips)
        assert_close(classify(model, clips), expected)
        reloaded = et.patch_videomae(through_a_folder(model, tmp_path / "folder"), et.ReRoSelector(1.0))
        assert_close(classify(reloaded, clips), expected)

    def test_sixteen_frames_asked_for_are_not_the_default(self, tmp_path):
        stored = fine_tuned(use_learnable_pos_emb=True, num_frames=12, img_size=224, patch_size=56)
        path = write(tmp_path / "w.pth", stored.state_dict())
        model = et.load_videomae(path, num_heads=2, num_frames=16)
        reference = fine_tuned(use_learnable_pos_emb=True, num_frames=16, img_size=224, patch_size=56)
        reference.load_state_dict(stored.state_dict() | {"pos_embed": resampled(stored.pos_embed, (6, 4), (8, 4))})
        clips = clips_for(reference, batch=1)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize(("family", "frames", "size"), [("videomae", 16, 16), ("mvd", 4, 40)])
    def test_a_computed_table_is_computed_for_any_size(self, tmp_path, family, frames, size):
        state = fine_tuned(family).state_dict()
        reference = fine_tuned(family, num_frames=frames, img_size=size)
        reference.load_state_dict(state)
        path = write(tmp_path / "w.pth", state)
        model = et.load_videomae(path, family=family, num_heads=2, num_frames=frames, image_size=size)
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    def test_mvd_table_by_hand(self, tmp_path):
        """A model that lets nothing through but positions: channel by channel, from the description alone."""
        reference = fine_tuned("mvd", depth=1)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.startswith(("patch_embed", "blocks.0.attn.proj", "blocks.0.mlp.fc2")):
                    parameter.zero_()
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), family="mvd", **SIZES)
        with torch.no_grad():
            tokens = model.videomae(torch.zeros(1, 8, 3, 24, 24)).last_hidden_state[0]
        step, row, column = 3, 2, 1
        expected = []
        for position, width in ((step, 8), (column, 12), (row, 12)):
            angles = [position / 10000 ** (i / (width / 2)) for i in range(width // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert_close(tokens[step * 9 + row * 3 + column], torch.tensor(expected), 1e-6)

    def test_a_table_that_no_square_gives(self, tmp_path):
        state = fine_tuned(use_learnable_pos_emb=True).state_dict() | {"pos_embed": torch.randn(1, 37, 32)}
        with pytest.raises(ValueError, match=r"pos_embed.*37|37.*pos_embed"):
            et.load_videomae(write(tmp_path / "w.pth", state), num_heads=2)

    def test_reference_tables_differ(self):
        assert (sinusoid_table(36, 32) - mvd_table(4, 3, 3, 32)).abs().max() > 1


def cubic_weights(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """(new, old): cubic convolution with half-pixel centres, the edges repeated."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for k in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - k)
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(k, 0), old - 1)] += near if x <= 1 else far
    return weights


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (1, t·s·s, D) of (time steps, places a side) for others: bicubic places, linear time."""
    (t, s), (new_t, new_s) = old, new
    numbers = table.detach().double().view(t, s, s, -1).numpy()
    across, along = cubic_weights(s, new_s), linear_weights(t, new_t)
    numbers = np.einsum("tT,yY,xX,TYXd->tyxd", along, across, across, numbers)
    return torch.from_numpy(numbers).float().reshape(1, new_t * new_s**2, -1)


def linear_weights(old: int, new: int) -> np.ndarray:
    weights = np.zeros((new, old))
    for i in range(new):
        centre = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        below = math.floor(centre)
        weights[i, below] += 1 - (centre - below)
        weights[i, min(below + 1, old - 1)] += centre - below
    return weights


class TestFamily:
    @pytest.mark.parametrize(
        "args",
        [MVD_ARGS, Namespace(model="pretrain_masked_video_student_base_patch16_224", lr=1e-3)],
        ids=["fine-tuning", "pre-training"],
    )
    def test_mvd_by_its_arguments(self, tmp_path, caplog, args):
        reference = fine_tuned("mvd")
        path = write(tmp_path / "w.pth", reference.state_dict(), args=args)
        with caplog.at_level(logging.INFO, LOGGER):
            model = et.load_videomae(path, **SIZES)
        assert re.search("mvd", caplog.text, re.IGNORECASE)
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    def test_mvd_by_its_class_token(self, tmp_path):
        reference = fine_tuned("mvd", use_cls_token=True)
        model = et.load_videomae(write(tmp_path / "w.safetensors", reference.state_dict()), **SIZES)
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize("class_token", [False, True])
    def test_mvd_by_its_two_decoders(self, tmp_path, caplog, class_token):
        student = randomize(MVDPreTrainingModel(**SMALL, use_cls_token=class_token))
        paths = [write(tmp_path / name, student.state_dict()) for name in ("w.pth", "w.safetensors")]
        for path in paths:
            caplog.clear()
            with caplog.at_level(logging.INFO, LOGGER):
                model = et.load_videomae(path, num_labels=5, **SIZES)
            assert re.search("mvd", caplog.text, re.IGNORECASE)
            reference = fine_tuned("mvd", use_cls_token=class_token)
            weights = {n: v for n, v in student.state_dict().items() if n in reference.state_dict()}
            reference.load_state_dict(weights, strict=False)
            reference.fc_norm.reset_parameters()
            reference.head.load_state_dict(model.classifier.state_dict())
            clips = clips_for(reference)
            assert_close(classify(model, clips), expected_classes(reference, clips))

    def test_without_a_hint_videomae_is_assumed_and_said(self, tmp_path, caplog):
        reference = fine_tuned()
        path = write(tmp_path / "w.pth", reference.state_dict(), key=None)
        with caplog.at_level(logging.INFO, LOGGER):
            model = et.load_videomae(path, **SIZES)
        said = [r.getMessage() for r in caplog.records if "assum" in r.getMessage()]
        assert len(said) == 1
        assert "family" in said[0]
        clips = clips_for(reference)
        assert_close(classify(model, clips), expected_classes(reference, clips))
        caplog.clear()
        with caplog.at_level(logging.INFO, LOGGER):
            et.load_videomae(path, family="videomae", **SIZES)
        assert "assum" not in caplog.text

    def test_what_the_caller_says_wins(self, tmp_path):
        reference = fine_tuned("videomae")
        path = write(tmp_path / "w.pth", reference.state_dict(), args=MVD_ARGS)
        clips = clips_for(reference)
        model = et.load_videomae(path, family="videomae", **SIZES)
        assert_close(classify(model, clips), expected_classes(reference, clips))

    @pytest.mark.parametrize("family", ["VideoMAE", "vit", "", 3])
    def test_unknown(self, tmp_path, family):
        path = write(tmp_path / "w.pth", fine_tuned().state_dict())
        with pytest.raises(ValueError, match=r"(?s)videomae.*videomaev2.*mme.*mvd.*everest"):
            et.load_videomae(path, family=family, **SIZES)


class TestConfig:
    def test_what_is_recorded(self, tmp_path):
        kinds = {
            ("videomae", "sinusoid", False): fine_tuned(),
            ("mvd", "mvd", False): fine_tuned("mvd"),
            ("mvd", "mvd", True): fine_tuned("mvd", use_cls_token=True),
            ("videomae", "stored", False): fine_tuned(use_learnable_pos_emb=True),
        }
        for (family, position, token), reference in kinds.items():
            path = write(tmp_path / "w.pth", reference.state_dict())
            model = et.load_videomae(path, family=family, **SIZES)
            recorded = model.config.everest
            assert recorded["norm_eps"] == 1e-6
            assert recorded["position"] == position
            assert bool(recorded.get("class_token")) == token
            assert model.config.layer_norm_eps == 1e-6
            folder = tmp_path / f"{position}-{token}"
            model.save_pretrained(folder)
            assert (folder / "everest.safetensors").exists() == (position == "stored" or token)

    def test_sizes(self, tmp_path):
        state = fine_tuned("videomae", mlp_ratio=1.75, depth=3, num_classes=4).state_dict()
        config = et.load_videomae(write(tmp_path / "w.pth", state), num_heads=4, num_frames=4, image_size=40).config
        assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 3, 56)
        assert (config.num_attention_heads, config.num_frames, config.image_size) == (4, 4, 40)
        assert (config.patch_size, config.tubelet_size, config.num_channels) == (8, 2, 3)
        assert config.num_labels == 4
        assert config.use_mean_pooling
        assert len(config.id2label) == 4

    @pytest.mark.parametrize(
        ("family", "options", "said", "unsaid"),
        [
            ("videomae", {}, ["eps"], ["position", "class token"]),
            ("mvd", {}, ["eps", "position"], ["class token"]),
            ("mvd", {"use_cls_token": True}, ["eps", "position", "class token"], []),
            ("videomae", {"use_learnable_pos_emb": True}, ["eps", "position"], ["class token"]),
        ],
    )
    def test_saving_says_what_plain_transformers_lacks(self, tmp_path, caplog, family, options, said, unsaid):
        path = write(tmp_path / "w.pth", fine_tuned(family, **options).state_dict())
        model = et.load_videomae(path, family=family, **SIZES)
        caplog.clear()
        with caplog.at_level(logging.INFO, "everest_tokens"):
            model.save_pretrained(tmp_path / "folder")
        lines = [r for r in caplog.records if r.name.startswith("everest_tokens")]
        assert [line.levelno for line in lines] == [logging.WARNING]
        message = lines[0].getMessage().replace("_", " ")
        assert all(word in message for word in said), message
        assert not any(word in message for word in unsaid), message
        assert "\n" not in message

    def test_where_plain_transformers_lacks_nothing(self, tmp_path, caplog):
        """VideoMAE's positions and no fc_norm: transformers reads its other norms' eps from the config."""
        reference = fine_tuned(use_mean_pooling=False)
        model = et.load_videomae(write(tmp_path / "w.pth", reference.state_dict()), **SIZES)
        caplog.clear()
        with caplog.at_level(logging.INFO, "everest_tokens"):
            plain = through_a_folder(model, tmp_path / "folder")
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        clips = clips_for(reference)
        assert_close(classify(plain, clips), expected_classes(reference, clips))


class TestHead:
    @pytest.mark.parametrize("labels", [None, 5])
    def test_kept(self, tmp_path, caplog, labels):
        reference = fine_tuned()
        with caplog.at_level(logging.INFO, LOGGER):
            path = write(tmp_path / "w.pth", reference.state_dict())
            model = et.load_videomae(path, num_labels=labels, family="videomae", **SIZES)
        assert torch.equal(model.classifier.weight, reference.head.weight)
        assert torch.equal(model.classifier.bias, reference.head.bias)
        assert model.config.num_labels == 5
        assert not caplog.records

    @pytest.mark.parametrize("stored", [True, False])
    def test_fresh(self, tmp_path, caplog, stored):
        reference = fine_tuned()
        state = reference.state_dict()
        if not stored:
            del state["head.weight"], state["head.bias"]
        path = write(tmp_path / "w.pth", state)
        models = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            caplog.clear()
            with caplog.at_level(logging.INFO, LOGGER):
                models.append(et.load_videomae(path, num_labels=50, family="videomae", **SIZES))
            assert len(caplog.records) == 1
            assert re.search("head|classifier", caplog.records[0].getMessage())
            assert "50" in caplog.records[0].getMessage()
        assert_same_weights(*models, but="classifier.weight")  # all else is the file's
        assert models[0].classifier.weight.shape == (50, 32)
        assert models[0].num_labels == models[0].config.num_labels == 50
        assert 0.01 < models[0].classifier.weight.std() < 0.04  # transformers' initializer_range
        assert not models[0].classifier.bias.any()
        clips = clips_for(reference)
        assert_close(classify(models[0], clips)[0], expected_classes(reference, clips)[0])


class TestNothingIsRandom:
    @pytest.mark.parametrize("pretraining", [False, True])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_two_seeds_one_model(self, tmp_path, global_rng_untouched, pretraining, suffix):
        reference = pre_trained() if pretraining else fine_tuned(use_learnable_pos_emb=True)
        path = write(tmp_path / f"w{suffix}", reference.state_dict())
        models = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with global_rng_untouched():
                models.append(et.load_videomae(path, for_pretraining=pretraining, **SIZES | {"num_heads": (2, 3)}))
        assert_same_weights(*models)
        assert not any(value.is_meta for value in models[0].state_dict().values())

    def test_loaded_weights_are_the_models_own(self, tmp_path):
        path = write(tmp_path / "w.safetensors", fine_tuned().state_dict())
        before = path.read_bytes()
        model = et.load_videomae(path, **SIZES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        assert path.read_bytes() == before
        storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
        assert len(set(storages)) == len(storages)


def blank(model_class: Any, **options: Any) -> dict[str, Tensor]:
    """A state dict of zeros, without drawing millions of weights first."""
    with torch.device("meta"):
        shapes = model_class(**(SMALL | {"depth": 1, "mlp_ratio": 0.05} | options)).state_dict()
    return {name: torch.zeros(value.shape, dtype=torch.float16) for name, value in shapes.items()}


class TestHeadCount:
    @pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16)])
    def test_encoder_widths(self, tmp_path, width, heads):
        path = write(tmp_path / "w.pth", blank(FineTuningModel, embed_dim=width))
        model = et.load_videomae(path, num_frames=4, image_size=16)
        assert model.config.num_attention_heads == heads
        assert model.videomae.encoder.layer[0].attention.attention.num_attention_heads == heads

    @pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (512, 8), (640, 8)])
    @pytest.mark.parametrize("given", [None, 4, (4, 2)])
    def test_decoder_widths(self, tmp_path, width, heads, given):
        path = write(tmp_path / "w.pth", blank(PreTrainingModel, embed_dim=384, decoder_dim=width))
        model = et.load_videomae(path, for_pretraining=True, num_heads=given, num_frames=4, image_size=16)
        found = model.config.num_attention_heads, model.config.decoder_num_attention_heads
        assert found == ((4, 2) if given == (4, 2) else (given or 6, heads))
        assert model.decoder.decoder_layers[0].attention.attention.num_attention_heads == found[1]

    def test_one_number_serves_an_unknown_decoder_too(self, tmp_path):
        reference = pre_trained(decoder_num_heads=2)
        path = write(tmp_path / "w.pth", reference.state_dict())
        model = et.load_videomae(path, for_pretraining=True, **SIZES)
        clips, hidden = clips_for(reference), random_mask(2, 36, 30)
        with torch.no_grad():
            actual = model(clips.transpose(1, 2), bool_masked_pos=hidden).logits
        assert_close(actual, expected_pixels(reference, clips, hidden))

    def test_unknown(self, tmp_path):
        sizes = {"num_frames": 8, "image_size": 24}
        with pytest.raises(ValueError, match=r"(?s)32.*num_heads|num_heads.*32"):
            et.load_videomae(write(tmp_path / "w.pth", fine_tuned().state_dict()), **sizes)
        path = write(tmp_path / "w.pth", blank(PreTrainingModel, embed_dim=384, decoder_dim=24))
        with pytest.raises(ValueError, match=r"(?s)24.*num_heads|num_heads.*24"):
            et.load_videomae(path, for_pretraining=True, **sizes)
        assert et.load_videomae(path, num_labels=2, **sizes).config.num_attention_heads == 6  # no decoder, no question

    @pytest.mark.parametrize("given", [0, -2, 3, 64, True, "2", 2.0, (2,), (2, 0), (2, 5), (2, 2, 2)])
    def test_impossible(self, tmp_path, given):
        path = write(tmp_path / "w.pth", pre_trained().state_dict())
        with pytest.raises((ValueError, TypeError), match="head"):
            et.load_videomae(path, for_pretraining=True, num_frames=8, image_size=24, num_heads=given)


class TestRefusals:
    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            et.load_videomae(tmp_path / "nowhere.pth")

    @pytest.mark.parametrize("pretraining", [False, True])
    def test_cosine_attention(self, tmp_path, pretraining):
        build = pre_trained if pretraining else fine_tuned
        path = write(tmp_path / "w.pth", build("videomaev2", cos_attn=True).state_dict())
        with pytest.raises(ValueError, match=r"cosine.*attn\.scale|attn\.scale.*cosine"):
            et.load_videomae(path, for_pretraining=pretraining, **SIZES)

    @pytest.mark.parametrize("sizes", [{"num_frames": 1}, {"num_frames": 0}, {"image_size": 4}, {"image_size": -24}])
    @pytest.mark.parametrize("learned", [False, True])
    def test_sizes_without_a_token(self, tmp_path, sizes, learned):
        path = write(tmp_path / "w.pth", fine_tuned(use_learnable_pos_emb=learned).state_dict())
        with pytest.raises(ValueError, match=next(iter(sizes))):
            et.load_videomae(path, **SIZES | sizes)

    @pytest.mark.parametrize(("pretraining", "labels"), [(False, None), (False, 7), (True, None)])
    def test_every_key_is_needed(self, tmp_path, pretraining, labels):
        state = (pre_trained if pretraining else fine_tuned)(init_values=0.1).state_dict()
        unnamed = {}
        for name in state:
            path = write(tmp_path / "w.pth", {other: value for other, value in state.items() if other != name})
            message = refused(path, for_pretraining=pretraining, num_labels=labels, num_heads=(2, 3))
            if labels and name.startswith("head.") and not message:  # not needed then
                continue
            if last(name) not in message and name.rpartition(".")[0] + "." not in message:
                unnamed[name] = message or "loaded"
        assert not unnamed

    def test_all_missing_keys_are_listed(self, tmp_path):
        state = fine_tuned(depth=3).state_dict()
        gone = ["blocks.1.attn.proj.bias", "blocks.2.norm1.weight", "blocks.0.mlp.fc2.bias"]
        message = refused(write(tmp_path / "w.pth", {name: v for name, v in state.items() if name not in gone}))
        assert all(name in message for name in gone), message

    def test_a_missing_block(self, tmp_path):
        state = fine_tuned(depth=3).state_dict()
        state = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
        with pytest.raises(ValueError, match=r"blocks.*(\[0, 2\]|blocks\.1)"):
            et.load_videomae(write(tmp_path / "w.pth", state), **SIZES)

    @pytest.mark.parametrize("pretraining", [False, True])
    @pytest.mark.parametrize("change", ["shorter", "longer", "deeper", "flat", "scalar"])
    def test_every_shape_counts(self, tmp_path, pretraining, change):
        state = (pre_trained if pretraining else fine_tuned)(init_values=0.1).state_dict()
        distort = {
            "shorter": lambda value: value[:-1],
            "longer": lambda value: torch.cat([value, value[:1]]),
            "deeper": lambda value: value[None],
            "flat": lambda value: value.flatten(),
            "scalar": lambda value: value.sum(),
        }[change]
        unsaid = {}
        for name, value in state.items():
            wrong = distort(value).clone()
            if wrong.shape == value.shape:  # flat already
                continue
            if name == "decoder.head.weight" and change in ("shorter", "longer"):  # a decoder of other things
                continue
            path = write(tmp_path / "w.pth", state | {name: wrong})
            message = refused(path, for_pretraining=pretraining, num_heads=(2, 3))
            if not re.search(r"[(\[]\d+(, \d+)*,?[)\]]|\(\)|width \d+", message):
                unsaid[name] = message or "loaded"
        assert not unsaid

    @pytest.mark.parametrize(
        "name", ["extra.weight", "blocks.0.attn.k_bias", "blocks.0.adapter.weight", "pos_embedding"]
    )
    def test_keys_that_nothing_uses(self, tmp_path, name):
        state = fine_tuned().state_dict() | {name: torch.zeros(32)}
        with pytest.raises(ValueError, match=re.escape(last(name))):
            et.load_videomae(write(tmp_path / "w.pth", state), **SIZES)

    @pytest.mark.parametrize(
        "content",
        [
            {},
            {"model": {}},
            {"module": {}, "epoch": 3},
            {"model": None},
            {"model": 3},
            {"model": {"patch_embed.proj.weight": 3}},
            {"model": {"head.weight": torch.zeros(5, 32)}},
            {"model": {1: torch.zeros(3)}},
            {"model": {"two\nlines": torch.zeros(3)}},
            {"two\nlines": torch.tensor(1)},
            {1: torch.zeros(3)},
            {"epoch": 3},
            [],
            [torch.zeros(3)],
            None,
            3,
            "text",
            torch.zeros(3),
            (1, 2),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("zipped", [True, False])
    def test_what_is_no_checkpoint(self, tmp_path, content, zipped):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert refused(tmp_path / "w.pth")

    @pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"not a checkpoint\n" * 100, b"\x80\x02.", b"\x80"])
    @pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
    def test_what_is_no_file_of_tensors(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name)

    @pytest.mark.parametrize("name", ["blocks.0.attn.proj.weight", "head.weight", "patch_embed.proj.bias", "pos_embed"])
    @pytest.mark.parametrize(
        "convert",
        [
            pytest.param(lambda value: value.to("meta"), id="meta"),
            pytest.param(lambda value: value.to_sparse(), id="sparse"),
            pytest.param(lambda value: value.to(torch.complex64), id="complex"),
            pytest.param(lambda value: value.int(), id="integer"),
        ],
    )
    @pytest.mark.parametrize("labels", [None, 7])
    def test_tensors_without_plain_numbers(self, tmp_path, name, convert, labels):
        state = fine_tuned(use_learnable_pos_emb=True).state_dict()
        message = refused(write(tmp_path / "w.pth", state | {name: convert(state[name])}), num_labels=labels)
        assert message or (labels and name == "head.weight")  # not needed then

    @pytest.mark.parametrize(
        ("name", "shape"),
        [("encoder.cls_token", (1, 1, 32)), ("pos_embed", (1, 36, 24)), ("encoder.fc_norm.bias", (32,))],
    )
    def test_no_pixel_decoder_goes_with_these(self, tmp_path, name, shape):
        """A class token, a stored table of the decoder's own: what would be dropped, or what no forward could run."""
        state = pre_trained().state_dict() | {name: torch.randn(shape)}
        message = refused(write(tmp_path / "w.pth", state), for_pretraining=True, num_heads=(2, 3))
        assert name.removeprefix("encoder.") in message

    def test_a_reader_that_explains_itself_in_many_lines(self, tmp_path, monkeypatch):
        def load(*args: Any, **kwargs: Any) -> None:
            raise TypeError("set_() received an invalid combination of arguments:\n * (Tensor source)\n")

        monkeypatch.setattr(torch, "load", load)
        assert "invalid combination" in refused(write(tmp_path / "w.pth", {}))

    def test_a_key_of_two_lines(self, tmp_path):
        state = fine_tuned().state_dict() | {"two\nlines": torch.zeros(3)}
        assert "two" in refused(write(tmp_path / "w.pth", state))  # which also looks at the lines

    @pytest.mark.parametrize("biased", ["encoder", "decoder"])
    def test_query_biases_in_one_half_alone(self, tmp_path, biased):
        """transformers has one setting for both."""
        state = pre_trained().state_dict()
        state = {name: v for name, v in state.items() if not re.search("[qv]_bias", name) or name.startswith(biased)}
        assert refused(write(tmp_path / "w.pth", state), for_pretraining=True, num_heads=(2, 3))

    @pytest.mark.parametrize("name", fine_tuned().state_dict())
    def test_a_key_without_the_prefix_of_the_others(self, tmp_path, name):
        reference = fine_tuned()
        state = {key if key == name else f"encoder.{key}": value for key, value in reference.state_dict().items()}
        path = write(tmp_path / "w.pth", state)
        for more in ({"num_labels": 7}, {}):  # a fresh head must not hide what is missing
            message = refused(path, **more)
            assert message or name.startswith(("head.", "fc_norm."))  # these may lie outside an encoder
        if not message:
            clips = clips_for(reference)
            assert_close(classify(et.load_videomae(path, **SIZES), clips), expected_classes(reference, clips))

    def test_an_empty_safetensors(self, tmp_path):
        save_file({}, tmp_path / "w.safetensors")
        assert refused(tmp_path / "w.safetensors")


def last(name: str) -> str:
    """Of a key: what must be told, whatever prefix was stripped."""
    return ".".join(name.split(".")[-2:])


def refused(path: Any, **kwargs: Any) -> str:
    """The one line of a ValueError, or "" where a whole model came back. Nothing else may happen."""
    model, caught = None, None
    try:
        model = et.load_videomae(path, **SIZES | kwargs)
    except ValueError as error:
        caught = error
    if caught is not None:
        assert type(caught) is ValueError, f"{type(caught).__name__} reached the caller: {caught}"
        assert str(caught)
        assert "\n" not in str(caught), caught
        return str(caught)
    assert isinstance(model, (VideoMAEForVideoClassification, VideoMAEForPreTraining))
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32, name
        assert not value.is_meta, name
    return ""


class Payload:
    """Unpickles into a command that leaves a file."""

    def __init__(self, marker: Any) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'echo > "{self.marker}"',)


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
        content = PLACES[place]({"model": dict(fine_tuned(depth=1).state_dict())}, Payload(marker))
        if how == "plain pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
        message = refused(path)
        assert not marker.exists()
        assert message
        if how != "plain pickle":  # the payload would run: the file is as dangerous as it should be
            assert re.search(rf"\b{os.system.__module__}\.system\b", message), message
            assert re.search(r"safetensors|torch\.save|state_dict", message), message  # how to convert
            torch.load(path, weights_only=False)
            assert marker.exists()

    def test_a_whole_module_is_named(self, tmp_path):
        torch.save(fine_tuned(), tmp_path / "w.pth")
        message = refused(tmp_path / "w.pth")
        assert message
        assert "FineTuningModel" in message

    def test_arguments_need_no_trust(self, tmp_path):
        args = Namespace(
            model="vit_base_patch16_224", nested=Namespace(a=[1, None, True]), lr=0.1, names=("a", {"b": 2})
        )
        path = write(tmp_path / "w.pth", fine_tuned().state_dict(), args=args)
        assert not refused(path)

    def test_the_allowance_for_arguments_ends_with_the_load(self, tmp_path):
        path = write(tmp_path / "w.pth", fine_tuned().state_dict())
        before = set(torch.serialization.get_safe_globals())
        et.load_videomae(path, **SIZES)
        assert set(torch.serialization.get_safe_globals()) == before


TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "num_frames": 4, "embed_dim": 8, "depth": 1, "num_classes": 3}
TINY_SIZES = {"num_heads": 2, "num_frames": 4, "image_size": 8}
KINDS = ["zip", "legacy", "safetensors"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """kind → (bytes of a good file, path to write a broken one to)."""
    folder = tmp_path_factory.mktemp("broken")
    state = fine_tuned(**TINY).state_dict()
    files = {}
    for kind in KINDS:
        path = folder / ("w.safetensors" if kind == "safetensors" else f"{kind}.pth")
        write(path, state, zipped=kind == "zip")
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


class TestBrokenFiles:
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
        where = st.one_of(
            st.integers(0, edge - 1), st.integers(len(good) - edge, len(good) - 1), st.integers(0, len(good) - 1)
        )
        changed = bytearray(good)
        for position, bits in data.draw(st.lists(st.tuples(where, st.integers(1, 255)), min_size=1, max_size=3)):
            changed[position] ^= bits
        path.write_bytes(changed)
        assert_refused_or_whole(path)

    @pytest.mark.parametrize("kind", KINDS)
    @given(st.binary(max_size=400), st.integers(0, 400))
    def test_any_beginning(self, broken, kind, beginning, cut):
        good, path = broken(kind)
        path.write_bytes(beginning + good[cut:])
        assert_refused_or_whole(path)


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
            *("cls_token", "pos_embed", "norm.weight", "mask_token", "mask_token_img", "encoder.blocks.0.norm1.weight"),
            *(
                "blocks.1.norm1.weight",
                "blocks.x.norm1.weight",
                "blocks.0.attn.qkv.bias",
                "blocks.0.gamma_1",
                "blocks.",
            ),
            *("decoder.blocks.0.norm1.weight", "decoder.head.weight", "head", ".", "", "model", "module", "args"),
            *("blocks.99999999999.norm1.weight", "encoder_to_decoder.weight", "blocks.-1.norm1.weight"),
        ]
    ),
    st.text(max_size=12),
)


class TestBrokenDictionaries:
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
        path = tmp_path / "w.pth"
        torch.save({"model": state}, path)
        refused(path, **TINY_SIZES, for_pretraining=pretraining)

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
