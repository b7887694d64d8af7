"""examples/optimisation.py against learning rates worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimisation import layer_decay_groups
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

import everest_tokens as et

# Two blocks: layers 0 (embeddings), 1, 2 (blocks) and 3 (the rest), 0.5 to the power of 3, 2, 1 and 0.
RATES = {
    "videomae.embeddings": 0.125,
    "videomae.encoder.layer.0": 0.25,
    "videomae.encoder.layer.1": 0.5,
    "videomae.layernorm": 1.0,
    "fc_norm": 1.0,
    "classifier": 1.0,
}
# The matrices and the kernel of a block and of the rest; everything else in a classifier is a bias or of a norm.
MATRICES = ("projection.weight", "query.weight", "key.weight", "value.weight", "dense.weight", "classifier.weight")


def expected_rate(name: str) -> float:
    (rate,) = [rate for prefix, rate in RATES.items() if name.startswith(prefix + ".")]
    return rate


def settings_by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """{name: (lr, weight decay)} of what is in the groups; a parameter in two of them, or in none's model, fails."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(dict(listed)) == len(listed)
    return dict(listed)


@pytest.mark.filterwarnings("ignore:use_mean_pooling=False")
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_layers_learn_the_slower_the_lower(make_model: Any, mean_pooling: bool, patched: bool) -> None:
    model = make_model(VideoMAEForVideoClassification, use_mean_pooling=mean_pooling)
    if patched:
        et.patch_videomae(model, drop_path=0.1)
    found = settings_by_name(model, layer_decay_groups(model, 1.0, 0.05, 0.5))
    names = [name for name, _ in model.named_parameters()]
    assert ("fc_norm.weight" if mean_pooling else "videomae.layernorm.weight") in names
    assert any(name.endswith(("q_bias", "query.bias")) for name in names)
    assert found == {name: (expected_rate(name), 0.05 if name.endswith(MATRICES) else 0.0) for name in names}


def test_the_recipes_rates_in_a_deeper_model(make_model: Any) -> None:
    model = make_model(VideoMAEForVideoClassification, num_hidden_layers=12)
    found = settings_by_name(model, layer_decay_groups(model, 5e-4, 0.05, 0.75))
    assert found["videomae.embeddings.patch_embeddings.projection.weight"][0] == pytest.approx(
        5e-4 * 0.0237573, rel=1e-5
    )
    assert found["videomae.encoder.layer.0.output.dense.weight"][0] == pytest.approx(5e-4 * 0.0316764, rel=1e-5)
    assert found["videomae.encoder.layer.10.output.dense.weight"][0] == pytest.approx(5e-4 * 0.5625)
    assert found["videomae.encoder.layer.11.output.dense.weight"][0] == pytest.approx(5e-4 * 0.75)
    assert found["classifier.weight"][0] == 5e-4


def test_the_first_group_has_the_full_rate_and_no_two_are_alike(make_model: Any) -> None:
    groups = layer_decay_groups(make_model(VideoMAEForVideoClassification), 1.0, 0.05, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        *[(1.0, 0.05), (1.0, 0.0), (0.5, 0.05), (0.5, 0.0)],
        *[(0.25, 0.05), (0.25, 0.0), (0.125, 0.05), (0.125, 0.0)],
    ]


@pytest.mark.parametrize("patched", [False, True])
def test_pretraining_has_two_groups(make_model: Any, patched: bool) -> None:
    model = make_model(VideoMAEForPreTraining)
    if patched:
        et.patch_videomae(model)
    groups = layer_decay_groups(model, 1e-3, 0.05, 1.0)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.05), (1e-3, 0.0)]
    found = settings_by_name(model, groups)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["mask_token"] == (1e-3, 0.0)  # a vector, although stored as (1, 1, D)
    assert found["encoder_to_decoder.weight"] == found["decoder.head.weight"] == (1e-3, 0.05)
    assert found["decoder.head.bias"] == found["decoder.norm.weight"] == (1e-3, 0.0)


def test_the_decoder_learns_at_the_full_rate(make_model: Any) -> None:
    model = make_model(VideoMAEForPreTraining)
    found = settings_by_name(model, layer_decay_groups(model, 1.0, 0.05, 0.5))
    assert found["decoder.decoder_layers.0.output.dense.weight"] == (1.0, 0.05)
    assert found["videomae.encoder.layer.0.output.dense.weight"] == (0.25, 0.05)


def test_a_class_token_belongs_to_the_embeddings(make_model: Any) -> None:
    model = make_model(VideoMAEForVideoClassification)
    model.videomae.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, 32))  # as a converted MVD has it
    found = settings_by_name(model, layer_decay_groups(model, 1.0, 0.05, 0.5))
    assert found["videomae.embeddings.cls_token"] == (0.125, 0.0)


def test_a_bare_encoder(make_model: Any) -> None:
    model = make_model(VideoMAEModel)
    found = settings_by_name(model, layer_decay_groups(model, 1.0, 0.0, 0.5))
    assert found["embeddings.patch_embeddings.projection.weight"] == (0.125, 0.0)
    assert found["encoder.layer.1.output.dense.weight"] == (0.5, 0.0)


def test_wrappers_are_looked_through(make_model: Any) -> None:
    model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
    wrapped = torch.compile(nn.ModuleDict({"model": model})["model"])  # nothing is compiled before it is called
    plain = settings_by_name(model, layer_decay_groups(model, 1.0, 0.05, 0.5))
    assert settings_by_name(model, layer_decay_groups(wrapped, 1.0, 0.05, 0.5)) == plain


def test_frozen_parameters_are_left_out_and_adapters_have_their_blocks_rate(make_model: Any) -> None:
    model = make_model(VideoMAEForVideoClassification)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], bias="none")
    )
    found = settings_by_name(adapted, layer_decay_groups(adapted, 1.0, 0.05, 0.5))
    assert found.keys() == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(found) == 2 * 2 * 2 + 2  # A and B of query and value in each block, the classifier's weight and bias
    for name, rates in found.items():
        if "lora" in name:
            assert rates == (0.25 if ".layer.0." in name else 0.5, 0.05)
        else:
            assert rates == (1.0, 0.0 if name.endswith("bias") else 0.05)


def test_an_optimiser_and_a_scheduler_keep_the_proportions(make_model: Any) -> None:
    model = make_model(VideoMAEForVideoClassification)
    optimiser = torch.optim.SGD(layer_decay_groups(model, 0.1, 0.0, 0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 if step else 1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimiser.step()
        scheduler.step()
    for name, parameter in model.named_parameters():  # a full step and a half one
        expected = before[name] - 0.15 * expected_rate(name)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0.0, 0.05, 0.75), "lr must be positive and finite, got 0.0"),
        ((float("nan"), 0.05, 0.75), "lr must be positive and finite, got nan"),
        ((1.0, -0.1, 0.75), "weight_decay must be at least 0 and finite, got -0.1"),
        ((1.0, 0.05, 0.0), r"layer_decay must be in \(0, 1\], got 0.0"),
        ((1.0, 0.05, 1.1), r"layer_decay must be in \(0, 1\], got 1.1"),
    ],
)
def test_numbers_out_of_range_are_refused(make_model: Any, numbers: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_decay_groups(make_model(VideoMAEForVideoClassification), *numbers)


def test_other_models_and_wholly_frozen_ones_are_refused(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a transformers VideoMAE .*Linear"):
        layer_decay_groups(nn.Linear(2, 2), 1.0, 0.05, 0.75)
    with pytest.raises(ValueError, match="no trainable parameters"):
        layer_decay_groups(make_model(VideoMAEForVideoClassification).requires_grad_(False), 1.0, 0.05, 0.75)
