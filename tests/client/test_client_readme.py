"""clients/README.md says what is so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from fake_services import observation

from robodual_client import DualSystemClient, Timeouts, errors

README = (Path(__file__).parents[2] / "clients" / "README.md").read_text()


class Env:
    steps = 0

    def reset(self):
        return observation(0)

    def step(self, action):
        assert action.shape == (7,)
        self.steps += 1
        return observation(self.steps % 5), 0, False, {}


def test_example_runs(generalist, specialist, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = example.replace("127.0.0.1:50051", generalist.address).replace("127.0.0.1:50052", specialist.address)
    env = Env()
    monkeypatch.setattr("robodual_client.playtable.PlayTable", lambda: env)
    exec(example, {})  # noqa: S102 (the README of this repository)
    assert env.steps == 360
    assert [request.step for request in generalist.requests("Condition")][:4] == [0, 7, 15, 23]


def test_every_option_and_error_is_listed_and_no_other():
    parameters = set(inspect.signature(DualSystemClient).parameters)
    options = README.partition("## Options")[2].partition("## When")[0]
    assert set(re.findall(r"^\| `(\w+)`", options, re.MULTILINE)) == parameters
    for name in vars(Timeouts()):
        assert f"`{name}`" in options
    raised = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.RoboDualError) and kind is not errors.RoboDualError
    }
    table = README.partition("## When")[2]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == raised
