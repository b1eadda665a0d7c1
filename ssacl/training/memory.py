"""How a training process on a CPU handles freed memory."""

from __future__ import annotations

import ctypes
import logging
from typing import Literal

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Options of glibc's mallopt (malloc.h)."""
_LARGEST = 2**31 - 1
_DYNAMIC_LIMIT = 32 * 2**20
"""Where glibc's own, moving threshold ends up in a process that frees large blocks."""
_MIB = 2**20
_SETTINGS = {
    "kept": ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST)),
    "returned": ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 2 * _MIB), (_MMAP_THRESHOLD, _MIB)),
    "default": ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 2 * _DYNAMIC_LIMIT), (_MMAP_THRESHOLD, _DYNAMIC_LIMIT)),
}


Way = Literal["kept", "returned", "default"]


def set_freed_memory(way: Way) -> bool:
    """Say what becomes of the memory that this process frees; False where that cannot be set.

    Parameters
    ----------
    way
        "kept": stays with the process. The tensors of a step are freed and asked for again in the next one; taken from the system anew,
        each of their pages costs a fault: at base size in bfloat16 that is 4 to 7 % of a step on a quiet machine, and was half of it on a
        crowded one. The price is that the process stays as large as it once was.
        "returned": blocks of 1 MiB and more go back at once. For a model whose weights are whole for moments only (ZeRO 3): under glibc's
        own way the moments add up, to twice what a rank holds after the construction of a language model of 350 million numbers.
        "default": glibc's way; what is free now is given back.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):
        logger.info("This system's allocator is not glibc's; it is left as it is.")
        return False
    done = all(mallopt(option, value) == 1 for option, value in _SETTINGS[way])
    if way != "kept":
        trim(0)
    return done
