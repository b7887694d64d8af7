"""Small reference models of the VideoMAE family: VideoMAE, VideoMAE V2, MME, MVD and EVEREST.

Written for these tests from the papers and from a description of the published files: attribute and state-dict names,
shapes and call conventions are theirs, the code is not. One class serves the five fine-tuning models; they differ in a
few attributes that `family` chooses. They have no other public attributes than the described ones (`family` and the
methods run_*, own_masks aside, which are for the tests), so that code which needs more fails here too.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FAMILIES = ("videomae", "videomaev2", "mme", "mvd", "everest")

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def sinusoid_table(n: int, d: int) -> Tensor:
    """(1, n, d) float32: sin in the even, cos in the odd channels of angle n / 10000^(2·(j//2)/d)."""
    channel = torch.arange(d)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / d).double()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None].float()


def mvd_table(t: int, h: int, w: int, d: int) -> Tensor:
    """(1, t·h·w, d) float32, t-major: d/4 channels of the step, 3d/8 of the column, 3d/8 of the row (16 divides d)."""

    assert d % 16 == 0, d

    def encode(position: Tensor, width: int) -> Tensor:
        frequency = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
        angle = position.double()[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    step, row, column = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
    time, place = d // 4, (d - d // 4) // 2
    return torch.cat([encode(step, time), encode(column, place), encode(row, place)], dim=1)[None].float()


def randomize(model: Any, seed: int = 0) -> Any:
    """Every trainable parameter random, biases too (zeros would hide mistakes), norms' weights around 1; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # frozen ones are position tables
            noise = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data.copy_((0.03 if parameter.ndim == 5 else 0.2) * noise + around)  # 5-D: Conv3d, wide fan-in
    return model.eval()


class PatchEmbed(nn.Module):
    def __init__(
        self,
        family: str = "videomae",
        img_size: int | tuple[int, int] = (48, 64),
        patch_size: int = 16,
        num_frames: int = 8,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 32,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_size = (patch_size, patch_size)
        self.tubelet_size = tubelet_size
        grid = (num_frames // tubelet_size, self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = math.prod(grid)
        self.checks_size = family != "mvd"
        if family == "mvd":
            self.num_patches_t, self.num_patches_h, self.num_patches_w = grid
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel_size=kernel, stride=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) → (B, N, D), t-major."""
        if self.checks_size:
            assert tuple(x.shape[-2:]) == self.img_size, f"{tuple(x.shape[-2:])} is not {self.img_size}"
        return self.proj(x).flatten(2).transpose(1, 2)


EMBEDDING = ("img_size", "patch_size", "num_frames", "tubelet_size", "in_chans", "embed_dim")


def embedding_of(family: str, options: dict[str, Any]) -> PatchEmbed:
    """The patch embedding; takes its options out of `options`, so that what is left is for the blocks."""
    return PatchEmbed(family, **{name: options.pop(name) for name in EMBEDDING if name in options})


def tables(patches: PatchEmbed, family: str, width: int) -> Tensor:
    h, w = (side // patch for side, patch in zip(patches.img_size, patches.patch_size, strict=True))
    tokens = patches.num_patches
    return mvd_table(tokens // (h * w), h, w, width) if family == "mvd" else sinusoid_table(tokens, width)


class Attention(nn.Module):
    """Fused qkv whose key has no bias; V2's cosine attention has a learned scale for each head."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, cos_attn: bool, drop: float, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        if cos_attn:
            self.scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        else:
            self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head dim)
        if isinstance(self.scale, Tensor):  # a parameter, which torch.func hands in as a tensor
            logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale.clamp(max=math.log(100)).exp()
        else:
            logits = q * self.scale @ k.mT
        mixed = self.attn_drop(logits.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DropPath(nn.Module):
    """Drops a clip's whole branch, in training only."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        cos_attn: bool = False,
        init_values: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, cos_attn, drop_rate, attn_drop_rate)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim)) if init_values > 0 else None
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim)) if init_values > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attn(self.norm1(x))
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


def make_blocks(
    dim: int, depth: int = 2, num_heads: int = 2, drop_path_rate: float = 0.0, **options: Any
) -> nn.ModuleList:
    rates = (drop_path_rate * index / max(1, depth - 1) for index in range(depth))
    return nn.ModuleList(Block(dim, num_heads, drop_path=rate, **options) for rate in rates)


def run_blocks(module: Any, x: Tensor) -> Tensor:
    checkpointed = getattr(module, "use_checkpoint", False) or getattr(module, "with_cp", False)
    for block in module.blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


def add_checkpoint_flag(module: nn.Module, family: str) -> None:
    if family != "mme":
        setattr(module, "with_cp" if family == "videomaev2" else "use_checkpoint", False)


def most_changed(tokens: Tensor, steps: int, kept: int) -> Tensor:
    """EVEREST's own selection: the indices (B, kept) of the tokens that differ most from the step before."""
    by_step = tokens.detach().unflatten(1, (steps, -1))
    change = (by_step[:, 1:] - by_step[:, :-1]).norm(dim=-1)
    return torch.cat([change[:, :1], change], dim=1).flatten(1).argsort(dim=1, descending=True)[:, :kept]


def as_mask(index: Tensor, total: int) -> Tensor:
    """(B, total) bool, False at the indices (B, K)."""
    return torch.ones(index.shape[0], total, dtype=torch.bool, device=index.device).scatter(1, index, False)


class FineTuningModel(nn.Module):
    """A classifier of one of the five families; `forward` takes (B, C, T, H, W) and gives (B, classes).

    Options that a family lacks are refused: `use_cls_token` is MVD's, `cos_attn` V2's, `mcm` EVEREST's. Further ones
    are those of `PatchEmbed` and of `make_blocks`.
    """

    def __init__(
        self,
        family: str = "videomae",
        *,
        num_classes: int = 5,
        use_mean_pooling: bool = True,
        use_learnable_pos_emb: bool = False,
        use_cls_token: bool = False,
        head_drop_rate: float = 0.0,
        mcm: bool = False,
        mcm_ratio: float = 0.4,
        **options: Any,
    ) -> None:
        super().__init__()
        assert family in FAMILIES, family
        for option, owner in ((use_cls_token, "mvd"), (options.get("cos_attn"), "videomaev2"), (mcm, "everest")):
            assert not option or family == owner, f"only {owner} has it"
        self.family = family
        self.patch_embed = embedding_of(family, options)
        embed_dim = self.patch_embed.proj.out_channels
        if use_learnable_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        else:
            self.pos_embed = tables(self.patch_embed, family, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if use_cls_token else None
        self.pos_drop = nn.Dropout(options.get("drop_rate", 0.0))
        self.blocks = make_blocks(embed_dim, **options)
        self.norm = nn.Identity() if use_mean_pooling else LayerNorm(embed_dim)
        self.fc_norm = LayerNorm(embed_dim) if use_mean_pooling else None
        self.reset_classifier(num_classes)
        add_checkpoint_flag(self, family)
        if family == "videomaev2":
            self.head_dropout = nn.Dropout(head_drop_rate)
        elif family != "mme":
            self.fc_dropout = nn.Dropout(head_drop_rate)
        if family == "mme":
            self.mask_ratio = 0.0
        if family == "everest":
            self.mcm, self.mcm_ratio = mcm, mcm_ratio

    def get_num_layers(self) -> int:
        return len(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(self.patch_embed.proj.out_channels, num_classes) if num_classes > 0 else nn.Identity()

    def random_masking(self, x: Tensor, mask_ratio: float) -> Tensor:
        """MME: drops a share of the tokens; at 0 it still puts them into a random order."""
        order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, : int(x.shape[1] * (1 - mask_ratio))]
        return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    def run_tokens(self, x: Tensor) -> Tensor:
        """Tokens that have their positions (B, any number, D) → features (B, D): all that follows the embedding."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x)
        if self.family == "mme":
            x = self.random_masking(x, self.mask_ratio)
        x = self.norm(run_blocks(self, x))
        if self.fc_norm is None:
            return x[:, 0]
        return self.fc_norm(x[:, 1:].mean(1) if self.cls_token is not None else x.mean(1))

    def forward_features(self, clips: Tensor) -> Tensor:
        x = self.patch_embed(clips)
        batch, total, width = x.shape
        dropped = None
        if self.family == "everest" and self.mcm:
            steps = clips.shape[2] // self.patch_embed.tubelet_size
            dropped = as_mask(most_changed(x, steps, int(total * (1 - self.mcm_ratio))), total)
        if self.pos_embed is not None:
            x = x + self.pos_embed.expand(batch, -1, -1).type_as(x).to(x.device).clone().detach()
        if dropped is not None:
            x = x[~dropped].reshape(batch, -1, width)
        return self.run_tokens(x)

    def run_head(self, features: Tensor) -> Tensor:
        for name in ("fc_dropout", "head_dropout"):
            features = getattr(self, name, nn.Identity())(features)
        return self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_head(self.forward_features(x))


class PreTrainingEncoder(nn.Module):
    def __init__(self, family: str, **options: Any) -> None:
        super().__init__()
        self.patch_embed = embedding_of(family, options)
        dim = self.patch_embed.proj.out_channels
        self.pos_embed = sinusoid_table(self.patch_embed.num_patches, dim)
        self.blocks = make_blocks(dim, **options)
        self.norm = LayerNorm(dim)
        self.head = nn.Identity()
        add_checkpoint_flag(self, family)

    def forward_features(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.pos_embed.type_as(x).to(x.device).clone().detach()
        x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        return self.norm(run_blocks(self, x))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.forward_features(x, mask))


class PreTrainingDecoder(nn.Module):
    def __init__(self, family: str, head: nn.Module, dim: int, **options: Any) -> None:
        super().__init__()
        self.blocks = make_blocks(dim, **options)
        self.norm = LayerNorm(dim)
        self.head = head
        add_checkpoint_flag(self, family)

    def forward(self, x: Tensor, return_token_num: int) -> Any:
        x = run_blocks(self, x)
        if return_token_num > 0:
            x = x[:, -return_token_num:]
        x = self.norm(x)
        return [head(x) for head in self.head] if isinstance(self.head, nn.ModuleList) else self.head(x)


def decoder_block(options: dict[str, Any]) -> dict[str, Any]:
    """What a decoder's blocks have of the encoder's options."""
    own = (*EMBEDDING, "depth", "num_heads", "drop_path_rate")
    return {name: value for name, value in options.items() if name not in own}


def pick(table: Tensor, chosen: Tensor, like: Tensor) -> Tensor:
    """The rows of a table (1, N, D) that the mask (B, N) marks, (B, as many in each row, D)."""
    expanded = table.expand(chosen.shape[0], -1, -1).type_as(like).to(like.device).clone().detach()
    return expanded[chosen].reshape(chosen.shape[0], -1, table.shape[2])


class PreTrainingModel(nn.Module):
    """Masked pixel prediction of VideoMAE, V2 or EVEREST; `forward` takes (B, C, T, H, W) and a mask, True = hidden.

    VideoMAE and V2 give the prediction (B, M, 3·tubelet·patch²), EVEREST (prediction, (visible_mask, target_mask)).
    Further options are those of `PatchEmbed` and of `make_blocks`.
    """

    def __init__(
        self,
        family: str = "videomae",
        *,
        decoder_dim: int = 24,
        decoder_depth: int = 2,
        decoder_num_heads: int = 2,
        mcm: bool = False,
        mcm_ratio: float = 0.7,
        masking_ratio: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__()
        assert family in ("videomae", "videomaev2", "everest"), family
        assert not mcm or family == "everest"
        assert not options.get("cos_attn") or family == "videomaev2"
        self.family = family
        self.encoder = PreTrainingEncoder(family, **options)
        patches = self.encoder.patch_embed
        block = decoder_block(options) | {"depth": decoder_depth, "num_heads": decoder_num_heads}
        pixels = nn.Linear(decoder_dim, 3 * patches.tubelet_size * patches.patch_size[0] ** 2)
        self.decoder = PreTrainingDecoder(family, pixels, decoder_dim, **block)
        self.encoder_to_decoder = nn.Linear(patches.proj.out_channels, decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.pos_embed = sinusoid_table(patches.num_patches, decoder_dim)
        if family == "everest":
            self.encoder.mcm, self.encoder.mcm_ratio, self.encoder.masking_ratio = mcm, mcm_ratio, masking_ratio

    def get_num_layers(self) -> int:
        return len(self.encoder.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "mask_token"}

    def run_masked(self, x: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
        """The prediction of the tokens that `target` marks from those that `hidden` doesn't; masks (B, N)."""
        seen = self.encoder_to_decoder(self.encoder(x, hidden)) + pick(self.pos_embed, ~hidden, x)
        asked = self.mask_token + pick(self.pos_embed, target, x)  # in the clips' dtype: float32 under autocast too
        return self.decoder(torch.cat([seen, asked], dim=1), asked.shape[1])

    def own_masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """EVEREST's built-in selection: (visible_mask, target_mask), True where a token is not in the set."""
        encoder = self.encoder
        tokens = encoder.patch_embed(x)
        total = tokens.shape[1]
        steps = x.shape[2] // encoder.patch_embed.tubelet_size
        kept = most_changed(tokens, steps, int(total * (1 - encoder.mcm_ratio)))
        kept = kept.gather(1, torch.rand(kept.shape, device=kept.device).argsort(dim=1))
        seen = int(total * (1 - encoder.masking_ratio))
        return as_mask(kept[:, :seen], total), as_mask(kept[:, seen:], total)

    def forward(self, x: Tensor, mask: Tensor, decode_mask: Tensor | None = None) -> Any:
        if self.family != "everest":
            return self.run_masked(x, mask, mask if decode_mask is None else ~decode_mask)
        if not self.encoder.mcm:
            return self.run_masked(x, mask, mask), (None, None)
        visible_mask, target_mask = self.own_masks(x)
        return self.run_masked(x, visible_mask, ~target_mask), (visible_mask, target_mask)


class MMEPreTrainingModel(nn.Module):
    """MME predicts motion trajectories: a decoder for each target, its head a list of small MLPs."""

    def __init__(self, *, num_targets: int = 2, decoder_dim: int = 24, outputs: Any = (6, 10), **options: Any):
        super().__init__()

        def mlp(size: int) -> nn.Module:
            return nn.Sequential(nn.Linear(decoder_dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, size))

        self.encoder = PreTrainingEncoder("mme", **options)
        dim = self.encoder.patch_embed.proj.out_channels
        self.encoder_to_decoder = nn.ModuleList(nn.Linear(dim, decoder_dim, bias=False) for _ in range(num_targets))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.pos_embed = sinusoid_table(self.encoder.patch_embed.num_patches, decoder_dim)
        self.decoder = nn.ModuleList(
            PreTrainingDecoder("mme", nn.ModuleList(map(mlp, outputs)), decoder_dim, depth=1, **decoder_block(options))
            for _ in range(num_targets)
        )

    def forward(self, x: Tensor, mask: Tensor) -> list[list[Tensor]]:
        encoded, predictions = self.encoder(x, mask), []
        for narrow, decoder in zip(self.encoder_to_decoder, self.decoder, strict=True):
            seen = narrow(encoded)
            asked = self.mask_token + pick(self.pos_embed, mask, seen)
            tokens = torch.cat([seen + pick(self.pos_embed, ~mask, seen), asked], dim=1)
            predictions.append(decoder(tokens, asked.shape[1]))
        return predictions


class MVDPreTrainingModel(nn.Module):
    """MVD's student: flat, its position tables stored, one decoder for an image and one for a video teacher."""

    def __init__(
        self, *, decoder_dim: int = 32, use_cls_token: bool = False, features: int = 20, **options: Any
    ) -> None:
        super().__init__()
        block = decoder_block(options)
        self.patch_embed = embedding_of("mvd", options)
        embed_dim = self.patch_embed.proj.out_channels
        self.pos_embed = nn.Parameter(tables(self.patch_embed, "mvd", embed_dim), requires_grad=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if use_cls_token else None
        self.blocks = make_blocks(embed_dim, **options)
        self.norm = LayerNorm(embed_dim)
        for target in ("img", "vid"):
            decoder = PreTrainingDecoder("mvd", nn.Linear(decoder_dim, features), decoder_dim, depth=1, **block)
            setattr(self, f"mask_token_{target}", nn.Parameter(torch.zeros(1, 1, decoder_dim)))
            setattr(self, f"down_{target}", nn.Linear(embed_dim, decoder_dim))
            setattr(self, f"decoder_{target}", decoder)
            table = nn.Parameter(tables(self.patch_embed, "mvd", decoder_dim), requires_grad=False)
            setattr(self, f"pos_embed_{target}", table)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed
        x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        encoded = self.norm(run_blocks(self, x))[:, 0 if self.cls_token is None else 1 :]
        predictions = []
        for target in ("img", "vid"):
            table = getattr(self, f"pos_embed_{target}")
            seen = getattr(self, f"down_{target}")(encoded)
            asked = getattr(self, f"mask_token_{target}") + pick(table, mask, seen)
            tokens = torch.cat([seen + pick(table, ~mask, seen), asked], dim=1)
            predictions.append(getattr(self, f"decoder_{target}")(tokens, asked.shape[1]))
        return predictions[0], predictions[1]
