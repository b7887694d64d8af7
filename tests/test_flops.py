"""count_flops: against products written out by hand, the paper's tables, and forwards that torch counts elsewhere."""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from family_models import FineTuningModel, PreTrainingModel
from peft import LoraConfig, get_peft_model
from tiny_videomae import build_clips, build_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel
from transformers.models.videomae import modeling_videomae

import everest_tokens as et
from everest_tokens.dry_run import on_meta

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
    count = et.count_flops(model)
    assert count.total - count.selection == counted_by_torch(model, frames)


def blocks(tokens: int, width: int, depth: int, hidden: int | None = None) -> int:
    """Query, key, value and projection, the two attention products, and the two layers of the MLP."""
    hidden = 4 * width if hidden is None else hidden
    one = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * hidden
    return depth * one


class TestThePapersFigures:
    """Within 0.6 %, and to the last product what the layers of a VideoMAE multiply."""

    @staticmethod
    def assert_counts(model: Any, gflops: float, size: str, visible: int, kept: int | None = None) -> None:
        width, depth, _, decoder_width, _ = SIZES[size]
        count = et.count_flops(model)
        assert count.total / 1e9 == pytest.approx(gflops, rel=0.006)
        assert count.patch_embedding == 8 * 14 * 14 * width * (3 * 2 * 16 * 16)
        assert count.encoder == blocks(visible, width, depth)
        if kept is None:
            assert (count.decoder, count.head) == (0, width * 400)
        else:
            assert count.decoder == visible * width * decoder_width + blocks(kept, decoder_width, 4)
            assert count.head == (kept - visible) * decoder_width * (3 * 2 * 16 * 16)
        assert count.selection == (7 * 14 * 14 * width if hasattr(model, "everest") else 0)

    @pytest.mark.parametrize(("size", "unpatched", "patched"), [("S", 57.0, 29.1), ("B", 180.5, 98.1)])
    def test_fine_tuning(self, size, unpatched, patched):
        model = full_size(VideoMAEForVideoClassification, size)
        self.assert_counts(model, unpatched, size, 1568)
        self.assert_counts(et.patch_videomae(model, et.ReRoSelector(0.6)), patched, size, 940)

    @pytest.mark.parametrize(("size", "unpatched", "patched"), [("B", 35.5, 21.5), ("L", 83.1, 60.8)])
    def test_pretraining(self, size, unpatched, patched):
        model = full_size(VideoMAEForPreTraining, size)
        self.assert_counts(model, unpatched, size, 160, 1568)
        self.assert_counts(et.patch_videomae(model, et.ReRoSelector(0.4)), patched, size, 156, 627)
        if size == "B":  # Table 10
            model.everest.selector.keep_ratio = 0.3
            self.assert_counts(model, 19.8, "B", 156, 470)


class TestOtherHostsByHand:
    """Every product of small models, written out: clips of 8 frames, 48×64 pixels, tubelets 2×16×16: 4·3·4 tokens."""

    PIXELS = 3 * 2 * 16 * 16

    def test_a_family_classifier_with_a_class_token(self):
        model = FineTuningModel("mvd", embed_dim=48, mlp_ratio=3.0, depth=3, num_classes=7, use_cls_token=True)
        assert et.count_flops(model) == et.FlopCount(0, 48 * 48 * self.PIXELS, blocks(49, 48, 3, 144), 0, 48 * 7)
        et.patch_videomae(model, et.ReRoSelector(0.25, distance="cosine"))
        selection = 3 * (3 * 12) * 48  # a·b and both norms
        expected = et.FlopCount(selection, 48 * 48 * self.PIXELS, blocks(13, 48, 3, 144), 0, 48 * 7)
        assert et.count_flops(model) == expected
        assert et.count_flops(model, num_visible=10).encoder == blocks(11, 48, 3, 144)

    def test_a_family_pretraining_model(self):
        model = PreTrainingModel("videomaev2", embed_dim=32, decoder_dim=24, depth=2, decoder_depth=1, mlp_ratio=2.0)
        for visible in (8, 5):  # 2 of 12 places in 4 steps; as asked
            decoder = visible * 32 * 24 + blocks(48, 24, 1, 48)
            expected = (
                0,
                48 * 32 * self.PIXELS,
                blocks(visible, 32, 2, 64),
                decoder,
                (48 - visible) * 24 * self.PIXELS,
            )
            assert et.count_flops(model, None if visible == 8 else visible) == et.FlopCount(*expected)
        et.patch_videomae(model, et.ReRoSelector(0.5), mask_ratio=0.75)  # 12 visible of 24 kept
        decoder = 12 * 32 * 24 + blocks(24, 24, 1, 48)
        expected = (3 * 12 * 32, 48 * 32 * self.PIXELS, blocks(12, 32, 2, 64), decoder, 12 * 24 * self.PIXELS)
        assert et.count_flops(model) == et.FlopCount(*expected)

    def test_a_timm_model_with_prefix_tokens(self):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=(48, 64), embed_dim=48, depth=3, reg_tokens=2, num_classes=7
        )
        embedding, head = 12 * 48 * (3 * 16 * 16), 48 * 7
        assert et.count_flops(model) == et.FlopCount(0, embedding, blocks(12 + 3, 48, 3), 0, head)
        et.patch_videomae(model, et.ReRoSelector(0.25), num_frames=8)
        expected = et.FlopCount(36 * 48, 48 * 48 * self.PIXELS, blocks(12 + 3, 48, 3), 0, head)
        assert et.count_flops(model) == expected

    def test_attention_pooling_belongs_to_the_head(self):
        model = timm.create_model(
            "vit_base_patch16_siglip_224", img_size=(48, 64), embed_dim=48, depth=1, num_heads=4, num_classes=7
        )
        et.patch_videomae(model, et.ReRoSelector(0.25), num_frames=8)
        pooling = 48 * 48 + 12 * 48 * 96 + 2 * 12 * 48 + 48 * 48 + 2 * 48 * 192  # q, kv, products, projection, MLP
        assert et.count_flops(model).head == pooling + 48 * 7
        assert et.count_flops(model).encoder == blocks(12, 48, 1)


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
    """Against the forward of the model itself."""

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_shapes(self, cls, shape):
        model = full_size(cls, "S", **{**SHALLOW, **shape})
        if cls is VideoMAEForVideoClassification:
            assert_agrees(model)
        assert_agrees(et.patch_videomae(model, et.ReRoSelector(0.5)))

    def test_a_backbone_has_no_head(self):
        model = full_size(VideoMAEModel, "S", **SHALLOW)
        assert_agrees(model)
        assert_agrees(et.patch_videomae(model))
        assert et.count_flops(model).head == 0

    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_candidates_of_a_frame_sampler_are_embedded(self, cls):
        model = et.patch_videomae(full_size(cls, "S", **SHALLOW))
        before = et.count_flops(model)
        model.everest.frame_sampler = et.InfoFrameSampler(1.5)
        after = et.count_flops(model)
        assert_agrees(model, 24)
        assert after.patch_embedding == before.patch_embedding * 3 // 2
        assert (after.encoder, after.head) == (before.encoder, before.head)

    @pytest.mark.parametrize(
        ("selector", "visible"),
        [
            (et.RunningCellSelector(0.5), et.TubeSelector(0.1)),
            (et.RandomSelector(1.0), et.RandomSelector(0.25)),
            (et.TubeSelector(0.5), None),
        ],
    )
    def test_other_selectors(self, selector, visible):
        assert_agrees(et.patch_videomae(full_size(VideoMAEForPreTraining, "S", **SHALLOW), selector, visible=visible))

    def test_unpatched_pretraining_is_videomaes_tube_mask(self):
        model = full_size(VideoMAEForPreTraining, "S", **SHALLOW)
        expected = et.count_flops(model).total
        by_tubes = et.patch_videomae(model, et.RandomSelector(1.0), visible=et.TubeSelector(0.1))
        assert et.count_flops(by_tubes).total == counted_by_torch(by_tubes) == expected

    @pytest.mark.parametrize("num_visible", [1, 20, 40])
    def test_unpatched_pretraining_with_a_mask(self, make_model, num_visible):
        model = make_model(VideoMAEForPreTraining)  # boolean masks don't run on the meta device
        mask = torch.ones(1, 48, dtype=torch.bool)
        mask[:, :num_visible] = False
        with sdpa_kernel(SDPBackend.MATH):  # the counter misses fused attention on the CPU
            expected = counted_by_torch(model, bool_masked_pos=mask)
        assert et.count_flops(model, num_visible=num_visible).total == expected


class TestSettings:
    def test_each_distance(self):
        """a·b, and where it divides by the norms those too, for each of 7 · 14 · 14 pairs."""
        model = et.patch_videomae(full_size(VideoMAEForVideoClassification, "S", **SHALLOW))
        for distance, products in {"l2": 1, "l1": 1, "cosine": 3, "cka": 3}.items():
            model.everest.selector = et.ReRoSelector(0.6, distance=distance)
            assert et.count_flops(model).selection == 7 * 14 * 14 * 384 * products

    def test_live_settings_and_unpatching(self):
        model = full_size(VideoMAEForVideoClassification, "S", **SHALLOW)
        unpatched = et.count_flops(model)
        et.patch_videomae(model, et.ReRoSelector(0.5))
        model.everest.selector.keep_ratio = 0.25
        assert et.count_flops(model).encoder == blocks(392, 384, 2)
        assert et.count_flops(et.unpatch_videomae(model)) == unpatched

    def test_while_another_thread_runs_modules(self):
        """A pass over the same module names, begun and ended within each of the counted embedding's."""
        model = et.patch_videomae(build_model(VideoMAEForVideoClassification))
        expected = et.count_flops(model)
        other, embedding = copy.deepcopy(model), model.videomae.embeddings.patch_embeddings

        def elsewhere(*given):
            thread = threading.Thread(target=other, args=(build_clips(other, 1),))
            thread.start()
            thread.join()

        embedding.register_forward_pre_hook(elsewhere)
        assert et.count_flops(model) == expected

    def test_num_visible(self):
        model = et.patch_videomae(full_size(VideoMAEForPreTraining, "S", **SHALLOW))
        assert et.count_flops(model, num_visible=156) == et.count_flops(model)
        assert et.count_flops(model, num_visible=200).encoder == blocks(200, 384, 2)
        assert et.count_flops(model, num_visible=200).head == 270 * 192 * 1536

    @pytest.mark.parametrize(
        ("cls", "bad"), [(VideoMAEForPreTraining, (0, 1568)), (VideoMAEForVideoClassification, (0, -3, 1569, 0.5))]
    )
    def test_bad_num_visible(self, cls, bad):
        for num_visible in bad:
            with pytest.raises(ValueError, match="num_visible"):
                et.count_flops(full_size(cls, "S", **SHALLOW), num_visible=num_visible)

    def test_num_visible_of_an_unpatched_classifier(self):
        model = full_size(VideoMAEForVideoClassification, "S")
        count = et.count_flops(model, num_visible=500)
        assert count.encoder == blocks(500, 384, 12)
        assert (count.selection, count.head) == (0, 384 * 400)
        assert not hasattr(model, "everest")

    def test_an_image_has_no_tokens_to_choose(self):
        with pytest.raises(ValueError, match="num_visible=3: VisionTransformer runs an image"):
            et.count_flops(timm.create_model("vit_tiny_patch16_224", depth=1), num_visible=3)


def refuse_to_copy(*_: Any) -> Any:
    pytest.fail("weights were copied")


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("patched", [True, False])
    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    def test_to_the_bit(self, make_model, monkeypatch, cls, patched):
        model = make_model(cls).train()
        if patched:
            et.patch_videomae(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {name: (value, value.clone(), value.grad) for name, value in model.named_parameters()}
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
        settings, numbers = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
        monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse_to_copy)
        et.count_flops(model)
        assert torch.equal(torch.get_rng_state(), numbers)
        assert torch.is_grad_enabled()
        for name, parameter in model.named_parameters():
            same, value, grad = before[name]
            assert parameter is same
            assert parameter.grad is grad
            assert torch.equal(parameter, value)
            assert parameter.requires_grad
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        assert all(module.training for module in model.modules())
        assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == hooks
        assert model.config.to_dict() == settings
        assert hasattr(model, "everest") == patched

    def test_the_copy_has_no_weights(self, make_model):
        model = make_model(VideoMAEForPreTraining).half()
        copied = on_meta(model)
        assert type(copied) is type(model)
        assert copied.state_dict().keys() == model.state_dict().keys()
        tensors = [
            *copied.parameters(),
            *(x for m in copied.modules() for x in vars(m).values() if isinstance(x, Tensor)),
        ]
        assert {x.device.type for x in tensors} == {"meta"}

    def test_what_cannot_be_copied_is_shared(self, make_model):
        class Logger:
            def __init__(self) -> None:
                self.generator, self.calls = torch.Generator(), 0  # a generator has no deep copy

            def log(self, *_: Any) -> None:
                self.calls += 1

        class Chooser(Logger):
            def __call__(self, tokens: Tensor, grid: Any) -> Tensor:
                return torch.arange(6, device=tokens.device).expand(tokens.shape[0], -1)

        logger, model = Logger(), make_model(VideoMAEForVideoClassification)
        model.videomae.encoder.layer[0].register_forward_hook(logger.log)
        assert et.count_flops(et.patch_videomae(model, Chooser())).encoder == blocks(6, 32, 2, 48)
        assert logger.calls == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_any_precision(self, make_model, dtype):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        expected = et.count_flops(model)
        model.to(dtype).videomae.encoder.layer[0].attention.float()  # and a mixture, as under autocast
        assert et.count_flops(model) == expected
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            assert et.count_flops(model) == expected
        finally:
            torch.set_default_dtype(before)


class TestAroundTheModel:
    """What others put around modules, and changes nothing of what they multiply."""

    def test_compiled_blocks(self, make_model):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
        expected = et.count_flops(model)
        model.videomae.encoder.layer[0] = torch.compile(model.videomae.encoder.layer[0])
        model.videomae.encoder.layer[1].compile()
        assert et.count_flops(model) == expected

    @pytest.mark.parametrize("cls", [VideoMAEForPreTraining, VideoMAEForVideoClassification])
    @pytest.mark.parametrize("patched", [True, False])
    def test_what_accelerate_wraps_a_forward_in(self, make_model, cls, patched):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, whoever made it
        model = make_model(cls)
        if patched:
            et.patch_videomae(model)
        expected = et.count_flops(model)
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(copy.deepcopy(model))
        assert et.count_flops(prepared) == expected
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert et.count_flops(model) == expected

    @pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
    def test_every_implementation_of_attention(self, make_model, name):
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
        expected = et.count_flops(model)
        model.config._attn_implementation = name  # its kernel needn't be installed: shapes don't need it
        assert et.count_flops(model) == expected
        assert model.config._attn_implementation == name

    def test_adapters_run(self, make_model):
        model = make_model(VideoMAEForVideoClassification)
        before = et.count_flops(model)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
        after = et.count_flops(wrapped)
        assert after.encoder == before.encoder + 2 * 48 * (32 * 4 + 4 * 32)
        assert after.head == before.head  # the trained copy runs instead of the frozen one

    def test_a_selectors_matrix_products(self, make_model):
        class Learned(et.ReRoSelector):
            def importance(self, tokens: Tensor, grid: Any) -> Tensor:
                return super().importance(tokens @ torch.empty(32, 5, device=tokens.device), grid)

        model = et.patch_videomae(make_model(VideoMAEForVideoClassification))
        before = et.count_flops(model)
        model.everest.selector = Learned(0.6)
        after = et.count_flops(model)
        assert after.selection == before.selection + 48 * 32 * 5
        assert after.patch_embedding == before.patch_embedding

    @pytest.mark.parametrize(("sampler", "times"), [(None, 1), (et.InfoFrameSampler(2.0), 3)])
    def test_undoing_the_cameras_motion_embeds_again(self, make_model, sampler, times):
        """The moved clip, of all candidates and of the drawn steps; beside it small products of frames alone."""
        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), frame_sampler=sampler)
        before = et.count_flops(model)
        model.everest.selector.camera = "compensate"
        after = et.count_flops(model)
        again = before.patch_embedding * times // (1 if sampler is None else 2)
        assert replace(after, selection=0) == replace(before, selection=0)
        # For each pair of 48 × 64 frames 2 × 2 and 2 × 1 products over their pixels in each of 4 steps at half the side
        # and 1 at all of it, then 6 × 6 and 6 × 1 ones in 6 and 2; solving the systems is next to nothing.
        products = (4 / 4 + 1) * (4 + 2) * 48 * 64 + (6 / 4 + 2) * (36 + 6) * 48 * 64
        pairs = 8 - 2 if sampler is None else (16 - 2) + (8 - 2)
        assert after.selection - before.selection - again == pytest.approx(pairs * products, rel=1e-2)


@torch.library.custom_op("everest_tests::mix", mutates_args=())
def mix(tokens: Tensor, weight: Tensor) -> Tensor:
    return tokens @ weight


@mix.register_fake
def _(tokens: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(tokens)


class Multiplying(nn.Module):
    """A block whose products torch's counter may not know."""

    def __init__(self, multiply: Any) -> None:
        super().__init__()
        self.weight, self.multiply = nn.Parameter(torch.eye(32)), multiply

    def forward(self, tokens: Tensor) -> Tensor:
        return self.multiply(tokens, self.weight)


class TestWhatItCannotCount:
    """An error, where the counter alone would say that it costs nothing."""

    @pytest.mark.parametrize(
        ("multiply", "match"),
        [
            (mix, "everest_tests::mix"),
            (lambda x, weight: (x[0] @ weight[0])[None, :, None] + x, "aten::mv"),
            (lambda x, weight: torch.zeros_like(x[0]).addmm_(x[0], weight)[None], "aten::addmm_"),
            (lambda x, weight: torch.addbmm(x[0], x.transpose(1, 2), x)[None], "aten::addbmm"),
            (lambda x, weight: x + torch.cdist(x, x, p=1).mean(), "aten::_cdist_forward"),
            (lambda x, weight: nn.functional.bilinear(x, x, weight[None].repeat(32, 1, 1)), "aten::_trilinear"),
            (lambda x, weight: x + torch.fft.fft(x).real, "aten::_fft_r2c"),
            (lambda x, weight: x * weight.sum().item(), "meta"),
            (lambda x, weight: x[:, x[0, :, 0] > 0], "meta"),
        ],
        ids=["custom", "mv", "in-place", "addbmm", "cdist", "bilinear", "fft", "a value", "a mask"],
    )
    def test_operators_without_a_formula(self, multiply, match):
        model = FineTuningModel().eval()
        model.blocks.append(Multiplying(multiply))
        with pytest.raises(TypeError, match=f"count_flops doesn't know what FineTuningModel costs: .*{match}"):
            et.count_flops(model)
        assert model.head.weight.device.type == "cpu"

    def test_a_formula_makes_it_known(self):
        model = FineTuningModel().eval()
        expected = et.count_flops(model).encoder + 48 * 32 * 32
        model.blocks.append(Multiplying(mix))
        packet = torch.ops.everest_tests.mix
        register_flop_formula(packet)(lambda x, weight, **_: 2 * math.prod(x) * weight[1])
        try:
            assert et.count_flops(model).encoder == expected
        finally:
            del flop_registry[packet]

    def test_a_selector_that_looks_at_values(self, make_model):
        def above_the_mean(tokens: Tensor, grid: Any) -> Tensor:
            return torch.arange(int((tokens > tokens.mean()).sum()), device=tokens.device)[None]

        model = et.patch_videomae(make_model(VideoMAEForVideoClassification), above_the_mean)
        with pytest.raises(TypeError, match="count_flops doesn't know"):
            et.count_flops(model)

    def test_settings_that_cannot_work_stay_a_value_error(self, make_model):
        model = et.patch_videomae(make_model(VideoMAEForPreTraining))
        model.everest.mask_ratio = 0.5
        with pytest.raises(ValueError, match=r"mask_ratio 0\.5 gives 24 visible of 14 kept tokens"):
            et.count_flops(model)
