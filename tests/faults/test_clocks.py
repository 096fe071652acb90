"""The machine's clock jumps, for the services, the client and Redis alike."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Row
from deployment import Deployment
from robots import STEPS, Robot, Undisturbed

JUMPS = {3: "+30d", 10: "-30d", 18: "+400d"}  # before these steps: the wall clock's distance to the true one


def library() -> Path | None:
    """libfaketime: from the `libfaketime` wheel, else the system's."""
    found = importlib.util.find_spec("libfaketime")
    folders = [] if found is None or found.origin is None else [Path(found.origin).parent / "vendor/libfaketime/src"]
    candidates = [folder / "libfaketime.so.1" for folder in folders]
    candidates += sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return next((path for path in candidates if path.exists()), None)


def test_a_clock_that_jumps_is_not_noticed_by_anyone(
    undisturbed: Undisturbed, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preloaded = library()
    if preloaded is None:
        pytest.skip("no libfaketime: pip install libfaketime")
    twin = undisturbed.of(1)
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(preloaded))
        patch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
        patch.setenv("FAKETIME_NO_CACHE", "1")
        patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        patch.setenv("DONT_FAKE_MONOTONIC", "1")
        faked = Deployment(tmp_path)
        faked.services = (faked.generalist, faked.a)
        try:
            faked.mend()
            command = [sys.executable, __file__, faked.generalist.address, faked.a.address, str(clock)]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr
        finally:
            faked.stop()

    answer = json.loads(done.stdout)
    assert answer["jumped"] > 300 * 86400, "the clock did not jump"
    assert answer["failures"] == [0] * STEPS
    assert answer["errors"] == 0
    np.testing.assert_array_equal(answer["actions"], twin.actions)
    rows.append(Row("clock jumps by months, forward and back", 0.0, answer["longest"], answer["longest"], STEPS, 0))


def main(generalist: str, specialist: str, clock: Path) -> None:
    """One robot's episode, with the jumps on its way."""
    robot = Robot(1, generalist, specialist)
    began = time.time()
    robot.reset()
    for step in range(STEPS):
        if step in JUMPS:
            clock.write_text(JUMPS[step])
        robot.step()
    answer = {
        "actions": [action.tolist() for action in robot.actions],
        "failures": [answer.failures for answer in robot.answers],
        "errors": len(robot.errors),
        "longest": robot.longest,
        "jumped": time.time() - began,
    }
    robot.client.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
