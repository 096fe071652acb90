"""The processes of a training: which device each works on."""

from __future__ import annotations

import pytest
import torch

from robodual.training.group import joined


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_process_works_on_one_gpu(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)  # beneath torch's own checks
    with joined(name) as group:
        assert (group.device, taken) == (torch.device("cuda", number), [number])
