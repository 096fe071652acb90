"""How a channel to a service is made: TLS, token, limits."""

from __future__ import annotations

import ipaddress
import logging
import os
import pkgutil
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from robodual_client.errors import Failure

logger = logging.getLogger(__name__)

# An answer holds a chunk and a recovery state, under 8 kB; nothing that a service sends is near this.
LARGEST_ANSWER = 1 << 20
LOOKUP = 2.0  # seconds that a name may take to resolve
# A host that went silent is noticed within 15 seconds, idle streams included.
IDLE, SILENT = 10, 5  # seconds until it is asked for a sign of life, and until that must come
PARTIAL_CHAIN = ssl.VerifyFlags(0x80000)  # of OpenSSL; Python names it from 3.10 on
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
NO_PROXIES = ("no_grpc_proxy", "no_proxy")  # the first that is set counts


@dataclass(frozen=True)
class Tls:
    """PEM files. `ca` is who signed the services' certificates (default: the roots that gRPC ships); `certificate` and
    `key` are this client's own, where the services ask for one; `name` is the host name in the services' certificates
    where it is not the one in their address.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ValueError, which names the file, if one cannot be read."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls: certificate and key go together, got only one of them")
        return grpc.ssl_channel_credentials(
            _read(self.ca, "ca"), _read(self.key, "key"), _read(self.certificate, "certificate")
        )

    def context(self) -> ssl.SSLContext:
        """The same for a socket. Raises ValueError if a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        # As gRPC does: what is in `ca` is trusted, be it an authority below another, or the service's own certificate.
        context.verify_flags |= PARTIAL_CHAIN
        roots = _default_roots() if self.ca is None else _read(self.ca, "ca")
        try:
            if roots is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(cadata=roots.decode("ascii", "ignore"))  # comments may be in any script
            if self.certificate is not None:
                # With a password, a key that has one is refused; without, it would be asked for at the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as error:
            raise ValueError(f"tls: {error}") from error
        return context


@dataclass(frozen=True)
class Security:
    """What a client shows to services, and asks of them."""

    token: str | None = field(repr=False)
    tls: Tls | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, grpc_module: Any, address: str, host: str | None = None) -> Any:
        """A channel of `grpc` or of `grpc.aio` to `address`, which was found under the name `host`."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", -1),  # the service's own limit counts
            ("grpc.max_receive_message_length", LARGEST_ANSWER),
            ("grpc.enable_retries", 0),  # calls.py repeats calls: within a budget, and on another replica
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", IDLE * 1000),
            ("grpc.keepalive_timeout_ms", SILENT * 1000),
        ]
        if _is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))
        elif self.token and self.tls is None:
            logger.warning("the token travels to %s in plain text: use TLS (tls=Tls(...))", address)
        if self.tls is None:
            return grpc_module.insecure_channel(address, options=options)
        name = self.tls.name or host
        if name is not None:
            options.append(("grpc.ssl_target_name_override", name))
        return grpc_module.secure_channel(address, self.tls.credentials(), options=options)

    def name(self, address: str, host: str | None) -> str:
        """What the service at `address`, which was found under the name `host`, is called in a request: as by gRPC."""
        if self.tls is None:
            return address
        return self.tls.name or host or address

    def connect(self, address: str, name: str, timeout: float) -> socket.socket:
        """A connection to `address`, "ip:port", on which HTTP/2 is spoken, and where TLS is asked for, the service
        proved to be `name`, in `timeout` seconds at most. Raises OSError, and ValueError as `Tls.context` does.
        """
        start = time.monotonic()
        connected = socket.create_connection((_host(address), int(address.rpartition(":")[2])), timeout)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            limits = ("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", SILENT), ("TCP_KEEPCNT", 1)
            # None is asked for while what was sent is not acknowledged: for that, the time limit that gRPC sets.
            for option, value in (*limits, ("TCP_USER_TIMEOUT", SILENT * 1000)):
                if hasattr(socket, option):  # not on every system
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            if self.tls is None:
                return connected
            connected.settimeout(max(start + timeout - time.monotonic(), 0.001))  # 0 has another meaning
            secured = self.tls.context().wrap_socket(connected, server_hostname=_without_port(name))
            if secured.selected_alpn_protocol() != "h2":
                secured.close()
                raise OSError("the service agrees on TLS, but not on HTTP/2")
            return secured
        except BaseException:
            connected.close()
            raise


def security(token: str | None, tls: Tls | bool) -> Security:
    """`tls` True means the default roots. Raises ValueError for another type or an unusable token."""
    if token is not None and not (isinstance(token, str) and re.fullmatch("[!-~]+", token)):
        raise ValueError("token must be printable ASCII without spaces, at least one character")
    if not isinstance(tls, (bool, Tls)):
        raise ValueError(f"tls must be True, False or Tls(ca=..., certificate=..., key=..., name=...), got {tls!r}")
    return Security(token, (Tls() if tls else None) if isinstance(tls, bool) else tls)


def lookup(name: str) -> list[str]:
    """Every address, "ip:port", of `name`, "host:port". Blocks. Raises Failure."""
    host, _, port = name.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError) as error:
        raise unresolved(name, str(error)) from error
    return [f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in (str(entry[4][0]) for entry in found)]


def unresolved(name: str, reason: str) -> Failure:
    return Failure(grpc.StatusCode.UNAVAILABLE, f"the name cannot be resolved: {reason}", f"dns:///{name}")


def _read(path: str | Path | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"tls: {name}: {error}") from error


def is_proxied(address: str) -> bool:
    """Whether gRPC may go through a proxy to `address`: the environment names one, and does not except the address."""
    if _is_loopback(address) or not any(os.environ.get(name) for name in PROXIES):
        return False
    excepted = next((os.environ[name] for name in NO_PROXIES if name in os.environ), "")
    return not any(_is_among(_host(address), entry.strip()) for entry in excepted.split(","))


def _is_among(host: str, entry: str) -> bool:
    """Whether `entry` of no_proxy means `host`, by gRPC's rules: it is the end of its name, or a network."""
    if entry and host.lower().endswith(entry.lower()):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _default_roots() -> bytes | None:
    """Those that gRPC takes, or None for the system's."""
    named = os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
    if named:
        return _read(named, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
    try:
        return pkgutil.get_data("grpc._cython", "_credentials/roots.pem")
    except OSError:
        return None


def is_ip(address: str) -> bool:
    """Whether it is "ip:port", and no name."""
    try:
        ipaddress.ip_address(_host(address))
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    host = _host(address)
    return ipaddress.ip_address(host).is_loopback if is_ip(address) else host == "localhost"


def _without_port(name: str) -> str:
    """The host that `name` names, with or without a port, as a certificate has it."""
    found = re.fullmatch(r"\[(.+)\]:[0-9]+|([^:]+):[0-9]+", name)
    return name if found is None else found.group(1) or found.group(2)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
