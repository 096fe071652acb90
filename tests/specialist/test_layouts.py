"""Requests that are read in place: those laid out like one before, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from robodual.serving.errors import InvalidArgument
from robodual.specialist.layouts import Layouts
from robodual.specialist.observation import check_values
from robodual_client import wire
from robodual_client.observation import Encoder

SENSORS = ("rgb_gripper", "depth_static", "depth_gripper", "proprio")


def request(step: int, side: int = 32, depth: float = 1.0) -> bytes:
    """A step's request, as the client library writes it."""
    draw = np.random.default_rng(step)
    colour = draw.integers(0, 256, (2, side, side, 3), np.uint8)
    maps = draw.uniform(1, 2, (2, side, side)).astype(np.float32)
    maps[0, 0, 0] = depth
    obs = {
        "rgb_obs": {"rgb_static": colour[0], "rgb_gripper": colour[1]},
        "depth_obs": {"depth_static": maps[0], "depth_gripper": maps[1]},
        "robot_obs": draw.uniform(-0.5, 0.5, 15),
    }
    head = wire.ActRequest(session_id="robot", episode=1, step=step)
    return b"".join(Encoder(SENSORS).encode(obs).act_request(head))


@pytest.fixture
async def layouts() -> Layouts:
    """They know the layout of a first request."""
    layouts = Layouts(SENSORS)
    received = layouts.receive(request(0))
    assert received.layout is None
    await layouts.frame(received)
    return layouts


async def test_a_request_like_one_before_is_read_in_place_and_means_the_same(layouts: Layouts) -> None:
    received, parsed = layouts.receive(request(300)), Layouts(SENSORS).receive(request(300))
    assert received.layout is not None
    assert not received.message.HasField("observation")
    assert (received.session_id, received.episode, received.step) == ("robot", 1, 300)
    frame, expected = await layouts.frame(received), await Layouts(SENSORS).frame(parsed)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(frame, name), value, err_msg=name)


@pytest.mark.parametrize("depth", [np.nan, np.inf, -1.0, 1e3])
async def test_what_is_read_in_place_is_checked_as_well(layouts: Layouts, depth: float) -> None:
    # The client library refuses to send it.
    raw = request(1, depth=99.0).replace(np.float32(99.0).tobytes(), np.float32(depth).tobytes())
    received = layouts.receive(raw)
    assert received.layout is not None
    frame = await layouts.frame(received)
    with pytest.raises(InvalidArgument, match=r"observation\.depth_static: expected"):
        check_values(frame)


async def test_a_request_of_another_size_is_parsed_and_its_layout_is_known_from_then_on(layouts: Layouts) -> None:
    for _ in range(2):
        received = layouts.receive(request(1, side=40))
        assert (await layouts.frame(received)).rgb_static.shape == (40, 40, 3)
    assert received.layout is not None


@pytest.mark.parametrize("place", ["between", "shape"])
async def test_a_request_whose_bytes_between_the_arrays_differ_is_parsed(layouts: Layouts, place: str) -> None:
    raw, message = request(1), wire.ActRequest.FromString(request(1))
    if place == "shape":  # of as many bytes
        message.observation.rgb_static.height, message.observation.rgb_static.width = 16, 64
    else:
        message.observation.rgb_static.encoding = wire.IMAGE_ENCODING_PNG
    changed = message.SerializeToString()
    assert len(changed) == len(raw)
    assert layouts.receive(changed).layout is None


async def test_a_request_with_two_observations_is_parsed_and_merged_by_protobuf(layouts: Layouts) -> None:
    other = wire.ActRequest(observation=wire.Observation(rgb_tactile=wire.Tensor(shape=[1])))
    twice = other.SerializeToString() + request(1)
    received = layouts.receive(twice)
    assert received.layout is None
    assert received.message.observation.rgb_tactile.shape == [1]


async def test_as_many_layouts_as_robots_have_are_remembered_and_the_oldest_goes(layouts: Layouts) -> None:
    for side in range(40, 40 + 8):
        await layouts.frame(layouts.receive(request(1, side=side)))
    assert all(layouts.receive(request(2, side=side)).layout is not None for side in range(40, 40 + 8))
    assert layouts.receive(request(2)).layout is None
