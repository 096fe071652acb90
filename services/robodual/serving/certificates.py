"""Whether the PEM files of TLS can be used: OpenSSL's own errors name no file."""

from __future__ import annotations

import ssl
from pathlib import Path


def check(setting: str, path: Path) -> None:
    """Raises `ValueError`, naming `setting` and the file, unless there are certificates in it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:
        raise ValueError(
            f"{setting}: {path}: expected certificates in PEM (-----BEGIN CERTIFICATE-----): {_reason(error)}"
        ) from error


def check_key(setting: str, path: Path, certificate: Path) -> None:
    """Raises `ValueError`, naming `setting` and the file, unless the key of `certificate` is in it."""
    try:
        # With a password, so that nobody is asked for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, path, password="")
    except OSError as error:
        raise ValueError(
            f"{setting}: {path}: expected the private key of {certificate} in PEM, not encrypted "
            f"(-----BEGIN PRIVATE KEY-----): {_reason(error)}"
        ) from error


def _reason(error: OSError) -> str:
    # Of a missing or unreadable file, what the system says; else OpenSSL's, without the place in Python's source.
    return error.strerror.partition(" (_ssl.c")[0] if error.strerror else str(error)
