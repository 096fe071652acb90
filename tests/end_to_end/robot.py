"""A robot at work in the background: a real client session on the built-in simulator."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from robodual.pair import Pair
from robodual_client import DualSystemClient
from robodual_client.calvin.sequences import published
from robodual_client.playtable import PlayTable

Errors = list[BaseException]


@contextlib.contextmanager
def at_work(pair: Pair, instruction: str, session: str, *, period: float = 0.07, **options: Any) -> Iterator[None]:
    """Steps through episodes of 60 steps, one step every `period` seconds, until the block ends.

    Raises what went wrong on the way.
    """
    told = threading.Event()
    errors: Errors = []

    def work() -> None:
        table = PlayTable(seed=0)
        try:
            with DualSystemClient(**pair.addresses, session=session, **options) as client:
                while not told.is_set():
                    client.reset(instruction)
                    obs = table.reset(*published()[0].observations())
                    for _ in range(60):
                        due = time.monotonic() + period
                        obs = table.step(client.step(obs))[0]
                        if told.wait(max(0.0, due - time.monotonic())):
                            break
        except BaseException as error:
            errors.append(error)
        finally:
            table.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        told.set()
        thread.join(120)
    if errors:
        raise errors[0]
