"""Random parameters and small batches, packed and not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.model.functional import Model
from switch_t5.types import Array, Params

Example = tuple[np.ndarray, np.ndarray]
"""Inputs and targets of one example."""


def random_params(model: Model, *, scale: float = 0.3, seed: int = 0) -> Params:
    """Parameters from NumPy, which takes no compilation; norms and all are drawn around 0."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype), model.abstract_params
    )


def examples(lengths: list[tuple[int, int]], *, vocab_size: int = 32, seed: int = 0) -> list[Example]:
    """An example of random tokens for each pair of input and target length."""
    random = np.random.default_rng(seed)
    return [tuple(random.integers(2, vocab_size, length) for length in pair) for pair in lengths]


def packed(rows: list[list[Example]], input_length: int, target_length: int) -> dict[str, Array]:
    """One sequence a row, holding its examples one after the other and then padding."""
    shapes = {"encoder": (len(rows), input_length), "decoder": (len(rows), target_length)}
    batch = {
        name: np.zeros(shapes[name.partition("_")[0]], np.int32)
        for name in (
            "encoder_input_tokens",
            "encoder_segment_ids",
            "encoder_positions",
            "decoder_input_tokens",
            "decoder_target_tokens",
            "decoder_segment_ids",
            "decoder_positions",
        )
    }
    for row, content in enumerate(rows):
        starts = [0, 0]
        for segment, (inputs, targets) in enumerate(content, start=1):
            shifted = np.concatenate([[0], targets[:-1]])
            for side, stack, features in (
                (0, "encoder", {"encoder_input_tokens": inputs}),
                (1, "decoder", {"decoder_input_tokens": shifted, "decoder_target_tokens": targets}),
            ):
                length = len(inputs if side == 0 else targets)
                place = slice(starts[side], starts[side] + length)
                values = features | {
                    f"{stack}_segment_ids": np.full(length, segment),
                    f"{stack}_positions": np.arange(length),
                }
                for name, value in values.items():
                    batch[name][row, place] = value
                starts[side] += length
    weights = (batch["decoder_target_tokens"] > 0).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in (batch | {"decoder_loss_weights": weights}).items()}


def unpacked(content: list[Example], input_length: int, target_length: int) -> dict[str, Array]:
    """One example a row, without segments."""
    batch = packed([[example] for example in content], input_length, target_length)
    return {name: value for name, value in batch.items() if not name.endswith(("segment_ids", "positions"))}
