"""Imports the published calvin_env with four packages: numpy, pybullet, hydra-core and omegaconf.

The modules that make up the simulator import more than they use: gym (a base class and a seeded generator), OpenCV (a
window for people), GitPython (the checkout's commit, for the log), and numpy-quaternion and SciPy (an inverse
kinematics that no published configuration turns on). Placeholders stand in for these while calvin_env is imported, and
only then; whatever is really installed comes back at once. So their versions, which no longer fit NumPy 2 or build on
a current Python, do not matter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Iterator

import numpy as np

from robodual_client.calvin.checkout import Checkout, SimulatorError

# The parts that hydra would import later, by name, when the placeholders are gone.
_PARTS = ("robot.robot", "scene.play_table_scene", "camera.static_camera", "camera.gripper_camera")


def simulator(checkout: Checkout) -> Any:
    """The class PlayTableSimEnv of the checkout, fit to live with.

    Two of its habits are left out: it asks git for its own commit with GitPython, which fails for a checkout that is a
    plain copy or belongs to another user; and on deletion it disconnects a client that may be disconnected already,
    and prints that it does. Raises SimulatorError if a needed package is missing, or another calvin_env is imported.
    """
    require_packages()
    published = _import(checkout)
    commit = checkout.commit() or "unknown"
    published.get_git_commit_hash = lambda path: commit
    return type("Simulator", (published.PlayTableSimEnv,), {"__del__": lambda self: None})


def require_packages() -> None:
    """Raises SimulatorError if one that the simulator needs is missing."""
    missing = [name for name in ("hydra", "omegaconf", "pybullet") if importlib.util.find_spec(name) is None]
    if missing:
        raise SimulatorError(
            f"calvin_env needs {', '.join(missing)}; install with: pip install 'robodual-client[calvin]'"
        )


def _import(checkout: Checkout) -> Any:
    """The module calvin_env.envs.play_table_env, with every module that the simulator needs imported."""
    package = checkout.repository / "calvin_env"
    present = sys.modules.get("calvin_env")
    if present is not None and str(package) not in present.__path__:
        raise SimulatorError(
            f"calvin_env is already imported from {present.__path__[0]}; {package} needs a process of its own"
        )
    if present is None:
        # From its own file: a folder of the same name in the working directory, or an installed copy, changes nothing.
        spec = importlib.util.spec_from_file_location(
            "calvin_env", package / "__init__.py", submodule_search_locations=[str(package)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["calvin_env"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["calvin_env"])
    with _placeholders(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its @hydra.main names no version of hydra
        for part in _PARTS:
            importlib.import_module(f"calvin_env.{part}")
        return importlib.import_module("calvin_env.envs.play_table_env")


@contextmanager
def _placeholders() -> Iterator[None]:
    """Puts stand-ins under the names of the modules that calvin_env imports and the simulator does not use."""
    stand_ins: dict[str, dict[str, Any]] = {
        "cv2": {},
        "git": {},
        "quaternion": {},
        "scipy": {},
        "scipy.spatial": {},
        "scipy.spatial.transform": {"Rotation": None},
        "gym": {"Env": object},
        "gym.utils": {},
        "gym.utils.seeding": {"np_random": lambda seed=None: (np.random.default_rng(seed), seed)},
    }
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, attributes in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name, present in before.items():
            if present is None:
                del sys.modules[name]
            else:
                sys.modules[name] = present
