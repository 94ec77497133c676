"""The dense feed-forward layer, plain or gated."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
from flax import nnx

from switch_t5.layers.dropout import drop, dropout_mask, row_dropout_mask
from switch_t5.layers.expert_loop import expert_loop
from switch_t5.layers.grouped_matmul import grouped_matmul
from switch_t5.layers.initializers import Initialization, Kind, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.layers.rematerialization import kept
from switch_t5.layers.row_blocks import UNKNOWN, Load
from switch_t5.partitioning.rules import constrain, target_platform
from switch_t5.types import Array, Axes

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


class FeedForward(nnx.Module):
    """``wo(activation(x wi))``; with two activations, their product (GLU variants, Shazeer 2020). No biases.

    With ``num_experts`` the kernels have a leading expert axis; so has the input, or its rows are sorted by expert.
    """

    # Either wi, or wi_0 and wi_1.
    wi: nnx.Param
    wi_0: nnx.Param
    wi_1: nnx.Param

    def __init__(
        self,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        convention: Initialization,
        *,
        num_experts: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.activations = activations
        expert_dims, expert_axes, mlp_axis = (), (), "mlp"
        kind: Kind = "mlp"
        if num_experts is not None:
            expert_dims, expert_axes, mlp_axis = (num_experts,), ("expert",), "expert_mlp"
            kind = "expert"
        into = initializer(kind, convention, fan_in=emb_dim)
        for name in self._input_names():
            axes: Axes = (*expert_axes, "embed", mlp_axis)
            setattr(self, name, parameter(rngs, into, (*expert_dims, emb_dim, mlp_dim), axes))
        out_of = initializer(kind, convention, fan_in=mlp_dim)
        self.wo = parameter(rngs, out_of, (*expert_dims, mlp_dim, emb_dim), (*expert_axes, mlp_axis, "embed"))

    def _input_names(self) -> tuple[str, ...]:
        return ("wi",) if len(self.activations) == 1 else ("wi_0", "wi_1")

    def __call__(
        self,
        x: Array,
        *,
        hidden_axes: Axes = (),
        dropout_rate: float,
        rng: Array | None,
        numbers: Array | None = None,
        sizes: Array | None = None,
        load: Load = UNKNOWN,
    ) -> Array:
        """Applies the layer.

        Args:
          x: ``[batch, length, embed]``; where there are experts ``[expert, tokens, embed]``, or ``[rows, embed]``
            sorted by expert.
          hidden_axes: the hidden activation's logical axes; of no use for rows.
          dropout_rate: of the hidden activation.
          rng: None in evaluation.
          numbers: ``[expert, tokens]`` or ``[rows]`` int32, what a row's dropout is drawn by; None where there are no
            experts, for T5 shares a draw along a sequence.
          sizes: ``[expert]`` int32, how many of the rows are each expert's.
          load: what is known of ``sizes`` beforehand.

        Returns:
          The shape and dtype of ``x``. Of experts whose hidden activations are split over devices, in
          :func:`switch_t5.partitioning.rules.per_shard`, it is this device's part of the sum.
        """
        into = tuple(getattr(self, name)[...].astype(x.dtype) for name in self._input_names())
        wo = self.wo[...].astype(x.dtype)
        mlp_dim = wo.shape[-2]
        if numbers is None:
            keep = dropout_mask((*x.shape[:-1], mlp_dim), dropout_rate, rng, broadcast_dim=-2)
        else:
            keep = row_dropout_mask(numbers, mlp_dim, dropout_rate, rng, columns="expert_mlp")

        def hidden(keep: Array | None, *branches: Array) -> Array:
            return drop(_activate(self.activations, *branches), keep, dropout_rate)

        if sizes is None:
            return constrain(hidden(keep, *(kept(x @ kernel) for kernel in into)), hidden_axes) @ wo
        if target_platform() == "cpu":
            return expert_loop(hidden, load, x, into, wo, keep, sizes)
        branches = (kept(grouped_matmul(x, kernel, sizes)) for kernel in into)
        return grouped_matmul(hidden(keep, *branches), wo, sizes)


def _activate(activations: tuple[str, ...], *branches: Array) -> Array:
    """The activations of the products with ``wi``, multiplied."""
    parts = (ACTIVATIONS[name](branch) for name, branch in zip(activations, branches, strict=True))
    return functools.reduce(operator.mul, parts)
