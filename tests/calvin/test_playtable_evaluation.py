from __future__ import annotations

from pathlib import Path

from running import outcomes

from robodual_client.calvin import Options, evaluate


def test_chains_on_the_real_table_do_not_depend_on_workers_or_on_what_ran_before(tmp_path: Path) -> None:
    settings = {"env": "playtable", "policy": "expert", "ep_len": 150}
    alone = evaluate(Options(out=tmp_path / "alone", numbers=(0, 2, 3), **settings))
    pair = evaluate(Options(out=tmp_path / "pair", numbers=(3, 2, 0), workers=2, **settings))
    assert outcomes(alone) == outcomes(pair)
    assert alone.average_length > 1
