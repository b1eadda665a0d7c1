"""What a submitted job runs on the cluster: `python -m ray_jobs.submitted train --config ...`, the `ssacl` command with its secrets."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ray_jobs.node_secrets import provide
from ssacl.cli import main as ssacl
from ssacl.errors import ClusterError


def main(arguments: Sequence[str]) -> int:
    """Exit code as of `ssacl.cli.main`."""
    try:
        provide()
    except ClusterError as error:
        print(f"ssacl: {error}", file=sys.stderr)
        return 1
    return ssacl(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
