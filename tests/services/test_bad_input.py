"""Bad input over real gRPC: each gets its status and a message that names the field; everyone else carries on."""

import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np
import pytest
from PIL import Image
from replicas import Replica, act, conditioning, frame, generalist, version

from robodual.conditioning.store import Store
from robodual.generalist.engine import GeneralistEngine
from robodual_client import tensors, wire

Spoil = Callable[[wire.ActRequest], object]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def encoded(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def png(**changes: object) -> wire.Image:
    fields = {"encoding": wire.IMAGE_ENCODING_PNG, "height": 200, "width": 200, "data": encoded(frame(0), "PNG")}
    return wire.Image(**(fields | changes))  # type: ignore[arg-type]


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(10**6))) + part(b"IEND", b"")
    )


def put(name: str, array: np.ndarray) -> Spoil:
    return lambda request: getattr(request.observation, name).CopyFrom(tensors.encode(array))


def put_image(image: wire.Image) -> Spoil:
    return lambda request: request.observation.rgb_static.CopyFrom(image)


def header_of_a_gigabyte(request: wire.ActRequest) -> None:
    request.observation.proprio.shape[:] = [2**14, 2**14]


def depth_header_of_a_gigabyte(request: wire.ActRequest) -> None:
    request.observation.depth_static.shape[:] = [2**14, 2**14]


def depth_with_little_data(request: wire.ActRequest) -> None:
    request.observation.depth_static.shape[:] = [1024, 1024]


def spotted(value: float, size: int = 200) -> np.ndarray:
    depth = np.ones((size, size), np.float32)
    depth[3, 4] = value
    return depth


OBSERVATIONS: list[tuple[str, Spoil, str]] = [
    ("no observation", lambda r: r.ClearField("observation"), "observation: is missing"),
    ("no static image", lambda r: r.observation.ClearField("rgb_static"), "observation.rgb_static: is missing"),
    ("no depth", lambda r: r.observation.ClearField("depth_static"), "observation.depth_static: is missing"),
    ("no proprio", lambda r: r.observation.ClearField("proprio"), "observation.proprio: is missing"),
    ("wrong dtype", put("depth_static", np.ones((200, 200))), "observation.depth_static"),
    ("integers for depth", put("depth_gripper", np.ones((84, 84), np.int32)), "observation.depth_gripper"),
    ("wrong rank", put("depth_static", np.ones((200, 200, 1), np.float32)), "observation.depth_static"),
    ("wrong shape", put("proprio", np.zeros(15, np.float32)), "observation.proprio"),
    ("too small", put("depth_gripper", np.ones((7, 84), np.float32)), "observation.depth_gripper"),
    ("too large", put("depth_static", np.ones((1025, 8), np.float32)), "observation.depth_static"),
    ("NaN depth", put("depth_static", spotted(np.nan)), "observation.depth_static: expected finite"),
    ("infinite depth", put("depth_gripper", spotted(np.inf, 84)), "observation.depth_gripper: expected finite"),
    (
        "absurd depth",
        put("depth_static", spotted(-1)),
        "observation.depth_static: expected metres from 0 to 100, got -1",
    ),
    ("depth in millimetres", put("depth_gripper", spotted(4e3, 84)), "observation.depth_gripper: expected metres"),
    ("absurd proprio", put("proprio", np.full(7, 1e6, np.float32)), "observation.proprio: expected values within"),
    ("NaN proprio", put("proprio", np.full(7, np.nan, np.float32)), "observation.proprio: expected finite"),
    ("1 GB header", depth_header_of_a_gigabyte, "observation.depth_static"),
    ("1 GB header, small field", header_of_a_gigabyte, "observation.proprio"),
    ("less data than the shape", depth_with_little_data, "observation.depth_static"),
    (
        "raw image cut short",
        put_image(wire.Image(encoding=1, height=200, width=200, data=b"x")),
        "observation.rgb_static",
    ),
    (
        "image without encoding",
        put_image(wire.Image(height=200, width=200, data=b"x")),
        "observation.rgb_static.encoding",
    ),
    ("unknown encoding", put_image(png(encoding=77)), "observation.rgb_static.encoding"),
    ("truncated PNG", put_image(png(data=encoded(frame(0), "PNG")[:-5000])), "observation.rgb_static.data"),
    ("PNG of 20 bytes", put_image(png(data=encoded(frame(0), "PNG")[:20])), "observation.rgb_static.data"),
    ("not a PNG", put_image(png(data=b"GIF89a" + bytes(1000))), "observation.rgb_static.data"),
    ("PNG of another size", put_image(png(height=201)), "observation.rgb_static"),
    ("decompression bomb", put_image(png(data=bomb(), height=1000, width=1000)), "observation.rgb_static"),
    ("giant image", put_image(png(data=bomb(), height=60_000, width=60_000)), "observation.rgb_static"),
    ("PNG said to be a JPEG", put_image(png(encoding=wire.IMAGE_ENCODING_JPEG)), "observation.rgb_static.data"),
    ("no session", lambda r: r.ClearField("session_id"), "session_id"),
    ("odd session", lambda r: setattr(r, "session_id", "a/b"), "session_id"),
    ("conditioning of the future", lambda r: r.min_conditioning.CopyFrom(version(1, 9)), "min_conditioning"),
]


@pytest.mark.parametrize(
    ("spoil", "field"), [case[1:] for case in OBSERVATIONS], ids=[case[0] for case in OBSERVATIONS]
)
async def test_a_bad_observation_is_named_and_the_session_carries_on(
    replica: Replica, store: Store, spoil: Spoil, field: str
) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    await store.put("robot", conditioning(1, 0))
    request = act("robot", 0, min_conditioning=version(1, 0))
    spoil(request)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Act(request, timeout=10)
    assert refused.value.code() == INVALID
    assert (refused.value.details() or "").startswith(field)
    answer = await replica.stub.Act(act("robot", 0, min_conditioning=version(1, 0)), timeout=10)
    assert answer.step == 0


async def test_values_out_of_bounds_are_named_before_a_conditioning_is_waited_for(replica: Replica) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id="robot", episode=1))
    for least in ({"min_conditioning": version(1, 0)}, {}):
        request = act("robot", 0, **least)
        put("depth_static", spotted(np.nan))(request)
        with pytest.raises(grpc.aio.AioRpcError, match="depth_static: expected finite") as refused:
            await replica.stub.Act(request, timeout=5)
        assert refused.value.code() == INVALID


def recovering(**changes: object) -> wire.ActRequest:
    """A request with a recovery state that is right but for the changes."""
    state = {
        "episode": 1,
        "step": 3,
        "chunks": tensors.encode(np.zeros((2, 8, 7), np.float32)),
        "chunk_steps": tensors.encode(np.array([2, 3], np.int32)),
        "history": tensors.encode(np.zeros((4, 7), np.float32)),
    }
    recovery = wire.RecoveryState(**(state | changes))  # type: ignore[arg-type]
    return act("moved", 4, recovery=recovery, previous_rgb_static=tensors.encode_image(frame(3)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"episode": 2}, "recovery.episode"),
        ({"step": 4}, "recovery.step"),
        ({"chunks": None}, "recovery.chunks"),
        ({"chunks": tensors.encode(np.zeros((9, 8, 7), np.float32))}, "recovery.chunks"),
        ({"chunks": tensors.encode(np.zeros((0, 8, 7), np.float32))}, "recovery.chunks"),
        ({"chunks": tensors.encode(np.full((2, 8, 7), np.nan, np.float32))}, "recovery.chunks"),
        ({"chunks": wire.Tensor(dtype=wire.DTYPE_FLOAT32, shape=[8, 8, 7])}, "recovery.chunks"),
        ({"chunk_steps": tensors.encode(np.array([3, 2], np.int32))}, "recovery.chunk_steps"),
        ({"chunk_steps": tensors.encode(np.array([1, 2], np.int32))}, "recovery.chunk_steps"),
        ({"chunk_steps": tensors.encode(np.array([-9, 3], np.int32))}, "recovery.chunk_steps"),
        ({"chunk_steps": tensors.encode(np.array([3], np.int32))}, "recovery.chunk"),
        ({"history": tensors.encode(np.zeros((3, 7), np.float32))}, "recovery.history"),
        ({"reference_window": 9}, "recovery.reference_window"),
    ],
)
async def test_a_bad_recovery_state_is_named_and_opens_no_session(
    replica: Replica, store: Store, changes: dict[str, object], field: str
) -> None:
    await store.put("moved", conditioning(1, 0))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Act(recovering(**changes), timeout=10)
    assert refused.value.code() == INVALID
    assert (refused.value.details() or "").startswith(field)
    assert not (await replica.stub.Close(wire.CloseRequest(session_id="moved"))).was_open
    assert (await replica.stub.Act(recovering(), timeout=10)).step == 4


async def test_recovery_without_the_frame_before_is_refused(replica: Replica) -> None:
    request = recovering()
    request.ClearField("previous_rgb_static")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Act(request, timeout=10)
    assert refused.value.code() == INVALID
    assert (refused.value.details() or "").startswith("previous_rgb_static: is missing")


async def test_an_unknown_window_is_refused(replica: Replica) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Reset(wire.ResetRequest(session_id="robot", reference_window=9))  # type: ignore[arg-type]
    assert refused.value.code() == INVALID
    assert (refused.value.details() or "").startswith("reference_window")


async def test_pictures_that_are_compressed_mean_what_raw_ones_mean(replica: Replica, store: Store) -> None:
    answers = []
    for session in ("raw", "png"):
        await replica.stub.Reset(wire.ResetRequest(session_id=session, episode=1))
        await store.put(session, conditioning(1, 0))
        request = act(session, 0, min_conditioning=version(1, 0))
        if session == "png":
            request.observation.rgb_static.CopyFrom(png())
        answers.append(await replica.stub.Act(request, timeout=10))
    assert answers[0].chunk == answers[1].chunk


@pytest.fixture
async def thinker(generalist_engine: GeneralistEngine, url: str) -> AsyncIterator[Replica]:
    async with generalist(generalist_engine, url) as replica:
        yield replica


GLANCES: list[tuple[dict[str, object], str]] = [
    ({"instruction": ""}, "instruction"),
    ({"instruction": " \n"}, "instruction"),
    ({"instruction": "x" * 513}, "instruction"),
    ({"rgb_static": None}, "rgb_static: is missing"),
    ({"rgb_static": png(data=encoded(frame(0), "PNG")[:-5000])}, "rgb_static.data"),
    ({"rgb_static": png(data=bomb(), height=1000, width=1000)}, "rgb_static"),
    ({"rgb_static": wire.Image(encoding=1, height=7, width=200, data=bytes(4200))}, "rgb_static"),
    ({"session_id": ""}, "session_id"),
    ({"session_id": "x" * 65}, "session_id"),
    ({"session_id": "robot:conditioning"}, "session_id"),
]


async def test_a_bad_glance_is_named_and_the_service_carries_on(thinker: Replica, store: Store) -> None:
    good = {"session_id": "robot", "episode": 1, "instruction": "push", "rgb_static": png()}
    for changes, field in GLANCES:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await thinker.stub.Condition(wire.ConditionRequest(**(good | changes)), timeout=60)  # type: ignore[arg-type]
        assert refused.value.code() == INVALID
        assert (refused.value.details() or "").startswith(field)
    assert await store.fetch("robot") is None
    assert (await thinker.stub.Condition(wire.ConditionRequest(**good), timeout=60)).stored  # type: ignore[arg-type]


async def test_a_message_over_the_limit_is_refused_before_it_is_read(replica: Replica) -> None:
    request = act("robot", 0)
    request.observation.rgb_static.data = bytes(17 * 2**20)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.stub.Act(request, timeout=10)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await replica.stub.GetInfo(wire.InfoRequest())).service == "specialist"


async def test_bytes_that_are_no_message_are_refused(replica: Replica) -> None:
    call = replica.channel.unary_unary("/robodual.v1.Specialist/Act")
    with pytest.raises(grpc.aio.AioRpcError):
        await call(b"\xff" * 100, timeout=10)
    assert (await replica.stub.GetInfo(wire.InfoRequest())).service == "specialist"
