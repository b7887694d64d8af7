"""Clips that each keep their own number of tokens, packed: what every model that can run them must compute."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from family_models import randomize
from host_case import HostCase, counted_by_torch, gradients, unchanged, weighted
from host_contract import CASES, hosts
from torch import Tensor, nn
from transformers import VideoMAEForVideoClassification, VideoMAEPreTrainedModel

import everest_tokens as et

PACKED = ("VideoMAEForVideoClassification", "VideoMAEModel", "VJEPA2", "Vivit")
packed = hosts(lambda case: case.name.startswith(PACKED))
classifiers = hosts(lambda case: case.name.startswith(PACKED) and case.name.endswith("Classification"))
BUDGETS = {
    "energy": et.EnergyBudget(0.7, min_tokens=2, max_tokens=20),
    "camera": et.EnergyBudget(0.5, distance="cosine", camera="compensate"),
    "run-length": et.RunLengthSelector(0.6),
}
energy = BUDGETS["energy"]


def clips_of(case: HostCase, dtype: Any = torch.float64, seed: int = 1) -> Tensor:
    """(3, …): a lively clip, one that changes in a corner, one that changes above; noise of a hundredth elsewhere."""
    clips = case.clips(3, seed, dtype=dtype)
    still = clips[:, :1].expand_as(clips).clone()
    still[1, ..., :16, :16] = clips[1, ..., :16, :16]
    still[2, ..., :16, :] = clips[2, ..., :16, :]
    still[0] = clips[0]
    return still + 0.01 * case.clips(3, seed + 100, dtype=dtype)


def patched(case: HostCase, selector: Any = energy, dtype: Any = torch.float64) -> Any:
    return et.patch_videomae(case.build(0).to(dtype), copy.deepcopy(selector))


def parts(case: HostCase, selection: et.TokenSelection) -> list[et.TokenSelection]:
    """A selection for each clip, of its own tokens and nothing else."""
    rows = zip(selection.visible, selection.lengths.tolist(), strict=True)
    return [et.TokenSelection(row[None, :length], None, case.grid) for row, length in rows]


def each_of(case: HostCase, output: Any, lengths: list[int]) -> list[Tensor]:
    """Of each clip what `case.output` gives of a clip alone."""
    if hasattr(output, "logits"):
        return list(output.logits.unsqueeze(1))
    tokens = output.last_hidden_state
    assert tokens.shape[:2] == (1, sum(lengths) + case.prefix * len(lengths))
    clips = tokens.split([length + case.prefix for length in lengths], dim=1)
    if hasattr(output, "pooler_output"):
        clips = [torch.cat([*both], 1) for both in zip(clips, output.pooler_output[:, None, None], strict=True)]
    return list(clips)


class TestNumbers:
    @packed
    @pytest.mark.parametrize(
        ("selector", "dtype"),
        [(energy, torch.float32), *((budget, torch.float64) for budget in BUDGETS.values())],
        ids=["float32", *BUDGETS],
    )
    def test_each_clip_is_what_its_tokens_alone_give(self, case, selector, dtype):
        """The reference knows nothing of packing: all tokens of one clip, the others' keys masked."""
        model, clips = patched(case, selector, dtype), clips_of(case, dtype)
        selection = et.select_tokens(model, clips)
        lengths = selection.lengths.tolist()
        assert len(set(lengths)) == 3, "clips of equally many tokens prove little"
        plain, loss = case.plain(dtype=dtype), torch.zeros((), dtype=dtype)
        outputs = each_of(case, model(clips), lengths)
        for clip, part, output in zip(clips, parts(case, selection), outputs, strict=True):
            expected = case.expected(plain, clip[None], part)
            case.close(output, expected)
            loss = loss + weighted(expected)
        if dtype == torch.float64:
            loss.backward()
            sum(map(weighted, outputs)).backward()
            case.close_gradients(model, plain)

    @packed
    def test_a_given_selection_is_run(self, case):
        model, clips = patched(case), clips_of(case)
        selection = et.select_tokens(model, clips)
        lengths = selection.lengths.tolist()
        own = each_of(case, model(clips), lengths)
        model.everest.selector.cover = 0.1
        assert et.select_tokens(model, clips).lengths.tolist() != lengths
        for actual, expected in zip(each_of(case, model(clips, token_selection=selection), lengths), own, strict=True):
            assert torch.equal(actual, expected)
        same = case.selection(3)  # equally many of every clip: nothing is packed
        case.close(case.run(model, clips, same), case.expected(case.plain(), clips, same))

    @packed
    def test_hidden_states_are_packed(self, case):
        model, clips = patched(case), clips_of(case)
        lengths = [length + case.prefix for length in et.select_tokens(model, clips).lengths.tolist()]
        states = model(clips, output_hidden_states=True).hidden_states
        alone = [model(clip[None], output_hidden_states=True).hidden_states for clip in clips]
        assert len(states) == len(alone[0]) > 2
        for layer, state in enumerate(states):
            for clip, part in zip(alone, state.split(lengths, dim=1), strict=True):
                case.close(part, clip[layer], 1e-10)

    @classifiers
    def test_the_backbone_alone_gives_packed_tokens(self, case):
        """And V-JEPA 2 the same tokens as the context that it masks nothing of, packed or not."""
        model, clips = patched(case), clips_of(case)
        backbone = getattr(model, model.base_model_prefix)
        arguments = {"skip_predictor": True} if case.name.startswith("VJEPA2") else {}
        selection = et.select_tokens(model, clips)
        total = int(selection.lengths.sum()) + 3 * case.prefix
        for selector in (model.everest.selector, et.ReRoSelector(0.5)):
            model.everest.selector = selector
            for given, shape in ((selection, (1, total)), (case.selection(3), (3, case.tokens // 3 + case.prefix))):
                output = backbone(clips, token_selection=given, **arguments)
                assert output.last_hidden_state.shape[:2] == shape
                if arguments:
                    assert torch.equal(output.masked_hidden_state, output.last_hidden_state)
                assert model(clips, token_selection=given).logits.shape == (3, 5)

    @classifiers
    def test_a_loss_over_labels(self, case):
        model, clips, labels = patched(case), clips_of(case), torch.tensor([0, 3, 4])
        output = model(clips, labels=labels)
        assert output.logits.shape == (3, 5)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))

    @classifiers
    @pytest.mark.parametrize("how", ["own", "reentrant", "not reentrant"])
    def test_checkpointed_blocks_know_their_clips_in_backward(self, case, how):
        """Two batches of equally many tokens in all, otherwise split, run before either's backward."""
        model, clips = patched(case).train(), clips_of(case)
        first = et.select_tokens(model, clips)
        second = et.TokenSelection(first.visible.flip(0), None, case.grid, lengths=first.lengths.flip(0).contiguous())
        assert first.lengths.tolist() != second.lengths.tolist()

        def losses() -> list[Tensor]:
            return [weighted(model(clips, token_selection=each).logits) for each in (first, second)]

        sum(losses()).backward()
        expected = gradients(model)
        model.zero_grad()
        if how == "own":
            case.checkpointing(model)
        else:
            case.checkpoint_blocks(model, reentrant=how == "reentrant")
        one, other = losses()
        other.backward()
        one.backward()
        case.close_gradients(gradients(model), expected)

    @classifiers
    def test_checkpoint_wrappers_that_were_there_before(self, case):
        model, clips = case.build(0).double(), clips_of(case)
        case.checkpoint_blocks(model, reentrant=False)
        et.patch_videomae(model, copy.deepcopy(energy))
        plain = patched(case)
        for each in (model, plain):
            weighted(each.train()(clips).logits).backward()
        case.close_gradients(gradients(model), gradients(plain))

    @classifiers
    def test_lora(self, case):
        peft = pytest.importorskip("peft")
        model, clips = patched(case), clips_of(case)
        expected = model(clips).logits
        names = {name.rpartition(".")[2] for name in case.adapted}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=sorted(names)))
        torch.testing.assert_close(adapted(clips).logits, expected)  # adapters begin at zero
        weighted(adapted.train()(clips).logits).backward()
        trained = {name for name, value in adapted.named_parameters() if value.grad is not None}
        assert trained
        assert all("lora_" in name for name in trained)

    @classifiers
    def test_two_threads(self, case):
        model, batches = patched(case), [clips_of(case, seed=seed) for seed in range(8)]
        expected = [model(clips).logits for clips in batches]
        with ThreadPoolExecutor(4) as pool:
            for actual, wanted in zip(
                pool.map(lambda clips: model(clips).logits, batches * 4), expected * 4, strict=True
            ):
                assert torch.equal(actual, wanted)

    @classifiers
    def test_autocast(self, case):
        model, clips = patched(case, dtype=torch.float32), clips_of(case, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(clips).logits
            alone = torch.cat([model(clip[None]).logits for clip in clips])
        torch.testing.assert_close(logits, alone, rtol=0.05, atol=0.05)

    @classifiers
    def test_flops_are_those_of_the_most_it_keeps(self, case):
        model = patched(case)
        most = et.patch_videomae(case.build(0), et.ReRoSelector(keep_tokens=20))
        assert et.count_flops(model) == et.count_flops(most)
        assert et.count_flops(model, 7) == et.count_flops(most, 7)


class TestPatching:
    @packed
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_unpatching_gives_everything_back(self, case, attention):
        model = case.build(0)
        model.set_attn_implementation(attention)
        with unchanged(model):
            et.patch_videomae(model, energy)
            assert model.config._attn_implementation not in ("sdpa", "eager")
            model(clips_of(case, torch.float32))
            et.patch_videomae(model, et.RunLengthSelector())
            model.everest.selector = et.ReRoSelector(0.5)  # which the same attention runs
            case.close(
                case.run(model, clips_of(case, torch.float32), case.selection(3)),
                case.expected(case.plain(dtype=torch.float32), clips_of(case, torch.float32), case.selection(3)),
            )
            et.unpatch_videomae(model)
        assert model.config._attn_implementation == attention

    @classifiers
    def test_the_patch_before_had_stochastic_depth(self, case):
        model, clips = case.patch(case.build(0).double(), drop_path=0.5), clips_of(case)
        et.patch_videomae(model, copy.deepcopy(energy))
        case.close(model.train()(clips).logits, patched(case).train()(clips).logits)

    @classifiers
    def test_another_model_of_the_same_config_is_left_alone(self, case):
        model = case.build(0)
        other = randomize(type(model)(model.config), 1).eval()
        before = other(clips_of(case, torch.float32)).logits
        et.patch_videomae(model, energy)
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(other(clips_of(case, torch.float32)).logits, before)

    @classifiers
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: config])
    def test_a_model_built_from_its_config_is_not_ready(self, case, copied):
        """Its blocks don't know where clips end: they would mix them."""
        model, clips = patched(case), clips_of(case)
        expected, selection = model(clips).logits, et.select_tokens(model, clips)
        other = type(case.build(0))(copied(model.config)).double().eval()
        other.load_state_dict(model.state_dict())
        et.patch_videomae(other, et.ReRoSelector(0.5))
        with pytest.raises(ValueError, match="attends by 'sdpa', which would mix packed clips"):
            other(clips, token_selection=selection)
        et.patch_videomae(other, copy.deepcopy(energy))
        assert torch.equal(other(clips).logits, expected)
        et.unpatch_videomae(other)
        assert other.config._attn_implementation == "sdpa"
        assert torch.equal(model(clips).logits, expected)

    @packed
    def test_copies_and_pickles(self, case):
        model, clips = patched(case), clips_of(case)
        lengths = et.select_tokens(model, clips).lengths.tolist()
        expected = each_of(case, model(clips), lengths)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.everest.selector.cover = 0.7
            for actual, wanted in zip(each_of(case, twin(clips), lengths), expected, strict=True):
                assert torch.equal(actual, wanted)
            et.unpatch_videomae(twin)
            assert twin.config._attn_implementation == "sdpa"

    @classifiers
    def test_a_saved_folder_brings_its_budget_back(self, case, tmp_path):
        model, clips = patched(case, dtype=torch.float32), clips_of(case, torch.float32)
        model.everest.selector.max_tokens = 12
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert "everest_packed" not in json.dumps(written)
        assert written["everest"]["selector"] == {
            **{"name": "EnergyBudget", "cover": 0.7, "min_tokens": 2, "max_tokens": 12},
            **{"distance": "l2", "camera": "ignore"},
        }
        loaded = et.patch_videomae(type(case.build(0)).from_pretrained(tmp_path, attn_implementation="sdpa"))
        case.close(loaded(clips).logits, model(clips).logits)

    @packed
    def test_nothing_is_left_of_a_failed_patch(self, case):
        model = case.build(0)
        with unchanged(model), pytest.raises(ValueError, match=r"max_tokens ≤ (36|48)"):
            et.patch_videomae(model, et.EnergyBudget(max_tokens=100))

    def test_live_settings(self):
        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        model, clips = patched(case), clips_of(case)
        model.everest.selector.cover, model.everest.selector.max_tokens = 1.0, None
        assert et.select_tokens(model, clips).lengths.tolist() == [48, 48, 48]
        model.everest.selector = et.RunLengthSelector(0.6)
        # of 3 × 4 places all, the corner's, and the upper row's change in each of 3 steps after the first
        assert et.select_tokens(model, clips).lengths.tolist() == [4 * 12, 12 + 3, 12 + 3 * 4]
        assert model.config.everest["selector"] == {"name": "RunLengthSelector", "threshold": 0.6}


class TestRefusals:
    @hosts(lambda case: not case.name.startswith(PACKED) and not case.pretraining and not case.variant)
    def test_models_that_cannot_run_packed(self, case):
        model, selector = case.build(0), et.EnergyBudget()
        with unchanged(model), pytest.raises(TypeError, match=r"different numbers of tokens.*EnergyBudget"):
            et.patch_videomae(model, selector, **case.settings)
        case.patch(model)
        with unchanged(model), pytest.raises(TypeError, match=r"different numbers of tokens.*EnergyBudget"):
            et.patch_videomae(model, selector, **case.settings)
        model.everest.selector = selector
        with pytest.raises(TypeError, match="different numbers of tokens"):
            model(case.clips(dtype=torch.float32))

    @hosts(lambda case: case.pretraining and not case.variant)
    def test_pretraining(self, case):
        model = case.build(0)
        for settings in ({"selector": energy}, {"visible": energy}):
            with unchanged(model), pytest.raises(ValueError, match="equally many tokens"):
                et.patch_videomae(model, **settings)
        case.patch(model)
        with pytest.raises(ValueError, match="equally many tokens"):
            model.everest.selector = energy

    def test_a_model_that_was_not_made_ready(self):
        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        clips = clips_of(case, torch.float32)
        model = case.patch(case.build(0))
        model.everest.selector = copy.deepcopy(energy)
        with pytest.raises(ValueError, match="attends by 'sdpa', which would mix packed clips"):
            model(clips)
        model = patched(case, dtype=torch.float32)
        selection = et.select_tokens(model, clips)
        with pytest.raises(ValueError, match="call patch_videomae with the selector of token_selection to make"):
            case.patch(case.build(0))(clips, token_selection=selection)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attends by 'eager'"):
            model(clips)
        with pytest.raises(ValueError, match="output_attentions"):
            patched(case, dtype=torch.float32)(clips, output_attentions=True)

    @classifiers
    def test_settings_without_a_meaning(self, case):
        model = case.build(0)
        with unchanged(model):
            with pytest.raises(ValueError, match=r"drop_path=0\.1"):
                et.patch_videomae(model, energy, drop_path=0.1)
            with pytest.raises(ValueError, match="fixed share"):
                et.patch_videomae(model, energy, frame_sampler=et.InfoFrameSampler(1.5))
        et.patch_videomae(model, energy)
        with pytest.raises(ValueError, match="fixed share"):
            model.everest.frame_sampler = et.InfoFrameSampler(1.5)

    def test_an_unknown_head(self):
        class Head(VideoMAEPreTrainedModel):
            def __init__(self, model: Any) -> None:
                super().__init__(model.config)
                self.videomae = model.videomae

            def forward(self, pixel_values: Tensor) -> Tensor:
                return self.videomae(pixel_values).last_hidden_state.amax(1)

        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        model = Head(case.build(0))
        with unchanged(model), pytest.raises(TypeError, match="how Head pools"):
            et.patch_videomae(model, energy)

    def test_a_transformers_without_the_interface(self, monkeypatch):
        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        monkeypatch.setitem(sys.modules, "everest_tokens.hosts.packing", None)  # which imports it
        model = case.build(0)
        with unchanged(model), pytest.raises(TypeError, match="AttentionInterface"):
            et.patch_videomae(model, energy)

    def test_attention_that_asks_nobody_is_noticed(self):
        """A block whose attention is its own code would let clips see each other."""

        class Own(nn.Module):
            def __init__(self, attention: Any) -> None:
                super().__init__()
                self.attention = attention

            def forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
                return tokens + tokens.mean(dim=1, keepdim=True)

        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        model = case.build(0)
        model.videomae.encoder.layer[1].attention = Own(model.videomae.encoder.layer[1].attention)
        with unchanged(model), pytest.raises(TypeError, match="doesn't attend through transformers'"):
            et.patch_videomae(model, energy)

    def test_stochastic_depth_of_its_own(self):
        (case,) = (case for case in CASES if case.name == "VJEPA2ForVideoClassification")
        model = case.build(0)
        config = copy.deepcopy(model.config)
        config.drop_path_rate = 0.2
        with pytest.raises(ValueError, match="stochastic depth"):
            et.patch_videomae(type(model)(config), energy)

    @classifiers
    def test_graphs(self, case):
        model, clips = patched(case, dtype=torch.float32), clips_of(case, torch.float32)
        with pytest.raises(Exception, match="numbers of tokens that differ by clip"):
            torch.compile(model, fullgraph=True, backend="eager")(clips)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="numbers of tokens that differ by clip"):
            torch.export.export(model, (clips,), strict=False)

    def test_compiled_with_breaks_it_runs(self):
        (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
        model, clips = patched(case, dtype=torch.float32), clips_of(case, torch.float32)
        expected = model(clips).logits
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(clips).logits, expected)
        torch._dynamo.reset()


def test_flops_of_a_packed_batch_are_its_clips_own():
    (case,) = (case for case in CASES if case.name == "VideoMAEForVideoClassification")
    model, clips = patched(case, dtype=torch.float32), clips_of(case, torch.float32)
    alone = sum(counted_by_torch(model, clip[None]) for clip in clips)
    assert counted_by_torch(model, clips) == alone
    assert isinstance(model, VideoMAEForVideoClassification)
