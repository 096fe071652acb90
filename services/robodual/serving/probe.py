"""Asks a service of this machine whether it is ready, as its own settings say: a health check of containers.

    python -m robodual.serving.probe specialist

Reads the environment and the file that the service reads. Exits with status 0 if the service is ready, else with 1 and
what it answered, or what is wrong with the settings.
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robodual.serving.settings import SERVICES

TIMEOUT = 2.0  # seconds
# What a service that listens everywhere is asked at.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def waiting_for(port: int, host: str = "127.0.0.1", certificate: Path | None = None, key: Path | None = None) -> str:
    """What keeps the service whose HTTP side is at `host`:`port` from being ready; "" if nothing does.

    `certificate` and `key` are the service's own, if it speaks TLS: it is shown them where it asks for a certificate
    (mutual TLS). What it shows is not checked: the connection stays on this machine and carries nothing secret.
    """
    host = LOOPBACK.get(host, host)
    host = f"[{host}]" if ":" in host else host
    scheme = "http"
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(certificate, key)
        scheme = "https"
        handlers.append(urllib.request.HTTPSHandler(context=context))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(f"{scheme}://{host}:{port}/readyz", timeout=TIMEOUT):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"HTTP {error.code}: {error.read(4096).decode(errors='replace')}"
    except (OSError, ValueError) as error:
        return f"{host}:{port}: {getattr(error, 'reason', error)}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in SERVICES:
        print(f"usage: python -m robodual.serving.probe {{{','.join(SERVICES)}}}", file=sys.stderr)
        return 2
    told: dict[str, Any] = {}  # by argument: nothing
    try:
        settings = SERVICES[arguments[0]](**told)
    except ValidationError as error:
        print("\n".join(problem["msg"] for problem in error.errors()), file=sys.stderr)
        return 1
    reason = waiting_for(settings.http_port, settings.host, settings.tls_certificate, settings.tls_key)
    print(reason or "ready")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
