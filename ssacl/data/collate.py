"""Samples -> `Batch`. Everything random derives from (seed, epoch, sample key, purpose): no rank, no batch mate, no order enters it.

Choices that are ours: the contrastive text keeps a uniform number of sentences between half of them (rounded up) and all; a report
that is cut to `lm_max_tokens` loses its newline, so that stopping is never learned from a cut; a sentence that denies counts as a normal
statement; a laterality flip is left out where the text names a side that cannot be mirrored ("RLL").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssacl.anatomy import (
    FINDING_INDEX,
    FINDINGS,
    LEAF_INDEX,
    LEAVES,
    NO_FINDING,
    SIDED_LEAVES,
    SIDES,
    FindingStatus,
    anatomy_groups,
    leaf_mask,
    mirrored,
    with_side,
)
from ssacl.config import DataConfig, VisionConfig
from ssacl.data.labeler import Mention, entities, label_report
from ssacl.data.records import Batch, Sample
from ssacl.data.reports import can_swap_laterality, split_sentences, swap_laterality, training_text
from ssacl.data.tokenization import Tokenizers, pad
from ssacl.data.transforms import Square, augment, load_square, mirror, normalise
from ssacl.errors import DataError

MAX_SENTENCES = 8
"""Sentences with a place that one sample gives to a batch; it bounds the cost of the region-text loss."""
CACHED_SAMPLES = 20_000
"""Samples whose text work is kept in memory, some kilobytes each."""
_RANK = {FindingStatus.UNMENTIONED: 0, FindingStatus.ABSENT: 1, FindingStatus.UNCERTAIN: 2, FindingStatus.PRESENT: 3}


@dataclass(frozen=True)
class _Text:
    """What a sample's text says; a pure function of the sample, so it is worked out once."""

    sentences: tuple[str, ...]
    report_ids: list[int]
    prompt_ids: list[int]
    labels: tuple[int, ...]
    has_labels: bool
    leaves: list[bool]
    entities: NDArray[np.int64]
    """[M, F] FindingStatus."""
    places: tuple[tuple[list[int], list[int], int], ...]
    """Per sentence with a place: ids, leaf indices, finding index (F for a normal statement)."""


@dataclass(frozen=True)
class Row:
    """One sample, decoded and tokenised: what a loader thread makes."""

    key: str
    image: Square
    text: _Text
    text_ids: list[int]
    prompt_ids: list[int]
    prompted: bool
    """The coin of this sample."""
    report_ids: list[int]
    mask_noise: NDArray[np.float32]
    warp: NDArray[np.float32]
    warp_padding: int


class Collator:
    """Turn samples into a `Batch`.

    Parameters
    ----------
    training
        True: augmentation, shuffled and cut sentences, the prompt by a coin. False: none of these, the prompt always, and the same
        masks and warps in every epoch. Prompts and reports are cut to `lm_max_tokens` in both, so that validation fits where training did.
    """

    def __init__(self, config: DataConfig, vision: VisionConfig, tokenizers: Tokenizers, seed: int, training: bool) -> None:
        self.config, self.vision, self.tokenizers, self.seed, self.training = config, vision, tokenizers, seed, training
        self._texts: dict[tuple[str, bool], _Text] = {}

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Batch:
        """One batch, rows in the order of `samples`.

        Raises
        ------
        ImageError
            A picture cannot be decoded.
        DataError
            No sample at all, or labels of another length than 14.
        """
        return self.join([self.row(sample, epoch) for sample in samples])

    def row(self, sample: Sample, epoch: int) -> Row:
        """Decode and tokenise one sample. May run in several threads; see `__call__` for the errors."""
        flip, swap = self._flips(sample, epoch)
        text = self._text(sample, swap)
        square, _ = load_square(sample, self.vision.image_size_px)
        if flip:
            square = mirror(square)
        if self.training:
            square = augment(square, self.config.augment, self._rng(epoch, sample.key, "augment"))
        rng = self._rng(epoch, sample.key, "prompt")
        # The coin is tossed for every sample, so that the share does not depend on which have labels.
        prompted = rng.random() < self.config.entity_prompt_share or not self.training
        limit = self.config.lm_max_tokens
        warp = self._rng(epoch, sample.key, "warp")
        angle = math.radians(self.config.warp_rotate_deg)
        reach = np.array([angle, self.config.warp_log_scale, self.config.warp_shift, self.config.warp_shift])
        return Row(
            key=sample.key,
            image=square,
            text=text,
            text_ids=self.tokenizers.text_ids(" ".join(self._contrastive(text.sentences, epoch, sample.key)), self.config.text_max_tokens),
            prompt_ids=text.prompt_ids[:limit],
            prompted=prompted,
            report_ids=text.report_ids[:limit],
            mask_noise=self._rng(epoch, sample.key, "mask").random(self.vision.num_patches, dtype=np.float32),
            warp=(warp.uniform(-1, 1, 4) * reach).astype(np.float32),
            warp_padding=int(warp.integers(3)),
        )

    def join(self, rows: Sequence[Row]) -> Batch:
        """Pad and stack rows."""
        if not rows:
            raise DataError("A batch of no samples was asked for; the loader gives at least one.")
        text_ids, text_mask = pad([row.text_ids for row in rows], self.tokenizers.text_pad_id)
        coins = [rows[0].prompted] * len(rows) if self.config.entity_prompt_coin == "batch" else [row.prompted for row in rows]
        prompts = [row.prompt_ids if coin else [] for row, coin in zip(rows, coins, strict=True)]
        prompt_ids, prompt_mask = pad(prompts, self.tokenizers.lm_pad_id)
        report_ids, report_mask = pad([row.report_ids for row in rows], self.tokenizers.lm_pad_id)
        places = [(index, *place) for index, row in enumerate(rows) for place in row.text.places]
        sentence_ids, sentence_mask = pad([ids for _, ids, _, _ in places], self.tokenizers.text_pad_id)
        sentence_leaves = torch.zeros((len(places), len(LEAVES)), dtype=torch.bool)
        for index, (_, _, leaves, _) in enumerate(places):
            sentence_leaves[index, leaves] = True
        return Batch(
            image=torch.from_numpy(np.stack([normalise(row.image) for row in rows])),
            text_ids=text_ids,
            text_mask=text_mask,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            report_ids=report_ids,
            report_mask=report_mask,
            leaf_mask=torch.tensor([row.text.leaves for row in rows]),
            labels=torch.tensor([row.text.labels for row in rows]),
            has_text=torch.tensor([bool(row.text.sentences) for row in rows]),
            has_labels=torch.tensor([row.text.has_labels for row in rows]),
            entities=torch.from_numpy(np.stack([row.text.entities for row in rows])),
            sentence_ids=sentence_ids,
            sentence_mask=sentence_mask,
            sentence_row=_integers([row for row, _, _, _ in places]),
            sentence_leaves=sentence_leaves,
            sentence_finding=_integers([finding for _, _, _, finding in places]),
            mask_noise=torch.from_numpy(np.stack([row.mask_noise for row in rows])),
            warp=torch.from_numpy(np.stack([row.warp for row in rows])),
            warp_padding=_integers([row.warp_padding for row in rows]),
            keys=tuple(row.key for row in rows),
        )

    def _rng(self, epoch: int, key: str, purpose: str) -> np.random.Generator:
        # Evaluation sees the same masks in every epoch, so that its losses can be compared.
        name = f"{self.seed}|{epoch if self.training else 0}|{key}|{purpose}"
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little"))

    def _flips(self, sample: Sample, epoch: int) -> tuple[bool, bool]:
        """Is the picture mirrored, and are words and places mirrored with it?"""
        kind = self.config.augment.flip
        if not self.training or kind == "none" or self._rng(epoch, sample.key, "flip").random() >= 0.5:
            return False, False
        if kind == "naive":
            return True, False
        can = can_swap_laterality(f"{sample.findings} {sample.impression}")
        return can, can

    def _contrastive(self, sentences: Sequence[str], epoch: int, key: str) -> list[str]:
        if not (self.training and self.config.shuffle_sentences) or not sentences:
            return list(sentences)
        rng = self._rng(epoch, key, "sentences")
        count = int(rng.integers((len(sentences) + 1) // 2, len(sentences) + 1))
        return [sentences[index] for index in rng.permutation(len(sentences))[:count]]

    def _text(self, sample: Sample, swap: bool) -> _Text:
        text = self._texts.get((sample.key, swap))
        if text is None:
            text = self._read_text(sample, swap)
            if len(self._texts) < CACHED_SAMPLES:
                self._texts[sample.key, swap] = text
        return text

    def _read_text(self, sample: Sample, swap: bool) -> _Text:
        which = self.config.sections
        turn = swap_laterality if swap else str
        findings = turn(sample.findings) if which != "impression" else ""
        impression = turn(sample.impression) if which != "findings" else ""
        told = label_report(findings, impression)
        sentences = tuple(split_sentences(findings) + split_sentences(impression))
        if sample.labels and len(sample.labels) != len(FINDINGS):
            raise DataError(f"Sample {sample.key} has {len(sample.labels)} labels, expected {len(FINDINGS)}; ingest the data set again.")
        labels = sample.labels or tuple(int(status) for status in told.labels)
        has_labels = any(status != FindingStatus.UNMENTIONED for status in labels)
        names = entities(labels, self.config.uncertain)
        report = turn(training_text(sample, which))
        grid = _entity_grid(told.mentions, self.config.uncertain)
        named = [_with_side(name, grid) for name in names] if self.config.entity_prompt_sides else names
        return _Text(
            sentences=sentences,
            report_ids=self.tokenizers.lm_ids(f"{report}\n") if report else [],
            prompt_ids=self.tokenizers.lm_ids(f"{', '.join(named) or NO_FINDING}\n") if has_labels else [],
            labels=tuple(int(status) for status in labels),
            has_labels=has_labels,
            leaves=leaf_mask(self._groups(sample, names, has_labels, swap)),
            entities=grid,
            places=self._places(told.mentions),
        )

    def _groups(self, sample: Sample, names: Sequence[str], has_labels: bool, swap: bool) -> tuple[str, ...]:
        # Labels follow the configured policy on doubt; a source's own groups serve where it brings nothing else.
        if has_labels or not sample.anatomy_groups:
            return anatomy_groups(names)
        return tuple(mirrored(group) for group in sample.anatomy_groups) if swap else sample.anatomy_groups

    def _places(self, mentions: Sequence[Mention]) -> tuple[tuple[list[int], list[int], int], ...]:
        by_sentence: dict[int, list[Mention]] = {}
        for mention in mentions:
            if mention.leaves:
                by_sentence.setdefault(mention.sentence_index, []).append(mention)
        # What is there says more about places than what is not.
        firm_first = sorted(by_sentence.values(), key=lambda group: -max(_RANK[mention.status] for mention in group))
        places = []
        for group in sorted(firm_first[:MAX_SENTENCES], key=lambda group: group[0].sentence_index):
            lead = max(group, key=lambda mention: _RANK[mention.status])
            stated = lead.finding is not None and lead.status != FindingStatus.ABSENT
            finding = FINDING_INDEX[lead.finding] if stated and lead.finding is not None else len(FINDINGS)
            leaves = {leaf for mention in group if mention.status == lead.status for leaf in mention.leaves}
            ids = self.tokenizers.text_ids(lead.sentence, self.config.text_max_tokens)
            places.append((ids, sorted(LEAF_INDEX[leaf] for leaf in leaves), finding))
        return tuple(places)


def _entity_grid(mentions: Sequence[Mention], uncertain: str) -> NDArray[np.int64]:
    """[M, F] status of each finding at each leaf; a doubt becomes present or absent where the policy says so."""
    grid = np.full((len(LEAVES), len(FINDINGS)), int(FindingStatus.UNMENTIONED), dtype=np.int64)
    policy = {"present": FindingStatus.PRESENT, "absent": FindingStatus.ABSENT}.get(uncertain, FindingStatus.UNCERTAIN)
    for mention in mentions:
        status = policy if mention.status == FindingStatus.UNCERTAIN else mention.status
        for finding in (mention.finding,) if mention.finding is not None else mention.covers:
            for leaf in mention.leaves:
                at = LEAF_INDEX[leaf], FINDING_INDEX[finding]
                if _RANK[status] > _RANK[FindingStatus(grid[at])]:
                    grid[at] = int(status)
    return grid


def _with_side(finding: str, grid_MF: NDArray[np.int64]) -> str:
    shown_M = grid_MF[:, FINDING_INDEX[finding]] == int(FindingStatus.PRESENT)
    return with_side(finding, *(bool(shown_M[list(SIDED_LEAVES[side])].any()) for side in SIDES))


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
