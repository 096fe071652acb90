"""TLS, mutual TLS, and tokens over plain text."""

from __future__ import annotations

import logging
import shutil
import ssl
import subprocess

import grpc
import pytest
from fake_services import FakeGeneralist, FakeSpecialist
from http2_server import Http2Server

from robodual_client import DualSystemClient, Timeouts, Tls, channel
from robodual_client.channel import security
from robodual_client.errors import Failure, ServiceUnavailable
from robodual_client.stream import ActStream
from robodual_client.wire import rpc

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for certificates")

QUICK = Timeouts(connect=0.5)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate authority, and a server's and a client's certificate of it, as PEM files in one folder."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=str(folder), check=True, stderr=subprocess.DEVNULL)

    (folder / "server.ext").write_text("subjectAltName=DNS:specialist.test,DNS:localhost,IP:127.0.0.1,IP:::1\n")
    (folder / "client.ext").write_text("subjectAltName=DNS:robot.test\n")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority", "-days", "2")
    (folder / "middle.ext").write_text("basicConstraints=CA:TRUE\n")
    (folder / "below.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for name, by in (("server", "ca"), ("client", "ca"), ("middle", "ca"), ("below", "middle")):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = (
            "-CA",
            f"{by}.pem",
            "-CAkey",
            f"{by}.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            f"{name}.ext",
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder


@pytest.fixture(params=["tls", "mutual"])
def secure(request, certificates):
    """Both services over TLS, and what a client must know of it."""
    mutual = request.param == "mutual"
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    ca = (certificates / "ca.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], ca if mutual else None, mutual)
    servers = FakeGeneralist(credentials), FakeSpecialist(credentials)
    tls = Tls(ca=certificates / "ca.pem", name="specialist.test")
    if mutual:
        tls = Tls(tls.ca, certificates / "client.pem", certificates / "client.key", tls.name)
    yield servers[0].address, servers[1].address, tls, mutual
    for server in servers:
        server.kill()


def test_episode_over_tls(secure, obs):
    generalist, specialist, tls, _ = secure
    with DualSystemClient(generalist, specialist, tls=tls, token="secret", timeouts=QUICK) as client:
        client.reset("open the drawer")
        assert client.step(obs).shape == (7,)


def test_certificate_is_checked_against_the_name_that_led_to_an_address(secure, obs):
    generalist, specialist, tls, _ = secure
    named = [f"dns:///localhost:{address.rpartition(':')[2]}" for address in (generalist, specialist)]
    with DualSystemClient(*named, tls=Tls(tls.ca, tls.certificate, tls.key), timeouts=QUICK) as client:
        client.reset("open the drawer")
        client.step(obs)
        assert client.last.address.startswith(("127.0.0.1:", "[::1]:"))


def test_plain_text_client_is_refused(secure):
    generalist, specialist, _, _ = secure
    assert "UNAVAILABLE" in refusal(generalist, specialist, False)


def test_unknown_authority_is_refused(secure):
    generalist, specialist, _, _ = secure
    assert "TLS settings" in refusal(generalist, specialist, True)


def test_other_host_name_is_refused(secure):
    generalist, specialist, tls, _ = secure
    refusal(generalist, specialist, Tls(tls.ca, tls.certificate, tls.key, "elsewhere.test"))


def test_client_without_a_certificate_is_refused_where_one_is_asked_for(secure):
    generalist, specialist, tls, mutual = secure
    bare = Tls(tls.ca, name=tls.name)
    if mutual:
        refusal(generalist, specialist, bare)
    else:
        with DualSystemClient(generalist, specialist, tls=bare, timeouts=QUICK) as client:
            assert client.info()["specialist"].profile == "fake"


def refusal(generalist, specialist, tls):
    """What the client says of services that do not agree with its TLS settings."""
    with DualSystemClient(generalist, specialist, tls=tls, timeouts=QUICK) as client:
        with pytest.raises(ServiceUnavailable) as raised:
            client.reset("open the drawer")
        return str(raised.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [({"ca": "absent.pem"}, r"tls: ca: .*absent\.pem"), ({"certificate": "a.pem"}, "certificate and key go together")],
)
def test_unreadable_file_is_named(files, expected):
    client = DualSystemClient(tls=Tls(**files))
    with pytest.raises(ValueError, match=expected):
        client.info()
    client.close()


LOCAL = ("localhost:1", "127.0.0.2:1", "[::1]:1")


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("10.0.0.5:50052", True),
        ("robot.example:50052", True),
        ("localhost:1", False),
        ("127.0.0.2:1", False),
        ("[::1]:1", False),
    ],
)
def test_token_in_plain_text_off_this_machine_is_warned_of_without_showing_it(caplog, address, warned):
    with caplog.at_level(logging.WARNING):
        security("hunter2", tls=False).channel(grpc, address).close()
    assert ("plain text" in caplog.text) is warned
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(security("hunter2", tls=False))


def stream(address, name, tls):
    opened = ActStream(security("secret", tls), [address], name, "Specialist.Act", 5)
    opened.close()


def test_stream_checks_the_certificate_as_grpc_does(secure, certificates, monkeypatch):
    _, specialist, tls, _ = secure
    stream(specialist, "specialist.test", tls)
    with pytest.raises(Failure, match=r"UNAVAILABLE: no connection: .*[Hh]ostname"):
        stream(specialist, "generalist.test", tls)
    named = Tls(None, tls.certificate, tls.key)
    with pytest.raises(Failure, match="CERTIFICATE_VERIFY_FAILED"):
        stream(specialist, "specialist.test", named)
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(certificates / "ca.pem"))
    stream(specialist, "specialist.test", named)


@pytest.mark.parametrize(("host", "name"), [(None, None), ("localhost", None), ("localhost", "specialist.test")])
def test_stream_calls_the_service_what_grpc_calls_it(certificates, host, name):
    # Proxies route by it: some tell "host" from "host:port", and all refuse an IPv6 address without brackets.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.set_alpn_protocols(["h2"])
    called = []

    def keep(peer):
        for _ in peer.messages():
            called.append(peer.headers[":authority"])
            peer.answer(b"")

    server = Http2Server(keep, context=context)
    secured = security(None, Tls(certificates / "ca.pem", name=name))
    with_grpc = secured.channel(grpc, server.address, host)
    next(rpc.Stub(with_grpc, rpc.SPECIALIST).ActStream(iter([b"request"]), timeout=5))
    with_grpc.close()
    opened = ActStream(secured, [server.address], secured.name(server.address, host), "Specialist.Act", 5)
    opened.exchange([b"request"], 5)
    opened.close()
    server.close()
    assert called[0] == called[1]


def test_ipv6_address_keeps_its_brackets_but_for_the_certificate(secure, monkeypatch):
    _, specialist, tls, _ = secure
    monkeypatch.setattr(channel, "_host", lambda address: "127.0.0.1")  # where the service is
    bare = security(None, Tls(tls.ca, tls.certificate, tls.key))
    name = bare.name("[::1]:50052", None)
    assert name == "[::1]:50052"
    ActStream(bare, [specialist], name, "Specialist.Act", 5).close()


def test_stream_trusts_whatever_certificate_is_in_ca_as_grpc_does(certificates, obs):
    pair = ((certificates / "below.key").read_bytes(), (certificates / "below.pem").read_bytes())
    servers = [kind(grpc.ssl_server_credentials([pair])) for kind in (FakeGeneralist, FakeSpecialist)]
    (certificates / "described.pem").write_bytes(
        "# Főtanúsítvány\n".encode() + (certificates / "middle.pem").read_bytes()
    )
    for ca in ("middle.pem", "below.pem", "described.pem"):
        addresses = [server.address for server in servers]
        with DualSystemClient(*addresses, tls=Tls(certificates / ca), timeouts=Timeouts(budget=0.5)) as client:
            client.reset("open the drawer")
            client.step(obs)
    for server in servers:
        server.kill()


def test_stream_needs_a_service_that_speaks_http2(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    server = Http2Server(lambda peer: None, context=context)
    with pytest.raises(Failure, match="not on HTTP/2"):
        stream(server.address, "localhost", Tls(certificates / "ca.pem"))
    server.close()


def test_file_that_cannot_be_used_is_named(certificates, tmp_path):
    (tmp_path / "empty.pem").write_text("")
    subprocess.run(
        ["openssl", "ec", "-in", certificates / "client.key", "-aes256", "-passout", "pass:1234", "-out", "locked.key"],
        cwd=str(tmp_path),
        check=True,
        stderr=subprocess.DEVNULL,
    )
    for tls in (
        Tls(tmp_path / "missing.pem"),
        Tls(tmp_path / "empty.pem"),
        Tls(None, certificates / "client.pem", certificates / "server.key"),
        Tls(None, certificates / "client.pem", tmp_path / "locked.key"),
    ):
        with pytest.raises(ValueError, match=r"^tls: "):
            tls.context()
