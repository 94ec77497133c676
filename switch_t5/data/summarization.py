"""Summaries: CNN/DailyMail as T5 has it, and XSum likewise; scored by ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from switch_t5.data.metrics_summarization import rouge
from switch_t5.data.text_to_text import UNKNOWN, Example, Row, Scores, TextToTextTask, text_of


def summary(document: str, abstract: str, row: Row) -> list[Example]:
    """``summarize: document`` to the abstract; the names of the row's fields are given."""
    return [
        Example(f"summarize: {text_of(row, document)}", text_of(row, abstract) if row.get(abstract) else UNKNOWN, row)
    ]


def rouge_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``rouge1``, ``rouge2`` and ``rougeLsum``."""
    return rouge([example.targets for example in examples], predictions)


def _task(name: str, tfds: str, document: str, abstract: str) -> TextToTextTask:
    return TextToTextTask(
        name=name,
        dataset=tfds.split(":")[0],
        tfds=tfds,
        examples=partial(summary, document, abstract),
        metrics=rouge_scores,
        fields=(document,),
        target_fields=(abstract,),
    )


TASKS = (
    _task("cnn_dailymail_v002", "cnn_dailymail:3.4.0", "article", "highlights"),
    _task("xsum_v110", "xsum:1.1.0", "document", "summary"),
)

MIXTURES = ()
