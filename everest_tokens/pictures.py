"""Pictures of what one model does with clips: the models and `visualization` meet here."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from everest_tokens.frame_sampling import InfoFrameSampler
from everest_tokens.patching import host_of, is_patched, patch_videomae, select_tokens, unwrap
from everest_tokens.policy import LiveSettings, SelectionPolicy
from everest_tokens.selection import TokenSelection
from everest_tokens.selectors import (
    Grid,
    RandomSelector,
    ReRoSelector,
    RunningCellSelector,
    Selector,
    TokenSelector,
    TubeSelector,
)
from everest_tokens.video import IMAGENET_MEAN, IMAGENET_STD
from everest_tokens.visualization import Part, candidates_part, kept_map, reconstruction_part, selection_part

logger = logging.getLogger(__name__)

SWEEP = (0.5, 0.25, 0.15)  # of Figure 9


class ModelPictures:
    """Draws from a copy of a model, which itself stays as it is: each method makes the `Part` of one clip.

    A patched model, or one from a folder whose `config.everest` records settings, is drawn with these; an unpatched one
    with what `patch_videomae` would set. Its frame sampler shows in `frames` only: the other pictures take the clip's
    frames as they are.

    Args:
        model: what `patch_videomae` takes.
        keep_ratio, distance, alpha: in place of the model's own.
        seed: of everything random.
        mean, std: of the normalisation that the model expects.

    All methods take frames (T, 3, H, W), uint8 or floats in [0, 1], as long and large as the model's clips.

    Raises:
        TypeError, ValueError: as `patch_videomae`, and for settings out of their range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep_ratio: float | None = None,
        distance: str | None = None,
        alpha: float | None = None,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.model = copy.deepcopy(unwrap(model)).eval()
        settled = is_patched(self.model)
        if not settled:
            if isinstance(getattr(getattr(unwrap(model), "config", None), "everest", None), LiveSettings):
                del self.model.config.everest  # of a patched model that shares the config
            recorded = getattr(getattr(self.model, "config", None), "everest", None) or {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about running the model, which is only looked at
                patch_videomae(self.model)
            settled = "selector" in recorded and recorded.get("task") == self.model.everest.task
        policy = self.model.everest
        self.sampler = InfoFrameSampler(alpha) if alpha is not None else policy.frame_sampler or InfoFrameSampler()
        policy.frame_sampler = None
        policy.selector = _adjusted(policy.selector, keep_ratio, distance)
        ratio = getattr(policy.selector, "keep_ratio", 0.5)
        self.strategies_ratio: float = ratio if settled or keep_ratio is not None else 0.5  # Figure 8's
        self.seed, self.mean, self.std = seed, torch.tensor(mean), torch.tensor(std)

    def selection(self, frames: Tensor, title: str = "") -> Part:
        """Frames, kept tokens and importance (Figure 6)."""
        chosen = self._selection(self.model.everest.selector, *self._embeddings(frames)[0])
        return selection_part(frames, {"kept": chosen}, title=title)

    def strategies(self, frames: Tensor, title: str = "") -> Part:
        """Random, tube, running cell and redundancy-robust selection at one keep ratio (Figure 8).

        Running cells keep a quarter, a half or three quarters: the nearest, of which the label gives the number. On a
        grid of odd height or width there are none, and the row is left out.
        """
        own, ratio = self.model.everest.selector, self.strategies_ratio
        tokens, grid = self._embeddings(frames)[0]
        rows: dict[str, Selector] = {"random (ST-MAE)": RandomSelector(ratio), "tube (VideoMAE)": TubeSelector(ratio)}
        if grid[1] % 2 == 0 and grid[2] % 2 == 0:
            rows["running cell (VideoMAE V2)"] = RunningCellSelector(min(max(round(4 * ratio), 1), 3) / 4)
        else:
            logger.info("no running cells on %d×%d tokens: they are of 2×2", *grid[1:])
        rows["ReRo (EVEREST)"] = _adjusted(own if isinstance(own, ReRoSelector) else ReRoSelector(), ratio, None)
        chosen = {label: self._selection(selector, tokens, grid) for label, selector in rows.items()}
        return selection_part(frames, chosen, title=title)

    def keep_ratios(self, frames: Tensor, title: str = "", ratios: Sequence[float] = SWEEP) -> Part:
        """The model's selector at several keep ratios, and importance (Figure 9)."""
        tokens, grid = self._embeddings(frames)[0]
        swept = {f"keep ratio {ratio:g}": _adjusted(self.model.everest.selector, ratio, None) for ratio in ratios}
        chosen = {label: self._selection(selector, tokens, grid) for label, selector in swept.items()}
        return selection_part(frames, chosen, title=title)

    def frames(self, frames: Tensor, title: str = "") -> Part:
        """The time steps that the frame sampler draws in training (§4.2, Figures 3 and 10).

        It takes ⌊α·τ⌋ time steps of frames.
        """
        (tokens, candidates), (_, grid) = self._embeddings(frames, self.sampler)
        chosen = self._selection(self.model.everest.selector, tokens, candidates)
        steps = self.sampler(chosen.frame_counts, grid[0], self._generator())
        return candidates_part(frames, kept_map(chosen), steps[0], title=title)

    @torch.no_grad()
    def reconstruction(self, frames: Tensor, title: str = "") -> Part:
        """What the encoder sees and what the decoder makes of it; see `reconstruction_part` (Eq. 3).

        Raises:
            ValueError: the model has no pixel decoder.
        """
        if self.model.everest.task != "pretraining":
            raise ValueError(f"{type(self.model).__name__} has no pixel decoder: it reconstructs nothing")
        clips = self._clips(frames)
        selection = select_tokens(self.model, clips, generator=self._generator())
        output = self.model(clips, token_selection=selection)
        prediction = output[0] if isinstance(output, tuple) else output.logits
        # The VideoMAE family's own pre-training normalises always, transformers' where the configuration says so.
        normalised = getattr(getattr(self.model, "config", None), "norm_pix_loss", True)
        return reconstruction_part(frames, selection, prediction, normalised=normalised, title=title)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _clips(self, frames: Tensor) -> Tensor:
        """A batch of one, as the model takes it."""
        pixels = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        clips = ((pixels.cpu() - self.mean[:, None, None]) / self.std[:, None, None])[None]
        clips = clips.to(next(parameter for parameter in self.model.parameters() if parameter.is_floating_point()))
        return clips.transpose(1, 2) if host_of(self.model).channels_first else clips

    def _embeddings(self, frames: Tensor, sampler: InfoFrameSampler | None = None) -> list[tuple[Tensor, Grid]]:
        """What the model's selector is given: tokens (1, N, D) and grid, with a sampler of all candidates first."""
        given: list[tuple[Tensor, Grid]] = []

        def remember(tokens: Tensor, grid: Grid) -> Tensor:
            given.append((tokens, grid))
            return torch.arange(tokens.shape[1], device=tokens.device)[None]

        policy = self.model.everest
        before = policy.selector, policy.visible, policy.frame_sampler
        policy.selector, policy.visible, policy.frame_sampler = remember, None, sampler
        try:
            select_tokens(self.model, self._clips(frames), generator=self._generator())
        finally:
            policy.selector, policy.visible, policy.frame_sampler = before
        return given

    def _selection(self, selector: Selector, tokens: Tensor, grid: Grid) -> TokenSelection:
        policy = SelectionPolicy("encoder", selector, 0.9, None, None)
        return policy.select(tokens, grid, generator=self._generator(), with_importance=True)


def _adjusted(selector: Selector, keep_ratio: float | None, distance: str | None) -> Selector:
    """A copy with what is given in place of its own; a distance is that of a `ReRoSelector`."""
    adjusted = copy.deepcopy(selector)
    if distance is not None:
        if not isinstance(adjusted, ReRoSelector):
            adjusted = ReRoSelector(getattr(selector, "keep_ratio", 0.3))
        adjusted.distance = distance
    if keep_ratio is not None:
        if not isinstance(adjusted, TokenSelector):
            raise ValueError(f"{selector!r} has no keep ratio that could be set to {keep_ratio}")
        adjusted.keep_ratio = keep_ratio
    return adjusted
