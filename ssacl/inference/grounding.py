"""Where a film shows what words say: maps of the anatomy, and of any sentence or phrase, with how sure the model is that it is there.

Anatomy maps are the node queries' attention. Where the model was trained with the grounding terms, they are the atlas' drawing, laid on
the patient by that attention and weighed with it, on a grid twice as fine: attention alone is a blob, whatever the organ's outline.
A finding's map is the places where the findings head sees it, within the anatomy that the words name.

Shape letters: G = 32 nodes, M = 25 leaves, F = 14 findings, N patches, g side of the maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ssacl.anatomy import (
    FINDING_GROUPS,
    FINDING_INDEX,
    LEAVES,
    NO_FINDING,
    NODE_INDEX,
    FindingStatus,
    leaves_below,
)
from ssacl.data.labeler import sentence_place
from ssacl.errors import GenerationError
from ssacl.inference.maps import normalised_map, restrict_to_picture
from ssacl.inference.report import Box
from ssacl.losses.registration import fit_pose, lay_drawing, lay_maps
from ssacl.losses.warp import patch_centres
from ssacl.models.encoded import Encoded
from ssacl.models.findings_head import FindingsRead
from ssacl.models.phrase import phrase_attention
from ssacl.models.restoration import LEAF_NODES
from ssacl.training.checkpoint import LoadedModel

FINER = 2
"""Cells of a registered map per patch and axis."""
MAX_PHRASE_CHARACTERS = 500
_FLOOR = 1e-3  # of the drawing: attention far outside of it still counts a little
_UNSEEN = 0.02
"""What a place counts for that does not show the finding: where none does, the map is the named place."""
_LEAF_INDEX = {leaf: index for index, leaf in enumerate(LEAVES)}


@dataclass(frozen=True)
class Meaning:
    """What a phrase or sentence was understood as."""

    anatomy: tuple[str, ...]
    finding: str | None
    status: FindingStatus

    @property
    def places(self) -> tuple[str, ...]:
        """The nodes to look at: those named, or where the finding can be, or the whole chest."""
        return self.anatomy or FINDING_GROUPS.get(self.finding or "", ()) or ("chest",)


def understand(text: str) -> Meaning:
    """Read the place and the finding of a sentence or phrase.

    Raises
    ------
    GenerationError
        The text is empty, or longer than `MAX_PHRASE_CHARACTERS`.
    """
    if not text.strip() or len(text) > MAX_PHRASE_CHARACTERS:
        raise GenerationError(
            f"A phrase of {len(text)} characters cannot be looked for; give 1 to {MAX_PHRASE_CHARACTERS}, as in 'left pleural effusion'."
        )
    return Meaning(*sentence_place(text))


class Look:
    """One encoded film, ready to be asked where things are.

    Parameters
    ----------
    loaded
        The model.
    encoded
        One film's row of `SSACL.encode`.
    read
        What the findings head sees in it, one row.
    frame, width_px, height_px
        Where the model's square lies on the original picture, and the picture's size, in pixels.

    Attributes
    ----------
    anatomy_maps : [G, g, g] float32
        Each sums to 1; padding holds nothing.
    pose : [2, 3] float32
        Affine map from the atlas' frame to the model's square, for points (x, y, 1) in half-widths; the identity without grounding terms.
    """

    def __init__(self, loaded: LoadedModel, encoded: Encoded, read: FindingsRead, frame: Box, width_px: int, height_px: int) -> None:
        self._loaded, self._encoded, self._read, self.frame = loaded, encoded, read, frame
        self._grid = loaded.config.model.vision.grid
        grounding = loaded.config.losses.grounding
        self._trained = grounding.enabled
        registered = grounding.enabled and grounding.shape > 0
        self.side = self._grid * (FINER if registered else 1)
        self._on_picture = restrict_to_picture(np.ones((self.side, self.side)), frame, width_px, height_px)
        attention_GN = encoded.attention_BGN[0].float().cpu().nan_to_num()
        maps = np.stack([normalised_map(each) for each in attention_GN.view(-1, self._grid, self._grid).numpy()])
        # The findings head sees the film in the atlas' frame; without the grounding terms that is the film's own.
        self._pose_123 = torch.eye(2, 3)[None]
        if self._trained:
            self._pose_123 = fit_pose((attention_GN[list(LEAF_NODES)] @ patch_centres(self._grid))[None])
        self.pose: NDArray[np.float32] = self._pose_123[0].numpy()
        if registered:
            drawn = lay_drawing(self._pose_123, self.side)[0].view(-1, self.side, self.side).numpy()
            maps = (np.sqrt(self._finer(maps)) * (drawn + _FLOOR)).astype(np.float32)
        self.anatomy_maps = np.stack([normalised_map(each * self._on_picture, sigma_cells=0) for each in maps])

    def place(self, meaning: Meaning) -> NDArray[np.float32]:
        """[g, g] float32, sums to 1: the anatomy that the words speak of, whatever it shows."""
        named: NDArray[np.float32] = np.mean([self.anatomy_maps[NODE_INDEX[node]] for node in meaning.places], axis=0)
        return named

    def evidence(self, text: str, meaning: Meaning) -> NDArray[np.float32]:
        """[g, g] float32, sums to 1: where the film shows what `text`, understood as `meaning`, says."""
        place = self.place(meaning)
        if meaning.finding is not None and meaning.finding != NO_FINDING:
            place = place * (self._finding_map(meaning.finding) + _UNSEEN)
        elif not meaning.anatomy:
            place = place * self._phrase_map(text)
        return normalised_map(place * self._on_picture, sigma_cells=0)

    def confidence(self, meaning: Meaning) -> float:
        """0..1: is what was said to be seen there?

        A finding: the findings head's probability, times the evidence at the named places over that at the best place of the film.
        Anatomy alone: the share of its drawing that lies on the film. Words that name neither: 0.
        """
        if meaning.finding is not None:
            named = [_LEAF_INDEX[leaf] for node in meaning.places for leaf in leaves_below(node)]
            leaf_M = self._read.leaves_BMF[0, :, FINDING_INDEX[meaning.finding]].sigmoid().cpu().numpy()
            share = float(leaf_M[named].max() / max(leaf_M.max(), 1e-12))
            return float(self._read.image_BF[0, FINDING_INDEX[meaning.finding]].sigmoid()) * share
        if not meaning.anatomy:
            return 0.0
        raw = np.stack([self._encoded.attention_BGN[0, NODE_INDEX[node]].float().cpu().numpy() for node in meaning.anatomy])
        on_grid = functional.interpolate(torch.from_numpy(self._on_picture)[None, None].float(), size=(self._grid, self._grid), mode="area")
        return float((raw * on_grid.flatten().numpy()).sum() / max(raw.sum(), 1e-12))

    def _finding_map(self, finding: str) -> NDArray[np.float32]:
        """[g, g] probability that each place shows the finding."""
        cells_11CC = self._read.cells_BFCC[:, [FINDING_INDEX[finding]]].sigmoid().cpu()
        shown: NDArray[np.float32] = lay_maps(cells_11CC, self._pose_123, self.side).view(self.side, self.side).numpy()
        return shown

    def _phrase_map(self, phrase: str) -> NDArray[np.float32]:
        """[g, g] attention of the phrase's own words, smoothed."""
        tokenizers, config = self._loaded.tokenizers, self._loaded.config
        device = self._encoded.patches_BND.device
        ids = torch.tensor([tokenizers.text_ids(phrase, config.data.text_max_tokens)], device=device)
        with torch.inference_mode():
            attention = phrase_attention(self._loaded.model, self._encoded, ids, torch.ones_like(ids, dtype=torch.bool))
        attended: NDArray[np.float32] = self._finer(normalised_map(attention[0].float().cpu().view(self._grid, self._grid).numpy())[None])[
            0
        ]
        return attended

    def _finer(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """[K, grid, grid] -> [K, g, g], bilinear."""
        if self.side == self._grid:
            return maps
        finer: NDArray[np.float32] = functional.interpolate(
            torch.from_numpy(maps)[None], size=(self.side, self.side), mode="bilinear", align_corners=False
        )[0].numpy()
        return finer
