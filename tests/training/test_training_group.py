"""The processes of a training: which device each works on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from robodual.training.group import joined


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_one_process_works_on_one_gpu(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)  # beneath torch's own checks
    with joined(name) as group:
        assert (group.device, taken) == (torch.device("cuda", number), [number])


@pytest.mark.parametrize(("name", "left"), [("cpu", None), ("cuda", "hosts")])
def test_a_process_that_fails_alone_waits_for_no_other(
    name: str, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's communicators end together, and gloo's each by itself."""
    ended: list[object] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda number: None, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "new_group", lambda **options: "hosts")
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: ended.append(group))
    with joined(name):
        pass
    with pytest.raises(ValueError, match="damaged"), joined(name):
        raise ValueError("damaged")
    assert ended == [None, left]
