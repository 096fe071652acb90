import re

import pytest
import torch

from robodual.serving.metrics import Metrics


def test_memory_is_that_of_each_gpu_at_the_time_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"cuda:0": 1, "cuda:1": 2}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - held[device], 100))
    metrics = Metrics()
    metrics.watch_memory("cpu", "cuda:0", "cuda:1")
    held["cuda:1"] = 3

    def shown(kind: str) -> dict[str, float]:
        text = metrics.exposition().decode()
        found = re.findall(rf'robodual_device_memory_bytes{{device="(.+)",kind="{kind}"}} (\S+)', text)
        return {device: float(value) for device, value in found}

    assert shown("used") == {"cuda:0": 1, "cuda:1": 3}
    assert shown("total") == {"cuda:0": 100, "cuda:1": 100}


def test_errors_that_alerts_look_for_are_there_before_the_first() -> None:
    metrics = Metrics()
    metrics.expect(["Act", "Reset"])
    text = metrics.exposition().decode()
    assert 'robodual_requests_total{code="INTERNAL",method="Act"} 0.0' in text
    assert 'robodual_requests_total{code="RESOURCE_EXHAUSTED",method="Reset"} 0.0' in text
    assert not metrics.answered()
