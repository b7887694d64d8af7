"""Host: the model classes of the VideoMAE family's own repositories, known by their structure alone.

Fine-tuning models (VideoMAE, V2, MME, MVD, EVEREST) run their own forward: their tubelet embedding returns the visible
tokens only, and their position table shows those tokens' positions for the time of a forward. Pre-training models
(VideoMAE, V2, EVEREST) get another forward, without the boolean masks of their own.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from everest_tokens.hosts.patch_options import PatchOptions
from everest_tokens.hosts.patched_class import Patched, patch_class, restore_class
from everest_tokens.hosts.selecting_model import SelectingModel, select_by
from everest_tokens.hosts.stochastic_depth import (
    check_stochastic_depth,
    restore_stochastic_depth,
    set_stochastic_depth,
)
from everest_tokens.hosts.visible_tokens import (
    SelectionRequest,
    check_clips,
    checked_selection,
    num_candidates,
    visible_tokens,
)
from everest_tokens.selection import SelectionPolicy, TokenSelection, source_positions
from everest_tokens.selectors import Grid
from everest_tokens.tubelets import TubeletSize, is_unhooked

PATCHABLE = (
    "fine-tuning models of VideoMAE, VideoMAE V2, MME, MVD and EVEREST and pre-training models of VideoMAE, V2 and"
    " EVEREST, of those repositories' own classes"
)


class TubeletEmbedding(Patched):
    """A `patch_embed` that returns the visible tokens for as long as a request is with it, else all."""

    everest: SelectionPolicy
    request: SelectionRequest | None
    only_projects: bool  # whether its own forward does nothing but call `proj`

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, C, T, H, W) → visible tokens without positions, (B, V, D)."""
        if self.request is None:
            return super().forward(x, **kwargs)
        size, grid = geometry(self)
        height, width = self.img_size
        frames = size.frames * self.everest.num_candidates(grid[0])
        expected = {"channels": self.proj.weight.shape[1], "frames": frames, "height": height, "width": width}
        check_clips(x, expected, self.everest, size.frames * grid[0], "clips")
        return visible_tokens(
            self.everest,
            self.request,
            partial(super().forward, x, **kwargs),
            x.transpose(1, 2),
            self.proj,
            size,
            grid,
            training=self.training,
            only_projects=self.only_projects and is_unhooked(self),
        )


class FineTuning(SelectingModel):
    """A classifier of which only the informative tokens reach the blocks."""

    patch_embed: TubeletEmbedding
    _table: Tensor | None  # the model's own `pos_embed` where that is a plain tensor

    @property
    def pos_embed(self) -> Tensor | None:
        """The table (1, N, D); from tubelet embedding to the end of a forward the visible tokens' rows, (B, V, D)."""
        table = {**self._buffers, **self._parameters}.get("pos_embed", self._table)
        request = self.patch_embed.request
        if table is None or request is None or request.selection is None:
            return table
        visible = request.selection.visible
        return table[0].to(visible.device)[visible]

    @pos_embed.setter
    def pos_embed(self, table: Tensor | None) -> None:
        self._table = table

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        _move_table(self, "_table", self.patch_embed.proj.weight.device)
        return self


class PreTrainingEncoder(Patched):
    """Encodes the visible tokens, without a boolean mask."""

    def forward(self, x: Tensor, request: SelectionRequest) -> Tensor:
        """(B, C, T, H, W) → (B, V, D); fills in the request."""
        embedding = self.patch_embed
        embedding.request = request
        try:
            tokens = embedding(x)
        finally:
            embedding.request = None
        assert request.selection is not None
        tokens = tokens + _rows(self.pos_embed, request.selection.visible, tokens.dtype)
        for block in self.blocks:
            if getattr(self, "use_checkpoint", False) or getattr(self, "with_cp", False):
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.head(self.norm(tokens))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        _move_table(self, "pos_embed", self.patch_embed.proj.weight.device)
        return self


class PreTraining(Patched):
    """Predicts the pixels of the kept tokens that are not visible (Eq. 3)."""

    everest: SelectionPolicy

    def forward(
        self, x: Tensor, mask: Any = None, decode_mask: Any = None, *, token_selection: TokenSelection | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As EVEREST's own classes answer.

        Args:
            x: clips (B, C, T, H, W), normalised.
            mask, decode_mask: ignored.

        Returns:
            The prediction (B, M, frames·height·width·C) in the order of `TokenSelection.target`, and (visible_mask,
            target_mask), (B, N) bool over the tokens of `x`, True where a token is *not* in the set.
        """
        request = SelectionRequest(checked_selection(token_selection))
        seen = self.encoder_to_decoder(self.encoder(x, request))  # (B, V, decoder D)
        selection = request.selection
        assert selection is not None
        assert selection.target is not None
        asked = self.mask_token + _rows(self.pos_embed, selection.target, x.dtype)
        seen = seen + _rows(self.pos_embed, selection.visible, x.dtype)  # as these models: in the clip's dtype
        prediction = self.decoder(torch.cat([seen, asked], dim=1), selection.target.shape[1])
        outside = partial(_outside, selection=selection, tokens=self.everest.num_candidates(selection.grid[0]))
        return prediction, (outside(selection.visible), outside(selection.target))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        _move_table(self, "pos_embed", self.mask_token.device)
        return self


class FusedAttention(Patched):
    """The family's attention through `scaled_dot_product_attention`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        batch, count, _ = tokens.shape
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        products = nn.functional.linear(tokens, self.qkv.weight, bias)
        query, key, value = products.view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, count, -1)))


def geometry(embedding: Any) -> tuple[TubeletSize, Grid]:
    """The tubelet size and the grid (τ, h, w) that the model runs. Raises ValueError for fewer than two time steps."""
    size = TubeletSize(int(embedding.tubelet_size), *embedding.patch_size)
    height, width = embedding.img_size
    places = (height // size.height) * (width // size.width)
    return size, size.grid(size.frames * (embedding.num_patches // places), height, width)


def recognises(model: nn.Module) -> bool:
    return _fine_tunes(model) or _pretrains(model) or _predicts_features(model)


def check_patchable(model: Any) -> None:
    """Raise TypeError for a part of a patched model, and for a pre-training model whose targets are not pixels."""
    embedding = getattr(_encoder(model), "patch_embed", None)
    if isinstance(embedding, TubeletEmbedding) and not isinstance(model, Patched):
        raise TypeError("a part of this model, or a model that it is part of, is patched already: unpatch that first")
    table = getattr(_encoder(model), "pos_embed", None)
    if isinstance(table, Tensor) and embedding is not None and table.shape[1] != embedding.num_patches:
        raise TypeError(
            f"{type(model).__qualname__} has {table.shape[1]} positions for {embedding.num_patches} tubelets;"
            f" patchable are {PATCHABLE}"
        )
    if _predicts_features(model):
        raise TypeError(
            f"{type(model).__qualname__} predicts other targets than pixels (MME: motion, MVD: teachers' features), "
            f"so its kept tokens are not its loss's; patchable are {PATCHABLE}"
        )


def task_of(model: nn.Module) -> str:
    """ "pretraining" for a model with a pixel decoder, else "encoder"."""
    return "pretraining" if _pretrains(model) else "encoder"


def example(model: Any) -> tuple[tuple[int, ...], Grid, int]:
    """The shape of one clip as `forward` takes it, its grid (τ, h, w), and the channels of a token."""
    embedding = _encoder(model).patch_embed
    size, grid = geometry(embedding)
    weight, frames = embedding.proj.weight, size.frames * num_candidates(model, grid)
    return (1, weight.shape[1], frames, *embedding.img_size), grid, weight.shape[0]


def model_grid(model: Any, options: PatchOptions) -> Grid:
    options.refuse_others("a model of the VideoMAE family", "drop_path", "fused_attention")
    check_stochastic_depth(_encoder(model).blocks, options.drop_path)
    if options.fused_attention:
        for number, block in enumerate(_all_blocks(model)):
            _check_attention(number, block.attn)
    return geometry(_encoder(model).patch_embed)[1]


def attach(model: Any, policy: SelectionPolicy, options: PatchOptions) -> None:
    """Make `model` select by `policy`. It must be unpatched."""
    encoder = _encoder(model)
    embedding = encoder.patch_embed
    device = embedding.proj.weight.device
    embedding.only_projects = _only_projects(embedding)
    patch_class(embedding, TubeletEmbedding)
    embedding.request = None
    embedding.everest = model.everest = policy
    if _pretrains(model):
        patch_class(model, PreTraining)
        patch_class(encoder, PreTrainingEncoder)
        for module in (model, encoder):
            _move_table(module, "pos_embed", device)
    else:
        model._table = model.__dict__.pop("pos_embed", None)
        model._given = None
        patch_class(model, FineTuning)
        _move_table(model, "_table", device)
        if getattr(model, "mcm", False):  # EVEREST's own selection
            model.mcm, model._everest_mcm = False, True
    if options.fused_attention:
        for block in _all_blocks(model):
            patch_class(block.attn, FusedAttention)
    if options.drop_path:
        set_stochastic_depth(encoder.blocks, options.drop_path)


def detach(model: Any, again: PatchOptions | None) -> None:
    """Undo `attach`."""
    encoder = _encoder(model)
    restore_stochastic_depth(encoder.blocks)
    for block in _all_blocks(model):
        if isinstance(block.attn, FusedAttention):
            restore_class(block.attn)
    restore_class(encoder.patch_embed)
    for name in ("request", "everest", "only_projects"):
        delattr(encoder.patch_embed, name)
    del model.everest
    restore_class(model)
    if _pretrains(model):
        restore_class(encoder)
        return
    table = model.__dict__.pop("_table")
    del model._given
    if not hasattr(model, "pos_embed"):
        model.pos_embed = table
    if model.__dict__.pop("_everest_mcm", False):
        model.mcm = True


def select(model: Any, clips: Tensor, generator: torch.Generator | None) -> TokenSelection:
    """Select without running the encoder."""
    return select_by(_encoder(model).patch_embed, clips, generator)


def _encoder(model: Any) -> Any:
    return model.encoder if _pretrains(model) else model


def _all_blocks(model: Any) -> list[Any]:
    return [*_encoder(model).blocks, *(model.decoder.blocks if _pretrains(model) else ())]


def _embeds_tubelets(module: Any) -> bool:
    embedding = getattr(module, "patch_embed", None)
    weight = getattr(getattr(embedding, "proj", None), "weight", None)
    named = all(hasattr(embedding, name) for name in ("img_size", "patch_size", "tubelet_size", "num_patches"))
    return named and isinstance(weight, Tensor) and weight.ndim == 5 and isinstance(module.blocks, nn.ModuleList)


def _fine_tunes(model: Any) -> bool:
    own = all(hasattr(model, name) for name in ("pos_embed", "head", "forward_features"))
    if not own or not (hasattr(model, "fc_norm") or hasattr(model, "norm")) or not _embeds_tubelets(model):
        return False
    wanted = inspect.signature(model.forward_features).parameters.values()
    return "mask" not in {parameter.name for parameter in wanted}  # that is a pre-training model's encoder


def _pretrains(model: Any) -> bool:
    """Whether its decoder predicts the pixels of a tubelet."""
    parts = ("encoder", "decoder", "encoder_to_decoder", "mask_token", "pos_embed")
    if not all(hasattr(model, name) for name in parts) or not _embeds_tubelets(model.encoder):
        return False
    head = getattr(model.decoder, "head", None)
    return getattr(head, "out_features", None) == math.prod(model.encoder.patch_embed.proj.weight.shape[1:])


def _predicts_features(model: Any) -> bool:
    """MME's pre-training model, with a decoder for each target, or MVD's, with one for each teacher."""
    with_decoders = hasattr(model, "encoder") and hasattr(model, "decoder") and _embeds_tubelets(model.encoder)
    teachers = any(hasattr(model, f"decoder_{name}") for name in ("img", "vid"))
    return (with_decoders and not _pretrains(model)) or (teachers and _embeds_tubelets(model))


def _check_attention(number: int, attention: Any) -> None:
    """Raise ValueError where a block's attention is not the family's usual one."""
    names = {name for name, _ in attention.named_parameters()}
    usual = {"qkv.weight", "proj.weight", "proj.bias"}
    parts = all(hasattr(attention, name) for name in ("num_heads", "attn_drop", "proj_drop", "q_bias", "v_bias"))
    scaled = isinstance(getattr(attention, "scale", None), float)
    if not parts or not scaled or names not in (usual, usual | {"q_bias", "v_bias"}):
        raise ValueError(
            f"fused_attention: the attention of block {number} ({type(attention).__qualname__}) is not a fused qkv with"
            f" a fixed scale, its parameters are {', '.join(sorted(names))}"
        )


def _rows(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """table (1, N, D), index (B, M) → (B, M, D), detached as in these models."""
    return table[0].detach().to(index.device)[index].to(dtype)


@torch.no_grad()
def _only_projects(embedding: Any) -> bool:
    """Whether an embedding is nothing but its convolution: tried, as its forward is not ours to read."""
    weight = embedding.proj.weight
    if len(list(embedding.modules())) != 2 or len(list(embedding.parameters())) != len([*embedding.proj.parameters()]):
        return False
    if weight.is_meta:
        return True
    size = (1, weight.shape[1], 2 * weight.shape[2], *embedding.img_size)
    clip = torch.linspace(-1, 1, math.prod(size), device=weight.device).view(size).to(weight.dtype)
    projected = embedding.proj(clip).flatten(2).transpose(1, 2)
    embedded = embedding(clip)
    return embedded.shape == projected.shape and torch.equal(embedded, projected)


def _move_table(module: Any, name: str, device: torch.device) -> None:
    """Tables that are plain tensors follow the model, so that no forward copies them from the host."""
    table = getattr(module, name)
    plain = isinstance(table, Tensor) and not isinstance(table, nn.Parameter)
    if plain and table.device != device and "meta" not in (table.device.type, device.type):
        setattr(module, name, table.to(device))


def _outside(index: Tensor, selection: TokenSelection, tokens: int) -> Tensor:
    """Positions (B, M) in the drawn clip → (B, N) bool over the clip passed in, True where a token is not there."""
    _, height, width = selection.grid
    everything = torch.ones(index.shape[0], tokens * height * width, dtype=torch.bool, device=index.device)
    return everything.scatter(1, source_positions(index, selection.steps, selection.grid), False)
