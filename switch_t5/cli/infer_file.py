"""Answers to a file of inputs, a JSON line for each; an output file that was begun is gone on with.

Inputs are decoded a chunk of batches at a time, and their lines written in the order of the inputs. A restart keeps the
chunks that are whole and goes on with the next: it decodes the same batches as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from switch_t5.data.rows import decoded, parse_row
from switch_t5.errors import UserError
from switch_t5.storage import storage_errors

if TYPE_CHECKING:
    from switch_t5.cli.build import Run

STANDARD = "-"

_BATCHES_AT_ONCE = 8
"""Batches decoded between writes: among so many inputs those of similar length share a batch."""


@dataclasses.dataclass
class Counts:
    """What was met on the way."""

    inputs: int = 0
    malformed: int = 0
    truncated: int = 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses flags that do not fit, before the model is built.

    Raises:
      UserError: the first that does not.
    """
    if args.text:
        raise UserError("--text and --input exclude each other: give one of them.")
    if args.json is not None:
        raise UserError("--json is for filled-in texts: the answers to --input are JSON lines, written to --output.")
    if args.field is not None and args.task is not None:
        raise UserError("--field and --task exclude each other: a task takes its own fields of a row.")
    for flag in ("field", "task"):
        if getattr(args, flag) is not None and args.input.endswith(".txt"):
            raise UserError(f"--{flag} is of JSON lines: the lines of {args.input} are texts as they stand.")
    if args.input != STANDARD and not Path(args.input).is_file():
        raise UserError(f"--input={args.input} is not a file.")
    if args.output is not None:
        _check_output(Path(args.output), args.input)


def _check_output(output: Path, source: str) -> None:
    if source == STANDARD:
        raise UserError("--output is resumable, which standard input is not: redirect standard output instead.")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder: name a file.")
    if output.absolute() == Path(source).absolute():
        raise UserError(f"--output={output} is the input: name another file.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output={output} cannot be written: there is no folder {output.parent}.")


def infer_file(run: Run, args: argparse.Namespace) -> int:
    """Decodes every input, writes a line for each, and returns 0."""
    from switch_t5.cli.processes import as_the_first, is_first
    from switch_t5.cli.trained import load_params
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.truncation import cut_and_ended, is_cut

    params, step = load_params(run, args.checkpoint or run.spec.train.model_dir)
    vocabulary, predictor, counts = get_vocabulary(run.spec.data), run.predictor, Counts()
    to_text = _to_text(args.task, _field(args))
    described = _description(run, args, step)
    chunk = _BATCHES_AT_ONCE * predictor.batch_size
    with _Lines(args.output, described | {"chunk": chunk}, active=is_first()) as lines:
        done = as_the_first(lines.done)
        source = _inputs(args.input, to_text, args.skip_malformed, counts)
        for _, text in itertools.islice(source, done):
            counts.truncated += is_cut(vocabulary.encode(text), predictor.inputs_length)
        for rows in _chunks(source, chunk):
            encoded = [vocabulary.encode(text) for _, text in rows]
            counts.truncated += sum(is_cut(tokens, predictor.inputs_length) for tokens in encoded)
            encoded = [cut_and_ended(vocabulary, tokens, predictor.inputs_length) for tokens in encoded]
            for (number, text), outputs in zip(
                rows, predictor(params, encoded, [number for number, _ in rows]), strict=True
            ):
                answers = [
                    {
                        "text": vocabulary.decode(output.tokens.tolist()),
                        "log_prob": output.log_prob,
                        "score": output.score,
                    }
                    for output in outputs
                ]
                lines.write({"index": number, "inputs": text, "outputs": answers})
            lines.flush()
    notes = [f"{counts.inputs} inputs"]
    notes += [f"{counts.truncated} cut to {predictor.inputs_length} tokens"] if counts.truncated else []
    notes += [f"{counts.malformed} malformed lines left out"] if counts.malformed else []
    notes += [f"{done} were done before"] if done else []
    print(", ".join(notes) + ".", file=sys.stderr)
    return 0


def _field(args: argparse.Namespace) -> str:
    return args.field or "inputs"


def _to_text(task: str | None, field: str) -> Callable[[dict[str, Any]], str]:
    """What makes a row's text: its field, or what a task makes of it.

    Raises:
      UserError: there is no such task, or it has no rows.
    """
    if task is not None:
        from switch_t5.data.text_to_text import get_task

        return get_task(task).inputs

    def text(row: dict[str, Any]) -> str:
        if not isinstance(row.get(field), str):
            has = ", ".join(map(repr, row)) or "none"
            raise UserError(f"lacks the text field {field!r}; it has {has}")
        return row[field]

    return text


def _inputs(
    path: str, to_text: Callable[[dict[str, Any]], str], skip: bool, counts: Counts
) -> Iterator[tuple[int, str]]:
    """Each input's number, from 0, and its text.

    Raises:
      UserError: a line cannot be read, and is not to be skipped.
    """
    with sys.stdin.buffer if path == STANDARD else open(path, "rb") as file:
        plain = path.endswith(".txt")
        for number, line in enumerate(file, start=1):
            try:
                text = _text_of(line, plain, to_text)
            except UserError as error:
                if not skip:
                    where = "standard input" if path == STANDARD else path
                    raise UserError(f"{where}:{number} {error}; --skip_malformed leaves such lines out.") from None
                counts.malformed += 1
                continue
            counts.inputs += 1
            yield counts.inputs - 1, text


def _text_of(line: bytes, plain: bool, to_text: Callable[[dict[str, Any]], str]) -> str:
    if not plain:
        return to_text(parse_row(line))
    if not line.strip():
        raise UserError("is empty")
    return decoded(line).rstrip("\r\n")


def _chunks(source: Iterator[tuple[int, str]], size: int) -> Iterator[Sequence[tuple[int, str]]]:
    chunk = []
    for item in source:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _description(run: Run, args: argparse.Namespace, step: int) -> dict[str, Any]:
    """What decides the answers: an output file that was begun with something else is not gone on with."""
    from switch_t5.checkpoint.folder import is_url
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.vocabularies import vocabulary_fingerprint

    checkpoint = args.checkpoint or run.spec.train.model_dir
    return {
        "checkpoint": checkpoint if is_url(checkpoint) else str(Path(checkpoint).absolute()),
        "step": step,
        "vocabulary": vocabulary_fingerprint(get_vocabulary(run.spec.data)),
        "input": None if args.input == STANDARD else _digest(Path(args.input)),
        "task": args.task,
        "field": _field(args),
        "lengths": dict(run.spec.data.task_feature_lengths),
        "decoding": {
            name: value for name, value in dataclasses.asdict(run.spec.decoding).items() if name != "batch_size"
        },
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Lines:
    """The file of answers, or standard output.

    Beside it stands ``<name>.origin``, which says of what it holds the answers. Of several processes one is active.
    """

    def __init__(self, path: str | None, origin: dict[str, Any], *, active: bool) -> None:
        self.done = 0
        self._active = active
        self._path = None if path is None or not active else Path(path)
        self._origin = origin
        self._file: BinaryIO = sys.stdout.buffer

    def __enter__(self) -> _Lines:
        if self._path is None:
            return self
        origin = self._path.with_name(self._path.name + ".origin")
        text = json.dumps(self._origin, indent=1)
        with storage_errors(f"Writing {self._path}"):
            if self._path.exists() and self._path.stat().st_size:
                if not origin.exists() or origin.read_text() != text:
                    raise UserError(
                        f"{self._path} holds the answers to another input, checkpoint or decoding"
                        f"{self._differing(origin)}: name another --output, or remove it."
                    )
                self._take_back_part_of_a_chunk()
            else:
                origin.write_text(text)
            self._file = open(self._path, "ab")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._path is not None:
            self._file.close()

    def _differing(self, origin: Path) -> str:
        """Which entries are others, in brackets; nothing where the file that says it is lost or torn."""
        try:
            saved = json.loads(origin.read_text())
            return f" (another {', '.join(key for key in self._origin if saved.get(key) != self._origin[key])})"
        except (OSError, ValueError, AttributeError):
            return ""

    def _take_back_part_of_a_chunk(self) -> None:
        assert self._path is not None
        with open(self._path, "r+b") as file:
            at, whole = 0, 0
            for number, line in enumerate(file, start=1):
                at += len(line)
                if number % self._origin["chunk"] == 0 and line.endswith(b"\n"):
                    self.done, whole = number, at
            file.truncate(whole)

    def write(self, answer: dict[str, Any]) -> None:
        """Appends a line."""
        if not self._active:
            return
        with storage_errors(f"Writing {self._path or 'standard output'}"):
            self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")

    def flush(self) -> None:
        """Hands over what was written to the operating system, and a file to the disk."""
        with storage_errors(f"Writing {self._path or 'standard output'}"):
            self._file.flush()
            if self._path is not None:
                os.fsync(self._file.fileno())
