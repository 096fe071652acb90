"""Bearer tokens: how they are written down, and whom each of them stands for."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SHORTEST = 16
LARGEST = 64 * 1024  # bytes of a file of tokens
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")


@dataclass(frozen=True)
class Token:
    """A token's owner and its SHA-256; the token itself is not kept.

    The owner is the name it was given, or "~" and 16 hexadecimal digits that only this token gives.
    """

    owner: str
    digest: bytes = field(repr=False)


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def parse(entries: Iterable[tuple[str, str]]) -> tuple[Token, ...]:
    """Tokens from entries "TOKEN" or "NAME:TOKEN", each with what to call it in an error.

    Several tokens may have one name: any of them is its owner. Raises `ValueError`, which never shows an entry.
    """
    tokens: dict[bytes, Token] = {}
    for place, entry in entries:
        name, colon, secret = entry.partition(":")
        if not colon:
            name, secret = "", entry
        elif not _NAME.fullmatch(name):
            raise ValueError(f"{place}: expected NAME:TOKEN, with a name of 1 to 32 characters of [A-Za-z0-9_.-]")
        if len(secret) < SHORTEST or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise ValueError(
                f"{place}: each token must be at least {SHORTEST} printable ASCII characters without spaces"
            )
        # Not the beginning of the digest that callers are checked against: this one is seen in logs and in Redis.
        owner = name or "~" + digest(f"owner of {secret}").hex()[:16]
        token = Token(owner, digest(secret))
        if tokens.setdefault(token.digest, token) != token:
            raise ValueError(f"{place}: the same token has another name already; a token belongs to one")
    return tuple(tokens.values())


@dataclass(frozen=True)
class TokensFile:
    """A file with an entry a line; empty lines and those that begin with "#" say nothing."""

    path: Path

    def read(self) -> tuple[bytes, bool]:
        """What is in it, and whether every user of the machine may read or write it. Raises `ValueError`."""
        try:
            with self.path.open("rb") as stream:
                content = stream.read(LARGEST + 1)
                mode = os.fstat(stream.fileno()).st_mode
        except OSError as error:
            raise ValueError(f"tokens_file: {self.path}: {error.strerror}") from error
        if len(content) > LARGEST:
            raise ValueError(f"tokens_file: {self.path}: expected at most {LARGEST} bytes")
        return content, bool(mode & (stat.S_IROTH | stat.S_IWOTH))

    def entries(self, content: bytes) -> list[tuple[str, str]]:
        """The entries in `content`, for `parse`. Raises `ValueError` if there are none."""
        # A byte that is no UTF-8 becomes a character that no token may have.
        lines = enumerate((line.strip() for line in content.decode(errors="replace").splitlines()), 1)
        entries = [(f"tokens_file: {self.path}: line {n}", line) for n, line in lines if line and line[0] != "#"]
        if not entries:
            raise ValueError(f"tokens_file: {self.path} has no tokens; put one on each line")
        return entries
