"""What the operator's page is sent, and what it costs: nothing while nobody looks."""

import asyncio
import gc
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from replicas import Replica, act, action, conditioning, specialist, version

from robodual.conditioning.record import Conditioning
from robodual.conditioning.store import Store
from robodual.serving import http as serving_http
from robodual.specialist.engine import Frame, SpecialistEngine
from robodual.specialist.operator import observers, pages, pictures
from robodual_client import wire

TOKEN = "a-token-of-sixteen-or-more"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
INSTRUCTION = '<img src=x onerror="alert(1)"> lift the block'
ASSETS = Path(pages.__file__).parent / "assets"


@asynccontextmanager
async def http(replica: Replica) -> AsyncIterator[httpx.AsyncClient]:
    address = f"http://127.0.0.1:{replica.server.http_port}"
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=20) as client:
        yield client


@asynccontextmanager
async def looking(client: httpx.AsyncClient, query: str = "", **options: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """The reports that an observer gets."""
    async with client.stream("GET", f"/operator/events{query}", **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line)


async def until(condition: Callable[[Any], Any], reports: AsyncIterator[Any]) -> list[Any]:
    """The reports up to the first that fits, which comes within ten seconds."""
    told = [await anext(reports)]
    deadline = time.monotonic() + 10
    while not condition(told[-1]):
        assert time.monotonic() < deadline, told[-1]
        told.append(await anext(reports))
    return told


async def status(client: httpx.AsyncClient, **options: Any) -> int:
    """Of the answer to one who wants to look."""
    async with client.stream("GET", "/operator/events", **options) as answer:
        return answer.status_code


async def home(client: httpx.AsyncClient) -> None:
    """Returns when all places are free."""
    deadline = time.monotonic() + 10
    while True:
        async with AsyncExitStack() as stack:
            answers = [
                await stack.enter_async_context(client.stream("GET", "/operator/events")) for _ in range(observers.MOST)
            ]
            if all(answer.status_code == 200 for answer in answers):
                break
        assert time.monotonic() < deadline
        await asyncio.sleep(observers.INTERVAL)
    await asyncio.sleep(2 * observers.INTERVAL)


async def glance(client: httpx.AsyncClient, query: str = "") -> Any:
    async with looking(client, query) as reports:
        return await anext(reports)


async def began(replica: Replica, store: Store, session: str = "robot", episode: int = 1) -> None:
    await replica.stub.Reset(wire.ResetRequest(session_id=session, episode=episode))
    plain = conditioning(episode, 0)
    await store.put(session, Conditioning(episode, 0, plain.reference_actions, plain.hidden_states, INSTRUCTION))


async def drive(replica: Replica, steps: range, session: str = "robot", episode: int = 1) -> list[wire.ActResponse]:
    least = version(episode, 0)
    requests = (act(session, step, episode=episode, min_conditioning=least) for step in steps)
    return [await replica.stub.Act(request, timeout=30) for request in requests]


def frames() -> int:
    gc.collect()
    return sum(type(thing) is Frame for thing in gc.get_objects())


async def test_while_nobody_looks_nothing_is_encoded_and_nothing_is_kept(
    replica: Replica, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    plain = pictures.jpeg
    monkeypatch.setattr(pictures, "jpeg", lambda image: encoded.append(image.shape) or plain(image))
    await began(replica, store)
    await drive(replica, range(5))
    before = frames()
    tracemalloc.start()
    await drive(replica, range(5, 15))
    ours = [tracemalloc.Filter(True, f"*/{name}") for name in ("operator/*.py", "specialist/view.py", "recent.py")]
    assert not tracemalloc.take_snapshot().filter_traces(ours).traces
    tracemalloc.stop()
    assert frames() <= before
    assert not encoded

    async with http(replica) as client:
        async with looking(client) as reports:
            await anext(reports)
            await drive(replica, range(15, 18))
            told = await until(lambda report: report["session"]["pictures"], reports)
        assert told[-1]["session"]["pictures"].keys() == {"static", "gripper"}
        await home(client)
        assert len(encoded) % 2 == 0
        assert encoded[:2] == [(200, 200, 3), (84, 84, 3)]
        encoded.clear()
        await drive(replica, range(18, 30))
        assert not encoded
        assert frames() <= before
        # One who comes back finds nothing of the time between.
        assert (await glance(client))["session"]["steps"] == []


async def test_an_observer_is_told_each_step_once(replica: Replica, store: Store) -> None:
    async with http(replica) as client, looking(client) as reports:
        assert (await anext(reports))["session"] is None
        await began(replica, store)
        told = await until(lambda report: report["session"] and report["session"]["instruction"], reports)
        assert told[-1]["session"]["instruction"] == INSTRUCTION
        answers = await drive(replica, range(3))
        await store.put("robot", conditioning(1, 3))
        answers += [await replica.stub.Act(act("robot", 3, min_conditioning=version(1, 3)), timeout=30)]
        answers += await drive(replica, range(4, 6))
        told = await until(lambda report: report["session"]["step"] == 5 and not report["session"]["steps"], reports)
    steps = [step for report in told for step in report["session"]["steps"]]
    assert [step["step"] for step in steps] == list(range(6))
    assert np.allclose([step["action"] for step in steps], [action(answer) for answer in answers], atol=1e-4)
    assert [step["age"] for step in steps] == [answer.age for answer in answers] == [0, 1, 2, 0, 1, 2]
    assert steps[0]["stages"].keys() >= {"decode", "wait", "queue", "model", "total"}
    references = [reference for report in told for reference in report["session"]["references"]]
    assert [reference["step"] for reference in references] == [0, 3]
    for reference in references:
        expected = conditioning(1, reference["step"]).reference_actions
        assert np.allclose(reference["actions"], expected, atol=1e-4)


async def test_the_newest_session_is_followed_and_another_may_be_chosen(replica: Replica, store: Store) -> None:
    async with http(replica) as client:
        for session in ("first", "second"):
            await began(replica, store, session)
        async with looking(client) as following, looking(client, "?session=first") as chosen:
            assert (await anext(following))["session"]["id"] == "second"
            assert (await anext(chosen))["session"]["id"] == "first"
            await began(replica, store, "third")
            await until(lambda report: report["session"]["id"] == "third", following)
            await replica.stub.Close(wire.CloseRequest(session_id="first"))
            await replica.stub.Close(wire.CloseRequest(session_id="third"))
            await until(lambda report: report["session"]["id"] == "second", following)
            await until(lambda report: report["session"] is None, chosen)
            await began(replica, store, "first", episode=2)
            await until(lambda report: report["session"] and report["session"]["episode"] == 2, chosen)


async def test_who_comes_later_is_told_what_is_kept_for_others(replica: Replica, store: Store) -> None:
    await began(replica, store)
    async with http(replica) as client, looking(client) as reports:
        await anext(reports)
        await drive(replica, range(4))
        await began(replica, store, episode=2)
        await drive(replica, range(2), episode=2)
        kept = (await glance(client))["session"]
    told = [(step["episode"], step["step"]) for step in kept["steps"]]
    assert told == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    assert [(reference["episode"], reference["step"]) for reference in kept["references"]] == [(1, 0), (2, 0)]


async def test_the_list_comes_in_pages(replica: Replica) -> None:
    for number in range(25):
        await replica.stub.Reset(wire.ResetRequest(session_id=f"robot-{number}", episode=1))
    async with http(replica) as client:
        first, last = await glance(client), await glance(client, "?page=99")
    assert (first["open"], first["page"], first["pages"]) == (25, 1, 2)
    assert [row["id"] for row in first["sessions"]] == [f"robot-{number}" for number in range(24, 4, -1)]
    assert (last["page"], len(last["sessions"])) == (2, 5)


async def test_however_many_look_a_session_is_encoded_five_times_a_second(
    replica: Replica, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plain = pictures.jpeg
    monkeypatch.setattr(pictures, "jpeg", lambda image: made.append(time.monotonic()) or plain(image))
    await began(replica, store)
    async with http(replica) as client, AsyncExitStack() as stack:
        queue = [await stack.enter_async_context(looking(client)) for _ in range(4)]
        for reports in queue:
            await anext(reports)
        start = time.monotonic()
        step = 0
        while time.monotonic() < start + 1:
            await drive(replica, range(step, step + 1))
            step += 1
            await asyncio.sleep(0.02)  # or a fast machine outruns max_age_steps
        for reports in queue:
            await until(lambda report: report["session"]["pictures"], reports)
        passed = time.monotonic() - start
    assert len(made) <= 2 * (passed / pictures.INTERVAL + 2)


async def test_a_large_frame_is_scaled_down() -> None:
    wide = np.zeros((480, 1024, 3), np.uint8)
    frame = Frame(wide, None, None, None, None, np.zeros(7, np.float32))
    count, made = await pictures.Pictures().latest(frame, 0)
    assert (count, made.keys()) == (1, {"static"})
    assert len(made["static"]) < 20_000


async def test_only_a_few_may_look_and_their_places_come_free(replica: Replica) -> None:
    async with http(replica) as client:
        async with AsyncExitStack() as stack:
            queue = [await stack.enter_async_context(looking(client)) for _ in range(observers.MOST)]
            for reports in queue:
                await anext(reports)
            async with client.stream("GET", "/operator/events") as refused:
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
                assert "8 observers look already" in (await refused.aread()).decode()
        await home(client)


async def test_who_does_not_read_loses_the_place(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "INTERVAL", 0.0)
    monkeypatch.setattr(observers, "MOST", 1)
    monkeypatch.setattr(pages, "STALLED", 0.5)
    for number in range(20):
        await replica.stub.Reset(wire.ResetRequest(session_id=f"robot-{number}", episode=1))
    with socket.socket() as asleep:
        asleep.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asleep.connect(("127.0.0.1", replica.server.http_port))
        asleep.sendall(b"GET /operator/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with http(replica) as client:
            while await status(client) != 429:  # until it has its place
                await asyncio.sleep(0.05)
            start = time.monotonic()
            while await status(client) != 200:
                await asyncio.sleep(0.05)
                assert time.monotonic() < start + 20, "its place was not given back"


async def test_what_is_shown_needs_a_token_and_the_page_itself_shows_nothing(
    specialist_engine: SpecialistEngine, url: str
) -> None:
    async with specialist(specialist_engine, url, tokens=(TOKEN,)) as replica, http(replica) as client:
        for headers in ({}, {"Authorization": "Bearer another-token-of-16"}):
            assert await status(client, headers=headers) == 401
        # Not from the address either: addresses are logged and kept.
        assert await status(client, params={"token": TOKEN}) == 401
        async with looking(client, headers=BEARER) as reports:
            assert (await anext(reports))["open"] == 0
        assert (await client.get("/operator")).headers["location"].endswith("/operator/")
        for path in ("/operator/", *(f"/operator/{file.name}" for file in ASSETS.iterdir())):
            answer = await client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/operator/..%2fpages.py", "/operator/pages.py", "/operator/assets"):
            assert (await client.get(path)).status_code == 404


async def test_a_token_shows_its_owners_sessions_and_an_operators_shows_all(
    specialist_engine: SpecialistEngine, url: str
) -> None:
    names = ("arm-1", "arm-2", "desk")
    settings = {"tokens": [f"{name}:{TOKEN}-{name}" for name in names], "operators": "desk"}
    async with specialist(specialist_engine, url, **settings) as replica, http(replica) as client:
        for name in ("arm-1", "arm-2"):
            bearer = [("authorization", f"Bearer {TOKEN}-{name}")]
            await replica.stub.Reset(wire.ResetRequest(session_id=f"{name}-session", episode=1), metadata=bearer)
            with pytest.raises(Exception, match="is not open here"):
                await replica.stub.Act(act(f"{name}-stranger", 0), metadata=bearer)
        seen = {}
        for name in names:
            headers = {"Authorization": f"Bearer {TOKEN}-{name}"}
            async with looking(client, "?session=arm-2-session", headers=headers) as reports:
                seen[name] = await anext(reports)
    listed = {name: [row["id"] for row in report["sessions"]] for name, report in seen.items()}
    both = ["arm-2-session", "arm-1-session"]
    assert listed == {"arm-1": ["arm-1-session"], "arm-2": ["arm-2-session"], "desk": both}
    assert [seen[name]["session"] is None for name in names] == [True, False, False]
    told = {name: [problem["session"] for problem in report["problems"]] for name, report in seen.items()}
    assert told == {
        "arm-1": ["arm-1-stranger"],
        "arm-2": ["arm-2-stranger"],
        "desk": ["arm-1-stranger", "arm-2-stranger"],
    }


async def test_a_token_that_is_withdrawn_sees_no_more(
    specialist_engine: SpecialistEngine, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"desk:{TOKEN}\n")
    file.chmod(0o600)
    async with specialist(specialist_engine, url, tokens_file=file) as replica, http(replica) as client:
        async with looking(client, headers=BEARER) as reports:
            await anext(reports)
            file.write_text(f"desk:another-{TOKEN}\n")
            start = time.monotonic()
            async for _ in reports:
                assert time.monotonic() < start + 10, "it still sees"
        assert await status(client, headers=BEARER) == 401


async def test_without_tokens_another_sites_name_for_this_machine_does_not_open(replica: Replica) -> None:
    async with http(replica) as client:
        for path in ("/operator/events", "/metrics", "/info"):
            refused = await client.get(path, headers={"Host": "evil.example:8052"})
            assert (refused.status_code, "Host" in refused.json()["detail"]) == (403, True)
        for host in ("localhost", "127.0.0.1:9", "[::1]:8052"):
            assert (await client.get("/info", headers={"Host": host})).status_code == 200


async def test_the_drain_does_not_wait_for_observers(specialist_engine: SpecialistEngine, url: str) -> None:
    async with AsyncExitStack() as stack:
        async with specialist(specialist_engine, url) as replica:
            client = await stack.enter_async_context(http(replica))
            reports = await stack.enter_async_context(looking(client))
            await anext(reports)
            start = time.monotonic()
        assert time.monotonic() - start < 3
        assert [report async for report in reports if report["ready"]] == []  # and the response ended whole


async def test_errors_are_shown_with_their_session(replica: Replica, store: Store) -> None:
    await began(replica, store)
    with pytest.raises(Exception, match="is not open here"):
        await replica.stub.Act(act("stranger", 0), timeout=30)
    with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        await replica.stub.Act(act("robot", 5, min_conditioning=version(1, 5)), timeout=0.4)
    async with http(replica) as client:
        while (report := await glance(client))["totals"]["missed"] == 0:
            await asyncio.sleep(0.05)
    assert (report["totals"]["errors"], report["totals"]["missed"]) == (1, 1)
    told = [(problem["code"], problem["session"], problem["method"]) for problem in report["problems"]]
    assert told == [("NOT_FOUND", "stranger", "Act"), ("DEADLINE_EXCEEDED", "robot", "Act")]


async def test_a_stream_outlives_the_wait_for_a_request_and_probes_the_limit_of_requests(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_http, "PATIENCE", 0.3)
    monkeypatch.setattr(serving_http, "REQUESTS", 1)
    async with http(replica) as client, looking(client) as reports:
        beginning = time.monotonic()
        while time.monotonic() < beginning + 1:
            await anext(reports)
        refused = await client.get("/info")
        assert (refused.status_code, "try again" in refused.text) == (503, True)
        for probe in ("/healthz", "/readyz"):
            assert (await client.get(probe)).status_code == 200
    async with http(replica) as client:
        deadline = time.monotonic() + 10
        while (await client.get("/info")).status_code != 200:
            assert time.monotonic() < deadline
