"""What a service can be told: by argument, by environment, by a file, else the defaults here.

A field of `Settings` is read from `ROBODUAL_GENERALIST_X` or `ROBODUAL_SPECIALIST_X`, else from `ROBODUAL_X`, which
goes for both services, else from the file's table of the service, else from its table [shared]; the fields of one
service alone only from its own variables and table.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from robodual.images import Strategy
from robodual.serving import certificates, settings_file, tokens

SHARED_PREFIX = "ROBODUAL_"
# Variables of the client, of compose, of the tests and of each service, which are not shared settings.
CLIENT = ("ROBODUAL_TOKEN", "ROBODUAL_MODELS")
TESTS = ("ROBODUAL_PARITY_DIR", "ROBODUAL_CALVIN_DATA", "ROBODUAL_PYTHON38")
OTHERS = ("ROBODUAL_CLIENT_", "ROBODUAL_GENERALIST_", "ROBODUAL_SPECIALIST_", *TESTS)

FILES = ("tokens_file", "tls_certificate", "tls_key", "tls_client_ca", "redis_ca", "redis_certificate", "redis_key")

T = TypeVar("T")


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Listed = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]  # in a variable, comma-separated


class Settings(BaseSettings):
    """What both services share. Frozen; an unknown variable, argument or key of the file is an error that names it."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_ignore_empty=True, hide_input_in_errors=True)
    service: ClassVar[str] = "shared"

    config: Path | None = Field(None, description="a TOML file with the tables [shared], [generalist], [specialist]")
    profile: str = "playtable"
    device: str = "auto"
    devices: Listed[str] = Field(
        (), description="instead of device: one engine on each, behind the one port; comma-separated"
    )
    dtype: str = "auto"
    seed: int = Field(0, description="of random weights, where there is no checkpoint")
    host: str = "127.0.0.1"
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="redis://, rediss:// or unix://")
    redis_ca: Path | None = Field(None, description="PEM: who signed a rediss:// server's certificate")
    redis_certificate: Path | None = Field(None, description="PEM: shown to a rediss:// server that asks for one")
    redis_key: Path | None = None
    redis_timeout: Seconds = 2.0
    conditioning_ttl: Seconds = Field(600.0, description="seconds that a conditioning stays in the store")
    tokens: Listed[SecretStr] = Field((), description="TOKEN or NAME:TOKEN, comma-separated")
    tokens_file: Path | None = Field(None, description="more tokens, one a line; read again when it changes")
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = Field(None, description="PEM: callers must show a certificate that it signed")
    insecure: bool = Field(False, description="allows a bind to other addresses than loopback without a token")
    max_message_bytes: int = Field(16 * 2**20, ge=2**16, le=2**30)
    max_queue: Count = Field(64, description="requests that wait for the model before more are turned away")
    max_batch: Count = 8
    max_rate: float | None = Field(None, gt=0, description="requests a second of one token; by default any number")
    max_sessions_per_token: Count | None = Field(None, description="by default as many as there is room for")
    shutdown_grace: Seconds = Field(10.0, description="seconds that requests in flight get to finish at shutdown")
    traces: str | None = Field(None, description="an OTLP/HTTP collector, http://HOST:4318, that gets every trace")
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def places(self) -> tuple[str, ...]:
        """The device of each engine."""
        return self.devices or (self.device,)

    @field_validator("redis_url")
    @classmethod
    def _check_database(cls, value: SecretStr) -> SecretStr:
        """The client of Redis takes a name for database 0, which may be another's."""
        url = urlsplit(value.get_secret_value())
        if url.scheme in ("redis", "rediss") and not re.fullmatch("/?[0-9]*", url.path):
            # Not what was given: where a password has a slash in it, that is part of the path.
            raise ValueError("redis_url: expected a database by its number after the host, as in redis://HOST:6379/0")
        return value

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        tokens.parse((f"number {n}", token.get_secret_value()) for n, token in enumerate(value, 1))
        return value

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Adds what the file says, where neither argument nor environment does."""
        check_environment(cls)
        path = data.get("config")
        if not path:
            return data
        return {**settings_file.merged(settings_file.read(Path(path), TABLES), cls.service), **data}

    @model_validator(mode="after")
    def _check_devices(self) -> Settings:
        if self.devices and "device" in self.model_fields_set:
            raise ValueError(
                f"devices: {','.join(self.devices)} is given, and device: {self.device} too; "
                "leave one out (devices may name a single one)"
            )
        if len({name.partition(":")[0] for name in self.devices}) > 1:
            raise ValueError(
                f"devices: expected devices of one kind, which give the same answers, not {','.join(self.devices)}; "
                "name CUDA devices alone (cuda:0,cuda:1), or the CPU alone"
            )
        return self

    @model_validator(mode="after")
    def _check_exposure(self) -> Settings:
        for kind in ("tls", "redis"):
            if (getattr(self, f"{kind}_certificate") is None) != (getattr(self, f"{kind}_key") is None):
                raise ValueError(f"{kind}_certificate and {kind}_key: give both or neither")
        for name in FILES:
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: {path} is no file")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: needs tls_certificate and tls_key; without them there is no TLS")
        encrypted = self.redis_url.get_secret_value().startswith("rediss://")
        if not encrypted and (self.redis_ca is not None or self.redis_certificate is not None):
            raise ValueError("redis_ca and redis_certificate: need a redis_url that begins with rediss://")
        if not (is_loopback(self.host) or self.tokens or self.tokens_file or self.insecure):
            raise ValueError(
                f"host: {self.host} can be reached from other machines; set tokens (ROBODUAL_TOKENS or "
                "ROBODUAL_TOKENS_FILE), or insecure=true to serve anyone"
            )
        return self

    @model_validator(mode="after")
    def _check_certificates(self) -> Settings:
        for name in ("tls_certificate", "tls_client_ca", "redis_ca", "redis_certificate"):
            path: Path | None = getattr(self, name)
            if path is not None:
                certificates.check(name, path)
        for kind in ("tls", "redis"):
            certificate, key = getattr(self, f"{kind}_certificate"), getattr(self, f"{kind}_key")
            if certificate is not None and key is not None:
                certificates.check_key(f"{kind}_key", key, certificate)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, EnvSettingsSource(Settings, env_prefix=SHARED_PREFIX)


class GeneralistSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="ROBODUAL_GENERALIST_")
    service: ClassVar[str] = "generalist"

    checkpoint: str | None = Field(None, description="a folder, or a hub id (openvla/openvla-7b)")
    adapters: Listed[Path] = Field((), description="LoRA folders, in order; comma-separated")
    merge_adapters: bool = Field(True, description="false keeps them beside the weights; better with quantisation")
    attention: str = Field("auto", description="auto, sdpa, flash_attention_2 or eager")
    quantisation: str = Field("none", description="none, int8, fp8 or nf4")
    constrained: bool | None = Field(None, description="decoding keeps to 8 x 7 actions; by default the profile's")
    speculation: bool = Field(True, description="several tokens a forward where guesses were right; the same tokens")
    port: Port = 50051
    http_port: Port = 8051


class SpecialistSettings(Settings):
    model_config = SettingsConfigDict(env_prefix="ROBODUAL_SPECIALIST_")
    service: ClassVar[str] = "specialist"

    checkpoint: Path | None = Field(None, description="a published EMA .pt, or our .safetensors")
    image_strategy: Strategy = Field("resize-naive", description="how frames become square, as in training")
    with_depth: bool | None = Field(None, description="sensors; by default the checkpoint's or the profile's")
    with_gripper: bool | None = None
    with_tactile: bool | None = None
    diffusion_steps: int | None = Field(None, ge=1, le=100, description="by default the checkpoint's: 10 as published")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="1: no guidance; 3 as published")
    only: Literal["generalist", "specialist"] | None = Field(
        None, description="one half of the pair alone: the reference chunk's own actions, or none of the conditioning"
    )
    port: Port = 50052
    http_port: Port = 8052
    max_sessions: Count = 256
    session_ttl: Seconds = Field(300.0, description="seconds without a request after which a session is closed")
    operators: Listed[str] = Field(
        (), description="names of tokens that show every session on the operator's page; comma-separated"
    )
    max_wait: Seconds = Field(10.0, description="seconds to wait for min_conditioning, if no deadline is sooner")
    degraded_age_steps: int = Field(16, ge=0, description="a conditioning older than this makes answers degraded")
    max_age_steps: int = Field(64, ge=0, description="a conditioning older than this is not used")


SERVICES: dict[str, type[GeneralistSettings] | type[SpecialistSettings]] = {
    kind.service: kind for kind in (GeneralistSettings, SpecialistSettings)
}
TABLES = {Settings.service: Settings, **SERVICES}


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, stands for this machine alone."""
    try:
        address = ipaddress.ip_address(host)
        # Where IPv6 takes IPv4 in, 127.0.0.1 is ::ffff:127.0.0.1, which counts as loopback from Python 3.13 on only.
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"


def check_environment(kind: type[BaseSettings]) -> None:
    """Raises `ValueError` naming the first ROBODUAL_* variable that is no setting of `kind` nor a shared one."""
    own = str(kind.model_config.get("env_prefix") or SHARED_PREFIX)
    for name in sorted(name.upper() for name in os.environ):
        if name.startswith(own) and own != SHARED_PREFIX:
            known = name.removeprefix(own).lower() in kind.model_fields
        elif name.startswith(SHARED_PREFIX) and not name.startswith(OTHERS) and name not in CLIENT:
            known = name.removeprefix(SHARED_PREFIX).lower() in Settings.model_fields
        else:
            continue
        if not known:
            raise ValueError(f"{name} is no setting; see docs/deployment.md for those there are")
