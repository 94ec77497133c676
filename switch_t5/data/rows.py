"""Where a labelled dataset's rows are: prepared files of JSON lines, or TFDS.

``SWITCH_T5_DATA_DIR/<dataset>/<split>.jsonl`` comes first, then what TFDS has prepared. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_t5.data.text_to_text import Row, TextToTextTask
from switch_t5.errors import ConfigError, UserError

FOLDER_VARIABLE = "SWITCH_T5_DATA_DIR"


def data_folder() -> Path:
    """Where prepared datasets are: ``SWITCH_T5_DATA_DIR``, or ``~/.cache/switch_t5/data``."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "switch_t5" / "data")


def read_rows(task: TextToTextTask, split: str, most: int | None = None) -> list[Row]:
    """The rows of a task's split, each checked; the first ``most`` of them where that is given.

    Raises:
      UserError: they are nowhere (says where they were looked for and what prepares them), or a row is malformed.
    """
    if split not in task.splits:
        raise ConfigError("EvaluationConfig.split", f"is {split!r}, but {task.name} has {', '.join(task.splits)}.")
    path = data_folder() / task.dataset / f"{task.splits[split]}.jsonl"
    if path.is_file():
        lines = _lines(str(path), path.stat().st_mtime_ns) if most is None else numbered_rows(path)
        numbered, where = list(itertools.islice(lines, most)), str(path)
    else:
        numbered, where = list(enumerate(_from_tfds(task, split, most), start=1)), task.tfds
    for number, row in numbered:
        try:
            task.check(row, labelled=split != "test")
        except UserError as error:
            raise UserError(f"{where}:{number} {error}.") from None
    return [row for _, row in numbered]


@functools.lru_cache(maxsize=4)
def _lines(path: str, modified: int) -> tuple[tuple[int, Row], ...]:
    """As `numbered_rows`, read once for tasks that share a file."""
    del modified
    return tuple(numbered_rows(Path(path)))


def numbered_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of JSON lines, each with the number of its line.

    Raises:
      UserError: a line is malformed.
    """
    for number, line in numbered_lines(file):
        try:
            yield number, parse_row(line)
        except UserError as error:
            raise UserError(f"{file}:{number} {error}.") from None


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its number from 1; empty ones at its end are not there."""
    empty: list[tuple[int, bytes]] = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            empty.append((number, line))
            if line.strip():
                yield from empty
                empty.clear()


def parse_row(line: bytes) -> dict[str, Any]:
    """A line as a JSON object.

    Raises:
      UserError: a clause that says what it is instead.
    """
    if not line.strip():
        raise UserError("is empty")
    text = decoded(line)
    try:
        row = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"must be a JSON object, got {type(row).__name__}")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError("has half of a surrogate pair, which is no text") from None
    return row


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def decoded(text: bytes) -> str:
    """Bytes as text.

    Raises:
      UserError: a clause that says where they are no text.
    """
    try:
        return text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 at byte {error.start + 1}") from None


def _from_tfds(task: TextToTextTask, split: str, most: int | None) -> list[Row]:
    from switch_t5.data.tensorflow_runtime import tfds

    folders = map(str, tfds.core.utils.file_utils.list_data_dirs())  # pyright: ignore[reportAttributeAccessIssue]
    places = [f"{folder}/{task.tfds.replace(':', '/')}" for folder in folders]
    prepared = [place for place in places if Path(place, "dataset_info.json").exists()]
    if not prepared:
        family = task.dataset.split("/")[0]
        looked = " or ".join([str(data_folder() / task.dataset), *places])
        raise UserError(
            f"The data of {task.name} is not in {looked}: make it of a local copy by "
            f"`switch-t5 data prepare --dataset={family} --input=FOLDER`, or set {FOLDER_VARIABLE} or TFDS_DATA_DIR."
        )
    builder = tfds.builder_from_directory(prepared[0])
    rows: Any = builder.as_dataset(split=task.splits[split], shuffle_files=False)  # pyright: ignore[reportCallIssue]
    found = []
    for number, row in enumerate(itertools.islice(tfds.as_numpy(rows), most), start=1):
        try:
            found.append(plain(row))
        except UserError as error:
            raise UserError(f"{task.tfds}:{number} {error}.") from None
    return found


def plain(value: Any) -> Any:
    """A row of TFDS, pandas or Arrow in JSON's own types.

    Raises:
      UserError: see :func:`decoded`.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value.tolist()]
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
