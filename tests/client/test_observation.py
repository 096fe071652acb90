from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from robodual_client import tensors, wire
from robodual_client.errors import InvalidObservation, ServiceMismatch
from robodual_client.observation import _SENSORS, Encoder, encode

SENSORS = ("rgb_static", "rgb_gripper", "depth_static", "depth_gripper", "proprio")


def received(obs, sensors=SENSORS):
    request = b"".join(encode(obs, sensors).act_request(wire.ActRequest(session_id="s", episode=3, step=5)))
    return wire.ActRequest.FromString(request)


def test_every_field_of_the_wire_observation_is_a_known_sensor():
    assert set(_SENSORS) == set(wire.Observation.DESCRIPTOR.fields_by_name)


def test_observation_arrives_as_it_was(obs):
    request = received(obs)
    assert (request.session_id, request.episode, request.step) == ("s", 3, 5)
    got = request.observation
    for name in ("rgb_static", "rgb_gripper"):
        np.testing.assert_array_equal(tensors.decode_image(getattr(got, name), field=name), obs["rgb_obs"][name])
    for name in ("depth_static", "depth_gripper"):
        depth = tensors.decode(getattr(got, name), field=name, dtype=np.float32, shape=(None, None))
        np.testing.assert_array_equal(depth, obs["depth_obs"][name])


def test_proprioception_is_the_pose_and_the_gripper_command(obs):
    obs["robot_obs"] = np.array([0.1, 0.2, 0.3, 1.1, 1.2, 1.3, 0.08, *range(7), -1.0])
    proprio = tensors.decode(received(obs).observation.proprio, field="proprio", dtype=np.float32, shape=(7,))
    np.testing.assert_array_equal(proprio, np.array([0.1, 0.2, 0.3, 1.1, 1.2, 1.3, -1], np.float32))


def test_only_the_sensors_that_the_model_reads_are_sent(obs):
    fields = received(obs, ("depth_gripper", "proprio", "rgb_static")).observation.ListFields()
    assert [field.name for field, _ in fields] == ["rgb_static", "depth_gripper", "proprio"]
    assert [field.name for field, _ in received(obs, ()).observation.ListFields()] == ["rgb_static"]


def test_strided_and_float64_arrays_are_accepted(obs):
    image, depth = obs["rgb_obs"]["rgb_static"], obs["depth_obs"]["depth_static"]
    obs["rgb_obs"]["rgb_static"] = np.asfortranarray(image)
    obs["depth_obs"]["depth_static"] = depth.astype(np.float64)[::2]
    got = received(obs).observation
    np.testing.assert_array_equal(tensors.decode_image(got.rgb_static, field="rgb_static"), image)
    sent = tensors.decode(got.depth_static, field="depth", dtype=np.float32, shape=(100, 200))
    np.testing.assert_array_equal(sent, depth[::2])


def test_tactile_image_is_a_tensor(obs):
    obs["rgb_obs"]["rgb_tactile"] = np.full((160, 120, 6), 7, np.uint8)
    tactile = received(obs, ("rgb_tactile",)).observation.rgb_tactile
    assert tensors.decode(tactile, field="rgb_tactile", dtype=np.uint8, shape=(160, 120, 6)).min() == 7


def test_condition_request_carries_the_static_image_before_and_after_the_act_request(obs):
    frame = encode(obs, SENSORS)
    head = wire.ConditionRequest(session_id="s", instruction="lift the red block", step=4)
    before = frame.condition_request(head)
    frame.act_request(wire.ActRequest())
    assert frame.condition_request(head) == before
    request = wire.ConditionRequest.FromString(before)
    assert request.instruction == "lift the red block"
    np.testing.assert_array_equal(
        tensors.decode_image(request.rgb_static, field="rgb_static"), obs["rgb_obs"]["rgb_static"]
    )


def test_caller_may_overwrite_its_arrays_after_the_step(obs):
    frame = encode(obs, SENSORS)
    head = wire.ConditionRequest(session_id="s", instruction="lift the red block", step=4)
    before = frame.condition_request(head)
    frame.act_request(wire.ActRequest(step=9))
    image = obs["rgb_obs"]["rgb_static"].copy()
    for array in (*obs["rgb_obs"].values(), *obs["depth_obs"].values(), obs["robot_obs"]):
        array[...] = 0
    assert frame.condition_request(head) == before
    later = encode(obs, SENSORS)
    request = wire.ActRequest.FromString(b"".join(later.act_request(wire.ActRequest(step=10), previous=frame)))
    previous = tensors.decode_image(request.previous_rgb_static, field="previous_rgb_static")
    np.testing.assert_array_equal(previous, image)
    assert tensors.decode_image(request.observation.rgb_static, field="rgb_static").max() == 0


def test_no_frame_but_the_static_one_is_copied_into_a_request(obs):
    tracemalloc.start()
    request = encode(obs, SENSORS).act_request(wire.ActRequest(session_id="s"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, request)) > 320_000
    assert peak < 1.1 * obs["rgb_obs"]["rgb_static"].nbytes


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("rgb_static", np.zeros((200, 200, 3)), "must be uint8, got float64: scale it by 255"),
        ("rgb_static", np.zeros((200, 200, 3), np.int64), "must be uint8, got int64: convert it"),
        ("rgb_gripper", np.zeros((3, 84, 84), np.uint8), "got [3, 84, 84]: transpose it, channels last"),
        ("rgb_gripper", np.zeros((84, 84, 4), np.uint8), "got [84, 84, 4]: drop the alpha channel"),
        ("rgb_static", np.zeros((200, 200), np.uint8), "must be RGB [height, width, 3], got [200, 200]"),
        ("rgb_static", np.zeros((200, 4, 3), np.uint8), "each side must be 8 to 4096 pixels, got 200 x 4"),
        ("rgb_static", [[0]], "must be a NumPy array, got builtins.list"),
        ("depth_static", np.full((200, 200), 4000, np.uint16), "must be float32 metres, got uint16: millimetres?"),
        ("depth_static", np.full((200, 200), 4000, np.float32), "0 to 100, got 4000 to 4000: is it in millimetres?"),
        ("depth_static", np.full((200, 200), -1, np.float32), "must be metres from 0 to 100, got -1"),
        ("depth_static", np.array([[np.nan] * 8] * 8, np.float32), "not finite"),
        ("depth_static", np.array([[np.inf] * 8] * 8, np.float32), "not finite"),
        ("depth_gripper", np.zeros((84, 84, 1), np.float32), "must be [height, width], 8 to 4096 each"),
        ("robot_obs", np.zeros(7), "must be float [15], got float64 [7]"),
        ("robot_obs", np.array([np.nan, *[0.0] * 14]), "not finite"),
        ("robot_obs", np.array([300.0, *[0.0] * 14]), '["robot_obs"][:3]: must be metres within 10'),
        ("robot_obs", np.array([*[0.0] * 5, 90.0, *[0.0] * 9]), '["robot_obs"][3:6]: must be radians'),
        ("robot_obs", np.array([*[0.0] * 14, 80.0]), "the gripper command must be -1 (closed) to 1 (open), got 80"),
    ],
)
def test_unusable_sensor_is_refused_with_its_name_and_advice(obs, path, value, expected):
    group = {"rgb": "rgb_obs", "dep": "depth_obs"}.get(path[:3])
    (obs[group] if group else obs)[path] = value
    with pytest.raises(InvalidObservation) as raised:
        encode(obs, SENSORS)
    assert str(raised.value).startswith('obs["')
    assert f'"{path}"' in str(raised.value)
    assert expected in str(raised.value)


def test_later_frames_of_an_episode_make_the_same_requests(obs):
    encoder = Encoder(SENSORS)
    head = wire.ActRequest(session_id="s", episode=1)
    random = np.random.default_rng(0)
    for step in range(4):
        for array in (*obs["rgb_obs"].values(), *obs["depth_obs"].values(), obs["robot_obs"]):
            array[...] = random.random(array.shape) * (200 if array.dtype == np.uint8 else 0.9)
        if step == 2:  # another layout is taken in as well
            obs["rgb_obs"]["rgb_static"] = np.full((96, 96, 3), 7, np.uint8)
            obs["depth_obs"]["depth_static"] = obs["depth_obs"]["depth_static"].astype(np.float64)
        if step == 3:
            obs["rgb_obs"]["rgb_gripper"] = obs["rgb_obs"]["rgb_gripper"][:, ::-1]
        head.step = step
        assert b"".join(encoder.encode(obs).act_request(head)) == b"".join(encode(obs, SENSORS).act_request(head))


def test_proprioception_of_float32_is_the_same_at_every_step(obs):
    encoder, head = Encoder(SENSORS), wire.ActRequest(session_id="s", episode=1)
    obs["robot_obs"] = obs["robot_obs"].astype(np.float32)
    first, second = (b"".join(encoder.encode(obs).act_request(head)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rgb_static", np.zeros((200, 200, 4), np.uint8)),
        ("rgb_static", np.zeros((200, 200, 3))),
        ("depth_static", np.full((200, 200), 4000, np.uint16)),
        ("depth_gripper", np.full((96, 96), 4000, np.float32)),
        ("depth_static", None),
        ("robot_obs", np.array([300.0, *[0.0] * 14])),
    ],
)
def test_what_changes_within_an_episode_is_checked_like_the_first_frame(obs, path, value):
    encoder = Encoder(SENSORS)
    encoder.encode(obs)
    group = {"rgb": "rgb_obs", "dep": "depth_obs"}.get(path[:3])
    (obs[group] if group else obs)[path] = value
    with pytest.raises(InvalidObservation, match=path):
        encoder.encode(obs)


def test_missing_sensors_are_named_together(obs):
    del obs["depth_obs"]
    with pytest.raises(InvalidObservation, match="the observation lacks") as raised:
        encode(obs, SENSORS)
    assert 'obs["depth_obs"]["depth_static"], obs["depth_obs"]["depth_gripper"]' in str(raised.value)
    encode(obs, ("rgb_static", "proprio"))


def test_something_else_than_a_dict_is_refused():
    with pytest.raises(InvalidObservation, match="must be CALVIN's dict, got ndarray"):
        encode(np.zeros(3), SENSORS)


def test_model_that_reads_an_unknown_sensor_asks_for_a_newer_client(obs):
    with pytest.raises(ServiceMismatch, match=r"'rgb_wrist'.*upgrade robodual-client"):
        encode(obs, ("rgb_static", "rgb_wrist"))
