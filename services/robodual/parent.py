"""Processes that must not outlive the one that started them, however that one ends."""

from __future__ import annotations

import sys


def end_with_parent() -> None:
    """Has the system send this process SIGTERM when its parent has gone. On Linux; elsewhere nothing."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
