from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from pydantic import ValidationError

from robodual.serving.settings import GeneralistSettings, Settings, SpecialistSettings

TOKEN = "a-token-of-sixteen-or-more"


def test_defaults_serve_this_machine_alone() -> None:
    generalist, specialist = GeneralistSettings(), SpecialistSettings()
    assert (generalist.host, generalist.port, generalist.http_port) == ("127.0.0.1", 50051, 8051)
    assert (specialist.host, specialist.port, specialist.http_port) == ("127.0.0.1", 50052, 8052)


def test_arguments_come_before_own_variables_before_shared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBODUAL_MAX_QUEUE", "1")
    monkeypatch.setenv("ROBODUAL_MAX_BATCH", "1")
    monkeypatch.setenv("ROBODUAL_PROFILE", "robodual-7b")
    monkeypatch.setenv("ROBODUAL_SPECIALIST_MAX_BATCH", "2")
    monkeypatch.setenv("ROBODUAL_SPECIALIST_PROFILE", "toy")
    settings = SpecialistSettings(profile="other")
    assert (settings.max_queue, settings.max_batch, settings.profile) == (1, 2, "other")
    assert GeneralistSettings().profile == "robodual-7b"


@pytest.mark.parametrize("name", ["ROBODUAL_SPECIALIST_PROT", "ROBODUAL_PROFIEL", "ROBODUAL_PORT", "ROBODUAL_TOKENZ"])
def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValidationError, match=f"{name} is no setting"):
        SpecialistSettings()


def test_variables_of_the_other_service_and_of_the_client_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBODUAL_SPECIALIST_MAX_SESSIONS", "3")
    monkeypatch.setenv("ROBODUAL_TOKEN", TOKEN)
    monkeypatch.setenv("ROBODUAL_MODELS", "/models")
    assert GeneralistSettings().max_batch == 8
    assert SpecialistSettings().max_sessions == 3


def test_devices_take_the_place_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GeneralistSettings().places == ("auto",)
    assert GeneralistSettings(device="cuda:1").places == ("cuda:1",)
    monkeypatch.setenv("ROBODUAL_DEVICES", "cuda:0, cuda:1")
    assert SpecialistSettings().places == ("cuda:0", "cuda:1")
    with pytest.raises(ValidationError, match="devices: cuda:0,cuda:1 is given, and device: cpu too; leave one out"):
        SpecialistSettings(device="cpu")
    monkeypatch.setenv("ROBODUAL_SPECIALIST_DEVICE", "cpu")
    with pytest.raises(ValidationError, match="leave one out"):
        SpecialistSettings()


@pytest.mark.parametrize("devices", ["cpu,cuda:0", "auto,cuda:1", "cuda:0,"])
def test_devices_that_would_answer_differently_are_refused(devices: str) -> None:
    with pytest.raises(ValidationError, match="devices: expected devices of one kind"):
        SpecialistSettings(devices=devices)  # type: ignore[arg-type]


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(ValidationError, match="prot"):
        SpecialistSettings(prot=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "robot.example"])
def test_other_machines_are_served_only_with_a_token(host: str) -> None:
    with pytest.raises(ValidationError, match="set tokens"):
        GeneralistSettings(host=host)
    GeneralistSettings(host=host, tokens=(TOKEN,))  # type: ignore[arg-type]
    GeneralistSettings(host=host, insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert GeneralistSettings(host=host).tokens == ()


def test_tokens_come_as_a_list_and_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBODUAL_TOKENS", f"{TOKEN}, {TOKEN}-2")
    monkeypatch.setenv("ROBODUAL_REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
    settings: Settings = SpecialistSettings()
    assert [token.get_secret_value() for token in settings.tokens] == [TOKEN, f"{TOKEN}-2"]
    assert TOKEN not in repr(settings)
    assert "hunter2" not in repr(settings)
    assert TOKEN not in settings.model_dump_json()


@pytest.mark.parametrize("token", ["short", "with spaces in the middle", "sixteen-characters-\n"])
def test_a_weak_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ValidationError, match="at least 16") as failure:
        GeneralistSettings(tokens=(token,))  # type: ignore[arg-type]
    assert token not in str(failure.value)


def test_a_file_of_tokens_opens_to_other_machines_and_is_named_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    settings = GeneralistSettings(host="0.0.0.0", tokens_file=tmp_path / "tokens")
    assert TOKEN not in repr(settings)
    with pytest.raises(ValidationError, match=r"tokens_file: .*absent is no file"):
        GeneralistSettings(tokens_file=tmp_path / "absent")


@pytest.mark.parametrize("kind", ["tls", "redis"])
def test_half_of_a_pair_is_refused(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"{kind}_certificate and {kind}_key: give both or neither"):
        GeneralistSettings(**{f"{kind}_certificate": Path("certificate.pem")})  # type: ignore[arg-type]


def test_files_without_the_tls_that_they_are_for_are_refused(certificates: Path) -> None:
    with pytest.raises(ValidationError, match="tls_client_ca: needs tls_certificate"):
        GeneralistSettings(tls_client_ca=certificates / "ca.pem")
    with pytest.raises(ValidationError, match="redis_ca and redis_certificate: need a redis_url"):
        GeneralistSettings(redis_ca=certificates / "ca.pem")
    GeneralistSettings(redis_ca=certificates / "ca.pem", redis_url="rediss://redis.lab:6379/0")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/robots", "/1a", "/0/1"])
def test_a_database_of_redis_has_a_number(path: str) -> None:
    with pytest.raises(ValidationError, match="redis_url: expected a database by its number") as caught:
        GeneralistSettings(redis_url=f"redis://:hunter2@redis.lab:6379{path}")  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)
    for fine in ("redis://redis.lab", "redis://redis.lab:6379/", "rediss://redis.lab/7", "unix:///run/redis.sock?db=1"):
        GeneralistSettings(redis_url=fine)  # type: ignore[arg-type]


def test_a_tls_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").touch()
    with pytest.raises(ValidationError, match=r"tls_key: .*absent\.key is no file"):
        GeneralistSettings(tls_certificate=tmp_path / "certificate.pem", tls_key=tmp_path / "absent.key")


@pytest.mark.parametrize("kind", ["tls", "redis"])
@pytest.mark.parametrize(
    "damage", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n"]
)
def test_a_certificate_key_or_authority_that_is_no_good_is_named(
    kind: str, damage: str, certificates: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_text(damage)
    authority = {"tls": "tls_client_ca", "redis": "redis_ca"}[kind]
    good: dict[str, Any] = {
        f"{kind}_certificate": certificates / "server.pem",
        f"{kind}_key": certificates / "server.key",
        authority: certificates / "ca.pem",
        "redis_url": "rediss://redis.lab:6379/0",
    }
    SpecialistSettings(**good)
    for name, expected in (
        (f"{kind}_certificate", "expected certificates in PEM"),
        (f"{kind}_key", f"expected the private key of {certificates}/server.pem in PEM"),
        (authority, "expected certificates in PEM"),
    ):
        with pytest.raises(ValidationError, match=f"{name}: {damaged}: {expected}"):
            SpecialistSettings(**(good | {name: damaged}))


def test_a_key_of_another_certificate_or_behind_a_password_is_named(certificates: Path, tmp_path: Path) -> None:
    key = serialization.load_pem_private_key((certificates / "server.key").read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"a password")))
    for other, reason in ((certificates / "client.key", "key values mismatch"), (encrypted, "not encrypted")):
        with pytest.raises(ValidationError, match=f"tls_key: {other}: expected the private key of .*{reason}"):
            SpecialistSettings(tls_certificate=certificates / "server.pem", tls_key=other)
