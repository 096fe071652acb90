"""`robodual-client doctor calvin`: why is it 0 %? What is off between the simulator, its pictures and the models."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np

from robodual_client.calvin import checkout as checkouts
from robodual_client.calvin import trace
from robodual_client.calvin.annotations import VALIDATION
from robodual_client.calvin.annotations import load as load_annotations
from robodual_client.calvin.checkout import Checkout, SimulatorError
from robodual_client.calvin.environment import CalvinEnvironment
from robodual_client.calvin.examination import Finding, examine, examine_actions, stage
from robodual_client.calvin.rendering import choose
from robodual_client.calvin.sequences import published
from robodual_client.client import DualSystemClient
from robodual_client.errors import RoboDualError

# The commit whose conf/ and data/ the recordings and the known pixels stand for.
RECORDED_COMMIT = "797142c588c21e76717268b7b430958dbd13bf48"
POLICY_STEPS = 24  # three conditionings of the published schedule

_ROUNDING = 1e-3  # metres and radians: a replay that stays this near differs in the last digits of its arithmetic
_ROBOT = (*"xyz", "roll", "pitch", "yaw", "gripper width", *(f"joint {n}" for n in range(1, 8)), "gripper command")
_SCENE = (
    *("sliding door", "drawer", "button", "switch", "light bulb", "LED"),
    *(f"{colour} block {what}" for colour in ("red", "blue", "pink") for what in (*"xyz", "roll", "pitch", "yaw")),
)


@dataclass(frozen=True)
class Options:
    """`traces`: a folder of trace_*.npz, or None for the one that comes with the client. `policy`: arguments of
    DualSystemClient (generalist, specialist, token, ...) to look at the services' actions too; None: not."""

    root: Path | None = None
    render: str = "auto"
    traces: Path | None = None
    policy: Mapping[str, Any] | None = field(default=None, repr=False)


def check(options: Options) -> list[Finding]:
    """Everything that can be told without a person watching, in the order in which one thing rests on another.

    Stops at what keeps the simulator from starting. Raises nothing for what it finds.
    """
    findings = list(_packages())
    try:
        checkout = checkouts.find(options.root)
        checkout.check_files("D")
        findings.append(_checkout(checkout))
        renderer = choose(options.render)
        findings.append(Finding("renderer", "ok", renderer.sentence))
        findings += _traces(checkout, options.traces)
        simulator = CalvinEnvironment(checkout.repository, "D", renderer)
    except SimulatorError as error:
        return [*findings, Finding("simulator", "fault", str(error))]
    try:
        findings += examine(simulator.reset(*stage()))
        if options.policy is not None:
            findings.append(_policy(simulator, options.policy))
    finally:
        simulator.close()
    return findings


def _packages() -> Iterator[Finding]:
    versions = [f"Python {platform.python_version()}"]
    for package in ("numpy", "pybullet", "hydra-core", "omegaconf"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "fault", "not installed", "pip install 'robodual-client[calvin]'")
    yield Finding("packages", "ok", ", ".join(versions))


def _checkout(checkout: Checkout) -> Finding:
    commit = checkout.commit()
    if commit is None:
        return Finding("checkout", "note", f"{checkout.repository}, no git commit", "results will not name its commit")
    if commit != RECORDED_COMMIT:
        remedy = f"if the trace below differs: git -C {checkout.repository} checkout {RECORDED_COMMIT[:12]}"
        return Finding("checkout", "note", f"{checkout.repository} at {commit[:12]}", remedy)
    return Finding("checkout", "ok", f"{checkout.repository} at {commit[:12]}")


def _traces(checkout: Checkout, folder: Path | None) -> Iterator[Finding]:
    """One finding a recording, each replayed in a process of its own."""
    files = [trace.SHIPPED] if folder is None else sorted(folder.glob("trace_*.npz"))
    if not files:
        yield Finding("trace", "fault", f"no trace_*.npz in {folder}", "give the folder of shared recordings")
    for file in files:
        child = subprocess.run(
            [sys.executable, "-m", "robodual_client.calvin.trace", str(file.resolve())],
            env={**os.environ, checkouts.ENVIRONMENT_VARIABLE: str(checkout.repository)},
            capture_output=True,
        )
        lines = child.stdout.decode().splitlines()
        if child.returncode != 0 or not lines:
            reason = (child.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            yield Finding(file.stem, "fault", f"the replay failed: {reason}", "run the same with --render cpu")
            continue
        yield judge_replay(file.stem, json.loads(lines[-1]))


def judge_replay(name: str, differences: Mapping[str, Mapping[str, Any] | None]) -> Finding:
    """What a replay's differences (those of trace.py, as JSON) mean."""
    off = {quantity: where for quantity, where in differences.items() if where is not None}
    if not off:
        return Finding(name, "ok", f"{', '.join(differences)} equal the recording bit for bit")
    states = {quantity: where for quantity, where in off.items() if quantity in trace.STATES}
    if not states:
        quantity, where = next(iter(off.items()))
        found = f"the motion is exact, {quantity} differs by up to {where['largest']:.3g}"
        return Finding(name, "fault", found, "meshes, textures or the camera's configuration were changed: git status")
    quantity, where = min(states.items(), key=lambda item: tuple(item[1]["index"]))
    step, column = where["index"]
    what = (_ROBOT if quantity == "robot_obs" else _SCENE)[column]
    found = (
        f"{quantity}[{column}] ({what}) first differs at step {step}: {where['replayed']:.9g} instead of"
        f" {where['recorded']:.9g}; by up to {max(other['largest'] for other in states.values()):.3g} later"
    )
    if max(other["largest"] for other in states.values()) < _ROUNDING:
        remedy = (
            "another processor or pybullet build rounds otherwise: single episodes may end otherwise, averages hold"
        )
        return Finding(name, "note", found, remedy)
    if step == 0:
        return Finding(
            name, "fault", found, "robot or scene start elsewhere: conf/robot, conf/scene or data/ were changed"
        )
    return Finding(
        name, "fault", found, "actions act otherwise: max_rel_pos, control_freq or pybullet (3.2.5 to 3.2.7)"
    )


def _policy(simulator: CalvinEnvironment, arguments: Mapping[str, Any]) -> Finding:
    """The actions of the first steps of the first published task."""
    sequence = published()[0]
    observation = simulator.reset(*sequence.observations())
    actions = []
    try:
        with DualSystemClient(**arguments) as client:
            client.reset(load_annotations(VALIDATION)[sequence.tasks[0]])
            for _ in range(POLICY_STEPS):
                actions.append(client.step(observation))
                observation = simulator.step(actions[-1])[0]
    except (RoboDualError, ValueError) as error:
        return Finding("actions", "fault", str(error))
    return examine_actions(np.array(actions))
