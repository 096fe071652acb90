import asyncio

from robodual.serving.readiness import Background, Readiness


async def test_it_is_ready_once_nothing_is_missing() -> None:
    readiness = Readiness(model="loading", store="away")
    readiness.meet("model")
    assert not readiness.ready
    readiness.meet("store")
    readiness.meet("never missed")
    assert readiness.ready
    readiness.lack("store", "gone")
    assert readiness.missing == {"store": "gone"}


async def test_background_work_that_fails_ends_readiness() -> None:
    readiness = Readiness()
    background = Background(readiness)

    async def fail() -> None:
        raise RuntimeError("broken")

    background.run("steady", asyncio.sleep(60))
    background.run("feed", fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert set(readiness.missing) == {"feed"}
    await background.close()
    assert set(readiness.missing) == {"feed"}


async def test_background_work_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    """As `asyncio.wait_for` does before Python 3.12, if what it waits for is there at the same moment."""
    background = Background(Readiness())
    lost = 0

    async def lose() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    background.run("loses one", lose())
    await asyncio.sleep(0)
    await asyncio.wait_for(background.close(), 5)
    assert lost == 2
