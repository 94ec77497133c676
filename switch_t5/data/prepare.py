"""A local copy of a dataset, in whatever layout, to the rows that tasks read.

Understood are folders as Hugging Face has them (Parquet, Arrow or JSON lines, a file or a folder a split) and a
benchmark's own files of JSON lines. Every row is checked before anything is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from switch_t5.data import superglue_files
from switch_t5.data.rows import parse_row, plain
from switch_t5.data.text_to_text import TextToTextTask, tasks
from switch_t5.errors import UserError, closest
from switch_t5.storage import storage_errors, writable_directory

_ENDINGS = (".parquet", ".arrow", ".jsonl", ".json")
_VALIDATION = {"val", "dev"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split that was written.

    Attributes:
      dataset: such as ``super_glue/boolq``.
      split: ``train``, ``validation`` or ``test``.
      rows: how many it has.
      path: the file.
    """

    dataset: str
    split: str
    rows: int
    path: Path


def families() -> list[str]:
    """What can be prepared: the first part of every dataset's name."""
    return sorted({task.dataset.split("/")[0] for task in tasks().values()})


def prepare(family: str, source: Path, output: Path) -> list[Prepared]:
    """Writes ``output/<dataset>/<split>.jsonl`` for every dataset of a family that ``source`` has.

    Args:
      family: such as ``super_glue``.
      source: a folder: the family's, with a folder for each dataset, or that of its only dataset.
      output: see :func:`switch_t5.data.rows.data_folder`.

    Raises:
      UserError: there is no such family or folder, no file of it, or a row is malformed; then nothing is written of
        its dataset.
    """
    if family not in families():
        raise UserError(f"There is no dataset called {family!r}.{closest(family, families())}")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder.")
    done: list[Prepared] = []
    # Tasks that share a dataset have the same fields.
    for dataset, task in {task.dataset: task for task in tasks().values()}.items():
        if dataset.split("/")[0] != family:
            continue
        for split, files in _files_of(dataset, source).items():
            rows = [row for file in files for row in _rows(dataset, task, split, file)]
            path = writable_directory(output / dataset, "The data folder") / f"{split}.jsonl"
            _write(path, rows)
            done.append(Prepared(dataset, split, len(rows), path))
    if not done:
        wanted = sorted({task.dataset for task in tasks().values() if task.dataset.split("/")[0] == family})
        raise UserError(
            f"{source} has no {', '.join(_ENDINGS)} file of a split of {', '.join(wanted)}: it needs a folder for "
            "each, with train, validation or test in its files' names."
        )
    return done


def _files_of(dataset: str, source: Path) -> dict[str, list[Path]]:
    """The files of each split of a dataset."""
    family, _, config = dataset.partition("/")
    names = {_simple(config or family)}
    if family == "super_glue":
        names.add(_simple(superglue_files.FOLDERS[config]))
    folders = [folder for folder in [source, *source.rglob("*")] if folder.is_dir() and _simple(folder.name) in names]
    if not folders and not config:
        folders = [source]
    splits = {split for task in tasks().values() if task.dataset == dataset for split in task.splits.values()}
    found: dict[str, list[Path]] = {}
    for path in sorted({path for folder in folders for path in folder.rglob("*") if path.suffix in _ENDINGS}):
        folder = next(folder for folder in folders if path.is_relative_to(folder))
        words = set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()))
        words |= {"validation"} if words & _VALIDATION else set()
        split = max((split for split in splits if set(split.split("_")) <= words), key=len, default=None)
        if split is None and config in ("axb", "axg"):
            split = "test"  # The diagnostics have but one file, named after them.
        if split is not None and not path.name.startswith(("dataset_info", "dataset_dict", "state")):
            found.setdefault(split, []).append(path)
    return found


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _rows(dataset: str, task: TextToTextTask, split: str, file: Path) -> Iterator[dict[str, Any]]:
    family, _, config = dataset.partition("/")
    for number, record in enumerate(_records(file), start=1):
        rows = superglue_files.rows_of(config, record) if family == "super_glue" else iter([dict(record)])
        try:
            for row in rows:
                task.check(row, labelled=split != "test")
                yield row
        except UserError as error:
            raise UserError(f"{file}:{number} {error}.") from None
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}:{number} is not laid out as {dataset} is (at {error}).") from None


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file, whatever its kind.

    Raises:
      UserError: the file cannot be read.
    """
    import pyarrow

    readers: dict[str, Callable[[Path], Iterator[Mapping[str, Any]]]] = {".parquet": _parquet, ".arrow": _arrow}
    try:
        yield from readers.get(file.suffix, _json_lines)(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}): is it whole?") from None


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    yield from map(plain, parquet.read_table(file).to_pylist())


def _arrow(file: Path) -> Iterator[Mapping[str, Any]]:
    """An Arrow stream, as Hugging Face's library keeps them, or an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        yield from map(plain, table.to_pylist())


def _json_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parse_row(line, f"{file}:{number}")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with storage_errors(f"Writing {path}"):
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
