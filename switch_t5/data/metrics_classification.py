"""Scores of labels, in percent. A prediction that is no label is wrong, whatever the label.

The metrics are scikit-learn's and SciPy's, imported when one is computed.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from switch_t5.data.text_to_text import Example, Scores, label_numbers

Numbers = Sequence[int]
"""Labels by number; -1 for a prediction that is none."""


def accuracy(targets: Numbers, predictions: Numbers) -> float:
    """The share of predictions that are right."""
    return 100 * float(np.mean(np.equal(targets, predictions)))


def label_scores(labels: tuple[str, ...], examples: Sequence[Example], predictions: Sequence[str]) -> Scores:
    """``accuracy`` of texts that are labels."""
    targets = label_numbers([example.targets for example in examples], labels)
    return {"accuracy": accuracy(targets, label_numbers(predictions, labels))}


def mean_f1(targets: Numbers, predictions: Numbers, num_labels: int) -> float:
    """The mean over labels of each one's F1, as CommitmentBank is scored; a label never seen nor said counts as 0."""
    from sklearn.metrics import f1_score

    labels = list(range(num_labels))
    return 100 * float(f1_score(targets, predictions, labels=labels, average="macro", zero_division=0))  # pyright: ignore[reportArgumentType]


def f1(targets: Numbers, predictions: Numbers) -> float:
    """F1 of label 1 of two; what is no label counts as the wrong one."""
    from sklearn.metrics import f1_score

    said = [
        1 - target if prediction < 0 else prediction for target, prediction in zip(targets, predictions, strict=True)
    ]
    return 100 * float(f1_score(targets, said, labels=[1], average="macro", zero_division=0))  # pyright: ignore[reportArgumentType]


def exact_match_by_group(targets: Numbers, predictions: Numbers, groups: Sequence[Hashable]) -> float:
    """The share of groups, such as a question's answers, in which every prediction is right."""
    right: dict[Hashable, bool] = collections.defaultdict(lambda: True)
    for target, prediction, group in zip(targets, predictions, groups, strict=True):
        right[group] &= target == prediction
    return 100 * float(np.mean(list(right.values())))


def matthews_correlation(targets: Numbers, predictions: Numbers) -> float:
    """Matthews' correlation coefficient; what is no label counts as a label of its own, -1, as in T5."""
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(matthews_corrcoef(targets, predictions))


def correlations(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant, for which neither is defined."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: list[Any] = [stats.pearsonr(targets, predictions), stats.spearmanr(targets, predictions)]
    pearson, spearman = (float(result.statistic) for result in found)
    return {"pearson_corrcoef": 100 * np.nan_to_num(pearson), "spearman_corrcoef": 100 * np.nan_to_num(spearman)}
