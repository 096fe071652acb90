from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from authority import issue

if not torch.cuda.is_available():  # before anything imports Triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's `ca.pem`, and certificates and keys for 127.0.0.1 (`NAME.pem`, `NAME.key`):

    `server` and `client`, signed by that authority, and `stranger`, signed by itself.
    """
    folder = tmp_path_factory.mktemp("certificates")
    issue(folder)
    return folder
