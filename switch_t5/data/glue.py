"""GLUE (Wang et al. 2018) as T5 writes and scores it; WNLI is left out, as T5 leaves it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from switch_t5.data.metrics_classification import accuracy, correlations, f1, matthews_correlation
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
)


def similarity(row: Row) -> list[Example]:
    """STS-B: the similarity from 0 to 5, rounded to 0.2, as text."""
    label = row.get("label")
    if label is not None and label != -1 and not 0 <= label <= 5:
        raise ValueError(f"a similarity of {label!r} is not from 0 to 5")
    # T5 multiplies and divides by 5: a half-way similarity goes to the even fifth.
    target = UNKNOWN if label is None or label < 0 else f"{round(float(label) * 5) / 5:.1f}"
    return [Example(joined("stsb", row, ("sentence1", "sentence2")), target, row)]


def similarity_scores(examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """Pearson's and Spearman's correlation of the rounded similarities; what is no number counts as -1."""
    return correlations([float(example.targets) for example in examples], [_number(text) for text in predictions])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def scores(
    labels: tuple[str, ...], kinds: tuple[str, ...], examples: Sequence[Example], predictions: Sequence[str]
) -> Scores:
    """The metrics named, of ``accuracy``, ``f1`` and ``matthews_corrcoef``."""
    targets = label_numbers([example.targets for example in examples], labels)
    said = label_numbers(predictions, labels)
    metrics = {"accuracy": accuracy, "f1": f1, "matthews_corrcoef": matthews_correlation}
    return {kind: metrics[kind](targets, said) for kind in kinds}


def _task(
    short: str,
    labels: tuple[str, ...],
    keys: tuple[str, ...],
    kinds: tuple[str, ...] = ("accuracy",),
    *,
    config: str | None = None,
    prefix: str | None = None,
    splits: dict[str, str] | None = None,
) -> TextToTextTask:
    config = config or short
    return TextToTextTask(
        name=f"glue_{short}_v002",
        dataset=f"glue/{config}",
        tfds=f"glue/{config}:2.0.0",
        examples=partial(classified, prefix or short, labels, keys),
        metrics=partial(scores, labels, kinds),
        fields=keys,
        target_fields=("label",),
        splits=splits or {"train": "train", "validation": "validation", "test": "test"},
        labels=labels,
    )


_PAIR = ("sentence1", "sentence2")
_INFERENCE = ("entailment", "neutral", "contradiction")
_TWO = ("entailment", "not_entailment")
_DUPLICATE = ("not_duplicate", "duplicate")
_mnli = partial(_task, config="mnli", prefix="mnli")
_MNLI_KEYS = ("hypothesis", "premise")

TASKS = (
    _task("cola", ("unacceptable", "acceptable"), ("sentence",), ("matthews_corrcoef",)),
    _task("sst2", ("negative", "positive"), ("sentence",)),
    _task("mrpc", ("not_equivalent", "equivalent"), _PAIR, ("f1", "accuracy")),
    _task("qqp", _DUPLICATE, ("question1", "question2"), ("f1", "accuracy")),
    TextToTextTask(
        name="glue_stsb_v002",
        dataset="glue/stsb",
        tfds="glue/stsb:2.0.0",
        examples=similarity,
        metrics=similarity_scores,
        fields=_PAIR,
        target_fields=("label",),
    ),
    _mnli("mnli", _INFERENCE, _MNLI_KEYS, splits={"train": "train"}),
    _mnli(
        "mnli_matched",
        _INFERENCE,
        _MNLI_KEYS,
        splits={"validation": "validation_matched", "test": "test_matched"},
    ),
    _mnli(
        "mnli_mismatched",
        _INFERENCE,
        _MNLI_KEYS,
        splits={"validation": "validation_mismatched", "test": "test_mismatched"},
    ),
    _task("qnli", _TWO, ("question", "sentence")),
    _task("rte", _TWO, _PAIR),
)

MIXTURES = (
    TextToTextMixture(
        "glue_v002_proportional",
        {
            "glue_cola_v002": 8551,
            "glue_sst2_v002": 67349,
            "glue_mrpc_v002": 3668,
            "glue_qqp_v002": 363849,
            "glue_stsb_v002": 5749,
            "glue_mnli_v002": 392702,
            "glue_mnli_matched_v002": 0,
            "glue_mnli_mismatched_v002": 0,
            "glue_qnli_v002": 104743,
            "glue_rte_v002": 2490,
        },
    ),
)
