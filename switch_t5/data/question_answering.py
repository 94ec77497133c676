"""Question answering, open book and closed, and the tasks of choices among the paper's table 5.

SQuAD's text is T5's, and so are the closed-book tasks' texts and scores (Roberts et al. 2020), but for their splits: T5
holds a tenth of the training rows out for validation, while here validation is the published one. For ARC, Winogrande
and ANLI no T5 code is published: their text follows SuperGLUE's pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from switch_t5.data.metrics_classification import label_scores
from switch_t5.data.metrics_question_answering import answer_scores, normalized_trivia
from switch_t5.data.text_to_text import (
    UNKNOWN,
    Example,
    Row,
    Scores,
    TextToTextTask,
    joined,
    label_text,
    text_of,
    texts_of,
)

_ANLI = ("entailment", "neutral", "contradiction")
_TRAIN_VALIDATION = {"train": "train", "validation": "validation"}


_SPACES = re.compile(r"[\t\n\f\r ]+")


def padded_punctuation(text: str) -> str:
    """Spaces around all but ASCII letters, digits and ``_``, and none twice, as T5 writes SQuAD.

    T5's regular expressions are RE2's, which know the classes of ASCII alone: accented letters are padded too.
    """
    return _SPACES.sub(" ", re.sub(r"[^0-9A-Za-z_]", r" \g<0> ", text))


def squad_answers(row: Row) -> list[str]:
    """The right answers, as the text has them."""
    return [padded_punctuation(answer) for answer in texts_of(row.get("answers") or {"text": ()}, "text")]


def squad(row: Row) -> list[Example]:
    """A question about a paragraph, to its first answer."""
    shown = {key: padded_punctuation(text_of(row, key)) for key in ("question", "context")}
    inputs = _SPACES.sub(" ", f"question: {shown['question']} context: {shown['context']}")
    return [Example(inputs, (squad_answers(row) or [UNKNOWN])[0], row)]


def squad_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``em`` and ``f1``, the best over a question's answers."""
    return answer_scores([squad_answers(example.row) for example in examples], predictions)


def closed_book_answers(row: Row) -> list[str]:
    """All right answers, whatever the dataset calls them."""
    key = "answer" if "answer" in row else "answers"
    found: Any = row.get(key)
    if isinstance(found, dict):
        aliases = texts_of(found, "aliases") if "aliases" in found else []
        return list(dict.fromkeys([text_of(found, "value"), *aliases]))
    return [found] if isinstance(found, str) else texts_of(row, key) if found else []


def closed_book(prefix: str, row: Row) -> list[Example]:
    """A question without a paragraph, to its first answer."""
    return [Example(f"{prefix} question: {text_of(row, 'question')}", (closed_book_answers(row) or [UNKNOWN])[0], row)]


def closed_book_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``em`` and ``f1``, the best over a question's answers, normalized as TriviaQA's."""
    return answer_scores([closed_book_answers(example.row) for example in examples], predictions, normalized_trivia)


def arc(row: Row) -> list[Example]:
    """A question with its choices, to the right one's name."""
    texts, marks = texts_of(row["choices"], "text"), texts_of(row["choices"], "label")
    shown = {f"choice{number}": text for number, text in enumerate(texts, start=1)}
    shown |= {"question": text_of(row, "question")}
    key = row.get("answerKey")
    target = f"choice{marks.index(key) + 1}" if key in marks else UNKNOWN
    return [Example(joined("arc", shown), target, row)]


def winogrande(row: Row) -> list[Example]:
    """A sentence with a blank and what may fill it, to the right one's name."""
    label = row.get("label")
    number = int(row.get("answer") or 0) if label is None else int(label) + 1
    target = f"option{number}" if number in (1, 2) else UNKNOWN
    return [Example(joined("winogrande", row, ("option1", "option2", "sentence")), target, row)]


def anli(row: Row) -> list[Example]:
    """Adversarial NLI; TFDS calls the premise context."""
    shown = {"hypothesis": row["hypothesis"], "premise": text_of(row, "context" if "context" in row else "premise")}
    return [Example(joined("anli", shown), label_text(row, _ANLI), row)]


def _closed_book(name: str, dataset: str, tfds: str, prefix: str, answer: str) -> TextToTextTask:
    return TextToTextTask(
        name=name,
        dataset=dataset,
        tfds=tfds,
        examples=partial(closed_book, prefix),
        metrics=closed_book_scores,
        fields=("question",),
        target_fields=(answer,),
        splits=_TRAIN_VALIDATION,
    )


def _choices(
    name: str,
    dataset: str,
    tfds: str,
    examples: Callable[[Row], list[Example]],
    labels: tuple[str, ...],
    fields: tuple[str, ...],
) -> TextToTextTask:
    return TextToTextTask(name, dataset, tfds, examples, partial(label_scores, labels), fields, labels=labels)


_ARC_CHOICES = tuple(f"choice{number}" for number in range(1, 6))
_ARC_FIELDS = ("question", "choices")

TASKS = (
    TextToTextTask(
        name="squad_v010_allanswers",
        dataset="squad",
        tfds="squad/v1.1:3.0.0",
        examples=squad,
        metrics=squad_scores,
        fields=("question", "context"),
        target_fields=("answers",),
        splits=_TRAIN_VALIDATION,
    ),
    *(_choices(f"anli_r{n}", f"anli/r{n}", f"anli/r{n}:0.1.0", anli, _ANLI, ("hypothesis",)) for n in (1, 2, 3)),
    _choices("arc_easy", "ai2_arc/ARC-Easy", "ai2_arc/ARC-Easy:1.0.0", arc, _ARC_CHOICES, _ARC_FIELDS),
    _choices("arc_challenge", "ai2_arc/ARC-Challenge", "ai2_arc/ARC-Challenge:1.0.0", arc, _ARC_CHOICES, _ARC_FIELDS),
    _choices(
        "winogrande",
        "winogrande",
        "winogrande:1.1.0",
        winogrande,
        ("option1", "option2"),
        ("sentence", "option1", "option2"),
    ),
    _closed_book("natural_questions_open", "natural_questions_open", "natural_questions_open:1.0.0", "nq", "answer"),
    TextToTextTask(
        name="web_questions_open",
        dataset="web_questions",
        tfds="web_questions:1.0.0",
        examples=partial(closed_book, "wq"),
        metrics=closed_book_scores,
        fields=("question",),
        target_fields=("answers",),
        splits={"train": "train", "validation": "test"},
    ),
    _closed_book("trivia_qa_open", "trivia_qa", "trivia_qa/unfiltered.nocontext:1.1.0", "trivia_qa", "answer"),
)

MIXTURES = ()
