"""checkpoints.py: the VideoMAE family's files as transformers models, against reference modules that wrote the files.

Files that are broken or hostile are in test_checkpoint_files.py.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_case import (
    MVD_ARGS,
    PIXELS,
    SIZES,
    SMALL,
    assert_classifies,
    assert_close,
    assert_predicts,
    assert_replays,
    classify,
    clips_for,
    expected_classes,
    expected_pixels,
    fine_tuned,
    pre_trained,
    repatched,
    through_a_folder,
    write,
)
from family_models import FineTuningModel, MMEPreTrainingModel, MVDPreTrainingModel, PreTrainingModel, randomize
from torch import Tensor, nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

import everest_tokens as et
from everest_tokens import positions

pytestmark = pytest.mark.filterwarnings("ignore:use_mean_pooling")  # of a few files, which their reference reads too


@pytest.fixture
def load(tmp_path):
    """(state dict or reference module, `write`'s arguments, `load_videomae`'s) → the model of the file."""

    def from_file(state: Any, name: str = "w.pth", written: Any = {}, **options: Any) -> Any:  # noqa: B006
        return et.load_videomae(write(tmp_path / name, state, **written), **SIZES | options)

    return from_file


@pytest.fixture
def said(caplog):
    """The library's log lines from INFO on."""
    caplog.set_level(logging.INFO, "everest_tokens")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("everest_tokens")]


CLASSIFIERS = [
    *(pytest.param(family, {}, id=family) for family in ("videomae", "videomaev2", "mme", "mvd", "everest")),
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
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize(("family", "options"), CLASSIFIERS)
    def test_numbers_of_the_reference(self, tmp_path, load, family, options, suffix):
        reference = fine_tuned(family, **options)
        model = load(reference, f"w{suffix}", family=family, image_size=reference.patch_embed.img_size[0])
        assert isinstance(model, VideoMAEForVideoClassification)
        assert not model.training
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
        assert_classifies(model, reference)
        assert_classifies(repatched(model, tmp_path / "folder"), reference)

    @pytest.mark.parametrize(("family", "options"), CLASSIFIERS[3:6] + CLASSIFIERS[9:10])
    def test_patching_copying_and_saving_in_any_order(self, tmp_path, load, family, options):
        reference = fine_tuned(family, **options)
        clips = clips_for(reference)
        expected = expected_classes(reference, clips)
        model = load(reference, family=family)
        assert_close(classify(copy.deepcopy(model).double(), clips.double()), tuple(n.double() for n in expected))
        copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
        patched = et.patch_videomae(model, et.ReRoSelector(1.0))
        assert_close(classify(copy.deepcopy(patched), clips), expected)
        again = et.patch_videomae(through_a_folder(patched, tmp_path / "patched"))
        assert again.everest.selector.keep_ratio == 1.0  # as recorded
        assert_close(classify(et.patch_videomae(through_a_folder(again, tmp_path / "again")), clips), expected)
        assert_close(classify(et.unpatch_videomae(patched), clips), expected)
        assert_close(classify(repatched(patched, tmp_path / "unpatched"), clips), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for name, twin in copies.items():  # have and save their own weights
            assert_close(classify(twin, clips), expected)
            assert_close(classify(repatched(twin, tmp_path / name), clips), expected)

    @pytest.mark.parametrize("learned", [False, True])
    def test_a_plain_folder_saved_anew_is_refused(self, tmp_path, load, learned):
        """transformers drops what it has no place for: then patching must not go on with other numbers."""
        reference = fine_tuned("mvd", use_learnable_pos_emb=learned, use_cls_token=True)
        through_a_folder(load(reference), tmp_path / "first").save_pretrained(tmp_path / "second")
        again = VideoMAEForVideoClassification.from_pretrained(tmp_path / "second").eval()
        for model in (again, VideoMAEForVideoClassification(again.config)):  # the second comes from nowhere
            with pytest.raises(ValueError, match=r"everest\.safetensors"):
                et.patch_videomae(model, et.ReRoSelector(1.0))

    def test_the_class_token_is_trained_and_saved(self, tmp_path, load):
        reference = fine_tuned("mvd", use_cls_token=True)
        clips, labels = clips_for(reference), torch.tensor([1, 4])
        model = load(reference)
        known = {name for name, _ in VideoMAEForVideoClassification(model.config).named_parameters()}
        (token,) = (p for name, p in model.named_parameters() if name not in known)
        nn.functional.cross_entropy(reference(clips), labels).backward()
        model(clips.transpose(1, 2), labels=labels).loss.backward()
        assert_close(token.grad, reference.cls_token.grad, 1e-4)
        with torch.no_grad():
            token += 1
            reference.cls_token += 1
        assert_classifies(model, reference)
        assert_classifies(repatched(model, tmp_path / "folder"), reference)

    @pytest.mark.parametrize(("family", "learned"), [("videomae", False), ("mvd", False), ("videomae", True)])
    def test_the_backbone_alone(self, tmp_path, load, family, learned):
        reference, tokens = fine_tuned(family, use_learnable_pos_emb=learned), []
        model = load(reference, family=family)
        model.save_pretrained(tmp_path / "folder")
        saved = et.patch_videomae(VideoMAEModel.from_pretrained(tmp_path / "folder").eval(), et.ReRoSelector(1.0))
        clips = clips_for(reference)
        reference.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
        with torch.no_grad():
            reference(clips)
            for backbone in (model.videomae, saved):
                assert_close(backbone(clips.transpose(1, 2)).last_hidden_state, tokens[0])

    @pytest.mark.parametrize(("family", "options"), [("mvd", {}), ("mvd", {"use_cls_token": True}), ("videomae", {})])
    def test_kept_tokens_keep_their_positions(self, tmp_path, load, family, options):
        reference = fine_tuned(family, **options)
        clips = clips_for(reference)
        patched = et.patch_videomae(through_a_folder(load(reference, family=family), tmp_path / "folder"))
        assert patched.everest.selector.keep_ratio == 0.6  # patching's defaults stand
        selection = et.select_tokens(patched, clips.transpose(1, 2))
        assert selection.visible.shape == (2, 21)
        with torch.no_grad():
            tokens = reference.patch_embed(clips) + reference.pos_embed
            features = reference.run_tokens(tokens[torch.arange(2)[:, None], selection.visible])
            expected = features, reference.run_head(features)
        assert_close(classify(patched, clips, token_selection=selection), expected)

    @pytest.mark.parametrize("reloaded", [False, True])
    @pytest.mark.parametrize("learned", [False, True])
    def test_eps_where_it_decides(self, tmp_path, load, learned, reloaded):
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
        model = load(reference)
        model = repatched(model, tmp_path / "folder") if reloaded else model
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

    def test_key_bias_and_query_bias_in_one(self, load):
        reference = fine_tuned()
        state = reference.state_dict()
        for block in ("blocks.0.attn.", "blocks.1.attn."):
            query, value = state.pop(block + "q_bias"), state.pop(block + "v_bias")
            state[block + "qkv.bias"] = torch.cat([query, torch.randn(32), value])  # softmax ignores a key's bias
        assert_classifies(load(state), reference)

    @pytest.mark.parametrize("family", ["mme", None])
    def test_an_image_kernel_is_spread_over_the_tubelet(self, load, family):
        reference = fine_tuned("mme")
        kernel = reference.patch_embed.proj.weight
        with torch.no_grad():
            kernel.copy_(kernel[:, :, :1].expand_as(kernel))
        state = reference.state_dict() | {"patch_embed.proj.weight": kernel[:, :, 0].detach() * 2}  # over two frames
        assert_classifies(load(state, family=family), reference)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_other_precisions_become_float32(self, load, dtype, name):
        reference = fine_tuned("mvd", init_values=0.1, use_learnable_pos_emb=True, use_cls_token=True).to(dtype)
        torch.set_default_dtype(torch.float64)  # whatever the default is
        try:
            model = load(reference, name)
            fresh = load(reference, name, num_labels=7)
        finally:
            torch.set_default_dtype(torch.float32)
        for values in (model, fresh):
            tensors = [*values.state_dict().values(), values.videomae.embeddings.position_embeddings]
            assert {value.dtype for value in tensors} == {torch.float32}
        assert_classifies(model, reference.float())


class TestContainers:
    """Every place that the repositories keep weights at, and every prefix that wrappers leave on their keys."""

    PREFIXES = ("", "encoder.", "backbone.", "encoder.model.", "encoder_q.encoder.model.", "module.", "_orig_mod.")

    @pytest.mark.parametrize(
        ("key", "prefix"), [*(("model", prefix) for prefix in PREFIXES), ("module", "module."), (None, "backbone.")]
    )
    def test_classifier(self, load, key, prefix):
        reference = fine_tuned(use_learnable_pos_emb=True)
        assert_classifies(load(reference, "w.bin", written={"key": key, "prefix": prefix}), reference)

    @pytest.mark.parametrize(
        ("key", "prefix"), [("model", ""), (None, "module."), ("module", "_orig_mod."), ("model", "module._orig_mod.")]
    )
    def test_pixel_decoder(self, load, key, prefix):
        reference = pre_trained()
        assert_predicts(load(reference, written={"key": key, "prefix": prefix}, **PIXELS), reference)

    @pytest.mark.parametrize("kind", ["legacy", "parameters", "one storage", "str path"])
    def test_ways_of_writing_tensors(self, tmp_path, kind):
        reference = fine_tuned()
        state: dict[str, Any] = dict(reference.state_dict())
        if kind == "parameters":
            state = dict(reference.named_parameters())
        if kind == "one storage":
            parts = torch.cat([value.flatten() for value in state.values()]).split([v.numel() for v in state.values()])
            state = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
        path = write(tmp_path / "w.pth", state, zipped=kind != "legacy")
        assert_classifies(et.load_videomae(str(path) if kind == "str path" else path, **SIZES), reference)


class TestPreTrained:
    @pytest.mark.parametrize(
        ("family", "options", "name"),
        [
            ("videomae", {}, "w.pth"),
            ("videomaev2", {"init_values": 0.1, "qkv_bias": False}, "w.safetensors"),
            ("everest", {"patch_size": 4, "img_size": 12, "init_values": 0.1}, "w.pth"),
            ("everest", {"qkv_bias": False}, "w.safetensors"),
        ],
    )
    def test_pixels_of_the_reference(self, tmp_path, load, family, options, name):
        reference = pre_trained(family, **options)
        model = load(reference, name, family=family, **PIXELS | {"image_size": options.get("img_size", 24)})
        assert isinstance(model, VideoMAEForPreTraining)
        assert not model.training
        reloaded = through_a_folder(model, tmp_path / "folder")
        assert_predicts(model, reference)
        for patched in (model, reloaded):
            assert_replays(patched, reference, clips_for(reference))
            assert {m.eps for m in patched.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

    def test_stored_positions_of_the_encoder(self, tmp_path, load):
        reference = pre_trained()
        reference.encoder.pos_embed = torch.randn(1, 36, 32)
        model = load(reference.state_dict() | {"encoder.pos_embed": reference.encoder.pos_embed}, **PIXELS)
        assert_predicts(model, reference)
        assert_replays(through_a_folder(model, tmp_path / "folder"), reference, clips_for(reference))

    def test_eps_of_the_decoder(self, tmp_path, load):
        reference = pre_trained()
        model = load(reference, **PIXELS)
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
        ("family", "build", "name"),
        [
            ("videomae", pre_trained, "w.pth"),
            ("videomaev2", lambda: pre_trained("videomaev2", init_values=0.1), "w.pth"),
            ("everest", lambda: pre_trained("everest"), "w.safetensors"),
            ("mme", lambda: randomize(MMEPreTrainingModel(**SMALL)), "w.pth"),
            ("mvd", lambda: randomize(MVDPreTrainingModel(**SMALL)), "w.safetensors"),
            ("mvd", lambda: randomize(MVDPreTrainingModel(**SMALL, use_cls_token=True)), "w.pth"),
        ],
        ids=["videomae", "videomaev2", "everest", "mme", "mvd", "mvd-class-token"],
    )
    def test_its_encoder_as_a_classifier(self, tmp_path, load, said, family, build, name):
        """As the repositories' fine-tuning scripts start: the encoder's blocks, mean pooling, a new norm and head."""
        pretrained = build()
        told = None if family in ("mme", "mvd") else family  # by their decoders
        model = load(pretrained, name, family=told, num_labels=7)
        assert isinstance(model, VideoMAEForVideoClassification)
        assert model.config.num_labels == 7
        assert len([line for line in said() if re.search("head|classifier", line)]) == 1
        assert told or family in " ".join(said()).lower()

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
        reference.fc_norm.reset_parameters()
        reference.head.load_state_dict(model.classifier.state_dict())
        assert_classifies(model, reference)
        assert_classifies(repatched(model, tmp_path / "folder"), reference)

    @pytest.mark.parametrize("build", [fine_tuned, lambda: randomize(MMEPreTrainingModel(**SMALL))])
    def test_no_pixel_decoder_to_load(self, load, said, build):
        load(build(), num_labels=5)
        anyway = set(said())
        assert isinstance(load(build(), num_labels=5, for_pretraining=True), VideoMAEForVideoClassification)
        (line,) = set(said()) - anyway
        assert "no pixel decoder" in line


class TestPositions:
    @pytest.mark.parametrize(
        ("options", "asked"),
        [
            # of the size that the table was made for
            ({"num_frames": 16}, {}),
            ({"num_frames": 12, "img_size": 224, "patch_size": 56}, {}),
            ({}, {"num_frames": 8}),
            ({}, {"image_size": 24}),
            ({}, {"num_frames": 8, "image_size": 24}),
            # of another size
            ({"num_frames": 16}, {"image_size": 32}),
            ({"num_frames": 16}, {"num_frames": 8}),
            ({"num_frames": 16}, {"num_frames": 24, "image_size": 40}),
            ({"num_frames": 16}, {"image_size": 16}),
            # sixteen frames that are asked for are not the default
            ({"num_frames": 12, "img_size": 224, "patch_size": 56}, {"num_frames": 16}),
        ],
        ids=str,
    )
    def test_a_stored_table(self, tmp_path, options, asked):
        stored, own = fine_tuned(use_learnable_pos_emb=True, **options), SMALL | options
        model = et.load_videomae(write(tmp_path / "w.pth", stored), num_heads=2, **asked)
        frames, size = asked.get("num_frames", own["num_frames"]), asked.get("image_size", own["img_size"])
        assert (model.config.num_frames, model.config.image_size) == (frames, size)
        assert model.config.everest["position"] == "stored"

        reference = fine_tuned(use_learnable_pos_emb=True, **options | {"num_frames": frames, "img_size": size})
        grids = [(f // 2, s // own["patch_size"]) for f, s in ((own["num_frames"], own["img_size"]), (frames, size))]
        reference.load_state_dict(stored.state_dict() | {"pos_embed": resampled(stored.pos_embed, *grids)})
        assert_classifies(model, reference, batch=1)
        assert_classifies(repatched(model, tmp_path / "folder"), reference, batch=1)

    @pytest.mark.parametrize("family", ["videomae", "mvd"])
    def test_a_stored_table_that_a_formula_gives(self, tmp_path, load, family):
        reference = fine_tuned(family)
        model = load(reference.state_dict() | {"pos_embed": reference.pos_embed}, family="mme")
        assert model.config.everest["position"] == ("mvd" if family == "mvd" else "sinusoid")
        assert_classifies(repatched(model, tmp_path / "folder"), reference)
        assert not (tmp_path / "folder" / "everest.safetensors").exists()

    @pytest.mark.parametrize(("family", "frames", "size"), [("videomae", 16, 16), ("mvd", 4, 40)])
    def test_a_computed_table_is_computed_for_any_size(self, load, family, frames, size):
        reference = fine_tuned(family, num_frames=frames, img_size=size)
        assert_classifies(load(reference, family=family, num_frames=frames, image_size=size), reference)

    def test_mvd_table_by_hand(self, load):
        """A model that lets nothing through but positions: channel by channel, from the description alone."""
        reference = fine_tuned("mvd", depth=1)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.startswith(("patch_embed", "blocks.0.attn.proj", "blocks.0.mlp.fc2")):
                    parameter.zero_()
            tokens = load(reference, family="mvd").videomae(torch.zeros(1, 8, 3, 24, 24)).last_hidden_state[0]
        step, row, column = 3, 2, 1
        expected = []
        for position, width in ((step, 8), (column, 12), (row, 12)):
            angles = [position / 10000 ** (i / (width / 2)) for i in range(width // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert_close(tokens[step * 9 + row * 3 + column], torch.tensor(expected), 1e-6)

    @pytest.mark.parametrize(("tokens", "width"), [(36, 768), (7, 5), (1, 1)])
    def test_the_sinusoid_is_transformers_own(self, tokens, width):
        torch.testing.assert_close(
            positions.sinusoid_table(tokens, width), get_sinusoid_encoding_table(tokens, width)[0], rtol=0, atol=1e-7
        )

    @pytest.mark.parametrize("pretraining", [False, True])
    def test_transformers_computes_no_table_of_a_whole_clip(self, monkeypatch, load, pretraining):
        """Its Python loops take seconds for a ViT-B's; all else that a model built from its config has is the same."""
        asked, original = [], get_sinusoid_encoding_table
        name = f"{VideoMAEModel.__module__}.get_sinusoid_encoding_table"
        monkeypatch.setattr(name, lambda tokens, width: asked.append(tokens) or original(tokens, width))
        model = load(pre_trained() if pretraining else fine_tuned(), **PIXELS if pretraining else {})
        assert sum(asked) <= 2
        plain = type(model)(model.config)
        assert asked[-1] == 36
        for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
            assert type(ours) is type(theirs)
            for attribute in ("num_patches", "image_size", "patch_size", "kernel_size"):
                assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
            if hasattr(theirs, "position_embeddings"):
                torch.testing.assert_close(ours.position_embeddings, theirs.position_embeddings, rtol=0, atol=1e-7)

    def test_a_table_that_no_square_gives(self, load):
        state = fine_tuned(use_learnable_pos_emb=True).state_dict() | {"pos_embed": torch.randn(1, 37, 32)}
        with pytest.raises(ValueError, match=r"pos_embed.*37|37.*pos_embed"):
            load(state)


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


def linear_weights(old: int, new: int) -> np.ndarray:
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - abs(centres[:, None] - np.arange(old)))


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (1, t·s·s, D) of (time steps, places a side) for others: bicubic places, linear time."""
    (t, s), (new_t, new_s) = old, new
    numbers = table.detach().double().view(t, s, s, -1).numpy()
    across, along = cubic_weights(s, new_s), linear_weights(t, new_t)
    numbers = np.einsum("tT,yY,xX,TYXd->tyxd", along, across, across, numbers)
    return torch.from_numpy(numbers).float().reshape(1, new_t * new_s**2, -1)


class TestFamily:
    @pytest.mark.parametrize(
        ("family", "options", "written", "told", "line"),
        [
            ("mvd", {}, {"args": MVD_ARGS}, None, "family 'mvd' by"),
            ("mvd", {}, {"args": {"model": "pretrain_masked_video_student_base_patch16_224"}}, None, "family 'mvd' by"),
            ("mvd", {"use_cls_token": True}, {"key": None}, None, None),
            (
                "everest",
                {},
                {"args": Namespace(model="pretrain_videoms_base_patch16_224")},
                None,
                "family 'everest' by",
            ),
            ("mme", {}, {"args": Namespace(model="vit", linear_probing=False)}, None, "family 'mme' by"),
            ("videomae", {}, {"key": None}, None, "family 'videomae' and its sinusoid positions assumed"),
            ("videomae", {}, {"args": MVD_ARGS}, "videomae", None),  # what the caller says wins
        ],
    )
    def test_found_out_and_said(self, load, said, family, options, written, told, line):
        reference = fine_tuned(family, **options)
        assert_classifies(load(reference, written=written, family=told), reference)
        assert len(said()) == (line is not None)
        assert line is None or line in said()[0]

    @pytest.mark.parametrize("family", ["VideoMAE", "vit", "", 3])
    def test_unknown(self, load, family):
        with pytest.raises(ValueError, match=r"(?s)videomae.*videomaev2.*mme.*mvd.*everest"):
            load(fine_tuned(), family=family)


class TestConfig:
    def test_sizes(self, load):
        state = fine_tuned("videomae", mlp_ratio=1.75, depth=3, num_classes=4)
        config = load(state, num_heads=4, num_frames=4, image_size=40).config
        assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 3, 56)
        assert (config.num_attention_heads, config.num_frames, config.image_size) == (4, 4, 40)
        assert (config.patch_size, config.tubelet_size, config.num_channels) == (8, 2, 3)
        assert config.num_labels == len(config.id2label) == 4
        assert config.use_mean_pooling

    @pytest.mark.parametrize(
        ("family", "options", "position", "lacking", "unsaid"),
        [
            ("videomae", {}, "sinusoid", ["eps"], ["position", "class token"]),
            ("mvd", {}, "mvd", ["eps", "position"], ["class token"]),
            ("mvd", {"use_cls_token": True}, "mvd", ["eps", "position", "class token"], []),
            ("videomae", {"use_learnable_pos_emb": True}, "stored", ["eps", "position"], ["class token"]),
        ],
    )
    def test_what_is_recorded_and_said(self, tmp_path, load, caplog, said, family, options, position, lacking, unsaid):
        model = load(fine_tuned(family, **options), family=family)
        recorded, token = model.config.everest, options.get("use_cls_token", False)
        assert recorded["norm_eps"] == model.config.layer_norm_eps == 1e-6
        assert (recorded["position"], bool(recorded.get("class_token"))) == (position, token)
        caplog.clear()
        model.save_pretrained(tmp_path / "folder")
        assert (tmp_path / "folder" / "everest.safetensors").exists() == (position == "stored" or token)
        (message,) = said()
        assert caplog.records[0].levelno == logging.WARNING
        assert "\n" not in message
        message = message.replace("_", " ")
        assert all(word in message for word in lacking), message
        assert not any(word in message for word in unsaid), message

    def test_where_plain_transformers_lacks_nothing(self, tmp_path, load, caplog, said):
        """VideoMAE's positions and no fc_norm: transformers reads its other norms' eps from the config."""
        reference = fine_tuned(use_mean_pooling=False)
        model = load(reference)
        caplog.clear()
        plain = through_a_folder(model, tmp_path / "folder")
        assert not said()
        assert_classifies(plain, reference)


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


class TestHead:
    @pytest.mark.parametrize("labels", [None, 5])
    def test_kept(self, load, said, labels):
        reference = fine_tuned()
        model = load(reference, num_labels=labels, family="videomae")
        assert torch.equal(model.classifier.weight, reference.head.weight)
        assert torch.equal(model.classifier.bias, reference.head.bias)
        assert model.config.num_labels == 5
        assert not said()

    @pytest.mark.parametrize("stored", [True, False])
    def test_fresh(self, load, caplog, stored):
        reference = fine_tuned()
        state = reference.state_dict()
        if not stored:
            del state["head.weight"], state["head.bias"]
        models = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            caplog.clear()
            models.append(load(state, num_labels=50, family="videomae"))
            (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
            assert re.search("(head|classifier).*50", record.getMessage())
        assert differing(*models) == {"classifier.weight"}  # all else is the file's
        assert models[0].classifier.weight.shape == (50, 32)
        assert models[0].num_labels == models[0].config.num_labels == 50
        assert 0.01 < models[0].classifier.weight.std() < 0.04  # transformers' initializer_range
        assert not models[0].classifier.bias.any()
        clips = clips_for(reference)
        assert_close(classify(models[0], clips)[0], expected_classes(reference, clips)[0])


class TestNothingIsRandom:
    @pytest.mark.parametrize(("pretraining", "name"), [(False, "w.pth"), (True, "w.safetensors")])
    def test_two_seeds_one_model(self, load, global_rng_untouched, pretraining, name):
        reference = pre_trained() if pretraining else fine_tuned(use_learnable_pos_emb=True)
        models = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with global_rng_untouched():
                models.append(load(reference, name, **PIXELS | {"for_pretraining": pretraining}))
        assert not differing(*models)
        assert not any(value.is_meta for value in models[0].state_dict().values())

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_loaded_weights_are_the_models_own(self, tmp_path, load, name):
        model, path = load(fine_tuned(), name), tmp_path / name
        before = path.read_bytes()
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
    def test_encoder_widths(self, load, width, heads):
        model = load(blank(FineTuningModel, embed_dim=width), num_heads=None)
        assert model.config.num_attention_heads == heads
        assert model.videomae.encoder.layer[0].attention.attention.num_attention_heads == heads

    @pytest.mark.parametrize(
        ("width", "given", "heads"),
        [(192, None, (6, 3)), (384, None, (6, 6)), (512, None, (6, 8)), (640, 4, (4, 8)), (192, (4, 2), (4, 2))],
    )
    def test_decoder_widths(self, load, width, given, heads):
        state = blank(PreTrainingModel, embed_dim=384, decoder_dim=width)
        model = load(state, for_pretraining=True, num_heads=given)
        assert (model.config.num_attention_heads, model.config.decoder_num_attention_heads) == heads
        assert model.decoder.decoder_layers[0].attention.attention.num_attention_heads == heads[1]

    def test_one_number_serves_an_unknown_decoder_too(self, load):
        reference = pre_trained(decoder_num_heads=2)
        assert_predicts(load(reference, for_pretraining=True), reference)

    def test_unknown(self, load):
        with pytest.raises(ValueError, match=r"(?s)32.*num_heads|num_heads.*32"):
            load(fine_tuned(), num_heads=None)
        state = blank(PreTrainingModel, embed_dim=384, decoder_dim=24)
        with pytest.raises(ValueError, match=r"(?s)24.*num_heads|num_heads.*24"):
            load(state, for_pretraining=True, num_heads=None)
        assert load(state, num_labels=2, num_heads=None).config.num_attention_heads == 6  # no decoder, no question

    @pytest.mark.parametrize("given", [0, -2, 3, 64, True, "2", 2.0, (2,), (2, 0), (2, 5), (2, 2, 2)])
    def test_impossible(self, load, given):
        with pytest.raises((ValueError, TypeError), match="head"):
            load(pre_trained(), for_pretraining=True, num_heads=given)
