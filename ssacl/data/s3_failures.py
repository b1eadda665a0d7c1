"""What can go wrong between this process and S3: which failures are worth another try, and how the others are named."""

from __future__ import annotations

import os

import botocore.exceptions as failures
import urllib3.exceptions as broken

from ssacl.data.storage import MissingObjectError
from ssacl.errors import StorageError

# A reset or a short body shows only while the body is read, after botocore's own retries are over.
_SHORT = (failures.IncompleteReadError, failures.ResponseStreamingError, broken.ProtocolError)
_SLOW = (failures.ReadTimeoutError, failures.ConnectTimeoutError, broken.ReadTimeoutError, TimeoutError)
_CONNECTION = (failures.ConnectionError, failures.HTTPClientError, ConnectionError)
# NoSuchUpload: some servers give an upload up when one of its parts arrives damaged.
_DAMAGED_CODES = {"BadDigest", "IncompleteBody", "NoSuchUpload", "XAmzContentSHA256Mismatch"}
_SERVER_CODES = {"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "RequestTimeTooSkewed"}
_BAD_CREDENTIALS = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"}


class WrongBytesError(Exception):
    """A body arrived whole, but not with the bytes that its checksum names."""


def retry_reason(error: Exception) -> str | None:
    """Why a call deserves another try: "timeout", "connection", "short_body", "wrong_bytes" or "server_error"; None: it does not."""
    if isinstance(error, WrongBytesError | failures.FlexibleChecksumError):
        return "wrong_bytes"
    if isinstance(error, _SLOW):
        return "timeout"
    if isinstance(error, _SHORT):
        return "short_body"
    if isinstance(error, _CONNECTION):
        return "connection"
    code = _code(error)
    if code in _DAMAGED_CODES:
        return "wrong_bytes"
    # An answer that is not S3's XML comes from something in between that is in trouble.
    if isinstance(error, failures.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return "server_error" if code in _SERVER_CODES or status >= 500 or status == 429 else None
    return "server_error" if type(error).__name__ == "ResponseParserError" else None


def named(action: str, place: str, bucket: str, error: Exception, num_tries: int) -> StorageError:
    """The error to raise for what is left after the retries.

    Parameters
    ----------
    action
        "read", "write", ...
    place
        URL of the object or prefix.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "its default endpoint"
    what = f"Cannot {action} {place}"
    if isinstance(error, StorageError):
        return error
    if isinstance(error, failures.NoCredentialsError | failures.PartialCredentialsError):
        return StorageError(f"{what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then run again.")
    code = _code(error)
    if code in {"NoSuchBucket", "InvalidBucketName"}:
        return StorageError(f"{what}: the bucket s3://{bucket} does not exist at {endpoint}. Create it or correct the URL, then run again.")
    if code in {"NoSuchKey", "404"}:
        return MissingObjectError(f"{what}: there is no such object. Check the URL, or make the data set first.")
    if code == "InvalidRange":
        return StorageError(f"{what}: the object is shorter than its index says. Write it again.")
    if code in _BAD_CREDENTIALS:
        return StorageError(
            f"{what}: {endpoint} refused the credentials ({code}). Give valid ones in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_SESSION_TOKEN, if they are for a time), then run again."
        )
    if code in {"AccessDenied", "403"}:
        return StorageError(
            f"{what}: {endpoint} refused access ({code}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
        )
    reason = retry_reason(error)
    if reason == "wrong_bytes":
        return StorageError(
            f"{what}: bytes are damaged on the way to or from {endpoint} ({num_tries} tries). "
            "Look at the network and any proxy, then run again."
        )
    if reason == "server_error":
        return StorageError(
            f"{what}: {endpoint} fails ({code or 'no S3 answer'}; {num_tries} tries). Look at the server's disk and log, then run again."
        )
    if reason:
        return StorageError(
            f"{what}: {endpoint} does not answer or breaks off ({num_tries} tries). "
            "Start the server or check AWS_ENDPOINT_URL, then run again: finished parts are kept."
        )
    return StorageError(f"{what}: {code or type(error).__name__}. Check AWS_ENDPOINT_URL and the URL, then run again.")


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, failures.ClientError) else ""
