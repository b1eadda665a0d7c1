"""One phantom study: a pure function of (seed, index)."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ssacl.errors import ConfigError
from ssacl.phantom.findings import TrueFinding, changed_body, draw_findings
from ssacl.phantom.geometry import Anatomy, Frame, Mask, draw_body, draw_pose
from ssacl.phantom.masks import node_masks
from ssacl.phantom.paint import paint
from ssacl.phantom.render import Scene, expose
from ssacl.phantom.reports import write_report

VISITS = (3, 2, 1, 1, 1, 1, 1)
"""Studies per patient in every block of ten studies, in an order that the block draws."""
SPLIT_SHARES = (("train", 0.8), ("val", 0.1), ("test", 0.1))


@dataclass(frozen=True)
class StudyTruth:
    """What is really in a phantom's picture. For measuring only: training sees pictures and reports."""

    study_id: str
    split: str
    findings: tuple[TrueFinding, ...]
    masks: Mask = field(repr=False)
    """[32, S, S] bool, `ssacl.anatomy.NODES` order; empty where the film cuts the anatomy off."""


@dataclass(frozen=True)
class PhantomStudy:
    """A study as a scanner and a radiologist would leave it, and its truth."""

    study_id: str
    patient_id: str
    """Made up; patients have one to three studies and one anatomy."""
    split: str
    """"train", "val" or "test", by a hash of the patient."""
    view: str
    """"PA" or "AP"."""
    report: str
    """Sections with headings; FINDINGS and IMPRESSION always."""
    detector: NDArray[np.uint16] = field(repr=False)
    """[S, S], 12 bits (0..4095), bone white."""
    truth: StudyTruth | None = field(repr=False)
    """None when it was not asked for."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture in 8 bits, [S, S], bone white, the patient's right on the left."""
        return (self.detector >> 4).astype(np.uint8)


def generate_study(seed: int, index: int, size_px: int = 256, with_truth: bool = True) -> PhantomStudy:
    """Study number `index` of the data set `seed`; equal arguments give equal bytes, in every process.

    Parameters
    ----------
    seed, index
        Not negative.
    size_px
        Side of the picture, pixels, at least 32. The anatomy and the report do not depend on it.
    with_truth
        False leaves the masks out, which saves a third of the time.

    Raises
    ------
    ConfigError
        An argument is out of range.
    """
    if seed < 0 or index < 0 or size_px < 32:
        raise ConfigError(f"A phantom needs seed >= 0, index >= 0 and size_px >= 32; got {seed}, {index}, {size_px}.")
    patient, visit = patient_of(seed, index)
    patient_id = "PH" + _digest(seed, "patient", patient)[:10].upper()
    study_id = "ST" + _digest(seed, "study", index)[:12].upper()
    body = draw_body(np.random.default_rng([seed, 1, patient]))
    # Separate streams: a change in one part (words, noise) leaves the others as they were.
    draw, words, brush, exposure = (np.random.default_rng([seed, stream, index]) for stream in (2, 3, 4, 5))
    findings = draw_findings(draw)
    sick = any(item.name in ("Support Devices", "Edema") for item in findings)
    view = "AP" if draw.random() < (0.75 if sick else 0.25) else "PA"
    body = changed_body(body, findings)
    if view == "AP":
        # The heart lies far from the detector on bedside films and is magnified a little.
        body = dataclasses.replace(body, heart_ratio=body.heart_ratio + 0.015)
    pose = draw_pose(draw, view)
    anatomy = Anatomy(body, pose, Frame(pose, size_px))
    scene = Scene(anatomy, brush)
    masks = [paint(scene, finding) for finding in findings]
    split = split_of(patient_id)
    truth = None
    if with_truth:
        true_findings = tuple(dataclasses.replace(item, mask=mask) for item, mask in zip(findings, masks, strict=True))
        truth = StudyTruth(study_id, split, true_findings, node_masks(anatomy))
    return PhantomStudy(
        study_id=study_id,
        patient_id=patient_id,
        split=split,
        view=view,
        report=write_report(findings, view, visit > 0, words),
        detector=expose(scene, exposure),
        truth=truth,
    )


def patient_of(seed: int, index: int) -> tuple[int, int]:
    """(patient number, visit number from 0) of a study."""
    block, within = divmod(index, sum(VISITS))
    visits = np.random.default_rng([seed, 0, block]).permutation(VISITS)
    ends = np.cumsum(visits)
    place = int(np.searchsorted(ends, within, side="right"))
    return block * len(VISITS) + place, within - int(ends[place] - visits[place])


def split_of(patient_id: str) -> str:
    """Split of a patient, about 80/10/10, by a hash of the id."""
    share = int(hashlib.sha256(f"split {patient_id}".encode()).hexdigest()[:8], 16) / 0x1_0000_0000
    for split, width in SPLIT_SHARES:
        if share < width:
            return split
        share -= width
    return SPLIT_SHARES[-1][0]


def _digest(seed: int, what: str, number: int) -> str:
    return hashlib.sha256(f"ssacl phantom {seed} {what} {number}".encode()).hexdigest()
