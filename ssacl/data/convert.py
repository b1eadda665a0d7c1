"""One study -> de-identified samples: pictures read and scaled, report scrubbed, cut into sections and labelled, ids hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ssacl import __version__
from ssacl.anatomy import FINDINGS, FindingStatus, anatomy_groups
from ssacl.data.deidentify import checked_secret, identifiers_in, key_secret, keyed_hash, scrub
from ssacl.data.dicom import MAX_BYTES, Picture, encode_picture, is_lateral, known_view, read_picture
from ssacl.data.labeler import label_report
from ssacl.data.records import Sample, Study
from ssacl.data.refusals import RefusedImageError
from ssacl.data.reports import split_sections
from ssacl.errors import ConfigError


@dataclass(frozen=True)
class IngestSettings:
    """What ingest makes of a study. Another value of any field makes another data set."""

    key_secret: str = field(repr=False)
    """Key of the hashes that stand for patients and studies; at least 16 characters; never stored with the data."""
    longest_side_px: int = 512
    """Pictures are scaled down to this, never up. 512 px keep lines and effusions; fine nodules and septal lines need more."""
    bits: int = 8
    """8 (JPEG), or 16 (PNG) where the film has more."""
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of patients in train, val, test, where the source gives no split."""
    shard_size: int = 200
    """Studies in a shard."""
    keep_lateral: bool = False
    correct_polarity: bool = True
    blank_text: bool = False
    """Fill what looks like burned-in text; it is looked for in any case, and noted."""

    def __post_init__(self) -> None:
        checked_secret(self.key_secret)
        if self.bits not in (8, 16) or self.longest_side_px < 32 or self.shard_size < 1:
            raise ConfigError("Ingest settings: bits is 8 or 16, longest_side_px at least 32, shard_size at least 1.")
        if min(self.split_shares) < 0 or abs(sum(self.split_shares) - 1) > 1e-6:
            raise ConfigError(f"Ingest settings: split_shares {self.split_shares} must be three shares that sum to 1.")

    @classmethod
    def from_environment(cls, key_file: Path | None = None, **values: Any) -> IngestSettings:
        """Settings with the secret from SSACL_KEY_SECRET, else from a private key file made at first use.

        Raises
        ------
        ConfigError
            The secret is too short or cannot be kept, or a value is out of range.
        """
        return cls(key_secret=key_secret(key_file), **values)

    @property
    def fingerprint(self) -> str:
        """Equal for settings that make the same samples."""
        values = asdict(self) | {"key_secret": keyed_hash(self.key_secret, "fingerprint", ""), "version": 1}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Reject:
    """A study, or one image of it, that is not in the data set."""

    study_key: str
    reason: str
    """One of `ssacl.data.refusals.REASONS`, or "missing_file", "no_image", "duplicate"."""
    image: int | None = None
    """Which image of the study; None: all of it."""


def split_of(patient_id: str, settings: IngestSettings) -> str:
    """The split of a patient where the source gives none: by keyed hash, so all studies of a patient go together."""
    place = int(keyed_hash(settings.key_secret, "split", patient_id)[:13], 16) / 16**13
    train, val, _ = settings.split_shares
    return "train" if place < train else "val" if place < train + val else "test"


def study_to_samples(study: Study, settings: IngestSettings) -> list[Sample] | Reject:
    """A study's samples, one per usable image, or why there is none."""
    samples, rejects = convert_study(study, settings)
    return samples or rejects[0]


def convert_study(study: Study, settings: IngestSettings) -> tuple[list[Sample], list[Reject]]:
    """A study's samples, and a reject for every image that gave none (at least one of the two)."""
    study_key = keyed_hash(settings.key_secret, "study", study.study_id)
    identifiers = {study.patient_id, study.study_id, *study.study_id.split("/")}
    pictures: list[tuple[int, Picture]] = []
    rejects: list[Reject] = []
    for number, image in enumerate(study.images):
        try:
            content = image.read(MAX_BYTES + 1)
            picture = read_picture(
                content,
                image.name,
                keep_lateral=settings.keep_lateral,
                bits=settings.bits,
                correct_polarity=settings.correct_polarity,
                blank_text=settings.blank_text,
                find_text=True,
            )
            if image.view:
                picture = replace(picture, view=known_view(image.view))
                if is_lateral(picture.view) and not settings.keep_lateral:
                    raise RefusedImageError("lateral")
            identifiers |= identifiers_in(content)
            pictures.append((number, picture))
        except RefusedImageError as error:
            rejects.append(Reject(study_key, error.reason, number))
        except OSError:
            rejects.append(Reject(study_key, "missing_file", number))
    if not study.images:
        rejects.append(Reject(study_key, "no_image"))
    if not pictures:
        return [], rejects
    text = _text_fields(study, identifiers)
    patient_key = keyed_hash(settings.key_secret, "patient", study.patient_id)
    return [_sample(f"{study_key}-{number:02d}", patient_key, picture, text, study, settings) for number, picture in pictures], rejects


@dataclass(frozen=True)
class _Text:
    findings: str
    impression: str
    labels: tuple[int, ...]
    anatomy_groups: tuple[str, ...]


def _text_fields(study: Study, identifiers: Iterable[str]) -> _Text:
    sections = split_sections(scrub(study.report, identifiers)) if study.report else None
    findings, impression = (sections.findings, sections.impression) if sections else ("", "")
    labels: tuple[int, ...] = ()
    if findings or impression:
        labels = tuple(int(status) for status in label_report(findings, impression).labels)
    elif study.labels:
        labels = tuple(int(study.labels.get(name, FindingStatus.UNMENTIONED)) for name in FINDINGS)
    # Uncertain ones too: a sentence that says "possible effusion" speaks of the place.
    spoken_of = [name for name, status in zip(FINDINGS, labels, strict=False) if status in {FindingStatus.PRESENT, FindingStatus.UNCERTAIN}]
    return _Text(findings, impression, labels, anatomy_groups(spoken_of))


def _sample(key: str, patient_key: str, picture: Picture, text: _Text, study: Study, settings: IngestSettings) -> Sample:
    content, image_format = encode_picture(picture, settings.longest_side_px)
    scale = min(1.0, settings.longest_side_px / max(picture.pixels.shape))
    return Sample(
        key=key,
        image=content,
        image_format=image_format,
        patient_key=patient_key,
        view=picture.view,
        width_px=max(1, round(picture.original_width_px * scale)),
        height_px=max(1, round(picture.original_height_px * scale)),
        original_width_px=picture.original_width_px,
        original_height_px=picture.original_height_px,
        findings=text.findings,
        impression=text.impression,
        labels=text.labels,
        anatomy_groups=text.anatomy_groups,
        provenance={
            "source": study.source,
            "licence": study.licence,
            "content_sha256": picture.pixel_digest,
            "polarity_corrected": picture.polarity_corrected,
            "burned_in": picture.burned_in,
            "ssacl_version": __version__,
        },
    )
