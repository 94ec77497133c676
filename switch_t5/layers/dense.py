"""The dense feed-forward layer, plain or gated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.dropout import dropout, dropout_of_rows
from switch_t5.layers.grouped_matmul import grouped_matmul
from switch_t5.layers.initializers import Initialization, Kind, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain, is_partitioned
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
        multiply = _matmul if sizes is None else partial(grouped_matmul, sizes=sizes)
        hidden = None
        for name, activation in zip(self._input_names(), self.activations, strict=True):
            branch = ACTIVATIONS[activation](multiply(x, getattr(self, name)[...].astype(x.dtype)))
            hidden = branch if hidden is None else hidden * branch
        assert hidden is not None
        if numbers is not None:
            hidden = dropout_of_rows(hidden, dropout_rate, rng, numbers, columns="expert_mlp")
        else:
            # T5 shares a draw along a sequence; neighbouring slots of an expert hold tokens of any sequence.
            shared = None if hidden_axes[0] == "expert" else -2
            hidden = dropout(constrain(hidden, hidden_axes), dropout_rate, rng, broadcast_dim=shared)
        return multiply(hidden, self.wo[...].astype(x.dtype))


def _matmul(x: Array, kernel: Array) -> Array:
    """``x @ kernel``, so that an optimizer may write a large expert kernel in place."""
    in_place = kernel.ndim == 3 and jax.default_backend() == "cpu" and not is_partitioned()
    return _expert_matmul(x, kernel) if in_place else x @ kernel


@jax.custom_vjp
def _expert_matmul(x: Array, kernel: Array) -> Array:
    """``[expert, tokens, embed] @ [expert, embed, mlp]`` on one device.

    XLA's CPU backend copies a donated parameter unless every product that reads it comes, in the flow of data, before
    the update that overwrites it. The gradient of ``x`` is such a product, so the kernel's gradient is made to follow
    it: it adds zero times one of its entries. (A product that rematerialisation repeats is still read later.)
    """
    return x @ kernel


def _expert_matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _expert_matmul_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = dy @ jnp.swapaxes(kernel, 1, 2)
    follows = dx[:, :1, :1]
    return dx, jnp.swapaxes(x, 1, 2) @ dy + jnp.where(jnp.isfinite(follows), 0 * follows, 0)


_expert_matmul.defvjp(_expert_matmul_forward, _expert_matmul_backward)
