"""Keeps the libraries that read patients' files from writing what stands in them."""

from __future__ import annotations

import logging
import warnings


def quiet_loggers(*names: str) -> None:
    """Let these loggers write errors' severity and above only. Called where such a library is used; it stays so for the process.

    pydicom quotes header values in its warnings, Pillow the text of EXIF tags at DEBUG, DICOMweb clients the UIDs that they ask for.
    """
    for name in names:
        logger = logging.getLogger(name)
        if logger.level != logging.CRITICAL:  # Setting it makes every logger of the process look its level up again.
            logger.setLevel(logging.CRITICAL)


def quiet_warnings(*packages: str) -> None:
    """Keep these packages' Python warnings, which quote header values too, from stderr. For the processes of services: it stays so.

    `warnings.catch_warnings` is for one thread only; where several read films, one puts the filters back while another still reads.
    """
    for package in packages:
        warnings.filterwarnings("ignore", module=rf"{package}\b")
