"""count_flops, against the paper's tables and against torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae import modeling_videomae

import everest_tokens as et

# width, depth, heads; decoder width and heads
SIZES = {
    "S": (384, 12, 6, 192, 3),
    "B": (768, 12, 12, 384, 6),
    "L": (1024, 24, 16, 512, 8),
}


@pytest.fixture(autouse=True)
def _empty_position_tables(monkeypatch):
    """Filling a table takes seconds with transformers' loops, and its values cost nothing to count."""
    empty = lambda tokens, width: torch.zeros(1, tokens, width, device="cpu")  # noqa: E731
    monkeypatch.setattr(modeling_videomae, "get_sinusoid_encoding_table", empty)


def full_size(cls: Any, size: str, **overrides: Any) -> Any:
    """A model of the paper's size on the meta device."""
    width, depth, heads, decoder_width, decoder_heads = SIZES[size]
    arguments = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * decoder_width,
        "num_labels": 400,
    }
    with torch.device("meta"):
        return cls(VideoMAEConfig(**{**arguments, **overrides}))


def counted_by_torch(model: Any, frames: int | None = None, **kwargs: Any) -> float:
    """Half of what FlopCounterMode counts for one clip: it counts a multiply–accumulate as two."""
    config = model.config
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    device = next(model.parameters()).device
    clip = torch.empty(1, frames or config.num_frames, config.num_channels, *size, device=device)
    if device.type == "cpu":
        clip.normal_()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(clip, **kwargs)
    return counter.get_total_flops() / 2


def assert_agrees(model: Any, frames: int | None = None) -> None:
    assert et.count_flops(model).total == pytest.approx(counted_by_torch(model, frames), rel=0.005)


class TestThePapersFigures:
    @pytest.mark.parametrize(("size", "gflops"), [("S", 57.0), ("B", 180.5), ("L", 597.2)])
    def test_fine_tuning_unpatched(self, size, gflops):
        assert et.count_flops(full_size(VideoMAEForVideoClassification, size)).total / 1e9 == pytest.approx(
            gflops, rel=0.01
        )

    @pytest.mark.parametrize(("size", "gflops"), [("S", 29.1), ("B", 98.1), ("L", 330.0)])
    def test_fine_tuning(self, size, gflops):
        model = et.patch_videomae(full_size(VideoMAEForVideoClassification, size), et.ReRoSelector(0.6))
        assert et.count_flops(model).total / 1e9 == pytest.approx(gflops, rel=0.01)

    @pytest.mark.parametrize(("size", "gflops"), [("S", 11.6), ("B", 35.5), ("L", 83.1)])
    def test_pretraining_unpatched(self, size, gflops):
        assert et.count_flops(full_size(VideoMAEForPreTraining, size)).total / 1e9 == pytest.approx(gflops, rel=0.01)

    @pytest.mark.parametrize(("size", "gflops"), [("S", 6.3), ("B", 21.5), ("L", 60.8)])
    def test_pretraining(self, size, gflops):
        model = et.patch_videomae(full_size(VideoMAEForPreTraining, size), et.ReRoSelector(0.4))
        assert et.count_flops(model).total / 1e9 == pytest.approx(gflops, rel=0.01)

    def test_pretraining_at_keep_ratio_03(self):
        model = et.patch_videomae(full_size(VideoMAEForPreTraining, "B"))
        assert et.count_flops(model).total / 1e9 == pytest.approx(19.8, rel=0.01)  # Table 10


# tiny depths: a layer counts the same the tenth time
SHALLOW = {"num_hidden_layers": 2, "decoder_num_hidden_layers": 1}
SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"image_size": (96, 160), "num_frames": 8}, id="96x160"),
    pytest.param({"num_channels": 1}, id="grey"),
    pytest.param({"tubelet_size": 1, "num_frames": 8}, id="tubelet1"),
    pytest.param({"patch_size": 32, "image_size": 256}, id="patch32"),
    pytest.param({"intermediate_size": 512, "decoder_intermediate_size": 100}, id="narrow-mlp"),
    pytest.param({"num_labels": 3, "use_mean_pooling": False}, id="few-labels"),
]


@pytest.mark.filterwarnings("ignore:use_mean_pooling")
class TestTorchsCounter:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("cls", [VideoMAEForVideoClassification, VideoMAEModel])
    def test_unpatched_encoders(self, cls, shape):
        assert_agrees(full_size(cls, "S", **{**SHALLOW, **shape}))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel])
    def test_patched(self, cls, shape):
        assert_agrees(et.patch_videomae(full_size(cls, "S", **{**SHALLOW, **shape}), et.ReRoSelector(0.5)))

    @pytest.mark.parametrize("distance", ["l2", "l1", "cosine", "cka"])
    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_each_distance(self, cls, distance):
        assert_agrees(et.patch_videomae(full_size(cls, "S", **SHALLOW), et.ReRoSelector(0.4, distance=distance)))

    @pytest.mark.parametrize(("alpha", "frames"), [(1.3, 20), (1.5, 24), (2.0, 32)])
    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_frame_sampler(self, cls, alpha, frames):
        model = full_size(cls, "S", **SHALLOW)
        assert_agrees(et.patch_videomae(model, frame_sampler=et.InfoFrameSampler(alpha)), frames)

    @pytest.mark.parametrize(
        ("selector", "visible"),
        [
            (et.RunningCellSelector(0.5), et.TubeSelector(0.1)),
            (et.RandomSelector(1.0), et.TubeSelector(0.1)),
            (et.RandomSelector(1.0), et.RandomSelector(0.25)),
            (et.TubeSelector(0.5), None),
            (et.RandomSelector(0.3), None),
        ],
    )
    def test_other_selectors(self, selector, visible):
        assert_agrees(et.patch_videomae(full_size(VideoMAEForPreTraining, "S", **SHALLOW), selector, visible=visible))

    def test_unpatched_pretraining_is_videomaes_tube_mask(self):
        model = full_size(VideoMAEForPreTraining, "S", **SHALLOW)
        by_tubes = et.patch_videomae(
            full_size(VideoMAEForPreTraining, "S", **SHALLOW), et.RandomSelector(1.0), visible=et.TubeSelector(0.1)
        )
        assert et.count_flops(model).total == et.count_flops(by_tubes).total
        assert et.count_flops(model).total == pytest.approx(counted_by_torch(by_tubes), rel=0.005)

    @pytest.mark.parametrize("num_visible", [1, 20, 40])
    def test_unpatched_pretraining_with_a_mask(self, make_model, num_visible):
        model = make_model(VideoMAEForPreTraining)  # boolean masks don't run on the meta device
        mask = torch.ones(1, 48, dtype=torch.bool)
        mask[:, :num_visible] = False
        with sdpa_kernel(SDPBackend.MATH):  # the counter misses fused attention on the CPU
            expected = counted_by_torch(model, bool_masked_pos=mask)
        assert et.count_flops(model, num_visible=num_visible).total == pytest.approx(expected, rel=0.005)


class TestParts:
    def test_of_a_classifier(self):
        model = full_size(VideoMAEForVideoClassification, "S")
        count = et.count_flops(model)
        assert (count.selection, count.decoder) == (0, 0)
        assert count.patch_embedding == 1568 * 2 * 16 * 16 * 3 * 384
        assert count.head == 384 * 400
        assert count.encoder == 12 * (1568 * 12 * 384**2 + 2 * 1568**2 * 384)
        patched = et.count_flops(et.patch_videomae(model))
        assert patched.patch_embedding == count.patch_embedding
        assert patched.head == count.head
        assert patched.encoder == 12 * (940 * 12 * 384**2 + 2 * 940**2 * 384)
        assert patched.selection == 7 * 196 * 384  # one product for each channel of each pair

    def test_of_a_pretraining_model(self):
        model = et.patch_videomae(full_size(VideoMAEForPreTraining, "S"))
        count = et.count_flops(model)
        assert count.encoder == 12 * (156 * 12 * 384**2 + 2 * 156**2 * 384)
        assert count.decoder == 156 * 384 * 192 + 4 * (470 * 12 * 192**2 + 2 * 470**2 * 192)
        assert count.head == 314 * 192 * 1536

    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel])
    def test_total_is_their_sum(self, cls):
        count = et.count_flops(et.patch_videomae(full_size(cls, "S")))
        parts = (count.selection, count.patch_embedding, count.encoder, count.decoder, count.head)
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        assert count.total == sum(parts)

    def test_a_backbone_has_no_head(self):
        assert et.count_flops(full_size(VideoMAEModel, "S")).head == 0

    def test_candidates_are_embedded(self):
        model = full_size(VideoMAEForVideoClassification, "S")
        before = et.count_flops(et.patch_videomae(model))
        model.everest.frame_sampler = et.InfoFrameSampler(1.5)
        after = et.count_flops(model)
        assert after.patch_embedding == before.patch_embedding * 3 // 2
        assert (after.encoder, after.head) == (before.encoder, before.head)

    def test_live_settings_and_unpatching(self):
        model = full_size(VideoMAEForVideoClassification, "S")
        unpatched = et.count_flops(model)
        et.patch_videomae(model, et.ReRoSelector(0.5))
        half = et.count_flops(model)
        model.everest.selector.keep_ratio = 0.25
        assert et.count_flops(model).encoder < half.encoder < unpatched.encoder
        assert et.count_flops(et.unpatch_videomae(model)) == unpatched

    def test_counting_changes_nothing(self, make_model, make_clips):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        torch.manual_seed(0)
        expected = model(make_clips(model)).loss
        torch.manual_seed(0)
        et.count_flops(model)
        assert torch.equal(model(make_clips(model)).loss, expected)

    def test_num_visible(self):
        model = et.patch_videomae(full_size(VideoMAEForPreTraining, "S"))
        assert et.count_flops(model, num_visible=156) == et.count_flops(model)
        assert et.count_flops(model, num_visible=200).encoder > et.count_flops(model).encoder
        assert et.count_flops(model, num_visible=200).head == 270 * 192 * 1536

    @pytest.mark.parametrize(
        ("cls", "num_visible"),
        [
            (VideoMAEForPreTraining, 0),
            (VideoMAEForPreTraining, 1568),
            (VideoMAEForVideoClassification, 0),
            (VideoMAEForVideoClassification, -3),
            (VideoMAEForVideoClassification, 1569),
        ],
    )
    def test_bad_num_visible(self, cls, num_visible):
        with pytest.raises(ValueError, match="num_visible"):
            et.count_flops(full_size(cls, "S"), num_visible=num_visible)
