"""S3 behind `ssacl.data.storage.Storage`: bounded time-outs, retries with backoff, verified lengths, named errors."""

from __future__ import annotations

import functools
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.exceptions as failures
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from ssacl.data.storage import MissingObjectError, ObjectInfo, checked_key
from ssacl.errors import StorageError

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_TRIES = 4
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 20
_MULTIPART_BYTES = 64 << 20
# A reset or a short body shows only while the body is read, after botocore's own retries are over: these are tried again here.
_TRANSIENT = (
    failures.ConnectionError,
    failures.HTTPClientError,
    failures.IncompleteReadError,
    failures.ResponseStreamingError,
    failures.FlexibleChecksumError,
    ConnectionError,
    TimeoutError,
)
_TRANSIENT_CODES = {
    "InternalError",
    "SlowDown",
    "ServiceUnavailable",
    "RequestTimeout",
    "500",
    "502",
    "503",
    "504",
    "IncompleteBody",
    "BadDigest",
}
_BAD_CREDENTIALS = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"}


class S3Storage:
    """Objects under `s3://bucket/prefix`. The client is made at first use, in the process that uses it.

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

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        ranged = start > 0 or end is not None
        extra = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if ranged else {}

        def get() -> bytes:
            reply = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **extra)
            body = reply["Body"]
            try:
                content: bytes = body.read()
            finally:
                body.close()
            if len(content) != reply["ContentLength"]:
                raise failures.IncompleteReadError(actual_bytes=len(content), expected_bytes=reply["ContentLength"])
            return content

        content = self._do("read", key, get)
        if end is not None and len(content) != end - start:
            raise StorageError(
                f"{self.url}/{key} is truncated: {end - start} bytes were asked for, {len(content)} are there. Write it again."
            )
        return content

    def write(self, key: str, content: bytes) -> None:
        self._do("write", key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=content))

    def upload(self, key: str, path: Path) -> None:
        settings = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES, max_concurrency=2)
        self._do("write", key, lambda: self._client.upload_file(str(path), self.bucket, self._full(key), Config=settings))

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

    def sub(self, prefix: str) -> S3Storage:
        return S3Storage(self.bucket, f"{self.prefix}/{prefix.strip('/')}")

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{checked_key(key)}" if self.prefix else checked_key(key)

    @property
    def _client(self) -> Any:
        names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        return _client(os.getpid(), tuple(os.environ.get(name, "") for name in names))

    def _do(self, action: str, key: str, call: Callable[[], T]) -> T:
        """Run `call`, again after transient failures of the body or the server; name what is left."""
        for left in reversed(range(NUM_TRIES)):
            try:
                return call()
            except Exception as error:
                if left and _is_transient(error):
                    logger.warning("object storage: cannot %s now (%s), trying again", action, type(error).__name__)
                    time.sleep((NUM_TRIES - left) * (0.5 + random.random() / 2))
                    continue
                raise self._named(action, key, error) from error
        raise AssertionError("unreachable")

    def _named(self, action: str, key: str, error: Exception) -> StorageError:
        where = f"s3://{self.bucket}"
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "its default endpoint"
        what = f"Cannot {action} {self.url}/{key}" if key else f"Cannot {action} {self.url}"
        if isinstance(error, StorageError):
            return error
        if isinstance(error, failures.NoCredentialsError | failures.PartialCredentialsError):
            return StorageError(f"{what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then run again.")
        code = _code(error)
        if code in {"NoSuchBucket", "InvalidBucketName"}:
            return StorageError(f"{what}: the bucket {where} does not exist at {endpoint}. Create it or correct the URL, then run again.")
        if code in {"NoSuchKey", "404"}:
            return MissingObjectError(f"{what}: there is no such object. Check the URL, or make the data set first.")
        if code == "InvalidRange":
            return StorageError(f"{what}: the object is shorter than its index says. Write it again.")
        if code in _BAD_CREDENTIALS:
            return StorageError(
                f"{what}: {endpoint} refused the credentials ({code}). Correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        if code in {"AccessDenied", "403"}:
            return StorageError(
                f"{what}: {endpoint} refused access ({code}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
            )
        if isinstance(error, _TRANSIENT):
            return StorageError(
                f"{what}: {endpoint} does not answer or breaks off ({NUM_TRIES} tries). "
                "Start the server or check AWS_ENDPOINT_URL, then run again: finished parts are kept."
            )
        if code in _TRANSIENT_CODES or code.startswith("5"):
            return StorageError(f"{what}: {endpoint} fails ({code}; {NUM_TRIES} tries). Look at the server's disk and log, then run again.")
        return StorageError(f"{what}: {code or type(error).__name__}. Check AWS_ENDPOINT_URL and the URL, then run again.")


def _code(error: Exception) -> str:
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, failures.ClientError):
        error = error.__context__
    if isinstance(error, failures.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def _is_transient(error: Exception) -> bool:
    return isinstance(error, _TRANSIENT) or _code(error) in _TRANSIENT_CODES


@functools.lru_cache(maxsize=8)
def _client(pid: int, environment: tuple[str, ...]) -> Any:
    """One client per process and set of credentials: making one costs a tenth of a second, and forks must not share sockets."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        # `_do` retries, bodies included; botocore's own retries on top would multiply the wait.
        retries={"mode": "standard", "total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,
        # A custom endpoint has no wildcard DNS for bucket.host names.
        s3={"addressing_style": "path"} if environment[0] or environment[1] else {},
    )
    return boto3.session.Session().client("s3", config=config, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
