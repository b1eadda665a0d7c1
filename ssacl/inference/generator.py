"""ReportGenerator: pictures in, draft reports with evidence out. The one thing that prediction, evaluation and serving share.

It takes pictures and nothing else: findings, anatomy and entities are the model's own, so no reference can reach it (METHOD section 5).

Shape letters: B images, G = 32 nodes, N patches, M = 25 leaves, F = 14 findings.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssacl.anatomy import FINDING_GROUPS, FINDINGS, NODE_INDEX
from ssacl.data.dicom import Picture
from ssacl.data.labeler import sentence_place
from ssacl.data.reports import split_sentences
from ssacl.data.transforms import SquareFit, load_square, normalise
from ssacl.errors import GenerationError
from ssacl.inference.decoding import GenerationOptions, TimeLimitError, decode, token_probabilities
from ssacl.inference.maps import box_of_map, normalised_map, restrict_to_picture
from ssacl.inference.report import Box, DraftReport, Finding, Sentence
from ssacl.models.encoded import Encoded
from ssacl.models.findings import infer_anatomy
from ssacl.training.checkpoint import LoadedModel, open_model

__all__ = ["GenerationOptions", "ReportGenerator", "TimeLimitError"]

logger = logging.getLogger(__name__)
_DEFAULT_THRESHOLD = 0.5


class ReportGenerator:
    """Writes draft reports with one model.

    Parameters
    ----------
    loaded
        A model folder in memory.
    device
        Where the model is.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device | str = "cpu") -> None:
        self._loaded = loaded
        self._model = loaded.model.eval()
        self._device = torch.device(device)

    @classmethod
    def load(cls, folder_or_url: str | Path, device: torch.device | str = "cpu") -> ReportGenerator:
        """Read a model folder from disk or object storage.

        Raises
        ------
        CheckpointError
            Incomplete, damaged, or made for another architecture.
        """
        return cls(open_model(folder_or_url, device), device)

    @property
    def model_version(self) -> str:
        return self._loaded.model_version

    def describe(self) -> dict[str, Any]:
        """Version, provenance and input size, as a plain tree."""
        manifest = self._loaded.manifest
        return {
            "model_version": self.model_version,
            "code_version": manifest.get("code_version", ""),
            "provenance": manifest.get("provenance", {}),
            "image_size_px": self._loaded.config.model.vision.image_size_px,
            "thresholds": dict(self._loaded.thresholds),
        }

    def generate(self, pictures: Sequence[Picture], options: GenerationOptions | None = None) -> list[DraftReport]:
        """One draft per picture, in order.

        Parameters
        ----------
        pictures
            Frontal chest radiographs as `ssacl.data.dicom.read_picture` gives them; any size.
        options
            Search settings; the defaults if none.

        Raises
        ------
        GenerationError
            The checkpoint has no language model or no tokenizer for it, its findings head was never trained, or its weights give values
            that are not finite.
        TimeLimitError
            `options.time_limit_s` was reached.
        """
        options = options or GenerationOptions()
        if not self._loaded.tokenizers.has_language:
            raise GenerationError(
                "This checkpoint was imported without its language model's tokenizer, so that no text can be written: import it again with "
                "`ssacl checkpoint import ... --language-model DIR`."
            )
        stages = self._loaded.manifest.get("provenance", {}).get("stages")
        if stages is not None and not {"generation", "joint"} & set(stages):
            raise GenerationError(
                "This checkpoint has no trained language model: train the stage `generation` or `joint` before asking for reports."
            )
        if stages is not None and "findings" not in stages:
            raise GenerationError(
                "This checkpoint's findings head was never trained, and a report follows its findings: train the stage `findings` first."
            )
        deadline = None if options.time_limit_s is None else time.monotonic() + options.time_limit_s
        reports: list[DraftReport] = []
        for start in range(0, len(pictures), options.max_batch_size):
            reports += self._generate_batch(pictures[start : start + options.max_batch_size], options, deadline)
        return reports

    def _generate_batch(self, pictures: Sequence[Picture], options: GenerationOptions, deadline: float | None) -> list[DraftReport]:
        size = self._loaded.config.model.vision.image_size_px
        squares = [load_square(picture.pixels, size) for picture in pictures]
        image_BCHW = torch.stack([torch.as_tensor(normalise(square)) for square, _ in squares]).to(self._device)
        with torch.inference_mode():
            encoded = self._model.encode(image_BCHW)
            probability_BF = self._model.findings_logits(encoded).float().sigmoid().cpu()
            if not bool(probability_BF.isfinite().all()):
                raise GenerationError("The model's findings are not finite numbers: its weights are damaged. Copy the model folder again.")
            inferred = [infer_anatomy(row, self._loaded.thresholds) for row in probability_BF]
            leaf_mask_BM = torch.tensor([kept for _, _, kept in inferred], device=self._device)
            prefix, prefix_mask = self._model.prefix(encoded, leaf_mask_BM)
        language, tokenizers = self._model.language, self._loaded.tokenizers
        prompts = [self._prompt(entities) for entities, _, _ in inferred]
        tokens = decode(language, tokenizers, prefix, prefix_mask, prompts, options, deadline)
        confidence = token_probabilities(language, prefix, prefix_mask, prompts, tokens)

        drafts = []
        for row, picture in enumerate(pictures):
            entities, groups, _ = inferred[row]
            written = list(_sentences(tokenizers.lm, tokens[row], confidence[row]))
            drafts.append(
                DraftReport(
                    **self._evidence(_row_of(encoded, row), written, _frame(squares[row][1], size), picture),
                    findings=self._findings(probability_BF[row]),
                    anatomy_groups=groups,
                    image_ref=picture.pixel_digest,
                    model_version=self.model_version,
                    provenance={"generation": options.model_dump(), "entities": entities, "view": picture.view},
                )
            )
        return drafts

    def _evidence(self, encoded_row: Encoded, written: list[tuple[str, float]], frame: Box, picture: Picture) -> dict[str, Any]:
        """The parts of a draft that say where: anatomy maps, and each sentence with its map and box."""
        height, width = picture.pixels.shape
        grid = self._loaded.config.model.vision.grid
        on_picture = restrict_to_picture(np.ones((grid, grid)), frame, width, height)
        raw_GN = encoded_row.attention_BGN[0].float().cpu().numpy()
        anatomy_maps = np.stack([normalised_map(np.nan_to_num(raw.reshape(grid, grid)) * on_picture) for raw in raw_GN])
        sentences = []
        for text, certainty in written:
            nodes, finding, status = sentence_place(text)
            # Where the sentence names no place: where its finding can be, or the whole chest.
            looked_at = nodes or FINDING_GROUPS.get(finding or "", ()) or ("chest",)
            evidence = np.mean([anatomy_maps[NODE_INDEX[node]] for node in looked_at], axis=0)
            if finding is not None:
                # Within that place, where the sentence's own words look.
                evidence = evidence * normalised_map(self._phrase_map(encoded_row, text) * on_picture)
            evidence = normalised_map(evidence, sigma_cells=0)
            box = box_of_map(evidence, frame, width, height) if nodes or finding else None
            sentences.append(Sentence(text, nodes, finding, status.name.lower(), certainty, box, evidence))
        return {
            "sentences": tuple(sentences),
            "anatomy_maps": anatomy_maps,
            "image_width_px": width,
            "image_height_px": height,
            "map_frame": frame,
        }

    def _phrase_map(self, encoded_row: Encoded, phrase: str) -> NDArray[np.float32]:
        """[grid, grid] attention of the phrase."""
        ids = torch.tensor([self._loaded.tokenizers.text_ids(phrase, self._loaded.config.data.text_max_tokens)], device=self._device)
        with torch.inference_mode():
            attention = self._model.phrase_attention(encoded_row, ids, torch.ones_like(ids, dtype=torch.bool))
        grid = self._loaded.config.model.vision.grid
        return np.asarray(np.nan_to_num(attention[0].float().cpu().numpy().reshape(grid, grid)), dtype=np.float32)

    def _prompt(self, entities: list[str]) -> list[int]:
        """Token ids of the entities and the newline, as in training."""
        return self._loaded.tokenizers.lm_ids(", ".join(entities) + "\n")

    def _findings(self, probability_F: Tensor) -> tuple[Finding, ...]:
        thresholds = [self._loaded.thresholds.get(name, _DEFAULT_THRESHOLD) for name in FINDINGS]
        return tuple(
            Finding(name, value, threshold, value >= threshold)
            for name, value, threshold in zip(FINDINGS, probability_F.tolist(), thresholds, strict=True)
        )


def _frame(fit: SquareFit, size_px: int) -> Box:
    """Original pixels that the model's square covers."""
    x0, y0 = fit.to_original(0.0, 0.0)
    x1, y1 = fit.to_original(float(size_px), float(size_px))
    return Box(float(x0), float(y0), float(x1), float(y1))


def _row_of(encoded: Encoded, row: int) -> Encoded:
    """One image of an encoded batch."""

    def cut(value: Any) -> Any:
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value[row : row + 1]

    return Encoded(**{item.name: cut(getattr(encoded, item.name)) for item in dataclasses.fields(encoded)})


def _sentences(tokenizer: Any, tokens: list[int], probabilities: list[float]) -> Iterator[tuple[str, float]]:
    """Each sentence of the written text and the mean probability of its tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    # Where in the text each token ends; a token may end inside a character, so lengths never fall.
    ends = [len(tokenizer.decode(tokens[: count + 1], skip_special_tokens=True)) for count in range(len(tokens))]
    cursor = first = 0
    for sentence in split_sentences(text):
        found = text.find(sentence[:12], cursor)
        cursor = max(cursor, found) + len(sentence)
        last = first
        while last < len(ends) and (ends[last] <= cursor or last == first):
            last += 1
        own = probabilities[first:last]
        yield sentence, float(np.mean(own)) if own else 0.0
        first = last
