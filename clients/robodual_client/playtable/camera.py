"""Pinhole cameras on Bullet's CPU renderer, with metric depth."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np
import pybullet


class Camera:
    """A square camera: vertical field of view in degrees, near and far planes in metres, size in pixels."""

    def __init__(self, client: int, size: int, field_of_view: float, near: float, far: float) -> None:
        self.client, self.size, self.near, self.far = client, size, near, far
        self._projection = pybullet.computeProjectionMatrixFOV(field_of_view, 1.0, near, far)

    def render(self, view: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 [size, size, 3] and depth float32 [size, size] in metres along the optical axis."""
        picture: Any = pybullet.getCameraImage(
            self.size,
            self.size,
            view,
            self._projection,
            shadow=0,
            renderer=pybullet.ER_TINY_RENDERER,
            flags=pybullet.ER_NO_SEGMENTATION_MASK,
            physicsClientId=self.client,
        )
        # Bullet gives flat tuples where it was built without NumPy.
        rgba = np.asarray(picture[2], dtype=np.uint8).reshape(self.size, self.size, 4)
        buffer = np.asarray(picture[3], dtype=np.float64).reshape(self.size, self.size)
        depth = self.far * self.near / (self.far - (self.far - self.near) * buffer)
        return np.ascontiguousarray(rgba[:, :, :3]), depth.astype(np.float32)


def static_view() -> tuple[float, ...]:
    """The view matrix of CALVIN's static camera (calvin_env conf/cameras/cameras/static.yaml)."""
    view: tuple[float, ...] = pybullet.computeViewMatrix(
        [2.871459009488717, -2.166602199425597, 2.555159848480571],
        [-0.026242351159453392, -0.0302329882979393, 0.3920000493526459],
        [0.4041403970338857, 0.22629790978217404, 0.8862616969685161],
    )
    return view


def gripper_view(client: int, body: int, link: int) -> tuple[float, ...]:
    """The view matrix of a camera that sits in a link, looks along its y axis and has its -z axis up."""
    state = pybullet.getLinkState(body, link, computeForwardKinematics=1, physicsClientId=client)
    eye = np.array(state[0])
    axes = np.array(pybullet.getMatrixFromQuaternion(state[1])).reshape(3, 3)
    view: tuple[float, ...] = pybullet.computeViewMatrix(
        eye.tolist(), (eye + axes[:, 1]).tolist(), (-axes[:, 2]).tolist()
    )
    return view
