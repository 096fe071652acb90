"""The settings file, and `robodual config show`."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from robodual.cli import app
from robodual.serving.provenance import masked
from robodual.serving.settings import GeneralistSettings, SpecialistSettings

TOKEN = "a-token-of-sixteen-or-more"
FILE = f"""
[shared]
profile = "toy"
max_queue = 1
max_batch = 1
redis_timeout = 1
log_format = "json"
tokens = ["{TOKEN}", "{TOKEN}-2"]
redis_url = "rediss://robot:hunter2@redis.lab:6379/0?password=hunter3"

[specialist]
max_queue = 2
max_batch = 2
redis_timeout = 2
with_depth = false

[generalist]
adapters = ["one", "two"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "robodual.toml"
    path.write_text(FILE)
    return path


def shown(*arguments: str) -> dict[str, dict[str, dict[str, object]]]:
    result = CliRunner().invoke(app, ["config", "show", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", "show", *arguments])
    assert result.exit_code == 2, result.output
    return result.output


def test_arguments_come_before_own_variables_before_shared_ones_before_the_files_tables(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBODUAL_CONFIG", str(file))
    monkeypatch.setenv("ROBODUAL_MAX_BATCH", "3")
    monkeypatch.setenv("ROBODUAL_REDIS_TIMEOUT", "3")
    monkeypatch.setenv("ROBODUAL_SPECIALIST_REDIS_TIMEOUT", "4")
    monkeypatch.setenv("ROBODUAL_LOG_LEVEL", "")

    settings = SpecialistSettings(profile="other")

    assert settings.profile == "other"
    assert (settings.redis_timeout, settings.max_batch, settings.max_queue) == (4, 3, 2)
    assert (settings.log_format, settings.log_level, settings.with_depth) == ("json", "info", False)
    assert [token.get_secret_value() for token in settings.tokens] == [TOKEN, f"{TOKEN}-2"]
    origin = {name: entry["source"] for name, entry in shown("specialist")["specialist"].items()}
    assert (
        origin
        | {
            "redis_timeout": "ROBODUAL_SPECIALIST_REDIS_TIMEOUT",
            "max_batch": "ROBODUAL_MAX_BATCH",
            "max_queue": f"{file} [specialist]",
            "log_format": f"{file} [shared]",
            "log_level": "default",
            "config": "ROBODUAL_CONFIG",
        }
        == origin
    )


def test_each_service_reads_its_own_table(file: Path) -> None:
    generalist = GeneralistSettings(config=file)

    assert (generalist.max_queue, generalist.adapters) == (1, (Path("one"), Path("two")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[specialist]\nprot = 1", "prot in [specialist] is no setting"),
        ("[generalist]\nmax_sessions = 1", "max_sessions in [generalist] is no setting"),
        ("[shared]\nport = 1", "port in [shared] is no setting"),
        ("[shared]\nconfig = 'other.toml'", "config in [shared] is no setting"),
        ("[shraed]\nport = 1", "shraed is none of the tables [shared], [generalist], [specialist]"),
        ("seed = 1", "seed is none of the tables"),
        ("[shared", "is no TOML"),
        ("[shared]\nlog_level = '\xff'", "is no TOML"),
    ],
)
def test_what_the_file_says_and_no_service_knows_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "robodual.toml"
    path.write_text(text, "latin-1")

    for kind in (GeneralistSettings, SpecialistSettings):
        with pytest.raises(ValidationError) as failure:
            kind(config=path)
        assert str(path) in str(failure.value)
        assert said in str(failure.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent.toml cannot be read" in refused("--config", f"{tmp_path}/absent.toml")


def test_a_service_does_not_start_on_a_file_that_it_does_not_understand(file: Path) -> None:
    file.write_text("[specialist]\nprot = 1")

    result = CliRunner().invoke(app, ["serve", "specialist", "--config", str(file)])

    assert result.exit_code == 2
    assert "prot in [specialist] is no setting" in result.output


def test_a_value_that_is_wrong_is_told_with_where_it_stands(file: Path) -> None:
    file.write_text("[specialist]\nmax_sessions = 'many'")

    assert f"max_sessions ({file} [specialist]): Input should be a valid integer" in refused("--config", str(file))


def test_what_is_shown_is_every_setting_without_its_secrets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = shown("--config", str(file))

    assert list(both) == ["generalist", "specialist"]
    for kind in (GeneralistSettings, SpecialistSettings):
        assert set(both[kind.service]) == set(kind.model_fields)
    specialist = both["specialist"]
    assert specialist["redis_url"]["value"] == "rediss://robot:**********@redis.lab:6379/0"
    assert specialist["tokens"]["value"] == ["**********", "**********"]
    assert specialist["config"] == {"value": str(file), "source": "command line"}
    monkeypatch.setattr("robodual.config_cli.console", Console(width=200))
    people = CliRunner().invoke(app, ["config", "show", "--config", str(file)])
    for text in (json.dumps(both), people.output):
        assert TOKEN not in text
        assert "hunter" not in text
    assert "redis.lab" in people.output


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:SECRET@h:1/0", "redis://:**********@h:1/0"),
        ("rediss://robot:SECRET@h/0?password=SECRET", "rediss://robot:**********@h/0"),
        ("redis://h/0?password=SECRET", "redis://h/0"),
        ("redis://h/0?password=SEC@RET", "redis://**********"),
        ("unix:///run/redis.sock?db=0&password=SECRET", "unix:///run/redis.sock"),
        ("redis://:SEC/RET@h:1/0", "redis://**********"),
        ("redis://robot:12/SECRET@h:1/0", "redis://**********"),
        ("redis://:SEC?RET@h:1/0", "redis://**********"),
        ("redis://robot:12#SECRET@h:1/0", "redis://**********"),
        ("SECRET", "**********"),
    ],
)
def test_no_piece_of_a_password_is_shown(url: str, seen: str) -> None:
    assert masked(url) == seen
