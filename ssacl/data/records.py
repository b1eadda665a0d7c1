"""The shapes in which data goes through the house: Study -> Sample (one shard entry) -> Batch.

Shape letters: B rows on this rank, N patches, L text tokens, P prompt tokens, R report tokens, S sentences of the batch,
M = 25 leaves, F = 14 findings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # Ingest workers read and write samples only: they start without torch, two seconds sooner.
    import torch
    from torch import Tensor

SPLITS = ("train", "val", "test")


class ImageReader(Protocol):
    """A picture that lies elsewhere than on this machine's disk; it is read by the task that needs it. Instances can be pickled."""

    @property
    def name(self) -> str:
        """Tells by its suffix what the picture claims to be; may be empty."""
        ...

    @property
    def size(self) -> int:
        """Bytes, -1 where not known."""
        ...

    def read(self, limit: int) -> bytes:
        """The first `limit` bytes, or all of a shorter picture.

        Raises
        ------
        FileNotFoundError
            There is none.
        StorageError
            Its place cannot be reached.
        """
        ...


@dataclass(frozen=True)
class StudyImage:
    """One picture of a study before ingest: a file, a reader, or bytes."""

    path: Path | None = None
    content: bytes | None = None
    view: str = ""
    """DICOM ViewPosition ("PA", "AP", "LATERAL", ...); empty: from the DICOM header, else unknown."""
    reader: ImageReader | None = None

    @property
    def name(self) -> str:
        """File name; may identify someone, so only its suffix is to be used."""
        return self.path.name if self.path else self.reader.name if self.reader else ""

    @property
    def size(self) -> int:
        """Bytes, -1 where not known."""
        if self.content is not None:
            return len(self.content)
        try:
            return self.path.stat().st_size if self.path else self.reader.size if self.reader else -1
        except OSError:
            return -1

    def read(self, limit: int) -> bytes:
        """The first `limit` bytes, or all of a shorter picture.

        Raises
        ------
        OSError
            There is none, or it cannot be read.
        StorageError
            Its place cannot be reached.
        """
        if self.content is not None:
            return self.content[:limit]
        if self.path:
            with self.path.open("rb") as file:
                return file.read(limit)
        if self.reader:
            return self.reader.read(limit)
        raise FileNotFoundError


@dataclass(frozen=True)
class Study:
    """One study as a source gives it. `study_id` and `patient_id` are the source's own and never leave ingest."""

    study_id: str
    patient_id: str
    images: tuple[StudyImage, ...]
    split: str = ""
    """One of `SPLITS`; empty: decided by a keyed hash of the patient."""
    report: str = ""
    """The whole report text, sections included; empty when there is none."""
    labels: dict[str, int] = field(default_factory=dict)
    """Finding -> FindingStatus, where the source brings labels; else the labeler reads the report."""
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Sample:
    """One shard entry: `KEY.jpg|png` + `KEY.json`. Holds an allowlist of fields; nothing identifies a patient."""

    key: str
    """Keyed hash of study and image; unique in the data set; shard member name."""
    image: bytes
    """Encoded picture (JPEG or PNG), 8- or 16-bit grey."""
    image_format: str
    """"jpg" or "png"."""
    patient_key: str = ""
    view: str = ""
    width_px: int = 0
    height_px: int = 0
    original_width_px: int = 0
    original_height_px: int = 0
    findings: str = ""
    impression: str = ""
    labels: tuple[int, ...] = ()
    """One FindingStatus per finding (`FINDINGS` order); empty when neither text nor labels exist."""
    anatomy_groups: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    """source, licence, content_sha256 of the original pixels, ssacl version."""

    @property
    def has_text(self) -> bool:
        return bool(self.findings or self.impression)


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one forward pass. Everything random in it derives from (seed, epoch, sample key)."""

    image: Tensor
    """[B, 3, H, W] float32, normalised (mean 0.4978, std 0.2449 of the 0..1 image)."""
    text_ids: Tensor
    """[B, L] int64, shuffled and truncated report, leading [CLS]."""
    text_mask: Tensor
    """[B, L] bool."""
    prompt_ids: Tensor
    """[B, P] int64 entities + newline, right-padded."""
    prompt_mask: Tensor
    """[B, P] bool; a row whose coin fell on "no prompt" is all False."""
    report_ids: Tensor
    """[B, R] int64 report + newline, right-padded."""
    report_mask: Tensor
    """[B, R] bool."""
    leaf_mask: Tensor
    """[B, M] bool: leaves of the report's anatomy groups."""
    labels: Tensor
    """[B, F] int64 FindingStatus."""
    has_text: Tensor
    """[B] bool; rows without a report serve the image-only losses."""
    has_labels: Tensor
    """[B] bool."""
    entities: Tensor
    """[B, M, F] int64 FindingStatus of each finding at each leaf, from the report."""
    sentence_ids: Tensor
    """[S, Ls] int64 sentences that speak of a place or finding, tokenised for the text encoder."""
    sentence_mask: Tensor
    """[S, Ls] bool."""
    sentence_row: Tensor
    """[S] int64 row of the batch."""
    sentence_leaves: Tensor
    """[S, M] bool leaves that the sentence speaks of."""
    sentence_finding: Tensor
    """[S] int64 finding index, F for a normal statement."""
    mask_noise: Tensor
    """[B, N] float32 uniform noise; argsort ascending, the first share is kept."""
    warp: Tensor
    """[B, 4] float32 warp of the masked pass: angle (radians), log scale, shift x, shift y (half-widths)."""
    warp_padding: Tensor
    """[B] int64: 0 zeros, 1 border, 2 reflection."""
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        from torch import Tensor

        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=True)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return int(self.image.shape[0])
