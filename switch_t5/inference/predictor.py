"""Inputs of any number and length through a decoder that is compiled for few shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from switch_t5.inference.config import DecodingConfig
from switch_t5.inference.decoding import decode
from switch_t5.inference.independence import independent
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.partitioning.rules import AXIS_RULES, AxisRules, partitioned
from switch_t5.types import Params

_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of an input.

    Attributes:
      tokens: int32, without padding; the end of sequence, where there is one, is the last.
      log_prob: of all of them, in nats.
      score: which outputs of one input are ranked by.
    """

    tokens: np.ndarray
    log_prob: float
    score: float


def buckets(longest: int) -> tuple[int, ...]:
    """The lengths that inputs are padded to: doubling up to the longest, so that padding never doubles the work."""
    lengths = []
    length = _SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


class Predictor:
    """Decodes inputs, batch by batch; compiles once for each length that inputs are padded to.

    Attributes:
      inputs_length: tokens of an input at the most.
      batch_size: inputs of a batch.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        decoding: DecodingConfig,
        *,
        lengths: tuple[int, int],
        batch_size: int,
        eos_id: int,
        mesh: Mesh,
        rules: AxisRules = AXIS_RULES,
        place: Callable[[dict[str, np.ndarray]], Any],
    ) -> None:
        """Makes a predictor; it compiles at its first use.

        Args:
          transformer: the model as it is trained.
          decoding: how tokens are chosen.
          lengths: of the inputs, and of the outputs where ``decoding`` does not say.
          batch_size: inputs decoded together where ``decoding`` does not say.
          eos_id: the token that ends an output.
          mesh: the devices that hold the parameters.
          rules: what logical axes are split over.
          place: a numpy batch, whole in every process, to global arrays.
        """
        self.inputs_length, targets_length = lengths
        self.batch_size = decoding.batch_size or batch_size
        self._mesh, self._rules, self._place = mesh, rules, place
        model = Model(independent(transformer))
        max_length = decoding.max_length or targets_length
        self._decode = jax.jit(functools.partial(decode, model, config=decoding, max_length=max_length, eos_id=eos_id))

    def __call__(
        self, params: Params, inputs: Sequence[np.ndarray], numbers: Sequence[int] | None = None
    ) -> list[list[Output]]:
        """Decodes.

        Args:
          params: the parameters.
          inputs: int32 tokens of each input, ended and not padded; longer ones are cut.
          numbers: tell inputs apart, for sampling; None takes their order.

        Returns:
          The outputs of each input, in the order of the inputs.
        """
        outputs: list[list[Output]] = [[]] * len(inputs)
        numbers = range(len(inputs)) if numbers is None else numbers
        for length, rows in self._batches(inputs):
            tokens = np.zeros((self.batch_size, length), np.int32)
            for place, row in enumerate(rows):
                cut = inputs[row][:length]
                tokens[place, : len(cut)] = cut
            told = np.zeros(self.batch_size, np.int32)
            told[: len(rows)] = [numbers[row] for row in rows]
            with partitioned(self._mesh, self._rules):
                placed = self._place({"tokens": tokens, "numbers": told})
                decoded = _everywhere(self._decode(params, placed["tokens"], placed["numbers"]))
            for place, row in enumerate(rows):
                outputs[row] = [
                    Output(_trimmed(said), float(log_prob), float(score))
                    for said, log_prob, score in zip(*(values[place] for values in decoded), strict=True)
                ]
        return outputs

    def _batches(self, inputs: Sequence[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
        """Rows of inputs that are padded to one length, a batch's worth each."""
        by_length: dict[int, list[int]] = {length: [] for length in buckets(self.inputs_length)}
        for row, tokens in enumerate(inputs):
            size = min(len(tokens), self.inputs_length)
            by_length[next(length for length in by_length if size <= length)].append(row)
        for length, rows in by_length.items():
            for start in range(0, len(rows), self.batch_size):
                yield length, rows[start : start + self.batch_size]


def _everywhere(decoded: Any) -> Any:
    """A result of all processes, on the host of each."""
    if jax.process_count() == 1:
        return jax.device_get(decoded)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(decoded, tiled=True)


def _trimmed(tokens: np.ndarray) -> np.ndarray:
    """Without the zeros after the end."""
    said = np.flatnonzero(tokens)
    return tokens[: said[-1] + 1] if said.size else tokens[:0]
