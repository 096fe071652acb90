from __future__ import annotations

import pytest
from fake_services import FakeGeneralist, FakeSpecialist, observation


@pytest.fixture
def obs():
    return observation(0)


@pytest.fixture
def generalist():
    server = FakeGeneralist()
    yield server
    server.kill()


@pytest.fixture
def specialist():
    server = FakeSpecialist()
    yield server
    server.kill()


@pytest.fixture
def second_specialist():
    server = FakeSpecialist()
    yield server
    server.kill()
