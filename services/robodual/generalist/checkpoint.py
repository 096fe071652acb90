"""Generalist checkpoints: Hugging Face folders as published, read natively. No code or pickle in them is ever run."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from robodual.facts import CheckpointError
from robodual.generalist.config import GeneralistConfig
from robodual.generalist.model import Generalist
from robodual.generalist.tokenizer import prompt_text
from robodual.generalist.tokens import GENERATED
from robodual.generalist.weights import save_weights

PREPROCESSOR = ("image_resize_strategy", "input_sizes", "means", "stds")
MAX_JSON = 64 * 1024 * 1024
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Everything that is read; weights in other formats and code stay on the hub.
HUB_FILES = ["*.json", "*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's description, without its weights."""

    folder: Path
    config: GeneralistConfig
    tokenizer: Tokenizer


def read_checkpoint(source: str | Path, *, constrained: bool = False) -> Checkpoint:
    """Reads everything but the weights of a folder, or of a hub repository ("openvla/openvla-7b") when online.

    Raises CheckpointError for a folder that is not an OpenVLA generalist, naming the file and the fix.
    """
    folder = locate(source)
    path = folder / "config.json"
    description = read_json(path, "give the folder of an OpenVLA checkpoint, as published on the Hugging Face hub")
    images = folder / "preprocessor_config.json"
    preprocessor = read_json(images, "download it again") if images.exists() else None
    try:
        config = GeneralistConfig.from_huggingface(description, preprocessor, constrained)
    except KeyError as error:
        file = images if error.args[0] in PREPROCESSOR else path
        raise CheckpointError(f"{file}: lacks the field {error}; download the folder again") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}; give the folder of an OpenVLA checkpoint") from error
    return Checkpoint(folder, config, read_tokenizer(folder, config))


def locate(source: str | Path) -> Path:
    """The folder itself, or the downloaded snapshot of a hub repository."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder}: is a file; a generalist checkpoint is a folder with config.json in it, "
            "and a specialist's file goes to `robodual serve specialist`"
        )
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{folder}: no such folder; give the folder of an OpenVLA checkpoint")
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: neither a folder here nor a repository that the Hugging Face hub gives ({reason}); "
            "check the name, or download it first and give its folder"
        ) from error


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CheckpointError that names the file."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {fix}")
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path}: larger than {MAX_JSON} bytes, so no file of a checkpoint; {fix}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {fix}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}; {fix}")
    return content


def read_tokenizer(folder: Path, config: GeneralistConfig) -> Tokenizer:
    """The folder's tokenizer.json as it is: Transformers 5 would rebuild parts of it from other files."""
    path = folder / "tokenizer.json"
    read_json(path, "save the tokenizer again with Transformers (a fast tokenizer, save_pretrained)")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise CheckpointError(f"{path}: not a tokenizer ({error}); download it again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.language.vocabulary:
        raise CheckpointError(
            f"{path}: has token id {largest}, but vocab_size is {config.language.vocabulary} in config.json; "
            "take both files from the same checkpoint"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # What is put around a text need not be in the vocabulary.
    if max(tokenizer.encode(prompt_text("open the drawer")).ids, default=0) >= config.language.vocabulary:
        raise CheckpointError(f"{path}: adds tokens that vocab_size in config.json does not know; download both again")
    return tokenizer


def save_checkpoint(folder: Path, model: Generalist, tokenizer: Tokenizer, *, shards: int = 1) -> None:
    """Writes a model as a folder in the published layout, in the dtype that it has.

    The folder appears whole or not at all. Raises FileExistsError if it is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        partial = Path(temporary) / "checkpoint"
        partial.mkdir()
        config = model.config
        statistics = _action_statistics()
        description = {
            **config.to_huggingface(),
            "norm_stats": statistics,
            "torch_dtype": str(model.dtype).removeprefix("torch."),
        }
        names = {token: tokenizer.id_to_token(getattr(config.tokens, token)) for token in ("bos", "eos", "pad")}
        files: dict[str, dict[str, Any]] = {
            "config.json": description,
            "preprocessor_config.json": config.images.to_huggingface(),
            "dataset_statistics.json": statistics,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{f"{token}_token": name for token, name in names.items()},
            },
        }
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        tokenizer.save(str(partial / "tokenizer.json"))
        save_weights(partial, model, shards)
        partial.rename(folder)


def _action_statistics() -> dict[str, Any]:
    """What the published code un-normalises the 64 tokens with: no change, since CALVIN's actions are in [-1, 1]."""
    action = {"q01": [-1.0] * GENERATED, "q99": [1.0] * GENERATED, "mask": [False] * GENERATED}
    return {"calvin": {"action": action}}
