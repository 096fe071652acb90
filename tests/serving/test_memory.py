"""Threads of a service share glibc's arenas."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Prints how many arenas there are after twenty threads have each taken memory.
COUNT = """
import ctypes, sys, threading
from robodual.serving.memory import share_arenas
if sys.argv[1] == "shared":
    share_arenas()
blocks, lock, there = [], threading.Lock(), threading.Barrier(20)
def take():
    there.wait()
    mine = [bytes(50_000) for _ in range(20)]
    with lock:
        blocks.append(mine)
    there.wait()
threads = [threading.Thread(target=take) for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
print(open(sys.argv[2]).read().count("<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_two_arenas(tmp_path: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}

    def count(how: str) -> int:
        command = [sys.executable, "-c", COUNT, how, f"{tmp_path}/{how}.xml"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert count("shared") <= 2 < count("alone")
