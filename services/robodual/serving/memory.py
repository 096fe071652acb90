"""How the C library shares memory between threads."""

from __future__ import annotations

import ctypes
import os
import sys

ARENAS = 2
_M_ARENA_MAX = -8  # malloc.h


def share_arenas() -> None:
    """Has all threads take memory from two arenas of glibc's; call it before there are threads.

    By default glibc gives nearly every thread an arena of its own, up to eight for each core, and each of them keeps
    the most that it ever held: a service whose batches come and go in several threads grows for hours. Does nothing
    where MALLOC_ARENA_MAX is set, or the C library is another.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_ARENA_MAX, ARENAS)
