"""SQuAD's scores: exact match and F1 over words, of normalized answers, the best over all right ones; in percent.

Source: the normalization and the overlap are those of SQuAD's evaluation (Rajpurkar et al. 2016), and for closed-book
question answering (Roberts et al. 2020) TriviaQA's (Joshi et al. 2017), as T5 has them. Neither scikit-learn nor SciPy
does.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACES_FOR_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))

Normalize = Callable[[str], str]


def normalized(answer: str) -> str:
    """Lower case, without punctuation and articles, and single spaces, as SQuAD has it."""
    return _normalized(answer, _NO_PUNCTUATION)


def normalized_trivia(answer: str) -> str:
    """As :func:`normalized`, but with spaces in the place of punctuation, as TriviaQA has it."""
    return _normalized(answer, _SPACES_FOR_PUNCTUATION)


def _normalized(answer: str, punctuation: Mapping[int, Any]) -> str:
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(punctuation)).split())


def exact(target: str, prediction: str) -> float:
    """1 where two normalized texts are the same, else 0."""
    return float(target == prediction)


def word_f1(target: str, prediction: str) -> float:
    """The harmonic mean of precision and recall of two normalized texts' words."""
    right, said = target.split(), prediction.split()
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


def answer_scores(
    answers: Sequence[Sequence[str]], predictions: Sequence[str], normalize: Normalize = normalized
) -> dict[str, float]:
    """``em`` and ``f1``."""
    answers, predictions = [list(map(normalize, group)) for group in answers], list(map(normalize, predictions))
    return {"em": best_over(exact, answers, predictions), "f1": best_over(word_f1, answers, predictions)}
