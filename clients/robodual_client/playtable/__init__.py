"""The built-in simulator: CALVIN's play table rebuilt from primitives, with the Panda arm (extra `sim`: pybullet)."""

from robodual_client.playtable.environment import PlayTable

__all__ = ["PlayTable"]
