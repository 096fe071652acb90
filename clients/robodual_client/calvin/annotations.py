"""What the policy is asked for each task: one or more English sentences a task.

The validation sentences are CALVIN's (mees/calvin, conf/annotations/new_playtable_validation.yaml), to the letter.
"""

from __future__ import annotations

import json
from pathlib import Path

from robodual_client.calvin.tasks import TASKS

VALIDATION = Path(__file__).with_name("annotations.json")


def load(path: Path = VALIDATION) -> dict[str, str]:
    """Each task's instruction, from a JSON object of task -> list of sentences: the first one, as the published
    evaluation does with enriched annotations too.

    Raises ValueError if the file is not such an object, or leaves a task out.
    """
    try:
        sentences = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"annotations: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"annotations: {path} is not JSON: {error}") from error
    if not isinstance(sentences, dict):
        raise ValueError(f"annotations: {path} must hold an object of task -> list of sentences")
    missing = [task for task in TASKS if task not in sentences]
    if missing:
        raise ValueError(f"annotations: {path} has no sentence for {', '.join(missing)}")
    for task in TASKS:
        listed = sentences[task]
        if not (isinstance(listed, list) and listed and isinstance(listed[0], str) and listed[0].strip()):
            raise ValueError(f"annotations: {path}: {task} must be a list of sentences, the first not empty")
    return {task: sentences[task][0] for task in TASKS}
