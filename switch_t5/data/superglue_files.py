"""SuperGLUE's own files, as the benchmark distributes them, to rows; and its submission files.

The benchmark nests what belongs together (a paragraph, its questions, their answers) and writes labels as words. A row
here is what TFDS and Hugging Face have: flat, with labels by number. Other publishers' names of the same fields, such
as GLUE's for RTE, are mended too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switch_t5.data.superglue import BOOLEANS, CHOICES, COMMITMENT, ENTAILMENT
from switch_t5.data.text_to_text import Example, label_numbers
from switch_t5.errors import UserError
from switch_t5.storage import storage_errors, writable_directory

FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "axb": "AX-b",
    "axg": "AX-g",
}
"""The benchmark's folder, and the name of its submission file, for each of its tasks."""

_LABELS = {"cb": COMMITMENT, "rte": ENTAILMENT, "axb": ENTAILMENT, "axg": ENTAILMENT}
_RENAMED = {
    "boolq": {"answer": "label"},
    "rte": {"sentence1": "premise", "sentence2": "hypothesis"},
}


def rows_of(config: str, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one line of a file.

    Args:
      config: such as ``boolq``.
      record: the line, in the benchmark's layout or already a row.
    """
    if config == "multirc" and isinstance(record.get("passage"), Mapping):
        yield from _multirc(record)
        return
    if config == "record" and isinstance(record.get("passage"), Mapping):
        yield from _record(record)
        return
    row = dict(record)
    if config == "wsc" and isinstance(row.get("target"), Mapping):
        row |= row.pop("target")
        row |= {f"{span}_text": _as_in_text(row, span) for span in ("span1", "span2")}
    for old, new in _RENAMED.get(config, {}).items():
        if old in row and new not in row:
            row[new] = row.pop(old)
    if "label" in row:
        row["label"] = label_number(row["label"], _LABELS.get(config, BOOLEANS))
    yield row


def _as_in_text(row: Mapping[str, Any], span: str) -> str:
    """A span as WSC's text has it, where the file has it in another case, or with a full stop or a line's end."""
    said, place = row[f"{span}_text"], row["text"].split()[row[f"{span}_index"]]
    if said in row["text"]:
        return said
    first = said[:1].lower() if place[:1].islower() else said[:1].upper()
    return (first + said[1:]).rstrip(".").replace("\n", " ")


def label_number(label: Any, labels: Sequence[str]) -> Any:
    """A label as a number: of a word its place, of True 1; what is neither is left to the row's check."""
    if isinstance(label, bool):
        return int(label)
    if label is None:
        return -1
    if isinstance(label, str):
        return labels.index(label) if label in labels else label
    return label


def _multirc(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    passage = record["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            index = {"paragraph": record["idx"], "question": question["idx"], "answer": answer["idx"]}
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": index,
                "label": label_number(answer.get("label"), BOOLEANS),
            }


def _record(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    text = record["passage"]["text"]
    # A span's end is its last character; an entity that is named twice is one entity, and TFDS sorts them.
    entities = sorted({text[span["start"] : span["end"] + 1] for span in record["passage"]["entities"]})
    for query in record["qas"]:
        answers = sorted({answer["text"] for answer in query.get("answers", ())})
        index = {"passage": record["idx"], "query": query["idx"]}
        yield {"passage": text, "query": query["query"], "entities": entities, "answers": answers, "idx": index}


def submission_lines(config: str, examples: Sequence[Example], predictions: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of one task's submission file, as the benchmark's server reads them.

    Every input needs a label there, so one that was not told in the task's words takes the first.

    Args:
      config: such as ``boolq``.
      examples: of the test split, in its order.
      predictions: the text for each.
    """
    if config == "multirc":
        return _nested_answers(examples, predictions)
    if config == "record":
        pairs = zip(examples, predictions, strict=True)
        return [{"idx": example.row["idx"]["query"], "label": text} for example, text in pairs]
    if config == "wsc":
        from switch_t5.data.superglue import refers_to

        said = [refers_to(example.targets, text) for example, text in zip(examples, predictions, strict=True)]
        labels: list[Any] = [BOOLEANS[max(number, 0)] for number in said]
    elif config == "copa":
        labels = [max(number, 0) for number in label_numbers(predictions, CHOICES)]
    else:
        words = _LABELS.get(config, BOOLEANS)
        labels = [words[max(number, 0)] for number in label_numbers(predictions, words)]
        if words is BOOLEANS:
            labels = [label.lower() for label in labels]
    return [{"idx": example.row.get("idx"), "label": label} for example, label in zip(examples, labels, strict=True)]


def _nested_answers(examples: Sequence[Example], predictions: Sequence[str]) -> list[dict[str, Any]]:
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    numbers = label_numbers(predictions, BOOLEANS)
    for example, number in zip(examples, numbers, strict=True):
        index = example.row["idx"]
        questions = paragraphs.setdefault(index["paragraph"], {})
        questions.setdefault(index["question"], []).append({"idx": index["answer"], "label": max(number, 0)})
    return [
        {
            "idx": paragraph,
            "passage": {"questions": [{"idx": number, "answers": answers} for number, answers in questions.items()]},
        }
        for paragraph, questions in paragraphs.items()
    ]


def write_submission(folder: Path, config: str, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Writes one task's submission file; returns its path.

    Raises:
      UserError: the folder cannot be written, or a row has no number of its own.
    """
    numbers = [line["idx"] for line in lines]
    if None in numbers:
        raise UserError(f"The rows of {config} have no 'idx', which a submission names them by.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"Some rows of {config} have the same 'idx', which a submission names them by.")
    path = writable_directory(folder, "The submission's folder") / f"{FOLDERS[config]}.jsonl"
    with storage_errors(f"Writing {path}"):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
