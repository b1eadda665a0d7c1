"""A phantom data set that went through ingest, its truth, and a tiny random model, on disk: what tests of evaluation start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tiny_model import tiny_model_folder

from ssacl.data.convert import IngestSettings
from ssacl.data.ingest import run_local
from ssacl.phantom import write_dicom_tree


@dataclasses.dataclass(frozen=True)
class Place:
    """A phantom data set and a model, on disk."""

    data: Path
    truth: Path
    model: Path


def make_place(root: Path, num_studies: int = 60) -> Place:
    """Write it all under `root`."""
    torch.set_num_threads(1)
    write_dicom_tree(root / "films", num_studies, seed=3, size_px=96, num_processes=1)
    run_local("dicom-dir", root / "films", str(root / "data"), IngestSettings(key_secret="k" * 20))
    return Place(root / "data", root / "films_truth", tiny_model_folder(root / "model"))
