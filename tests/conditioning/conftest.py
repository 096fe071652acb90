from collections.abc import Iterator

import pytest

from robodual.conditioning.valkey import EmbeddedServer


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server
