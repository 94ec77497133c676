"""ROUGE, by the library rouge-score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KINDS = ("rouge1", "rouge2", "rougeLsum")


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """The mean F of unigrams, bigrams and longest common subsequences of sentences, a line each, in percent.

    As T5 does, a sentence ends where a full stop has spaces around it, too. T5 reports the middle of a bootstrap's
    interval, which scatters around this mean.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS))
    scored = [scorer.score(_lines(target), _lines(said)) for target, said in zip(targets, predictions, strict=True)]
    return {kind: 100 * float(np.mean([row[kind].fmeasure for row in scored])) for kind in KINDS}


def _lines(text: str) -> str:
    return text.replace(" . ", " .\n")
