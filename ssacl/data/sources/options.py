"""How a source is to be read: what the command line's options become."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROLES = ("image", "report", "patient", "study", "split", "view", "labels", "licence")


@dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read. A format leaves out what it has no use for."""

    columns: dict[str, str] = field(default_factory=dict)
    """csv: role (one of `ROLES`) -> column name."""
    image_root: str | Path | None = None
    """csv, release-csv: folder or s3:// URL that image paths are relative to; none: the CSV's folder."""
    reports: str | Path | None = None
    """mimic-cxr, mimic-cxr-jpg: folder or s3:// URL above the reports' files/pNN/...; none: the source itself."""
    query: dict[str, str] = field(default_factory=dict)
    """dicomweb: attribute -> value that studies must match, such as StudyDate -> "20240101-20241231"."""
    max_studies: int = 100_000
    """dicomweb: studies asked for at most."""
