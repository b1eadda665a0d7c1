"""The phantom data set that benchmarks of learning train and measure on: made once in a work folder, found again there."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssacl.data.corpus import train_dataset_tokenizers
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.sources import SourceOptions
from ssacl.data.storage import open_storage
from ssacl.phantom import write_dicom_tree

NOBODYS_KEY = "phantoms have nobody to protect"
NUM_STUDIES, NUM_QUICK_STUDIES = 3000, 120


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """`--work` and `--seed` of a benchmark that trains."""
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="data set and runs; the same folder goes on where it stood")
    parser.add_argument("--seed", type=int, default=0, help="of the run; the data set is always the same")


def work_folder(options: argparse.Namespace) -> Path:
    """`--work`; quick runs are kept apart from real ones."""
    folder: Path = options.work / "quick" if options.quick else options.work
    return folder


def phantom_data(options: argparse.Namespace) -> tuple[str, Path]:
    """Data set root and truth folder in the work folder; both are written on the first call.

    Raises
    ------
    StorageError, DataError
        The folder cannot be used, or holds something else.
    """
    work = work_folder(options)
    tree = work / "phantom"
    data_url = str(work / "shards")
    if not open_storage(data_url).exists("wordpiece.json"):
        if not tree.exists():
            write_dicom_tree(tree, NUM_QUICK_STUDIES if options.quick else NUM_STUDIES, 0)
        run_local("dicom-dir", tree, data_url, IngestSettings(key_secret=NOBODYS_KEY), SourceOptions(), None)
        train_dataset_tokenizers(data_url, None, 30000, 50257)
    return data_url, tree.with_name(tree.name + "_truth")
