from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from replicas import Replica, specialist

from robodual.conditioning.store import Store
from robodual.conditioning.valkey import EmbeddedServer
from robodual.generalist.engine import GeneralistEngine, load_generalist
from robodual.serving.logging import configure
from robodual.serving.settings import SpecialistSettings
from robodual.specialist.engine import SpecialistEngine, load_specialist


@pytest.fixture(scope="session", autouse=True)
def logs() -> None:
    configure(SpecialistSettings(log_level="error"))


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def url(shared_valkey: EmbeddedServer) -> Iterator[str]:
    yield shared_valkey.url
    with redis.Redis.from_url(shared_valkey.url) as client:
        client.flushall()


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url, timeout=5)
    yield store
    await store.close()


@pytest.fixture(scope="session")
def specialist_engine() -> SpecialistEngine:
    return load_specialist("toy", device="cpu")


@pytest.fixture(scope="session")
def generalist_engine() -> GeneralistEngine:
    return load_generalist("toy", device="cpu")


@pytest.fixture
async def replica(specialist_engine: SpecialistEngine, url: str) -> AsyncIterator[Replica]:
    async with specialist(specialist_engine, url) as replica:
        yield replica
