"""Our records in the log that Ray Serve keeps for a replica: each line there carries the id of its request."""

from __future__ import annotations

import logging


def join_replica_log() -> None:
    """Called in a replica's process, which has no log of its own: records below a warning would go nowhere."""
    for name in ("serve", "ssacl"):
        logging.getLogger(name).parent = logging.getLogger("ray.serve")
