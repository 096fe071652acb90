"""Tokens: how they are written, that a file of them is followed, and that nothing shows one."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
from pydantic import SecretStr

from robodual.serving import auth, rate, tokens
from robodual.serving.auth import Authenticator, Caller
from robodual.serving.errors import ResourceExhausted, Unauthenticated

OLD, NEW, OTHER = "the-old-token-of-the-robot", "the-new-token-of-the-robot", "token-of-somebody-else"


def by(authenticator: Authenticator, token: str) -> Caller | None:
    return authenticator.caller(f"Bearer {token}")


def parsed(*entries: str) -> tuple[tokens.Token, ...]:
    return tokens.parse((f"number {n}", entry) for n, entry in enumerate(entries, 1))


def test_a_name_is_the_owner_and_without_one_the_token_itself_is() -> None:
    named, also, bare, again = parsed(f"arm-1:{OLD}", f"arm-1:{NEW}", OTHER, "arm-2:with:colons:in:it")
    assert (named.owner, also.owner, again.owner) == ("arm-1", "arm-1", "arm-2")
    assert (bare,) == parsed(OTHER)
    assert bare.owner != parsed(NEW)[0].owner
    # An owner's name is seen in logs: it is neither a name that another could be given nor a part of what opens.
    assert bare.owner.startswith("~")
    assert bare.owner[1:] not in tokens.digest(OTHER).hex()


def test_a_token_of_sixteen_characters_is_one_and_shows_nothing_of_what_opens() -> None:
    (token,) = parsed("arm-1:" + 16 * "x")
    assert token.digest == tokens.digest(16 * "x")
    assert repr(token) == "Token(owner='arm-1')"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((15 * "x",), "number 1: each token must be at least 16"),
        (("short",), "number 1: each token must be at least 16"),
        ((OLD, "name:short"), "number 2: each token must be at least 16"),
        (("name:with spaces in it, which is too many",), "number 1: each token"),
        ((f"sp ce:{OLD}",), "number 1: expected NAME:TOKEN"),
        ((f":{OLD}",), "number 1: expected NAME:TOKEN"),
        ((f"{'n' * 33}:{OLD}",), "number 1: expected NAME:TOKEN"),
        ((f"a:{OLD}", f"b:{OLD}"), "number 2: the same token has another name"),
    ],
)
def test_what_is_no_token_is_refused_by_its_place_without_being_shown(entries: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parsed(*entries)
    assert not any(entry in str(refused.value) for entry in entries)


def test_both_the_setting_and_the_file_open(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# robots\n\n  arm-1:{OLD}  \r\n{NEW}\n")
    authenticator = Authenticator([SecretStr(OTHER)], file=file)
    for token, owner in ((OLD, "arm-1"), (NEW, parsed(NEW)[0].owner), (OTHER, parsed(OTHER)[0].owner)):
        caller = by(authenticator, token)
        assert caller is not None
        assert caller.owner == owner
    for authorization in (
        None,
        "",
        "Bearer",
        f"Bearer  {OLD}",
        f"Basic {OLD}",
        f"Bearer arm-1:{OLD}",
        f"Bearer {OLD}x",
    ):
        assert authenticator.caller(authorization) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no tokens"),
        (b"# nothing\n", "has no tokens"),
        (b"\nshort\n", "line 2: each token"),
        (f"{OLD}\xff".encode("latin-1"), "line 1: each token"),
        (b"x" * 70_000, "at most 65536 bytes"),
    ],
)
def test_a_file_that_is_no_good_is_refused_at_the_start(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        Authenticator(file=file)
    assert str(file) in str(refused.value)


@contextlib.asynccontextmanager
async def followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Authenticator]:
    monkeypatch.setattr(auth, "LOOK", 0.01)
    authenticator = Authenticator(file=file)
    task = asyncio.create_task(authenticator.follow())
    yield authenticator
    assert not task.done(), task
    task.cancel()


async def until(condition: object) -> None:
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


def mount(folder: Path, version: str, content: str) -> None:
    """As Kubernetes does it: a folder a version, and a link to the current one that is replaced by a rename."""
    (folder / version).mkdir()
    (folder / version / "tokens").write_text(content)
    os.utime(folder / version / "tokens", (1, 1))  # no help from dates
    (folder / "next").symlink_to(version)
    (folder / "next").rename(folder / "..data")


async def test_a_mounted_secret_that_is_replaced_counts_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(tmp_path, "one", f"arm-1:{OLD}\n{OTHER}\n")
    file = tmp_path / "tokens"
    file.symlink_to(Path("..data") / "tokens")
    async with followed(file, monkeypatch) as authenticator:
        old, other = by(authenticator, OLD), by(authenticator, OTHER)
        assert old is not None
        assert other is not None

        mount(tmp_path, "two", f"arm-1:{OLD}\narm-1:{NEW}\n{OTHER}\n")
        await until(lambda: by(authenticator, NEW) is not None)
        assert by(authenticator, OLD) is old
        new = by(authenticator, NEW)
        assert new is not None
        assert new.owner == old.owner

        mount(tmp_path, "three", f"arm-1:{NEW}\n{OTHER}\n")
        await until(lambda: by(authenticator, OLD) is None)
        # Calls that the old token opened end at their next message; the others notice nothing.
        with pytest.raises(Unauthenticated, match="withdrawn"):
            old.admit()
        for caller in (new, other):
            caller.admit()
        assert by(authenticator, OTHER) is other


async def test_a_new_file_that_is_no_good_keeps_the_old_tokens_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tokens"
    file.write_text(OLD)
    with structlog.testing.capture_logs() as logs:
        async with followed(file, monkeypatch) as authenticator:

            def errors() -> list[str]:
                return [str(line["reason"]) for line in logs if line["log_level"] == "error"]

            spoilers = (lambda: file.write_text("half-a-tok"), file.unlink, file.touch)
            for number, spoil in enumerate(spoilers, 1):
                spoil()
                await until(lambda number=number: len(errors()) >= number)
                await asyncio.sleep(0.05)  # for several looks
                assert len(errors()) == number
                assert by(authenticator, OLD) is not None
            file.write_text(NEW)
            await until(lambda: by(authenticator, NEW) is not None)
            assert by(authenticator, OLD) is None
    assert not any(token in str(logs) for token in (OLD, NEW, "half-a-tok"))


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_file_that_everyone_may_read_is_warned_of(tmp_path: Path, mode: int, warned: bool) -> None:
    file = tmp_path / "tokens"
    file.write_text(OLD)
    file.chmod(mode)
    with structlog.testing.capture_logs() as logs:
        Authenticator(file=file)
    assert [line["log_level"] for line in logs] == ["warning"] * warned


def test_a_rate_is_shared_by_the_tokens_of_one_name_and_by_no_others() -> None:
    authenticator = Authenticator([SecretStr(f"arm:{OLD}"), SecretStr(f"arm:{NEW}"), SecretStr(OTHER)], max_rate=5)
    old, new, other = (by(authenticator, token) for token in (OLD, NEW, OTHER))
    assert old is not None
    assert new is not None
    assert other is not None
    for caller in (old, new, old, new, old):
        caller.admit()
    for caller in (old, new):
        with pytest.raises(ResourceExhausted, match=r"5 requests a second; send fewer, or try again in \d+ ms"):
            caller.admit()
    other.admit()


def test_a_rate_lets_through_what_it_says_and_saves_up_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(rate, "time", SimpleNamespace(monotonic=lambda: now))
    caller = by(Authenticator([SecretStr(OLD)], max_rate=20), OLD)
    assert caller is not None
    admitted = 0
    for tick in range(1000):  # ten seconds, at 100 a second
        now = 1000.0 + tick / 100
        with contextlib.suppress(ResourceExhausted):
            caller.admit()
            admitted += 1
    assert admitted == pytest.approx(20 + 200, abs=2)
    now += 60
    for _ in range(20):
        caller.admit()
    with pytest.raises(ResourceExhausted):
        caller.admit()
