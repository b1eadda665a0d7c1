"""A run that begins as a copy of another one's checkpoint."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from ssacl.data.storage import Storage
from ssacl.errors import CheckpointError
from ssacl.training.reporter import MetricsLog
from ssacl.training.resume import RunStore
from ssacl.training.sealed import MANIFEST, download_folder, parse_manifest, seal, upload_folder

logger = logging.getLogger(__name__)


def fork_run(donor: Storage, target: Storage, done: int) -> None:
    """Give a new run the checkpoint that another one has after `done` optimizer steps, and its metrics; nothing where it has one already.

    The copy's manifest names the donor (`forked_from`). Whether the new run's settings may go on from there is asked when it does.

    Raises
    ------
    CheckpointError
        The donor has no such checkpoint, or it is damaged.
    """
    if RunStore(target).positions():
        return
    for position in reversed(RunStore(donor).positions()):
        content = donor.read(f"{position.prefix}/{MANIFEST}")
        if parse_manifest(content, position.prefix).get("run_step") == done:
            break
    else:
        raise CheckpointError(f"{donor.url} has no checkpoint after {done} optimizer steps to fork from. Run the same command again.")
    with tempfile.TemporaryDirectory(prefix="ssacl-fork-") as parent:
        folder = download_folder(donor, position.prefix, Path(parent) / "checkpoint")
        manifest = parse_manifest(content, position.prefix)
        seal(folder, {**manifest, "forked_from": donor.url}, manifest["files"])
        target.write(MetricsLog.KEY, donor.read(MetricsLog.KEY))
        upload_folder(folder, target, position.prefix)
    logger.info("%s goes on from %s after %d steps", target.url, donor.url, done)
