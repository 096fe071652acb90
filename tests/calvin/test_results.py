from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from robodual_client.calvin import EvaluationError, records
from robodual_client.calvin.comparison import compare
from robodual_client.calvin.histogram import Histogram
from robodual_client.calvin.records import Record
from robodual_client.calvin.results import Results, load
from robodual_client.calvin.sequences import published
from robodual_client.calvin.statistics import bootstrap, sign_flip, wilson


def run(lengths: list[int]) -> Results:
    """A run whose first sequences solved so many tasks."""
    return Results(
        {
            number: Record(number, published()[number].tasks, length, [50] * min(5, length + 1), 10.0)
            for number, length in enumerate(lengths)
        }
    )


def test_the_figures_are_the_published_ones() -> None:
    results = run([5, 0, 2, 3]).to_json()
    assert results["avg_seq_len"] == 2.5
    assert results["chain_sr"] == {"1": 0.75, "2": 0.75, "3": 0.5, "4": 0.25, "5": 0.25}
    tried = [task for number, length in enumerate([5, 0, 2, 3]) for task in published()[number].tasks[: length + 1]]
    solved = [task for number, length in enumerate([5, 0, 2, 3]) for task in published()[number].tasks[:length]]
    assert results["task_info"] == {
        task: {"success": solved.count(task), "total": tried.count(task)} for task in set(tried)
    }
    row = run([5, 0, 2, 3]).table().splitlines()[1]
    assert row.split() == ["4", "chains", "75.0", "75.0", "50.0", "25.0", "25.0", "2.500"]


def test_a_run_without_sequences_has_results_too() -> None:
    assert run([]).to_json()["avg_seq_len"] == 0
    assert run([]).to_json()["task_info"] == {}


def test_a_record_survives_its_line_and_a_torn_line_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "sequences.jsonl"
    record = Record(
        7, published()[7].tasks, 2, [10, 20, 360], 12.5, ages={0: 3, 7: 1}, degraded=2, video="videos/7.mp4"
    )
    record.milliseconds["act"] = Histogram()
    record.milliseconds["act"].add(12.0)
    records.append(file, record)
    file.write_bytes(file.read_bytes() + b'{"sequence": 8, "ta')
    assert list(records.read(file)) == [7]
    records.append(file, Record(9, published()[9].tasks, 0, [5], 1.0))
    read = records.read(file)
    assert list(read) == [7, 9]
    assert read[7].to_json() == record.to_json()


@pytest.mark.parametrize("bad", [b'{"sequence": 1}\n', b"{}\n", b"\x00\r\xff\n", b"\n"])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "sequences.jsonl"
    for number in (7, 9):
        records.append(file, Record(number, published()[number].tasks, 0, [5], 1.0))
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + bad + second)
    with pytest.raises(ValueError, match=r"line 2, .*; delete the line, and --resume runs its sequence again"):
        records.read(file)


@pytest.mark.parametrize("bad", ["{", "[]", "{}", '{"protocol": 1, "provenance": []}'])
def test_a_damaged_protocol_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "run.json").write_text(bad)
    with pytest.raises(EvaluationError, match=r"run\.json is not a run's protocol and provenance: .*; choose another"):
        load(tmp_path)


def test_a_histogram_keeps_quantiles_and_merges_exactly() -> None:
    random = np.random.default_rng(0)
    values = np.exp(random.normal(3.0, 0.5, 4000))
    whole, parts = Histogram(), [Histogram(), Histogram()]
    for index, value in enumerate(values):
        whole.add(value)
        parts[index % 2].add(value)
    assert Histogram.merged(parts).counts == whole.counts
    assert Histogram.from_json(json.loads(json.dumps(whole.to_json()))).counts == whole.counts
    for q in (0.01, 0.5, 0.99):
        assert whole.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.03)
    edges, counts = whole.columns(40)
    assert len(edges) == len(counts) + 1 <= 41
    assert sum(counts) >= 0.99 * len(values)
    inside = np.histogram(values, edges)[0]
    np.testing.assert_array_equal(inside[:-1], counts[:-1])


def test_wilson_intervals_equal_the_known_ones() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_covers_what_the_normal_interval_does() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    spread = 1.96 * values.std() / np.sqrt(400)
    assert bootstrap(list(values)) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.01)
    assert bootstrap(list(values)) == bootstrap(list(values))


def test_a_sign_flip_counts_the_signs_that_lead_as_far() -> None:
    assert sign_flip([1] * 6) == pytest.approx(2 / 2**6)
    assert sign_flip([0, 0, -2]) == 1.0
    assert sign_flip([]) == 1.0
    differences = [3, -1, 2, 2, 0, 1, -1, 4]
    sums = [np.dot(signs, differences) for signs in product((-1, 1), repeat=8)]
    assert sign_flip(differences) == pytest.approx(np.mean([abs(each) >= sum(differences) for each in sums]))
    large = np.random.default_rng(0).integers(-5, 6, 1000).tolist()
    assert sign_flip(large) == pytest.approx(
        2 * (1 - NormalDist(0, np.linalg.norm(large)).cdf(abs(sum(large)))), abs=0.01
    )


@pytest.mark.parametrize("sequences", [1, 5])
def test_a_handful_of_sequences_proves_nothing(sequences: int) -> None:
    compared = compare(run([0] * sequences), run([5] * sequences))
    assert compared.difference == 5
    assert "no difference beyond chance" in compared.table("old", "new")
    assert "new is better (p = 0.031)" in compare(run([0] * 6), run([5] * 6)).table("old", "new")


def test_comparison_pairs_the_sequences_that_both_runs_have() -> None:
    a, b = run([0, 1, 2, 3, 4, 0, 1, 2]), run([1, 2, 3, 4, 5, 1, 2])
    compared = compare(a, b)
    assert compared.shared == 7
    assert compared.difference == 1.0
    assert compared.difference_interval == (1.0, 1.0)
    assert [row.a for row in compared.chains] == a.chain_rates()
    assert "new is better" in compared.table("old", "new")
    assert compared.table("old", "new").splitlines()[1].split() == ["chains", "8", "7"]
    assert "no difference beyond chance" in compare(a, a).table("one", "same")
    with pytest.raises(ValueError, match="no sequence in common"):
        compare(run([]), a)
