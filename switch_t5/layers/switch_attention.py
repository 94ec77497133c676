"""Self-attention whose projections are experts: a router for the query, one for key and value, one for the output.

Source: Fedus et al. 2022, appendix A, figure 10: for each token one set of weights makes the query, another the shared
key and value. So key and value, where both are sparse, have one router and one assignment, and a kernel each.

What the paper leaves open, and what is done here:

* A token without a slot. Its projection is zero, as a feed-forward's output is, but only that of ``out`` is made good
  by the residual. A token whose query was dropped attends by position alone (zero logits, and the position bias); one
  whose key and value were dropped is attended to by position, and adds nothing. So give room: a capacity factor of 2,
  or ``dropless``.
* The weight. A projection is scaled by its router's probability, as every expert's output is; so the router of the
  query learns through attention's logits, and that of key and value through both.
* The output. The figure leaves it dense, and so does the default.
* An expert is one matrix. The paper tried feed-forwards as well.

The paper found these layers unstable in bfloat16 (table 10), so experts compute in a dtype of their own.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.attention import (
    HEADS_AXES,
    PROJECTIONS,
    Projection,
    SelfAttend,
    attend_with_dropout,
    into_heads,
    out_of_heads,
    projection_kernel,
)
from switch_t5.layers.grouped_matmul import grouped_matmul
from switch_t5.layers.initializers import Initialization
from switch_t5.layers.moe import SparseLayer
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.row_blocks import UNKNOWN, Load
from switch_t5.partitioning.rules import constrain
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array, Axes

ExpertDtype = Literal["float32", "bfloat16"]

SPARSE_PROJECTIONS = ("query", "key_value", "key", "value", "out")
"""The names that sparse projections may have in a :class:`SwitchAttention`, in the order of their statistics."""


class LinearExperts(nnx.Module):
    """For each name of a projection a kernel ``[expert, embed, heads, kv]``, or ``[expert, heads, kv, embed]``."""

    query: nnx.Param
    key: nnx.Param
    value: nnx.Param
    out: nnx.Param

    def __init__(
        self,
        names: tuple[Projection, ...],
        num_experts: int,
        sizes: tuple[int, int, int],
        convention: Initialization,
        dtype: ExpertDtype,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.names, self.dtype = names, dtype
        for name in names:
            setattr(self, name, projection_kernel(name, *sizes, convention, num_experts=num_experts, rngs=rngs))

    def __call__(
        self,
        x: Array,
        *,
        hidden_axes: Axes = (),
        dropout_rate: float = 0.0,
        rng: Array | None = None,
        numbers: Array | None = None,
        sizes: Array | None = None,
        load: Load = UNKNOWN,
    ) -> Array:
        """Applies each expert to its own tokens.

        Args:
          x: ``[expert, tokens, embed]``, or ``[rows, embed]`` sorted by expert; for ``out`` heads and kv in one dim.
          hidden_axes: of no use, as all that a feed-forward is told of its hidden activation: there is none.
          dropout_rate: of no use.
          rng: of no use.
          numbers: of no use.
          sizes: ``[expert]`` int32, how many of the rows are each expert's.
          load: what is known of ``sizes`` beforehand.

        Returns:
          ``[expert, tokens, heads * names * kv]``, so that the heads of several projections split as one dim; for
          ``out`` ``[expert, tokens, embed]``; or rows of either. The dtype is that of ``x``.
        """
        del hidden_axes, dropout_rate, rng, numbers
        outputs = [self._apply(x, getattr(self, name)[...], sizes, load) for name in self.names]
        if len(outputs) == 1:
            return outputs[0].astype(x.dtype)
        heads, kv = getattr(self, self.names[0])[...].shape[-2:]
        apart = [y.reshape(*y.shape[:-1], heads, kv) for y in outputs]
        return jnp.stack(apart, axis=-2).reshape(*x.shape[:-1], -1).astype(x.dtype)

    def _apply(self, x: Array, kernel: Array, sizes: Array | None, load: Load) -> Array:
        into = x.shape[-1]
        matrices = kernel.reshape(kernel.shape[0], into, -1).astype(self.dtype)
        if sizes is not None:
            return grouped_matmul(x.astype(self.dtype), matrices, sizes, load.most)
        # Accelerators multiply float32 in fewer bits unless asked, and then nothing would be gained over bfloat16.
        raised = self.dtype == "float32" and x.dtype != jnp.float32
        precision = jax.lax.Precision.HIGHEST if raised else None
        return jnp.matmul(x.astype(self.dtype), matrices, precision=precision)


class SparseProjection(SparseLayer):
    """One or two projections into heads by one router: ``[batch, length, embed]`` to heads, names and kv in one dim."""

    in_axis = "embed"
    summed_axis = "embed"
    out_axis = "heads"

    def __init__(
        self,
        names: tuple[Projection, ...],
        config: MoEConfig,
        sizes: tuple[int, int, int],
        convention: Initialization,
        dtype: ExpertDtype,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        emb_dim, num_heads, head_dim = sizes
        super().__init__(config, num_heads * head_dim if names == ("out",) else emb_dim, convention, rngs=rngs)
        self.experts = LinearExperts(names, config.num_experts, sizes, convention, dtype, rngs=rngs)


class SparseOutput(SparseProjection):
    """The projection out of heads, whose router sees what attention gives: heads and kv in one dim to ``embed``."""

    in_axis = "heads"
    summed_axis = "heads"
    out_axis = "embed"


class SwitchAttention(nnx.Module):
    """:class:`switch_t5.layers.attention.Attention` of ``[B, L, D]`` over itself, with sparse projections."""

    # Each a kernel, or a sparse projection; key_value in place of key and value where both are sparse.
    query: nnx.Param | SparseProjection
    key: nnx.Param | SparseProjection
    value: nnx.Param | SparseProjection
    key_value: SparseProjection
    out: nnx.Param | SparseOutput

    def __init__(
        self,
        config: MoEConfig,
        sparse: tuple[Projection, ...],
        emb_dim: int,
        num_heads: int,
        head_dim: int,
        convention: Initialization,
        *,
        expert_dtype: ExpertDtype = "float32",
        rngs: nnx.Rngs,
    ) -> None:
        sizes = (emb_dim, num_heads, head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        self.routed = routed_together(sparse)
        for name in PROJECTIONS:
            if name not in sparse:
                setattr(self, name, projection_kernel(name, *sizes, convention, rngs=rngs))
        for names in self.routed:
            layer = SparseOutput if names == ("out",) else SparseProjection
            setattr(self, "_".join(names), layer(names, config, sizes, convention, expert_dtype, rngs=rngs))

    def __call__(
        self,
        x: Array,
        mask: Array,
        positions: Array | None,
        *,
        real: Array,
        tokens: Array,
        sequences: int,
        train: bool,
        dropout_rate: float,
        rng: Array | None,
        attend_to_self: SelfAttend | None = None,
    ) -> tuple[Array, tuple[RouterStats, ...]]:
        """Attends.

        Args:
          x: ``[batch, length, embed]``.
          mask: ``[batch, 1, length, length]`` float32, of :func:`switch_t5.layers.attention.mask_bias`, or one query's
            for all.
          positions: ``[batch shards, heads, length, length]`` float32, or None.
          real: ``[batch, length]`` bool, False for padding.
          tokens: ``[batch, length]`` int32, entries of the vocabulary, for hash routing.
          sequences: sequences in a routing group.
          train: chooses the capacity.
          dropout_rate: of the attention probabilities.
          rng: None where nothing is random.
          attend_to_self: in place of :func:`switch_t5.layers.attention.attend_with_dropout`.

        Returns:
          ``[batch, length, embed]``, and the statistics of each router, in the order of :data:`SPARSE_PROJECTIONS`.
        """
        stats: list[RouterStats] = []

        def route(names: tuple[Projection, ...], x: Array) -> Array:
            layer_rng = None if rng is None else jax.random.fold_in(rng, len(stats))
            layer: SparseLayer = getattr(self, "_".join(names))
            y, layer_stats = layer(x, real, tokens=tokens, sequences=sequences, train=train, rng=layer_rng)
            stats.append(layer_stats)
            return y

        heads = {
            name: into_heads(x, getattr(self, name))
            for name in ("query", "key", "value")
            if isinstance(getattr(self, name, None), nnx.Param)
        }
        for names in self.routed:
            if names != ("out",):
                heads |= dict(zip(names, self._split_heads(route(names, x), len(names)), strict=True))
        attending = attend_to_self or attend_with_dropout
        context = attending(**heads, mask=mask, positions=positions, dropout_rate=dropout_rate, rng=rng)
        if isinstance(self.out, nnx.Param):
            return out_of_heads(context, self.out), tuple(stats)
        joined = jnp.swapaxes(context, 1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim)
        return route(("out",), joined), tuple(stats)

    def _split_heads(self, y: Array, count: int) -> list[Array]:
        """``[B, L, H * count * K]`` to as many ``[B, H, L, K]``."""
        y = y.reshape(*y.shape[:2], self.num_heads, count, self.head_dim)
        return [constrain(jnp.swapaxes(y[:, :, :, index], 1, 2), HEADS_AXES) for index in range(count)]


def routed_together(sparse: tuple[Projection, ...]) -> tuple[tuple[Projection, ...], ...]:
    """The projections of each router, in the order of :data:`SPARSE_PROJECTIONS`: key and value share one."""
    groups: tuple[tuple[Projection, ...], ...] = (("query",), ("key",), ("value",), ("out",))
    if "key" in sparse and "value" in sparse:
        groups = (("query",), ("key", "value"), ("out",))
    return tuple(names for names in groups if set(names) <= set(sparse))
