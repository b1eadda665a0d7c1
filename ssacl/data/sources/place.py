"""A source's root, a folder or an S3 prefix, seen alike: what is there, texts and tables, and pictures to be read later."""

from __future__ import annotations

import csv
import gzip
import io
import posixpath
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from ssacl.data.records import StudyImage
from ssacl.data.storage import FolderStorage, MissingObjectError, Storage, open_storage
from ssacl.data.truth_guard import TRUTH_MANIFEST, TRUTH_SUFFIX, refuse_truth
from ssacl.errors import DataError

MAX_TEXT_BYTES = 4 << 20
"""Of one report. A longer file is none."""
_MAX_FIELD_CHARACTERS = 1 << 24
_NUM_THREADS = 16
_READ_AHEAD = 64


@dataclass(frozen=True)
class StoredImage:
    """A picture in object storage (an `ssacl.data.records.ImageReader`)."""

    storage: Storage
    key: str
    size: int = -1

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    def read(self, limit: int) -> bytes:
        try:
            # A whole read carries the server's checksum, a range does not.
            return self.storage.read(self.key) if self.size <= limit else self.storage.read(self.key, 0, limit)
        except MissingObjectError as error:
            raise FileNotFoundError from error


@dataclass(frozen=True)
class SourcePlace:
    """A folder or an s3:// prefix; keys are relative to it, with "/" between parts. A single file is the place above it and its `key`."""

    storage: Storage
    key: str = ""
    """The file that the source is; "" for a folder."""

    @classmethod
    def at(cls, path: str | Path) -> SourcePlace:
        """The place that a path or URL names.

        Raises
        ------
        DataError
            Nothing is there.
        SplitError
            It is a phantom's measuring truth.
        StorageError
            It cannot be reached.
        """
        refuse_truth(path)
        text = str(path)
        if "://" not in text:
            local = Path(text)
            if not local.exists():
                raise DataError(f"There is nothing at {local}. Check the path.")
            return cls(open_storage(local.parent), local.name) if local.is_file() else cls(open_storage(local))
        above, _, name = text.rstrip("/").rpartition("/")
        if "." in name and above.count("/") > 2 and open_storage(above).exists(name):
            return cls(open_storage(above), name)
        place = cls(open_storage(text))
        if not place.storage.list():
            raise DataError(f"There is nothing at {text}. Check the URL.")
        return place

    @property
    def url(self) -> str:
        """As people write it."""
        return f"{self.storage.url}/{self.key}" if self.key else self.storage.url

    def files(self, prefix: str = "") -> dict[str, int]:
        """Key -> bytes of every file, sorted; a phantom's truth beside its data is left out."""
        found = {item.key: item.size for item in self.storage.list(prefix)}
        manifests = (key for key in found if posixpath.basename(key) == TRUTH_MANIFEST)
        truths = tuple(f"{folder}/" for folder in map(posixpath.dirname, manifests) if folder.endswith(TRUTH_SUFFIX))
        return {key: size for key, size in found.items() if not truths or not key.startswith(truths)}

    def image(self, key: str, size: int = -1, view: str = "") -> StudyImage:
        """A picture, read later; `key` may also be an absolute path or an s3:// URL. One that is not there is found out then."""
        if key.startswith("s3://"):
            above, _, name = key.rpartition("/")
            return StudyImage(reader=StoredImage(open_storage(above), name, size), view=view)
        if isinstance(self.storage, FolderStorage):
            return StudyImage(path=self.storage.root / key, view=view)
        key = posixpath.normpath(key)
        inside = not key.startswith(("../", "/")) and key not in {".", ".."}
        return StudyImage(reader=StoredImage(self.storage, key, size), view=view) if inside else StudyImage(view=view)

    def head(self, key: str, num_bytes: int) -> bytes:
        """The first bytes of a file that is at least so long."""
        return self.storage.read(key, 0, num_bytes)

    def texts(self, keys: Iterable[str]) -> Iterator[str]:
        """The text of each file in order, "" for one that is missing or too long, and for the key "".

        Some are read ahead, in threads: object storage answers late, not slowly.
        """
        waiting: deque[Future[str]] = deque()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for key in keys:
                waiting.append(pool.submit(self._text, key))
                if len(waiting) >= _READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def rows(self, key: str) -> Iterator[dict[str, str]]:
        """The rows of a CSV or CSV.gz file, one at a time; cells that are missing are "".

        Raises
        ------
        DataError
            It is missing or no CSV.
        """
        name = f"{self.storage.url}/{key}"
        csv.field_size_limit(_MAX_FIELD_CHARACTERS)
        try:
            plain = io.BytesIO(self.storage.read(key))
            unpacked = gzip.GzipFile(fileobj=plain) if key.endswith(".gz") else plain
            with io.TextIOWrapper(cast(IO[bytes], unpacked), encoding="utf-8-sig", errors="replace", newline="") as file:
                reader = csv.DictReader(file, restval="")
                for row in reader:
                    yield {column: (value or "").strip() for column, value in row.items() if column is not None}
        except (csv.Error, EOFError, gzip.BadGzipFile) as error:
            raise DataError(
                f"{name} is not a readable CSV file ({error}). Export it as comma-separated UTF-8 with a header line."
            ) from error

    def header(self, key: str) -> list[str]:
        """The column names of a CSV file."""
        try:
            text = self.storage.read(key).decode("utf-8-sig", errors="replace")
            return next(csv.reader(io.StringIO(text, newline="")), [])
        except csv.Error as error:
            name = f"{self.storage.url}/{key}"
            raise DataError(
                f"{name} is not a readable CSV file ({error}). Export it as comma-separated UTF-8 with a header line."
            ) from error

    def _text(self, key: str) -> str:
        try:
            content = self.storage.read(key) if key else b""
        except MissingObjectError:
            return ""
        return content.decode("utf-8", errors="replace") if len(content) <= MAX_TEXT_BYTES else ""
