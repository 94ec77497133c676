"""Tasks of labelled rows, as text to text: what a row becomes, and how predictions are scored.

A row is a dictionary as the dataset's publishers have it. A task makes it into examples in plain Python, which tests,
evaluation, inference and training all call; training reads the examples from memory, for these datasets are small.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switch_t5.errors import UserError, closest

Row = Mapping[str, Any]
Scores = dict[str, float]

UNKNOWN = "<unk>"
"""The target of a row whose label is kept secret, as T5 writes it."""

_MODULES = ("superglue", "glue", "question_answering", "summarization")


@dataclasses.dataclass(frozen=True)
class Example:
    """One input with its target.

    Attributes:
      inputs: the text that the model reads.
      targets: the text that it should write.
      row: the row that it was made of.
    """

    inputs: str
    targets: str
    row: Row


@dataclasses.dataclass(frozen=True)
class TextToTextTask:
    """A task.

    Attributes:
      name: T5's.
      dataset: where its rows are, such as ``super_glue/boolq``.
      tfds: the TFDS dataset that has the same rows, its version included.
      examples: a row to its examples; several where several targets are right.
      metrics: examples and the text predicted for each to scores, in percent, higher is better.
      fields: what a row must have.
      target_fields: what it must have besides where its target is known.
      splits: the dataset's splits by the task's: ``train``, ``validation`` and ``test`` where it has them.
      labels: the texts of its labels, in the order of their numbers; None for free text.
      index: the numbers that make a row's ``idx``, by name; empty where it is one number.
      in_the_mean: whether the mean over tasks counts it, as its benchmark does.
      once: tells which examples of a split are asked for the same prediction, of which evaluation keeps the first.
    """

    name: str
    dataset: str
    tfds: str
    examples: Callable[[Row], list[Example]]
    metrics: Callable[[Sequence[Example], Sequence[str]], Scores]
    fields: tuple[str, ...]
    splits: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )
    target_fields: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    index: tuple[str, ...] = ()
    in_the_mean: bool = True
    once: Callable[[Example], object] | None = None

    def inputs(self, row: Row) -> str:
        """The text of a row whose target is not known.

        Raises:
          UserError: a field is missing.
        """
        self.check(row, labelled=False)
        examples = self.examples(row)
        if not examples:
            raise UserError(f"is a row that {self.name} leaves out")
        return examples[0].inputs

    def check(self, row: Row, *, labelled: bool = True) -> None:
        """Checks that a row has the task's fields, of the kinds it knows, and where it is labelled a target.

        Raises:
          UserError: a clause that says what is wrong with the row.
        """
        for field in (*self.fields, *(self.target_fields if labelled else ())):
            if field in row and row[field] is None:
                raise UserError(f"has null in the field {field!r} of {self.dataset}")
            if field not in row:
                has = ", ".join(map(repr, row)) or "none"
                near = closest(field, row).replace(" Did", " (did").replace("?", "?)")
                raise UserError(f"lacks the field {field!r} of {self.dataset}; it has {has}{near}")
        index = row.get("idx")
        numbers = [index.get(part) if isinstance(index, Mapping) else None for part in self.index] or [index]
        if index is not None and not all(isinstance(number, int) for number in numbers):
            wanted = f"a record with the numbers {', '.join(self.index)}" if self.index else "a number"
            raise UserError(f"has the idx {index!r}; in {self.dataset} it is {wanted}")
        label = row.get("label")
        if self.labels is not None and label is not None and label != -1:
            known = range(len(self.labels))
            if not isinstance(label, int) or label not in known:
                raise UserError(f"has the label {label!r}; those of {self.dataset} are {list(known)} or -1 for unknown")
        try:
            examples = self.examples(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"is not laid out as {self.dataset} is ({error})") from None
        if labelled and UNKNOWN in (example.targets for example in examples):
            raise UserError(f"has no answer that {self.name} knows, and only rows of test may lack it")

    def is_secret(self, example: Example) -> bool:
        """Whether an example's answer is not known, so that nothing can be scored."""
        unlabelled = "label" in self.target_fields and example.row.get("label") in (None, -1)
        return unlabelled or example.targets == UNKNOWN

    def to_evaluate(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of a split that are predicted and scored."""
        examples = [example for row in rows for example in self.examples(row)]
        if self.once is None:
            return examples
        first: dict[object, Example] = {}
        for example in examples:
            first.setdefault(self.once(example), example)
        return list(first.values())


@dataclasses.dataclass(frozen=True)
class TextToTextMixture:
    """Tasks in proportion to weights; a task of weight 0 is evaluated alone."""

    name: str
    weights: Mapping[str, float]


@functools.cache
def tasks() -> dict[str, TextToTextTask]:
    """All tasks by name."""
    found: dict[str, TextToTextTask] = {}
    for module in _MODULES:
        found |= {task.name: task for task in importlib.import_module(f"switch_t5.data.{module}").TASKS}
    return found


@functools.cache
def mixtures() -> dict[str, TextToTextMixture]:
    """All mixtures by name."""
    found: dict[str, TextToTextMixture] = {}
    for module in _MODULES:
        found |= {mixture.name: mixture for mixture in importlib.import_module(f"switch_t5.data.{module}").MIXTURES}
    return found


def get_task(name: str) -> TextToTextTask:
    """A task by name.

    Raises:
      UserError: there is none.
    """
    if name not in tasks():
        raise UserError(f"There is no labelled task called {name!r}.{closest(name, tasks())}")
    return tasks()[name]


def task_names_of(name: str) -> tuple[str, ...]:
    """The labelled tasks of a task or mixture; none of another kind."""
    if name in tasks():
        return (name,)
    return tuple(mixtures()[name].weights) if name in mixtures() else ()


def joined(prefix: str, row: Row, keys: Sequence[str] | None = None) -> str:
    """``prefix key: value key: value``, of the keys given or of all but label and idx, sorted."""
    keys = sorted(set(row) - {"label", "idx"}) if keys is None else keys
    return " ".join([prefix, *(f"{key}: {text_of(row, key)}" for key in keys)])


def text_of(row: Row, key: str) -> str:
    """The text of a field.

    Raises:
      TypeError: it has something else.
    """
    if not isinstance(row[key], str):
        raise TypeError(f"its {key!r} is not a text but of type {type(row[key]).__name__}")
    return row[key]


def texts_of(row: Row, key: str) -> list[str]:
    """The texts of a field, of which there may be none.

    Raises:
      TypeError: it has something else.
    """
    if not isinstance(row[key], list | tuple) or not all(isinstance(text, str) for text in row[key]):
        raise TypeError(f"its {key!r} is not a list of texts")
    return list(row[key])


def label_text(row: Row, labels: Sequence[str]) -> str:
    """The text of a row's label; ``<unk>`` where it is -1 or missing."""
    label = row.get("label")
    return UNKNOWN if label is None or int(label) < 0 else labels[int(label)]


def classified(prefix: str, labels: Sequence[str], keys: Sequence[str], row: Row) -> list[Example]:
    """``prefix key: value ...`` to the label's text."""
    return [Example(joined(prefix, row, keys), label_text(row, labels), row)]


def label_numbers(texts: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The numbers of labels by their texts, spaces around them aside; -1 for what is no label."""
    numbers = {label: number for number, label in enumerate(labels)}
    return [numbers.get(text.strip(), -1) for text in texts]
