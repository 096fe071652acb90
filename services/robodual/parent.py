"""Processes that must not outlive the one that started them, however that one ends."""

from __future__ import annotations

import signal
import sys


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Has the system send this process a signal when its parent has gone. On Linux; elsewhere nothing."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
