"""How a training process on a CPU handles freed memory."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Options of glibc's mallopt (malloc.h)."""
_LARGEST = 2**31 - 1
_DYNAMIC_LIMIT = 32 * 2**20
"""Where glibc's own, moving threshold ends up in a process that frees large blocks."""


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the process keep what it frees, instead of giving every large block back to the system; False where that cannot be set.

    The tensors of a step are freed and asked for again in the next one. Taken from the system anew, each of their pages costs a fault: at
    base size in bfloat16 that is 4 to 7 % of a step on a quiet machine, and was half of it on a crowded one. The price is that the process
    stays as large as it once was.

    Parameters
    ----------
    keep
        False goes back to glibc's way, and gives back what is free now.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        logger.info("This system's allocator is not glibc's; it is left as it is.")
        return False
    settings = (
        ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST))
        if keep
        else ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 2 * _DYNAMIC_LIMIT), (_MMAP_THRESHOLD, _DYNAMIC_LIMIT))
    )
    done = all(mallopt(option, value) == 1 for option, value in settings)
    if not keep:
        trim(0)
    return done
