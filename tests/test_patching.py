"""patch_videomae, unpatch_videomae and select_tokens: what they change, record, restore and refuse."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import warnings
from typing import Any

import pytest
import torch
from host_case import unchanged
from torch import Tensor, nn
from transformers import (
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.videomae import modeling_videomae
from versions import needs_argument, set_attention

import everest_tokens as et

CLASSES = [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel]
HEADED = CLASSES[:2]


def first_half(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """A selector that isn't ours: an importable function, so that models with it pickle."""
    return torch.arange(tokens.shape[1] // 2).expand(tokens.shape[0], -1)


def l2_squared(a: Tensor, b: Tensor) -> Tensor:
    """A distance that isn't ours."""
    return (a - b).square().sum(-1)


def kept_of(model: Any, clips: Tensor) -> int:
    return et.select_tokens(model, clips).kept.shape[1]


class TestDefaults:
    @pytest.mark.parametrize(
        ("cls", "kept", "visible"),
        [(VideoMAEForPreTraining, 38, 12), (VideoMAEForVideoClassification, 76, 76), (VideoMAEModel, 76, 76)],
    )
    def test_the_papers_keep_ratios(self, make_model, make_clips, cls, kept, visible):
        model = make_model(cls, image_size=64, num_frames=16)  # 8·4·4 = 128 tokens
        assert et.patch_videomae(model) is model
        selection = et.select_tokens(model, make_clips(model))
        assert selection.kept.shape == (2, kept)  # ⌊0.3·128⌋ and ⌊0.6·128⌋
        assert selection.visible.shape == (2, visible)  # ⌊0.1·128⌋ in pre-training
        assert selection.grid == (8, 4, 4)
        assert model.everest.mask_ratio == 0.9
        assert isinstance(model.everest.selector, et.ReRoSelector)
        assert model.everest.selector.distance == "l2"


class TestInvisibility:
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("return_dict", [True, False])
    def test_outputs_have_the_same_class_and_fields(self, make_model, make_clips, cls, return_dict):
        plain = make_model(cls)
        set_attention(plain, "eager")
        patched = et.patch_videomae(copy.deepcopy(plain))
        clips = make_clips(plain)
        kwargs = {"output_hidden_states": True, "output_attentions": True, "return_dict": return_dict}
        if cls is VideoMAEForVideoClassification:
            kwargs["labels"] = torch.tensor([0, 1])
        mask = torch.arange(48).expand(2, -1) % 2 == 0
        given = {"bool_masked_pos": mask} if cls is VideoMAEForPreTraining else {}
        before, after = plain(clips, **given, **kwargs), patched(clips, **kwargs)
        assert type(after) is type(before)
        if return_dict:
            assert list(after) == list(before)
        else:
            assert [type(item) for item in after] == [type(item) for item in before]
        assert len(after) == len(before)

    def test_num_items_in_batch_reaches_the_loss(self, make_model, make_clips):
        needs_argument(VideoMAEForVideoClassification, "num_items_in_batch")
        plain = make_model(VideoMAEForVideoClassification)
        patched = et.patch_videomae(copy.deepcopy(plain), et.ReRoSelector(1.0))
        kwargs = {"labels": torch.tensor([0, 1]), "num_items_in_batch": torch.tensor(7)}
        clips = make_clips(plain)
        torch.testing.assert_close(patched(clips, **kwargs).loss, plain(clips, **kwargs).loss)
        given = et.select_tokens(patched, clips)
        loss = patched(clips, **kwargs, token_selection=given).loss
        torch.testing.assert_close(loss, plain(clips, **kwargs).loss)


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_each_has_its_own_record(self, make_model, cls, duplicate):
        model = et.patch_videomae(make_model(cls), et.ReRoSelector(0.5))
        twin = duplicate(model)
        assert twin.config.everest == model.config.everest
        twin.everest.selector.keep_ratio, twin.everest.mask_ratio = 0.75, 0.6
        for config, keep_ratio, mask_ratio in (
            (twin.config, 0.75, 0.6),
            (copy.deepcopy(twin.config), 0.75, 0.6),
            (model.config, 0.5, 0.9),
        ):
            for record in (config.everest, config.to_dict()["everest"]):
                assert record["selector"]["keep_ratio"] == keep_ratio
                assert record["mask_ratio"] == mask_ratio
        assert type(copy.deepcopy(twin.config).everest) is dict
        et.unpatch_videomae(twin)
        assert not hasattr(twin.config, "everest")
        assert hasattr(model.config, "everest")

    def test_a_copy_of_a_config_restores_as_a_folder_does(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), et.ReRoSelector(0.25))
        other = VideoMAEForVideoClassification(copy.deepcopy(model.config))
        assert kept_of(et.patch_videomae(other), make_clips(model)) == 12


class TestLiveSettings:
    def test_each_takes_effect_at_the_next_forward(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        clips = make_clips(model)
        assert model(clips).logits.shape[1] == 10  # 14 - 4 of 48
        model.everest.selector.keep_ratio = 0.5
        assert model(clips).logits.shape[1] == 20
        model.everest.mask_ratio = 0.75
        assert model(clips).logits.shape[1] == 12
        model.everest.selector = et.RandomSelector(0.75)
        assert model(clips).logits.shape[1] == 24
        model.everest.visible = et.TubeSelector(0.5)
        model.everest.selector = et.RandomSelector(1.0)
        assert model(clips).logits.shape[1] == 24
        model.everest.selector = first_half
        model.everest.visible = None
        assert model(clips).logits.shape[1] == 12
        model.everest.frame_sampler = et.InfoFrameSampler(1.5)
        assert model(make_clips(model, frames=12)).logits.shape[1] == 12
        model.everest.frame_sampler.alpha = 2.0
        assert model(make_clips(model, frames=16)).logits.shape[1] == 12
        model.everest.frame_sampler = None
        assert model(clips).logits.shape[1] == 12

    @pytest.mark.parametrize("cls", CLASSES)
    def test_config_is_always_the_live_state_as_json(self, make_model, cls):
        model = et.patch_videomae(make_model(cls))
        policy, task = model.everest, "pretraining" if cls is VideoMAEForPreTraining else "encoder"

        def recorded() -> dict[str, Any]:
            found = json.loads(json.dumps(model.config.everest))
            assert found == model.config.everest  # no tuples or other things that JSON would change
            assert json.loads(model.config.to_json_string())["everest"] == found
            assert found["task"] == task
            return found

        keep = 0.3 if task == "pretraining" else 0.6
        rero = {"name": "ReRoSelector", "keep_ratio": keep, "distance": "l2", "descending": True}
        rero |= {"anchor": None, "keep_tokens": None, "camera": "ignore"}
        written = {"task": task, "selector": rero, "mask_ratio": 0.9, "visible": None, "frame_sampler": None}
        assert recorded() == {**recorded(), **written}
        policy.selector.keep_ratio, policy.selector.distance, policy.selector.descending = 0.5, "cka", False
        assert recorded()["selector"] == {**rero, "keep_ratio": 0.5, "distance": "cka", "descending": False}
        policy.selector.keep_tokens, policy.selector.anchor, policy.selector.camera = 9, "middle", "compensate"
        written = {"keep_ratio": None, "keep_tokens": 9, "anchor": "middle", "camera": "compensate"}
        assert recorded()["selector"] == {**rero, "distance": "cka", "descending": False, **written}
        policy.mask_ratio = 0.8
        assert recorded()["mask_ratio"] == 0.8
        policy.frame_sampler = et.InfoFrameSampler(1.5)
        policy.frame_sampler.alpha = 2
        assert recorded()["frame_sampler"] == {"name": "InfoFrameSampler", "alpha": 2.0}
        policy.selector = et.TubeSelector(0.5)
        policy.selector.keep_ratio = 0.25
        assert recorded()["selector"] == {"name": "TubeSelector", "keep_ratio": 0.25}
        policy.selector = et.ReRoSelector(distance=l2_squared)
        assert recorded()["selector"]["distance"] == "custom"
        policy.selector = first_half
        assert recorded()["selector"] == {"name": "custom"}
        if task == "pretraining":
            policy.visible = et.TubeSelector(0.25)
            policy.visible.keep_ratio = 0.5
            assert recorded()["visible"] == {"name": "TubeSelector", "keep_ratio": 0.5}
            policy.visible = None
            assert recorded()["visible"] is None


class TestSaving:
    def test_a_record_that_lacks_something_says_what(self, make_model):
        model = make_model(VideoMAEModel)
        model.config.everest = {"task": "encoder", "mask_ratio": 0.9, "visible": None}
        with pytest.raises(ValueError, match="lacks frame_sampler, selector"):
            et.patch_videomae(model)
        assert not hasattr(model, "everest")

    @pytest.mark.parametrize("cls", CLASSES)
    def test_repatching_restores_the_settings(self, make_model, make_clips, tmp_path, cls, caplog):
        visible = {"visible": et.ReRoSelector(0.25, distance="cosine", descending=False)}
        settings = {} if cls is not VideoMAEForPreTraining else visible
        model = et.patch_videomae(
            make_model(cls),
            et.ReRoSelector(0.5, distance="cosine", descending=False),
            mask_ratio=0.8,
            frame_sampler=et.InfoFrameSampler(2.0),
            **settings,
        )
        model.everest.selector.keep_ratio = 0.75  # the live state, not the one at patching
        model.save_pretrained(tmp_path)
        with caplog.at_level(logging.INFO, "everest_tokens"):
            again = et.patch_videomae(cls.from_pretrained(tmp_path))
        assert not [record for record in caplog.records if record.name.startswith("everest_tokens")]
        assert again.config.everest == model.config.everest
        assert again.everest.selector.keep_ratio == 0.75
        assert again.everest.frame_sampler.alpha == 2.0
        clips = make_clips(model, frames=16)
        expected, actual = et.select_tokens(model, clips), et.select_tokens(again, clips)
        assert torch.equal(actual.kept, expected.kept)
        assert torch.equal(actual.visible, expected.visible)
        again.everest.selector.keep_ratio = 0.5  # the restored ones are live
        assert again.config.everest["selector"]["keep_ratio"] == 0.5
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]

    @pytest.mark.parametrize(
        ("saved", "loaded", "keep"),
        [
            (VideoMAEForPreTraining, VideoMAEForVideoClassification, 0.6),
            (VideoMAEForPreTraining, VideoMAEModel, 0.6),
            (VideoMAEForVideoClassification, VideoMAEForPreTraining, 0.3),
        ],
    )
    def test_another_task_gets_the_defaults_and_one_log_line(self, make_model, tmp_path, caplog, saved, loaded, keep):
        et.patch_videomae(make_model(saved), et.TubeSelector(0.75), mask_ratio=0.8).save_pretrained(tmp_path)
        model = loaded.from_pretrained(tmp_path)
        caplog.clear()
        with caplog.at_level(logging.INFO, "everest_tokens"):
            et.patch_videomae(model)
        assert isinstance(model.everest.selector, et.ReRoSelector)
        assert model.everest.selector.keep_ratio == keep
        assert model.everest.mask_ratio == 0.9
        lines = [record for record in caplog.records if record.name.startswith("everest_tokens")]
        assert len(lines) == 1
        assert "default" in lines[0].getMessage()
        assert model.config.everest["task"] == ("pretraining" if loaded is VideoMAEForPreTraining else "encoder")

    def test_the_backbone_of_a_classifier_is_the_same_task(self, make_model, tmp_path, caplog):
        et.patch_videomae(make_model(VideoMAEForVideoClassification), et.TubeSelector(0.75)).save_pretrained(tmp_path)
        model = VideoMAEModel.from_pretrained(tmp_path)
        caplog.clear()
        with caplog.at_level(logging.INFO, "everest_tokens"):
            et.patch_videomae(model)
        assert model.everest.selector.keep_ratio == 0.75
        assert not caplog.records

    def test_explicit_arguments_win(self, make_model, tmp_path):
        et.patch_videomae(
            make_model(VideoMAEForPreTraining),
            et.ReRoSelector(0.75),
            mask_ratio=0.7,
            frame_sampler=et.InfoFrameSampler(2.0),
        ).save_pretrained(tmp_path)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return et.patch_videomae(VideoMAEForPreTraining.from_pretrained(tmp_path), *args, **kwargs).everest

        policy = patched(et.RandomSelector(0.5))
        assert (type(policy.selector), policy.selector.keep_ratio) == (et.RandomSelector, 0.5)
        assert (policy.mask_ratio, policy.frame_sampler.alpha) == (0.7, 2.0)
        assert patched(mask_ratio=0.8).mask_ratio == 0.8
        assert patched(mask_ratio=0.9).mask_ratio == 0.9  # also where it is the default's value
        assert patched(frame_sampler=et.InfoFrameSampler(1.5)).frame_sampler.alpha == 1.5
        assert patched(mask_ratio=0.8).selector.keep_ratio == 0.75

    @pytest.mark.parametrize("kind", ["selector", "distance", "visible"])
    def test_a_custom_selector_must_be_passed_again(self, make_model, make_clips, tmp_path, kind):
        arguments = {
            "selector": {"selector": first_half},
            "distance": {"selector": et.ReRoSelector(0.5, distance=l2_squared)},
            "visible": {"selector": et.RandomSelector(1.0), "visible": lambda tokens, grid: first_half(tokens, grid)},
        }[kind]
        et.patch_videomae(make_model(VideoMAEForPreTraining), **arguments).save_pretrained(tmp_path)
        model = VideoMAEForPreTraining.from_pretrained(tmp_path)
        with unchanged(model), pytest.raises(ValueError, match="visible" if kind == "visible" else "selector"):
            et.patch_videomae(model)
        et.patch_videomae(model, **arguments)
        assert kept_of(model, make_clips(model)) == (48 if kind == "visible" else 24)

    @pytest.mark.parametrize("cls", HEADED)
    def test_norm_eps_survives(self, make_model, make_clips, tmp_path, cls):
        def norm(model: Any) -> nn.LayerNorm:
            return model.fc_norm if cls is VideoMAEForVideoClassification else model.decoder.norm

        plain = make_model(cls)
        norm(plain).eps = 1e-2
        model = et.patch_videomae(plain)
        assert norm(model).eps == 1e-2
        assert model.config.everest["norm_eps"] == 1e-2
        model.save_pretrained(tmp_path / "first")
        again = cls.from_pretrained(tmp_path / "first")
        assert norm(again).eps == 1e-5  # what transformers hard-codes
        et.patch_videomae(again, et.ReRoSelector(0.6))  # other explicit settings leave it alone
        assert norm(again).eps == 1e-2
        again.save_pretrained(tmp_path / "second")
        last = et.patch_videomae(cls.from_pretrained(tmp_path / "second"))
        et.patch_videomae(model, et.ReRoSelector(0.6))  # twice on a patched one
        clips = make_clips(model)
        selection = et.select_tokens(model, clips)
        expected = model(clips, token_selection=selection).logits
        for each in (again, last):
            assert torch.equal(each(clips, token_selection=selection).logits, expected)
        assert norm(et.unpatch_videomae(again)).eps == 1e-2  # the checkpoint's, not the patch's
        assert again.config.everest["norm_eps"] == 1e-2
        norm(model).eps = 1e-3  # while patched
        assert norm(et.patch_videomae(model)).eps == 1e-3
        assert norm(et.unpatch_videomae(model)).eps == 1e-3


class TestWarnings:
    def test_a_warning_made_an_error_changes_nothing(self, make_model):
        model = make_model(VideoMAEForVideoClassification, use_mean_pooling=False)
        with unchanged(model), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="use_mean_pooling"):
                et.patch_videomae(model)

    @pytest.mark.parametrize(
        ("cls", "how"),
        [(cls, "keyword") for cls in CLASSES]
        + [(VideoMAEForPreTraining, "positional"), (VideoMAEModel, "positional")],  # a classifier's second is labels
    )
    def test_bool_masked_pos_is_ignored_with_one_warning(self, make_model, make_clips, cls, how):
        needs_argument(cls, "bool_masked_pos")
        model = et.patch_videomae(make_model(cls))
        clips, mask = make_clips(model), torch.arange(48).expand(2, -1) % 2 == 0
        torch.manual_seed(0)
        expected = model(clips)[0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                torch.manual_seed(0)
                out = model(clips, mask) if how == "positional" else model(clips, bool_masked_pos=mask)
                assert torch.equal(out[0], expected)
            given = et.select_tokens(model, clips.flip(1))  # and a given selection wins
            out = model(clips, bool_masked_pos=mask, token_selection=given)
            assert torch.equal(out[0], model(clips, token_selection=given)[0])
        assert [warning.category for warning in caught] == [UserWarning]
        assert "bool_masked_pos" in str(caught[0].message)

    def test_no_mean_pooling_warns_once_at_patching(self, make_model, make_clips):
        model = make_model(VideoMAEForVideoClassification, use_mean_pooling=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            et.patch_videomae(model)
            for _ in range(2):
                model(make_clips(model))
        assert len(caught) == 1
        assert "use_mean_pooling=True" in str(caught[0].message)
        assert caught[0].filename == __file__  # points at the caller

    @pytest.mark.parametrize(("cls", "pooling"), [(cls, True) for cls in CLASSES] + [(VideoMAEForPreTraining, False)])
    def test_silence_otherwise(self, make_model, make_clips, cls, pooling):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = et.patch_videomae(make_model(cls, use_mean_pooling=pooling))
            model(make_clips(model))
            et.select_tokens(model, make_clips(model))


class SubclassedClassifier(VideoMAEForVideoClassification):
    pass


class SubclassedPreTraining(VideoMAEForPreTraining):
    def forward(self, *args, **kwargs):
        return None


class SubclassedEmbeddings(modeling_videomae.VideoMAEEmbeddings):
    pass


def vit(make_model: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(image_size=32, **sizes))


def own_embeddings(make_model: Any) -> nn.Module:
    model = make_model(VideoMAEModel)
    model.embeddings.__class__ = SubclassedEmbeddings
    return model


class TestRefusals:
    @pytest.mark.parametrize(
        "build",
        [
            lambda make: nn.Linear(2, 2),
            lambda make: make(VideoMAEModel).encoder,
            vit,
            lambda make: make(SubclassedPreTraining),
            own_embeddings,
            lambda make: None,
            lambda make: "MCG-NJU/videomae-base",
        ],
        ids=["linear", "encoder", "vit", "own-forward", "own-embeddings", "none", "name"],
    )
    @pytest.mark.parametrize("call", [et.patch_videomae, et.count_flops])
    def test_what_cannot_be_patched_names_what_can(self, make_model, build, call):
        with pytest.raises(TypeError, match="VideoMAEForVideoClassification"):
            call(build(make_model))

    def test_a_subclass_that_a_patch_does_not_replace_is_fine(self, make_model, make_clips):
        model = et.patch_videomae(make_model(SubclassedClassifier))
        assert type(model) is SubclassedClassifier
        assert kept_of(model, make_clips(model)) == 28

    @pytest.mark.parametrize("where", ["", "videomae", "videomae.encoder.layer.0", "videomae.embeddings"])
    def test_an_instance_level_forward(self, make_model, where):
        model = make_model(VideoMAEForVideoClassification)
        module = model.get_submodule(where)
        module.forward = module.forward
        with pytest.raises(TypeError, match=r"patch_videomae before|patch first"):
            et.patch_videomae(model)
        assert not hasattr(model, "everest")
        assert not hasattr(model.config, "everest")

    @pytest.mark.parametrize("selector", [nn.Linear(2, 2), 0.3, "l2", et.ReRoSelector])
    @pytest.mark.parametrize("name", ["selector", "visible"])
    def test_selectors(self, make_model, selector, name):
        with pytest.raises(TypeError, match=name):
            et.patch_videomae(make_model(VideoMAEForPreTraining), **{name: selector})
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        recorded = copy.deepcopy(model.config.everest)
        with pytest.raises(TypeError, match=name):
            setattr(model.everest, name, selector)
        assert model.config.everest == recorded

    @pytest.mark.parametrize(
        ("selector", "arguments"),
        [
            (None, {"mask_ratio": 0.7}),  # 14 kept, 14 visible: no target
            (et.RandomSelector(0.75), {"visible": et.TubeSelector(0.1)}),  # how many they share is random
            (et.RunningCellSelector(0.5), {}),  # 3×4 places: an odd height
        ],
    )
    def test_settings_that_cannot_work_on_this_model(self, make_model, selector, arguments):
        with pytest.raises(ValueError, match=r"\d|grid"):
            et.patch_videomae(make_model(VideoMAEForPreTraining), selector, **arguments)

    def test_live_settings_that_cannot_work(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        model.everest.mask_ratio = 0.5  # its selector may be replaced next, so that it only shows when run
        with pytest.raises(ValueError, match="visible"):
            model(make_clips(model))

    def test_mask_ratio(self, make_model):
        model = make_model(VideoMAEForPreTraining)
        for value in (0, 1, -0.5, 1.5, True, "0.9", None):
            with pytest.raises(ValueError, match="mask_ratio"):
                et.patch_videomae(model, mask_ratio=value)

    def test_one_time_step(self, make_model):
        with pytest.raises(ValueError, match=r"two|2"):
            et.patch_videomae(make_model(VideoMAEModel, num_frames=2))


class TestSelectTokens:
    def test_importance_only_of_our_selector(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEModel), first_half)
        assert et.select_tokens(model, make_clips(model)).importance is None

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
    def test_looks_through_wrappers(self, make_model, make_clips, wrap):
        model = make_model(VideoMAEForVideoClassification)
        wrapped = wrap(model)
        assert et.patch_videomae(wrapped) is wrapped
        clips = make_clips(model)
        assert torch.equal(et.select_tokens(wrapped, clips).kept, et.select_tokens(model, clips).kept)
        assert et.count_flops(wrapped) == et.count_flops(model)
        et.unpatch_videomae(wrapped)
        assert not hasattr(model, "everest")


class TestPublicInterface:
    def test_parameters(self):
        parameters = inspect.signature(et.patch_videomae).parameters
        assert list(parameters)[:6] == ["model", "selector", "mask_ratio", "visible", "frame_sampler", "drop_path"]
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[2:])
        assert (parameters["mask_ratio"].default, parameters["drop_path"].default) == (0.9, 0.0)
        assert list(inspect.signature(et.select_tokens).parameters) == ["model", "pixel_values", "generator"]


class TestWhatIsPatched:
    def test_two_models_of_one_config_keep_their_own_settings(self, make_model, make_clips, tmp_path, caplog):
        config = copy.deepcopy(make_model(VideoMAEForPreTraining).config)
        first, second = VideoMAEForPreTraining(config), VideoMAEForVideoClassification(config)
        et.patch_videomae(first, et.ReRoSelector(0.5))
        with caplog.at_level(logging.INFO, "everest_tokens"):
            et.patch_videomae(second)  # another model's settings are not a checkpoint's
        assert len(caplog.records) == 1
        first.everest.selector.keep_ratio = 0.75
        assert (first.config.everest["task"], first.config.everest["selector"]["keep_ratio"]) == ("pretraining", 0.75)
        assert (second.config.everest["task"], second.config.everest["selector"]["keep_ratio"]) == ("encoder", 0.6)
        assert kept_of(first, make_clips(first)) == 36
        assert all(part.config is second.config for part in (second.videomae, second.videomae.encoder))
        et.unpatch_videomae(second)
        first.save_pretrained(tmp_path)
        again = et.patch_videomae(VideoMAEForPreTraining.from_pretrained(tmp_path))
        assert again.everest.selector.keep_ratio == 0.75

    def test_a_dropout_of_the_users_own_survives(self, make_model):
        model = make_model(VideoMAEForVideoClassification)
        own = nn.Sequential(nn.Dropout(0.1), nn.Identity())
        model.videomae.encoder.layer[0].output.dropout = own
        for rate in (0.0, 0.1):
            et.unpatch_videomae(et.patch_videomae(model, drop_path=rate))
            assert model.videomae.encoder.layer[0].output.dropout is own

    def test_custom_visible_tokens_lie_among_the_kept(self, make_model, make_clips):
        def last(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
            return torch.arange(40, 48).expand(len(tokens), -1)

        model = et.patch_videomae(make_model(VideoMAEForPreTraining), first_half, visible=last)
        with pytest.raises(ValueError, match="among the kept"):
            model(make_clips(model))
