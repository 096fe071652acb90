"""What the services answered, as plain data."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Iterable

import numpy as np
import numpy.typing as npt

from robodual_client import tensors, wire
from robodual_client.errors import ServiceFailed

_ACTION = struct.Struct("<7f")


@dataclass(frozen=True)
class ServiceInfo:
    """What a service is (GetInfo), with the address that said so. JSON-ready through `dataclasses.asdict`."""

    address: str
    service: str
    version: str
    profile: str
    checkpoint: str
    device: str
    dtype: str
    parameters: int
    weight_bytes: int
    sensors: tuple[str, ...]
    details: dict[str, str]

    @classmethod
    def of(cls, response: wire.InfoResponse, address: str) -> ServiceInfo:
        return cls(
            address=address,
            service=response.service,
            version=response.version,
            profile=response.profile,
            checkpoint=response.checkpoint,
            device=response.device,
            dtype=response.dtype,
            parameters=response.parameters,
            weight_bytes=response.weight_bytes,
            sensors=tuple(response.sensors),
            details=dict(response.details),
        )

    @property
    def model(self) -> tuple[str, str, tuple[str, ...]]:
        """What replicas of one service have in common."""
        return self.profile, self.checkpoint, self.sensors


@dataclass(frozen=True)
class Conditioning:
    """The generalist's answer to the frame of `step`."""

    episode: int
    step: int
    stored: bool  # False: the store already held this version or a newer one
    malformed_tokens: int
    timings: dict[str, float]  # milliseconds by stage, on the server
    round_trip: float  # milliseconds, seen from here

    @classmethod
    def of(cls, response: wire.ConditionResponse, round_trip: float) -> Conditioning:
        return cls(
            episode=response.version.episode,
            step=response.version.step,
            stored=response.stored,
            malformed_tokens=response.malformed_tokens,
            timings=_timings(response.timings),
            round_trip=round_trip,
        )


@dataclass(frozen=True)
class Answer:
    """The specialist's answer to one step."""

    episode: int
    step: int
    action: npt.NDArray[np.float64]  # [7]
    chunk: npt.NDArray[np.float32]  # [8, 7], before temporal aggregation
    conditioning_step: int  # whose frame the conditioning was made of
    age: int  # steps since that frame
    degraded: bool  # the conditioning is older than the service calls fresh, or the store is out of reach
    timings: dict[str, float]  # milliseconds by stage, on the server
    round_trip: float  # milliseconds of the attempt that was answered, seen from here
    failures: int  # attempts before it
    address: str  # of the replica that answered
    conditioning: Conditioning | None  # the generalist's latest answer, where this client has seen one

    @classmethod
    def of(
        cls,
        response: wire.ActResponse,
        *,
        step: int,
        episode: int,
        round_trip: float,
        failures: int,
        address: str,
        conditioning: Conditioning | None,
    ) -> Answer:
        """Raises ServiceFailed if `response` is not an answer to this step, or its action could not be executed."""
        action = checked_action(response, step=step, episode=episode, address=address)
        try:
            chunk = tensors.decode(response.chunk, field="chunk", dtype=np.float32, shape=(8, 7))
        except ValueError as error:
            raise ServiceFailed(f"Specialist.Act at {address}: {error}") from error
        return cls(
            episode=episode,
            step=step,
            action=action,
            chunk=chunk,
            conditioning_step=response.conditioning.step,
            age=response.age,
            degraded=response.degraded,
            timings=_timings(response.timings),
            round_trip=round_trip,
            failures=failures,
            address=address,
            conditioning=conditioning,
        )


def checked_action(response: wire.ActResponse, *, step: int, episode: int, address: str) -> npt.NDArray[np.float64]:
    """The action [7]. Raises ServiceFailed if it is not that of this step, or could not be executed."""
    tensor = response.action
    try:
        if response.step != step or response.episode != episode:
            raise ValueError(
                f"answered step {response.step} of episode {response.episode} "
                f"when asked for step {step} of episode {episode}"
            )
        if tensor.dtype == wire.DTYPE_FLOAT32 and tensor.shape == [7] and len(tensor.data) == _ACTION.size:
            values = _ACTION.unpack(tensor.data)
        else:  # which says why
            values = tuple(tensors.decode(tensor, field="action", dtype=np.float32, shape=(7,)).tolist())
        if not all(map(math.isfinite, values)):
            raise ValueError(f"the action is not finite: {list(values)}")
    except ValueError as error:
        raise ServiceFailed(f"Specialist.Act at {address}: {error}") from error
    return np.array(values)


def _timings(timings: Iterable[Any]) -> dict[str, float]:
    return {timing.stage: timing.milliseconds for timing in timings}
