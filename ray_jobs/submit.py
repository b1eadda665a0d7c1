"""Jobs on a Ray cluster through its Jobs API: submit, follow, look, stop. Secrets go by reference (`ray_jobs.node_secrets`)."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_jobs import node_secrets
from ray_jobs.package import stage
from ssacl.errors import ClusterError

ANSWER_S = 10.0
"""Longest wait for the head's first answer."""
POLL_S = 1.0
_AWAY_S = 120.0
"""A head that is away (restarted) is asked again for this long before following gives up; the job itself does not notice."""
_STOPPED = 130
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True)
class Job:
    """What is to run."""

    words: tuple[str, ...]
    """The `ssacl` command with its arguments, without `--config`."""
    config: Path | None = None
    """Value of `--config`, a file here; with `image`, its path there."""
    image: str | None = None
    """Container image with the code, in place of the working tree."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Variable -> file on the machines of the cluster, or "" where their environment has it."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Settings that are no secrets."""
    name: str = ""
    num_cpus: float = 0.0
    """Reserved for the command's own process; what it starts reserves for itself."""
    num_gpus: float = 0.0


class Cluster:
    """The Jobs API of a cluster.

    Raises
    ------
    ClusterError
        Nothing answers at the address, something else does, or a Ray of another version.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ClusterError(f"'{address}' is no address of a Ray dashboard; write it as http://head:8265.")
        headers = _authorization()
        _check(self.address, headers)
        with self._named(), _no_address_variables():
            self._client = JobSubmissionClient(self.address, headers=headers)
        # The second sets a level of its own.
        for name in ("ray.dashboard", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def submit(self, job: Job) -> str:
        """Send a job; gives its id.

        Raises
        ------
        ClusterError
            The package is too large, the name is taken, or the cluster refuses.
        """
        job_id = job.name or f"ssacl-{job.words[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        listed = ",".join(f"{name}={path}" if path else name for name, path in job.secrets.items())
        runtime_env: dict[str, Any] = {"env_vars": {**job.environment, node_secrets.REFERENCES: listed, "PYTHONUNBUFFERED": "1"}}
        with tempfile.TemporaryDirectory(prefix="ssacl-job-") as folder:
            config = str(job.config or "")
            if job.image:
                runtime_env["image_uri"] = job.image
            else:
                config = stage(Path(folder), job.config)
                runtime_env |= {
                    "working_dir": folder,
                    "worker_process_setup_hook": f"{node_secrets.__name__}.{node_secrets.provide.__name__}",
                }
            entrypoint = shlex.join(["python", "-m", "ray_jobs.submitted", *job.words, *(["--config", config] if config else [])])
            with self._named():
                return str(
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job_id,
                        runtime_env=runtime_env,
                        metadata={"command": job.words[0]},
                        entrypoint_num_cpus=job.num_cpus or None,
                        entrypoint_num_gpus=job.num_gpus or None,
                    )
                )

    def follow(self, job_id: str, start_limit_s: float, write: Callable[[str], object] = sys.stdout.write) -> int:
        """Write a job's log as it grows, until the job ends; gives its exit code (130: it was stopped).

        Raises
        ------
        ClusterError
            It found no room within `start_limit_s` (it is stopped then), could not be set up, or the head is gone.
        """
        self._await_start(job_id, start_limit_s)
        written = 0

        async def tail() -> None:
            nonlocal written
            seen = 0
            async for text in self._client.tail_job_logs(job_id):
                # A stream that is opened again tells all from the beginning.
                new, seen = text[max(0, written - seen) :], seen + len(text)
                written = max(written, seen)
                write(new)

        gone_at: float | None = None
        while True:
            try:
                asyncio.run(tail())
                if (info := self.info(job_id)).status.is_terminal():
                    return _exit_code(info)
                gone_at = None
            except (ClusterError, RuntimeError, OSError, aiohttp.ClientError) as error:
                gone_at = gone_at or time.monotonic()
                if time.monotonic() - gone_at > _AWAY_S:
                    raise ClusterError(
                        f"The head at {self.address} has not answered for {_AWAY_S:.0f} s. The job may go on: look again with "
                        f"ssacl submit status {job_id} --address {self.address}"
                    ) from error
            time.sleep(POLL_S)

    def info(self, job_id: str) -> JobDetails:
        with self._named(job_id):
            return self._client.get_job_info(job_id)

    def jobs(self) -> list[JobDetails]:
        """Submitted jobs, the newest first."""
        with self._named():
            return sorted((job for job in self._client.list_jobs() if job.submission_id), key=lambda job: -(job.start_time or 0))

    def logs(self, job_id: str) -> str:
        with self._named(job_id):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; whether it was running."""
        with self._named(job_id):
            return bool(self._client.stop_job(job_id))

    def _await_start(self, job_id: str, limit_s: float) -> None:
        started = time.monotonic()
        while self.info(job_id).status == JobStatus.PENDING:
            if time.monotonic() - started > limit_s:
                self.stop(job_id)
                raise ClusterError(
                    f"The job {job_id} found no room on the cluster within {limit_s:.0f} s and was stopped. Lower --cpus or --gpus, wait "
                    "for other jobs, or let the cluster grow (maxReplicas, max_workers); --start-limit-s waits longer."
                )
            time.sleep(POLL_S / 4)

    @contextmanager
    def _named(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except (requests.RequestException, ConnectionError) as error:
            raise _unreachable(self.address, type(error).__name__) from error
        except (RuntimeError, ValueError) as error:
            text = str(error)
            if "status code 404" in text and job_id:
                raise ClusterError(
                    f"The cluster at {self.address} has no job {job_id}; ssacl submit status --address {self.address} lists them."
                ) from error
            said = text.strip().splitlines() or [type(error).__name__]
            raise ClusterError(f"The cluster at {self.address} refused: {_essence(said)}") from error


def _essence(lines: list[str]) -> str:
    """The line that tells most of an error: a server's stack ends with it."""
    last = next((line for line in reversed(lines) if line.strip(" .'\"")), lines[0])
    return last.strip()[:300].rstrip(".") + "."


def _authorization() -> dict[str, str]:
    """The header that Ray's token authentication wants, where this process has a token."""
    token, path = os.environ.get("RAY_AUTH_TOKEN", ""), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not token and path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read. Write the cluster's token there.") from error
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check(address: str, headers: dict[str, str]) -> None:
    try:
        reply = requests.get(f"{address}/api/version", headers=headers, timeout=ANSWER_S)
        if reply.status_code in (401, 403):
            raise ClusterError(
                f"The cluster at {address} {'refuses the' if headers else 'wants a'} token. Give it in RAY_AUTH_TOKEN, or its file in "
                "RAY_AUTH_TOKEN_PATH; on Kubernetes it is in the Secret of the RayCluster's name, key auth_token."
            )
        reply.raise_for_status()
        version = str(reply.json()["ray_version"])
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        raise _unreachable(address, f"HTTP {code}" if code else type(error).__name__) from error
    if version != ray.__version__:
        raise ClusterError(
            f"The cluster at {address} runs Ray {version}, this is Ray {ray.__version__}. Use the cluster image of this release "
            "(cluster/docker), or install the cluster's version here."
        )


def _unreachable(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"No Ray dashboard answers at {address} ({why}). Check host, port (8265) and firewall; on Kubernetes: kubectl port-forward "
        "service/ssacl-head-svc 8265:8265. Heads start it with --include-dashboard=true."
    )


@contextmanager
def _no_address_variables() -> Iterator[None]:
    """Ray would take their address in place of the one that was given."""
    kept = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _exit_code(info: JobDetails) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return _STOPPED
    code = info.driver_exit_code
    if code is None:
        # The command never ran, so that its log is empty.
        said = (info.message or "no reason given").strip().splitlines()
        raise ClusterError(
            f"The job {info.submission_id} could not be started: {_essence(said)} The head's dashboard_agent.log tells more."
        )
    return code if code > 0 else 128 - code
