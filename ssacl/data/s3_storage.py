"""S3 behind `ssacl.data.storage.Storage`: bounded time-outs, retries with backoff that are counted, verified bodies, named errors."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.exceptions as failures
from botocore.config import Config

from ssacl.data.s3_failures import WrongBytesError, named, retry_reason
from ssacl.data.storage import MissingObjectError, ObjectInfo, Patience, checked_key, count_retry
from ssacl.errors import StorageError

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_TRIES = 7
RETRY_LIMIT_S = 60.0
"""No further try later than this after the first failure: a store that is down is named within two minutes, mostly within half of one.
`Storage.patience`, where it is set, goes beyond this and `NUM_TRIES`."""
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
SLOWEST_BYTES_PER_S = 20_000
"""A body that comes more slowly than this is given up and asked for again, on a new connection."""
_PART_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 16
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class S3Storage:
    """Objects under `s3://bucket/prefix`. The client is made at first use, in the process that uses it.

    What is written carries its MD5, which the server checks; what is read whole is compared with its ETag. Ranges have no checksum of
    the server's: who reads one knows its own (`ssacl.data.shards.read_sample`).

    Raises
    ------
    StorageError
        The bucket name is empty.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        if not bucket:
            raise StorageError("The storage URL names no bucket; write s3://bucket/prefix.")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.retries: Counter[str] = Counter()
        self.patience = Patience()

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        ranged = start > 0 or end is not None
        extra = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if ranged else {}
        wrong: set[str] = set()

        def get() -> bytes:
            reply = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **extra)
            content = _body(reply)
            if not ranged and _differs(reply, content):
                digest = _md5(content).hex()
                # The same wrong bytes twice did not change on the way: this server's ETag is no MD5 (it encrypts).
                if digest not in wrong:
                    wrong.add(digest)
                    raise WrongBytesError
            return content

        content = self._do("read", key, get)
        if end is not None and len(content) != end - start:
            raise StorageError(
                f"{self.url}/{key} is truncated: {end - start} bytes were asked for, {len(content)} are there. Write it again."
            )
        return content

    def write(self, key: str, content: bytes) -> None:
        request = {"Bucket": self.bucket, "Key": self._full(key), "Body": content, "ContentMD5": _content_md5(content)}
        self._do("write", key, lambda: self._client.put_object(**request))

    def upload(self, key: str, path: Path) -> None:
        if path.stat().st_size <= _PART_BYTES:
            self.write(key, path.read_bytes())
        else:
            self._do("write", key, lambda: self._upload_parts(self._full(key), path))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        root = f"{self.prefix}/" if self.prefix else ""

        def pages() -> list[ObjectInfo]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix)
            return [ObjectInfo(item["Key"][len(root) :], item["Size"]) for page in pages for item in page.get("Contents", ())]

        return sorted(self._do("list", prefix, pages), key=lambda item: item.key)

    def exists(self, key: str) -> bool:
        try:
            self._do("look for", key, lambda: self._client.head_object(Bucket=self.bucket, Key=self._full(key)))
        except MissingObjectError:
            # HEAD says 404 for a missing bucket too: that is an error to name, not an absent object.
            self._do("look for", key, lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._full(key), MaxKeys=1))
            return False
        return True

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self._client.delete_object(Bucket=self.bucket, Key=self._full(key)))

    def sweep(self, is_mine: Callable[[str], bool]) -> None:
        """Nothing: an object is there whole or not at all; a bucket's lifecycle rule removes parts of broken uploads."""

    def sub(self, prefix: str) -> S3Storage:
        storage = S3Storage(self.bucket, f"{self.prefix}/{prefix.strip('/')}")
        storage.retries, storage.patience = self.retries, self.patience
        return storage

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{checked_key(key)}" if self.prefix else checked_key(key)

    @property
    def _client(self) -> Any:
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        return _client(os.getpid(), CONNECT_TIMEOUT_S, READ_TIMEOUT_S, tuple(os.environ.get(name, "") for name in names))

    def _do(self, action: str, key: str, call: Callable[[], T]) -> T:
        """Run `call`, again after transient failures of the way, the body or the server; name what is left."""
        failing_since = float("inf")
        for number in itertools.count(1):
            try:
                return call()
            except Exception as error:
                reason = retry_reason(error)
                failing_since = min(failing_since, time.monotonic())
                failing_s = time.monotonic() - failing_since
                tired = (number >= NUM_TRIES or failing_s >= RETRY_LIMIT_S) and failing_s >= self.patience.seconds
                if reason is None or tired:
                    raise named(action, f"{self.url}/{key}" if key else self.url, self.bucket, error, number) from error
                count_retry(self, reason)
                logger.warning("object storage: cannot %s now (%s), trying again", action, reason)
                time.sleep(min(8.0, 0.25 * 2 ** min(number, 5)) * (0.5 + random.random() / 2))
        raise AssertionError("unreachable")

    def _upload_parts(self, full_key: str, path: Path) -> None:
        place = {"Bucket": self.bucket, "Key": full_key}
        client = self._client
        upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
        parts: list[dict[str, Any]] = []
        try:
            with path.open("rb") as file:
                while block := file.read(_PART_BYTES):
                    number = len(parts) + 1
                    reply = client.upload_part(**upload, PartNumber=number, Body=block, ContentMD5=_content_md5(block))
                    parts.append({"ETag": reply["ETag"], "PartNumber": number})
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except Exception:
            try:
                client.abort_multipart_upload(**upload)
            except Exception as error:  # The first error is the one to tell; a bucket's lifecycle rule removes what lies around.
                logger.debug("cannot abort an upload: %s", type(error).__name__)
            raise


def _body(reply: Mapping[str, Any]) -> bytes:
    """The whole body of a reply, as long as the reply says.

    Raises
    ------
    TimeoutError, urllib3.exceptions.ReadTimeoutError
        It trickles, or stands still.
    botocore.exceptions.IncompleteReadError, urllib3.exceptions.ProtocolError
        It breaks off.
    """
    size = reply["ContentLength"]
    deadline = time.monotonic() + READ_TIMEOUT_S + size / SLOWEST_BYTES_PER_S
    blocks = []
    with closing(reply["Body"]) as body:
        # botocore's own `read` waits until a block is full, however long that takes; `read1` gives what has come.
        while block := body._raw_stream.read1(_BLOCK_BYTES):
            blocks.append(block)
            if time.monotonic() > deadline:
                raise TimeoutError
    content = b"".join(blocks)
    if len(content) != size:
        raise failures.IncompleteReadError(actual_bytes=len(content), expected_bytes=size)
    return content


def _differs(reply: Mapping[str, Any], content: bytes) -> bool:
    """Whether the reply's ETag is an MD5 (it is not for objects in parts) and not that of `content`."""
    etag = _MD5.fullmatch(reply.get("ETag", ""))
    return etag is not None and etag[1] != _md5(content).hex()


def _md5(content: bytes) -> bytes:
    # S3's own checksum of bodies: it guards against damage, not against people.
    return hashlib.md5(content, usedforsecurity=False).digest()


def _content_md5(content: bytes) -> str:
    return base64.b64encode(_md5(content)).decode()


@functools.lru_cache(maxsize=8)
def _client(pid: int, connect_timeout_s: float, read_timeout_s: float, environment: tuple[str, ...]) -> Any:
    """One client per process and set of credentials: making one costs a tenth of a second, and forks must not share sockets."""
    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        # `_do` retries, bodies included; botocore's own retries on top would multiply the wait.
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
        # A custom endpoint has no wildcard DNS for bucket.host names.
        s3={"addressing_style": "path"} if environment[0] or environment[1] else {},
    )
    return boto3.session.Session().client("s3", config=config, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
