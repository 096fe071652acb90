"""The benchmarks of loading and of the generalist run, and the bound on host memory holds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from robodual.generalist.engine import load_generalist


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module(f"benchmarks.{request.param}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("benchmark", ["loading"], indirect=True)
def test_loading_takes_no_more_host_memory_than_weights_and_one_shard(benchmark: ModuleType) -> None:
    load, inspection = benchmark.results(megabytes=300, shards=4)

    # A second copy of the weights would be far above both.
    assert load["weights"] > 280
    assert load["largest_shard"] + benchmark.SLACK < load["weights"]
    assert load["peak"] <= load["weights"] + load["largest_shard"] + benchmark.SLACK
    assert load["after"] >= 0.9 * load["weights"]
    assert inspection["peak"] <= inspection["largest_shard"] + benchmark.SLACK
    assert load["within"]
    assert inspection["within"]


@pytest.mark.parametrize("benchmark", ["generalist"], indirect=True)
def test_generalist_benchmark_measures_what_it_can_and_says_what_it_cannot(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "generalist.json"
    arguments = ["--profile", "toy", "--device", "cpu", "--rounds", "2", "--json", str(record)]
    threads = torch.get_num_threads()

    assert benchmark.main([*arguments, "--quantisation", "none", "nf4", "--threads", str(threads)]) == 0

    rows = json.loads(record.read_text())["rows"]
    assert [(row["quantisation"], row["attention"], bool(row["reason"])) for row in rows] == [
        ("none", "sdpa", False),
        ("none", "flash_attention_2", True),
        ("nf4", "sdpa", True),
        ("nf4", "flash_attention_2", True),
    ]
    engine = load_generalist("toy", device="cpu")
    assert rows[0]["weight_bytes"] == engine.facts.weight_bytes
    assert 0 < rows[0]["median"] <= rows[0]["p99"]
    assert rows[0]["forwards"] == benchmark.forwards(engine)
    assert "nf4 needs a CUDA device" in rows[2]["reason"]
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 3
    assert benchmark.main([*arguments, "--quantisation", "int8", "--attention", "sdpa"]) == 1
