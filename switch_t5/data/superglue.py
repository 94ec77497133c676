"""SuperGLUE (Wang et al. 2019) as T5 writes and scores it.

Source: Raffel et al. 2020, section 2.4 and appendix D; names and mixing weights are T5's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from switch_t5.data.metrics_classification import accuracy, exact_match_by_group, f1, label_scores, mean_f1
from switch_t5.data.metrics_question_answering import answer_scores
from switch_t5.data.text_to_text import (
    UNKNOWN,
    Example,
    Row,
    Scores,
    TextToTextMixture,
    TextToTextTask,
    classified,
    joined,
    label_numbers,
    label_text,
    text_of,
    texts_of,
)

BOOLEANS = ("False", "True")
ENTAILMENT = ("entailment", "not_entailment")
COMMITMENT = ("entailment", "contradiction", "neutral")
CHOICES = ("choice1", "choice2")

_DETERMINERS = frozenset(
    [
        *("a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some"),
        *("that", "the", "their", "these", "this", "those", "which", "whose", "your"),
    ]
)
_MENDED_WSC = {
    "The boy continued to whip the pony , and eventually the pony threw him over. John laughed out quite loud. "
    '"Good for him," he said. ': ('"Good for him," he said. ', '"Good for *{}* ," he said.'),
    "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the magic pebble in an iron safe "
    ". Some day they might want to use it , but really for now, what more could they wish for?": (
        "use it ,",
        "use *{}* ,",
    ),
}
"""The two texts of WSC whose ``span2_index`` is wrong, and what T5 writes for a part of each, with the pronoun."""

_SENTENCE_HIGHLIGHT = re.compile(r"([.?!\"'])\n@highlight\n")


def diagnostic(row: Row) -> list[Example]:
    """The broad-coverage diagnostic, whose sentences are named as those of GLUE, as RTE."""
    renamed = {"premise": text_of(row, "sentence1"), "hypothesis": text_of(row, "sentence2"), "label": row.get("label")}
    return [Example(joined("rte", renamed, ("hypothesis", "premise")), label_text(renamed, ENTAILMENT), row)]


def multirc(row: Row) -> list[Example]:
    """An answer to a question about a paragraph, right or wrong; the paragraph's markup goes."""
    keys = ("question", "answer", "paragraph")
    plain = {key: re.sub(r"</?b>", "", text_of(row, key).replace("<br>", " ")) for key in keys}
    return [Example(joined("multirc", plain, keys), label_text(row, BOOLEANS), row)]


def record(row: Row) -> list[Example]:
    """A query with a blank and the entities that may fill it; an example for each that does."""
    passage = _SENTENCE_HIGHLIGHT.sub(r"\1 ", text_of(row, "passage")).replace("\n@highlight\n", ". ")
    shown = {"query": row["query"], "entities": ", ".join(texts_of(row, "entities")), "passage": passage}
    inputs = joined("record", shown, ("query", "entities", "passage"))
    answers = texts_of(row, "answers") if row.get("answers") else [UNKNOWN]
    return [Example(inputs, answer, row) for answer in answers]


def wsc(row: Row, *, only_true: bool = False) -> list[Example]:
    """The text with its pronoun between stars, to the candidate's text.

    Args:
      row: of WSC.
      only_true: leaves out rows whose candidate is not what the pronoun means, of which nothing can be learned.
    """
    if only_true and row.get("label") is not None and int(row["label"]) != 1:
        return []
    text, pronoun = text_of(row, "text"), text_of(row, "span2_text")
    if text in _MENDED_WSC:
        part, mended = _MENDED_WSC[text]
        starred = text.replace(part, mended.format(pronoun))
    else:
        words = text.split(" ")
        word = words[row["span2_index"]]
        if pronoun not in word:
            raise ValueError(f"the word at span2_index is {word!r}, not {pronoun!r}")
        # Whatever is written at the pronoun, such as a comma, stays.
        words[row["span2_index"]] = word.replace(pronoun, f"*{pronoun}*", 1)
        starred = " ".join(words)
    return [Example(f"wsc: {starred}", text_of(row, "span1_text"), row)]


def dpr(row: Row) -> list[Example]:
    """Definite Pronoun Resolution as WSC: the first occurrence of the pronoun is the one in question.

    As in T5 it is looked for between a space and a space, full stop or comma; where it is never so, nothing is starred.
    """
    pronoun = re.compile(rf" ({re.escape(text_of(row, 'pronoun'))})( |\.|,)")
    starred = pronoun.sub(r" *\1*\2", text_of(row, "sentence"), count=1)
    return [Example(f"wsc: {starred}", label_text(row, texts_of(row, "candidates")), row)]


def refers_to(candidate: str, prediction: str) -> int:
    """1 where a predicted text means a candidate, one having all the words of the other, determiners aside; else 0.

    A prediction without such words is -1, which is no label: it means neither.
    """

    def words(text: str) -> set[str]:
        return {word for word in text.strip().lower().split(" ") if word and word not in _DETERMINERS}

    right, said = words(candidate), words(prediction)
    if not said:
        return -1
    alike = ("'" in "".join(said)) == ("'" in "".join(right))
    return int(alike and (said <= right or right <= said))


def commitment_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``mean_3class_f1`` and ``accuracy``."""
    targets = label_numbers([example.targets for example in examples], COMMITMENT)
    said = label_numbers(predictions, COMMITMENT)
    return {"mean_3class_f1": mean_f1(targets, said, 3), "accuracy": accuracy(targets, said)}


def multirc_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``f1`` over all answers, and ``exact_match``: of questions whose answers are all told right."""
    targets = label_numbers([example.targets for example in examples], BOOLEANS)
    said = label_numbers(predictions, BOOLEANS)
    questions = [(example.row["idx"]["paragraph"], example.row["idx"]["question"]) for example in examples]
    return {"f1": f1(targets, said), "exact_match": exact_match_by_group(targets, said, questions)}


def record_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``em`` and ``f1``, the best over a query's answers."""
    return answer_scores([example.row.get("answers") or [] for example in examples], predictions)


def wsc_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``accuracy`` of whether the text predicted means the candidate."""
    said = [refers_to(example.targets, text) for example, text in zip(examples, predictions, strict=True)]
    return {"accuracy": accuracy([int(example.row["label"]) for example in examples], said)}


def text_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``accuracy`` of texts that are the target's to the letter."""
    said = [int(example.targets == text) for example, text in zip(examples, predictions, strict=True)]
    return {"accuracy": accuracy([1] * len(said), said)}


def _task(short: str, prefix: str, labels: tuple[str, ...], keys: tuple[str, ...]) -> TextToTextTask:
    return TextToTextTask(
        name=f"super_glue_{short}_v102",
        dataset=f"super_glue/{short}",
        tfds=f"super_glue/{short}:1.0.2",
        examples=partial(classified, prefix, labels, keys),
        metrics=commitment_scores if short == "cb" else partial(label_scores, labels),
        fields=keys,
        target_fields=("label",),
        labels=labels,
    )


_PREMISE = ("hypothesis", "premise")
_TEST = {"test": "test"}
_WSC = {
    "dataset": "super_glue/wsc",
    "tfds": "super_glue/wsc.fixed:1.0.2",
    "metrics": wsc_scores,
    "fields": ("text", "span1_text", "span2_text", "span2_index"),
    "target_fields": ("label",),
    "labels": BOOLEANS,
}

TASKS = (
    _task("boolq", "boolq", BOOLEANS, ("passage", "question")),
    _task("cb", "cb", COMMITMENT, _PREMISE),
    _task("copa", "copa", CHOICES, ("choice1", "choice2", "premise", "question")),
    TextToTextTask(
        name="super_glue_multirc_v102",
        dataset="super_glue/multirc",
        tfds="super_glue/multirc:1.0.2",
        examples=multirc,
        metrics=multirc_scores,
        fields=("question", "answer", "paragraph"),
        target_fields=("idx", "label"),
        labels=BOOLEANS,
        index=("paragraph", "question", "answer"),
    ),
    TextToTextTask(
        name="super_glue_record_v102",
        dataset="super_glue/record",
        tfds="super_glue/record:1.0.2",
        examples=record,
        metrics=record_scores,
        fields=("passage", "query", "entities"),
        target_fields=("answers",),
        index=("passage", "query"),
        once=lambda example: tuple((example.row.get("idx") or example.row)[key] for key in ("passage", "query")),
    ),
    _task("rte", "rte", ENTAILMENT, _PREMISE),
    _task("wic", "wic", BOOLEANS, ("sentence1", "sentence2", "word")),
    TextToTextTask(
        name="super_glue_wsc_v102_simple_train",
        examples=partial(wsc, only_true=True),
        splits={"train": "train"},
        **_WSC,
    ),
    TextToTextTask(
        name="super_glue_wsc_v102_simple_eval",
        examples=wsc,
        splits={"validation": "validation", "test": "test"},
        **_WSC,
    ),
    TextToTextTask(
        name="super_glue_axb_v102",
        dataset="super_glue/axb",
        tfds="super_glue/axb:1.0.2",
        examples=diagnostic,
        metrics=partial(label_scores, ENTAILMENT),
        fields=("sentence1", "sentence2"),
        target_fields=("label",),
        splits=_TEST,
        labels=ENTAILMENT,
    ),
    TextToTextTask(
        name="super_glue_axg_v102",
        dataset="super_glue/axg",
        tfds="super_glue/axg:1.0.2",
        examples=partial(classified, "rte", ENTAILMENT, _PREMISE),
        metrics=partial(label_scores, ENTAILMENT),
        fields=_PREMISE,
        target_fields=("label",),
        splits=_TEST,
        labels=ENTAILMENT,
    ),
    TextToTextTask(
        name="dpr_v001_simple",
        dataset="definite_pronoun_resolution",
        tfds="definite_pronoun_resolution/plain_text:1.1.0",
        examples=dpr,
        metrics=text_scores,
        fields=("sentence", "pronoun", "candidates"),
        target_fields=("label",),
        in_the_mean=False,
        splits={"train": "train", "validation": "test"},
    ),
)

MIXTURES = (
    TextToTextMixture(
        "super_glue_v102_proportional",
        {
            "dpr_v001_simple": 1322,
            "super_glue_wsc_v102_simple_train": 259,
            "super_glue_wsc_v102_simple_eval": 0,
            "super_glue_boolq_v102": 9427,
            "super_glue_cb_v102": 250,
            "super_glue_copa_v102": 400,
            "super_glue_multirc_v102": 27243,
            "super_glue_record_v102": 138854,
            "super_glue_rte_v102": 2490,
            "super_glue_wic_v102": 5428,
        },
    ),
)
