"""The dense feed-forward layer, plain or gated."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
from flax import nnx

from switch_t5.layers.dropout import drop, dropout_mask, dropout_of_rows
from switch_t5.layers.expert_loop import expert_loop
from switch_t5.layers.grouped_matmul import grouped_matmul
from switch_t5.layers.initializers import Initialization, Kind, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain, is_partitioned, target_platform
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
        sizes: Array | None = None,
        numbers: Array | None = None,
    ) -> Array:
        """Applies the layer.

        Args:
          x: ``[batch, length, embed]``; where there are experts ``[expert, tokens, embed]``, or ``[rows, embed]``
            sorted by expert.
          hidden_axes: the hidden activation's logical axes; of no use for rows.
          dropout_rate: of the hidden activation.
          rng: None in evaluation.
          sizes: ``[expert]`` int32, how many of the rows are each expert's.
          numbers: ``[rows]`` int32, what a row's dropout is drawn by.

        Returns:
          The shape and dtype of ``x``. Of experts whose hidden activations are split over devices, in
          :func:`switch_t5.partitioning.rules.per_shard`, it is this device's part of the sum.
        """
        into = tuple(getattr(self, name)[...].astype(x.dtype) for name in self._input_names())
        wo = self.wo[...].astype(x.dtype)
        activate = functools.partial(_activate, self.activations)
        if sizes is not None:
            assert numbers is not None
            hidden = activate(*(grouped_matmul(x, kernel, sizes) for kernel in into))
            return grouped_matmul(dropout_of_rows(hidden, dropout_rate, rng, numbers, columns="expert_mlp"), wo, sizes)
        # T5 shares a draw along a sequence; neighbouring slots of an expert hold tokens of any sequence.
        shared = -2 if wo.ndim == 2 else None
        keep = dropout_mask((*x.shape[:-1], wo.shape[-2]), dropout_rate, rng, broadcast_dim=shared)
        if wo.ndim == 3 and target_platform() == "cpu" and not is_partitioned():
            dropped = lambda keep, *branches: drop(activate(*branches), keep, dropout_rate)  # noqa: E731
            return expert_loop(dropped, x, into, wo, keep)
        hidden = constrain(activate(*(x @ kernel for kernel in into)), hidden_axes)
        return drop(hidden, keep, dropout_rate) @ wo


def _activate(activations: tuple[str, ...], *branches: Array) -> Array:
    """The activations of the products with ``wi``, multiplied."""
    parts = (ACTIVATIONS[name](branch) for name, branch in zip(activations, branches, strict=True))
    return functools.reduce(operator.mul, parts)
