"""Where studies come from: each format of a hospital or a public set -> `Study` records, in a fixed order. One file per format family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ssacl.data.records import Study
from ssacl.data.sources.csv_table import read_csv
from ssacl.data.sources.dicom_folder import find_dicom_studies
from ssacl.data.sources.dicomweb import query_dicomweb
from ssacl.data.sources.iu_xray import read_iu_xray
from ssacl.data.sources.labels import finding_labels
from ssacl.data.sources.mimic import read_mimic
from ssacl.data.sources.options import ROLES, SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.data.sources.release_csv import read_release_csv
from ssacl.errors import ConfigError

__all__ = ["FORMATS", "ROLES", "SourceOptions", "finding_labels", "open_source"]

_FILE_FORMATS: dict[str, Callable[[SourcePlace, SourceOptions], Iterable[Study]]] = {
    "csv": read_csv,
    "dicom-dir": find_dicom_studies,
    "iu-xray": read_iu_xray,
    "mimic-cxr": lambda place, options: read_mimic(place, options, suffix=".dcm"),
    "mimic-cxr-jpg": lambda place, options: read_mimic(place, options, suffix=".jpg"),
    "release-csv": read_release_csv,
}
FORMATS = (*_FILE_FORMATS, "dicomweb")


def open_source(format: str, path: str | Path, options: SourceOptions | None = None) -> Iterator[Study]:
    """The studies of a source. What can be checked without reading pictures is checked before the first study.

    Parameters
    ----------
    format
        One of `FORMATS`.
    path
        Folder or file, here or at s3://bucket/prefix; for "dicomweb" the server's http(s) URL.
    options
        Default: all at their defaults.

    Raises
    ------
    ConfigError
        Unknown format or column role, or an option that this format needs is missing.
    DataError
        Nothing there, no study in it, or a file is not as the format has it.
    SplitError
        The path, or a picture of a CSV, is a phantom's measuring truth.
    StorageError
        Storage or the server cannot be reached.
    """
    options = options or SourceOptions()
    if format == "dicomweb":
        return query_dicomweb(str(path), options)
    if format not in _FILE_FORMATS:
        raise ConfigError(f"--format {format} is unknown; choose one of {', '.join(FORMATS)}.")
    return iter(_FILE_FORMATS[format](SourcePlace.at(path), options))
