"""A command's result as JSON: the flag ``--json=PATH`` and what it writes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switch_t5.errors import UserError

STANDARD_OUTPUT = "-"


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json=PATH`` to a command; ``args.json`` is the path, ``-``, or None."""
    parser.add_argument(
        "--json",
        metavar="PATH",
        type=_destination,
        help="write the result to PATH as JSON; - is standard output",
    )


def refuse_empty(args: argparse.Namespace, *flags: str) -> None:
    """Refuses flags that were given without a value, as a shell does where a variable is unset.

    Raises:
      UserError: the first that was.
    """
    for flag in flags:
        if getattr(args, flag) == "":
            raise UserError(f"--{flag} is empty: give it a value, or leave it out.")


def write_json(result: Any, destination: str | None) -> None:
    """Writes a result where the user asked for it: to a file at once and whole, or to standard output.

    Args:
      result: of mappings, sequences, text, numbers and arrays. A number that is not finite becomes null, as
        JSON has no word for it.
      destination: ``args.json``; None writes nothing.

    Raises:
      UserError: the file cannot be written.
    """
    if destination is None:
        return
    text = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"
    if destination == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        _write_whole(Path(destination).resolve(), text)
    except OSError as error:
        raise UserError(f"--json={destination} cannot be written: {error.strerror}.") from None


def _write_whole(path: Path, text: str) -> None:
    """Writes a file such that a reader sees the old one or the new one, never a part."""
    if path.exists() and not path.is_file():  # A device such as /dev/null is written to, never replaced.
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _destination(path: str) -> str:
    """Checks a path before the command's work, rather than after it."""
    if path == STANDARD_OUTPUT:
        return path
    if not path or Path(path).is_dir():
        raise UserError(f"--json={path} is not a file.")
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise UserError(f"--json={path} cannot be written: there is no folder {str(folder)!r}.")
    return path


def _plain(value: Any) -> Any:
    """Returns ``value`` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # An array or a scalar of NumPy or JAX.
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
