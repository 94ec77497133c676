"""SQuAD's scores: exact match and F1 over words, of normalized answers, the best over all right ones; in percent.

Source: the normalization and the overlap are those of SQuAD's evaluation (Rajpurkar et al. 2016); closed-book question
answering (Roberts et al. 2020) uses the exact match alone. Neither scikit-learn nor SciPy has them.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """Lower case, without punctuation and articles, and single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact(target: str, prediction: str) -> float:
    """1 where both are the same once normalized, else 0."""
    return float(normalized(target) == normalized(prediction))


def word_f1(target: str, prediction: str) -> float:
    """The harmonic mean of precision and recall of normalized words."""
    right, said = normalized(target).split(), normalized(prediction).split()
    common = sum((collections.Counter(right) & collections.Counter(said)).values())
    return 2 * common / (len(right) + len(said)) if common else 0.0


def best_over(
    score: Callable[[str, str], float], answers: Sequence[Sequence[str]], predictions: Sequence[str]
) -> float:
    """The mean over predictions of the best score against any of its right answers, in percent."""
    best = [
        max((score(answer, prediction) for answer in group), default=0.0)
        for group, prediction in zip(answers, predictions, strict=True)
    ]
    return 100 * float(np.mean(best))


def squad(answers: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """``em`` and ``f1``."""
    return {"em": best_over(exact, answers, predictions), "f1": best_over(word_f1, answers, predictions)}
