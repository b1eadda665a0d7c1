"""ReportGenerator: pictures in, draft reports with evidence out. The one thing that prediction, evaluation and serving share.

It takes pictures and nothing else: findings, anatomy and entities are the model's own, so no reference can reach it (METHOD section 5).

Shape letters: B images, G = 32 nodes, N patches, M = 25 leaves, F = 14 findings.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ssacl.anatomy import FINDINGS, with_side
from ssacl.data.dicom import Picture
from ssacl.data.labeler import sentence_place
from ssacl.data.reports import split_sentences
from ssacl.data.transforms import SquareFit, load_square, normalise
from ssacl.errors import GenerationError
from ssacl.inference.decoding import GenerationOptions, TimeLimitError, decode
from ssacl.inference.grounding import Look, Meaning, understand
from ssacl.inference.maps import box_of_map
from ssacl.inference.precision import Precision, prepare
from ssacl.inference.report import Box, DraftReport, Finding, PhraseEvidence, Sentence
from ssacl.models.encoded import Encoded
from ssacl.models.findings import infer_anatomy, infer_sides
from ssacl.models.findings_head import FindingsRead
from ssacl.training.checkpoint import LoadedModel, open_model

__all__ = ["GenerationOptions", "ReportGenerator", "TimeLimitError"]

logger = logging.getLogger(__name__)
_DEFAULT_THRESHOLD = 0.5
_Rows = TypeVar("_Rows", Encoded, FindingsRead)


@dataclass(frozen=True)
class Conditions:
    """What the language model writes from: prefix and mask, and as prompts the entities that the findings head saw, film by film."""

    prefix: Tensor
    mask: Tensor
    prompts: list[list[int]]
    entities: list[list[str]]
    groups: list[tuple[str, ...]]
    """Names of the anatomy groups whose leaves the prefix keeps."""


class ReportGenerator:
    """Writes draft reports with one model.

    Parameters
    ----------
    loaded
        A model folder in memory.
    device
        Where the model is.
    precision
        What `prepare` made of the model, where it did.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device | str = "cpu", precision: Precision = "fp32") -> None:
        self._loaded, self._precision = loaded, precision
        self._model = loaded.model.eval()
        self._device = torch.device(device)

    @classmethod
    def load(cls, folder_or_url: str | Path, device: torch.device | str = "cpu", precision: Precision = "fp32") -> ReportGenerator:
        """Read a model folder from disk or object storage and make it ready to write, in `precision`.

        Raises
        ------
        CheckpointError
            Incomplete, damaged, or made for another architecture.
        ConfigError
            The device has no such precision.
        """
        loaded = open_model(folder_or_url, device)
        prepare(loaded.model, precision)
        return cls(loaded, device, precision)

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
            "precision": self._precision,
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
        encoded, squares, read = self._encode(pictures)
        given = self.conditions(encoded, read, options.entities)
        language, tokenizers = self._model.language, self._loaded.tokenizers
        reports = decode(language, tokenizers, given.prefix, given.mask, given.prompts, options, deadline)
        probability_BF = read.image_BF.sigmoid().cpu()

        drafts = []
        for row, picture in enumerate(pictures):
            written = list(_sentences(tokenizers.lm, reports[row].tokens, reports[row].probabilities))
            drafts.append(
                DraftReport(
                    **self._evidence(self._look(encoded, read, row, squares[row][1], picture), written, picture),
                    findings=self._findings(probability_BF[row]),
                    anatomy_groups=given.groups[row],
                    image_ref=picture.pixel_digest,
                    model_version=self.model_version,
                    provenance={
                        "generation": options.model_dump(),
                        "precision": self._precision,
                        "entities": given.entities[row],
                        "view": picture.view,
                    },
                )
            )
        return drafts

    def conditions(self, encoded: Encoded, read: FindingsRead, with_entities: bool = True) -> Conditions:
        """What the language model is given for encoded films, by what the findings head `read` in them.

        Without entities the report follows the film at once, as in the rows of training whose coin said so.
        """
        with torch.inference_mode():
            inferred = [infer_anatomy(row, self._loaded.thresholds) for row in read.image_BF.sigmoid().cpu()]
            leaf_mask_BM = torch.tensor([kept for _, _, kept in inferred], device=self._device)
            prefix, mask = self._model.prefix(encoded, leaf_mask_BM)
        named = [self._with_sides(entities, read.leaves_BMF[row]) for row, (entities, _, _) in enumerate(inferred)]
        prompts = [self._prompt(entities) if with_entities else [] for entities in named]
        return Conditions(prefix, mask, prompts, named if with_entities else [[] for _ in named], [groups for _, groups, _ in inferred])

    def _encode(self, pictures: Sequence[Picture]) -> tuple[Encoded, list[tuple[Any, SquareFit]], FindingsRead]:
        """The encoded films, their squares, and what the findings head sees in them."""
        size = self._loaded.config.model.vision.image_size_px
        squares = [load_square(picture.pixels, size) for picture in pictures]
        image_BCHW = torch.stack([torch.as_tensor(normalise(square)) for square, _ in squares]).to(self._device)
        half = torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16")
        with torch.inference_mode(), half:
            encoded = self._model.encode(image_BCHW)
            read = self._model.findings_read(encoded)
        if not bool(read.image_BF.isfinite().all()):
            raise GenerationError("The model's findings are not finite numbers: its weights are damaged. Copy the model folder again.")
        return encoded, squares, read

    def ground(self, picture: Picture, phrases: Sequence[str]) -> list[PhraseEvidence]:
        """Where a film shows each of `phrases` ("left pleural effusion", "carina"), and how sure the model is that it is there.

        Raises
        ------
        GenerationError
            A phrase is empty or too long, or the weights give values that are not finite.
        """
        meanings = [understand(phrase) for phrase in phrases]
        look = self.look(picture)
        return [self._phrase_evidence(look, phrase, meaning, picture) for phrase, meaning in zip(phrases, meanings, strict=True)]

    def look(self, picture: Picture) -> Look:
        """The encoded film, ready to be asked where things are; see `ground` for errors."""
        encoded, squares, read = self._encode([picture])
        return self._look(encoded, read, 0, squares[0][1], picture)

    def _phrase_evidence(self, look: Look, phrase: str, meaning: Meaning, picture: Picture) -> PhraseEvidence:
        confidence = look.confidence(meaning)
        threshold = self._loaded.thresholds.get(meaning.finding or "", _DEFAULT_THRESHOLD)
        reason = ""
        if meaning.finding is None and not meaning.anatomy:
            reason = "The words name no anatomy and no finding that is known here."
        elif confidence < threshold:
            what = f"{meaning.finding} is not seen there" if meaning.finding else "That anatomy lies outside of the film"
            reason = f"{what} (confidence {confidence:.2f}, threshold {threshold:.2f})."
        evidence = look.evidence(phrase, meaning)
        height, width = picture.pixels.shape
        box = box_of_map(evidence, look.frame, width, height)
        return PhraseEvidence(phrase, meaning.anatomy, meaning.finding, confidence, bool(reason), reason, box, look.frame, evidence)

    def _look(self, encoded: Encoded, read: FindingsRead, row: int, fit: SquareFit, picture: Picture) -> Look:
        height, width = picture.pixels.shape
        frame = _frame(fit, self._loaded.config.model.vision.image_size_px)
        return Look(self._loaded, _row_of(encoded, row), _row_of(read, row), frame, width, height)

    def _evidence(self, look: Look, written: list[tuple[str, float]], picture: Picture) -> dict[str, Any]:
        """The parts of a draft that say where: anatomy maps, and each sentence with its map and box."""
        height, width = picture.pixels.shape
        sentences = []
        for text, certainty in written:
            meaning = Meaning(*sentence_place(text))
            evidence = look.evidence(text, meaning)
            box = box_of_map(evidence, look.frame, width, height) if meaning.anatomy or meaning.finding else None
            sentences.append(Sentence(text, meaning.anatomy, meaning.finding, meaning.status.name.lower(), certainty, box, evidence))
        return {
            "sentences": tuple(sentences),
            "anatomy_maps": look.anatomy_maps,
            "image_width_px": width,
            "image_height_px": height,
            "map_frame": look.frame,
        }

    def _with_sides(self, entities: list[str], leaf_logits_MF: Tensor) -> list[str]:
        """The entities as the prompts of this model's training named them."""
        if not self._loaded.config.data.entity_prompt_sides:
            return entities
        sides = infer_sides(leaf_logits_MF)
        return [with_side(name, *sides[name]) if name in sides else name for name in entities]

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


def _row_of(batch: _Rows, row: int) -> _Rows:
    """One image of what was computed for a batch."""

    def cut(value: Any) -> Any:
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value[row : row + 1]

    return type(batch)(**{item.name: cut(getattr(batch, item.name)) for item in dataclasses.fields(batch)})


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
