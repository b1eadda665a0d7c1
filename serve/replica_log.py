"""Our records in the log that Ray Serve keeps for a replica: each line there carries the id of its request."""

from __future__ import annotations

import logging

from ssacl.data.quiet import quiet_warnings


def join_replica_log() -> None:
    """Called in a replica's process, which has no log of its own: records below a warning would go nowhere."""
    quiet_warnings("pydicom", "PIL")
    for name in ("serve", "ssacl"):
        logging.getLogger(name).parent = logging.getLogger("ray.serve")
