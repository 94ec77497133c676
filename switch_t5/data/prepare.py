"""A local copy of a dataset, in whatever layout, to the rows that tasks read.

Understood are folders as Hugging Face has them (Parquet, Arrow or JSON lines, a file or a folder a split) and a
benchmark's own files of JSON lines. Every row of a dataset is checked before anything of it is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_t5.data import superglue_files
from switch_t5.data.rows import numbered_lines, parse_row, plain
from switch_t5.data.text_to_text import Row, TextToTextTask, tasks
from switch_t5.errors import UserError, closest
from switch_t5.storage import storage_errors, writable_directory

if TYPE_CHECKING:
    import pyarrow

Record = Callable[[], Mapping[str, Any]]
"""Gives a row of a file as it stands there; raises a UserError, a clause, where it cannot be read."""

_ENDINGS = (".parquet", ".arrow", ".jsonl", ".json")
_VALIDATION = {"val", "dev"}
_FOLDERS = {"super_glue/wsc": ("wsc.fixed", "wsc")}
"""The names of a dataset's folder, the best first, where they are not its own."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split that was written.

    Attributes:
      dataset: such as ``super_glue/boolq``.
      split: ``train``, ``validation`` or ``test``.
      rows: how many it has.
      path: the file.
      malformed: what is wrong with each record that was left out: a line, or a row of a table.
    """

    dataset: str
    split: str
    rows: int
    path: Path
    malformed: tuple[str, ...] = ()


def families() -> list[str]:
    """What can be prepared: the first part of every dataset's name."""
    return sorted({task.dataset.split("/")[0] for task in tasks().values()})


def prepare(family: str, source: Path, output: Path, *, skip_malformed: bool = False) -> list[Prepared]:
    """Writes ``output/<dataset>/<split>.jsonl`` for every dataset of a family that ``source`` has.

    Args:
      family: such as ``super_glue``.
      source: a folder: the family's, with a folder for each dataset, or that of its only dataset.
      output: see :func:`switch_t5.data.rows.data_folder`.
      skip_malformed: leaves malformed records out instead of refusing the dataset. A record of MultiRC or ReCoRD is a
        paragraph with all of its rows.

    Raises:
      UserError: there is no such family or folder, no file of it, or a dataset has one split in several folders or a
        malformed row, or a split without rows; then nothing is written of that dataset.
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
        read: dict[str, tuple[list[Row], list[str]]] = {}
        for split, files in _files_of(dataset, source).items():
            malformed = [] if skip_malformed else None
            rows = [row for file in files for row in _rows(dataset, task, split, file, malformed)]
            if not rows:
                others = f", but malformed ones such as {malformed[0]}" if malformed else ""
                raise UserError(f"The {split} split of {dataset} has no row in {files[0]}{others}.")
            read[split] = rows, malformed or []
        for split, (rows, malformed) in read.items():
            path = writable_directory(output / dataset, "The data folder") / f"{split}.jsonl"
            _write(path, rows)
            done.append(Prepared(dataset, split, len(rows), path, tuple(malformed)))
    if not done:
        wanted = sorted({task.dataset for task in tasks().values() if task.dataset.split("/")[0] == family})
        raise UserError(
            f"{source} has no {', '.join(_ENDINGS)} file of a split of {', '.join(wanted)}: it needs a folder for "
            "each, with train, validation or test in its files' names."
        )
    return done


def _files_of(dataset: str, source: Path) -> dict[str, list[Path]]:
    """The files of each split of a dataset.

    Raises:
      UserError: those of one split lie in several folders.
    """
    folders, wanted = _folders_of(dataset, source)
    splits = {split for task in tasks().values() if task.dataset == dataset for split in task.splits.values()}
    found: dict[str, dict[Path, list[Path]]] = {}
    for path in sorted({path for folder in folders for path in folder.rglob("*") if path.suffix in _ENDINGS}):
        folder = next(folder for folder in folders if path.is_relative_to(folder))
        name = str(path.relative_to(folder))
        split = max((split for split in splits if _is_called(name, split)), key=len, default=None)
        if split is None and dataset in ("super_glue/axb", "super_glue/axg"):
            split = "test"  # The diagnostics have but one file, named after them.
        if split is None or not wanted <= _words(name):
            continue
        if not path.name.startswith(("dataset_info", "dataset_dict", "state")):
            found.setdefault(split, {}).setdefault(_place(path, folder, split), []).append(path)
    for split, places in found.items():
        _check_one_place(dataset, split, sorted(places), source)
    return {split: [file for files in places.values() for file in files] for split, places in found.items()}


def _folders_of(dataset: str, source: Path) -> tuple[list[Path], set[str]]:
    """Where a dataset's files are, and the words that must be in their names: its own, if no folder is called so."""
    family, _, config = dataset.partition("/")
    folders = [folder for folder in [source, *source.rglob("*")] if folder.is_dir()]
    names = [_simple(name) for name in _FOLDERS.get(dataset, (config or family,))]
    for name in names:
        if called := [folder for folder in folders if _simple(folder.name) == name]:
            return called, set()
    above = [_simple(part) for part in Path(os.path.abspath(source)).parts]
    of_family = next((depth for depth, part in enumerate(above) if part.endswith(_simple(family))), len(above))
    inside = not set(names).isdisjoint(above[of_family:])
    return [source], set() if inside or not config else _words(config)


def _place(file: Path, folder: Path, split: str) -> Path:
    """The folder that holds a split: that of a file called after it, else the innermost that is called so itself."""
    above = [parent for parent in file.parents if parent != folder and parent.is_relative_to(folder)]
    called = [parent for parent in above if _is_called(parent.name, split)]
    return file.parent if _is_called(file.name, split) or not called else called[0]


def _check_one_place(dataset: str, split: str, places: list[Path], source: Path) -> None:
    """Refuses a split in several folders, for they are most likely copies or versions of one another.

    Raises:
      UserError: it is.
    """
    if len(places) == 1:
        return
    # A folder that holds a single split cannot be an input, but the one above it can.
    inputs = [place.parent if place != source and _is_called(place.name, split) else place for place in places[:2]]
    first, second = inputs if inputs[0] != inputs[1] else places[:2]
    nested = first.is_relative_to(second) or second.is_relative_to(first)
    raise UserError(
        f"The {split} split of {dataset} is both in {first} and in {second}: "
        f"{'keep only one of them' if nested else 'give one of them as --input'}."
    )


def _is_called(name: str, split: str) -> bool:
    """Whether a file's or folder's name tells of a split."""
    words = set(re.findall(r"[a-z]+", name.lower()))
    return set(split.split("_")) <= words | ({"validation"} if words & _VALIDATION else set())


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _simple(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _rows(dataset: str, task: TextToTextTask, split: str, file: Path, malformed: list[str] | None) -> Iterator[Row]:
    """The rows of a file; what is wrong with others goes into ``malformed``, without which it is raised."""
    for number, record in _records(file):
        try:
            yield from _checked(dataset, task, split, record)
        except UserError as error:
            if malformed is None:
                raise UserError(f"{file}:{number} {error}; --skip_malformed leaves such records out.") from None
            malformed.append(f"{file}:{number} {error}")


def _checked(dataset: str, task: TextToTextTask, split: str, record: Record) -> Sequence[Row]:
    """The rows of a record.

    Raises:
      UserError: a clause that says what is wrong with it.
    """
    family, _, config = dataset.partition("/")
    read = record()
    try:
        rows = list(superglue_files.rows_of(config, read)) if family == "super_glue" else [dict(read)]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"is not laid out as {dataset} is (at {error})") from None
    for row in rows:
        task.check(row, labelled=split != "test")
    return rows


def _records(file: Path) -> Iterator[tuple[int, Record]]:
    """The records of a file, whatever its kind, each with the number of its line, or of its row where it has none.

    Raises:
      UserError: the file cannot be read.
    """
    import pyarrow

    readers: dict[str, Callable[[Path], pyarrow.Table]] = {".parquet": _parquet, ".arrow": _arrow}
    try:
        if file.suffix in readers:
            rows = _with_bytes(readers[file.suffix](file)).to_pylist()
            yield from ((number, partial(plain, row)) for number, row in enumerate(rows, start=1))
        else:
            yield from ((number, partial(parse_row, line)) for number, line in numbered_lines(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} has text inside of lists or records that is not UTF-8.") from None
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read ({str(error).splitlines()[0]}): is it whole?") from None


def _with_bytes(table: pyarrow.Table) -> pyarrow.Table:
    """A table whose columns of text are bytes, so that a text that is none spoils its own row alone."""
    import pyarrow

    types = pyarrow.types
    texts = {field.name for field in table.schema if types.is_string(field.type) or types.is_large_string(field.type)}
    columns = {name: table[name] for name in table.column_names}
    return pyarrow.table(columns | {name: columns[name].cast(pyarrow.large_binary()) for name in texts})


def _parquet(file: Path) -> pyarrow.Table:
    from pyarrow import parquet

    return parquet.read_table(file)


def _arrow(file: Path) -> pyarrow.Table:
    """An Arrow stream, as Hugging Face's library keeps them, or an Arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            return pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).read_all()


def _write(path: Path, rows: list[Row]) -> None:
    with storage_errors(f"Writing {path}"):
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
