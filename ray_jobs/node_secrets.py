"""Secrets of a submitted job, by reference: variables and files that the cluster's machines have. Values never travel with the job.

`SSACL_SECRETS` lists them, comma-separated: `NAME` is a variable of every machine's environment, `NAME=/path` a file mounted there. Ray
calls `provide` in each process of the job before its work begins, on the machine where it runs.
"""

from __future__ import annotations

import os
from pathlib import Path

from ssacl.errors import ClusterError

REFERENCES = "SSACL_SECRETS"
MAX_SECRET_BYTES = 64 << 10


def references(text: str) -> dict[str, str]:
    """Variable -> path of the file that holds its value; "" where the machines' environment holds it."""
    return {name: path for item in text.split(",") if item for name, _, path in [item.partition("=")]}


def provide() -> None:
    """Put the values of secret files into this process' environment.

    Raises
    ------
    ClusterError
        A variable or file is not there; the message names it and never holds a value.
    """
    for name, path in references(os.environ.get(REFERENCES, "")).items():
        if path:
            os.environ[name] = _read(name, Path(path))
        elif not os.environ.get(name):
            raise ClusterError(
                f"The secret {name} is not in the environment of this machine of the cluster. Start Ray there with it (KubeRay: a Secret "
                f"by envFrom), or name a file: --secret {name}=/path/on/every/machine."
            )


def _read(name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
        text = content.decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ClusterError(
            f"The secret {name} cannot be read from {path} on this machine of the cluster ({why}). Mount the file there, for the user that "
            "runs Ray."
        ) from error
    if not text or len(content) > MAX_SECRET_BYTES:
        raise ClusterError(f"The secret {name} in {path} is empty or longer than {MAX_SECRET_BYTES} bytes. Write it again.")
    return text
