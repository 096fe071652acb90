from __future__ import annotations

from pathlib import Path

import pytest
from layouts import write_adapter, write_generalist, write_specialist


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `generalist/` (a hub folder), `adapter/`, `second/` (LoRA) and `specialist.pt` (EMA)."""
    folder = tmp_path_factory.mktemp("published")
    write_generalist(folder / "generalist")
    write_adapter(folder / "adapter", seed=1)
    write_adapter(folder / "second", seed=2, alpha=8)
    write_specialist(folder / "specialist.pt")
    return folder
