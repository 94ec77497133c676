"""The sparse layer: a router and experts, of which a token passes through few.

Source: Fedus et al. 2022, section 2; the routers are those of :mod:`switch_t5.routing.router`. Tokens are grouped
``[G, S, D]``. With a capacity they are dispatched to slots ``[G, E, C, D]``, and turned so that the expert axis takes
the mesh axis that the groups shared with it: that turn is the only all-to-all, and the turn back the second, whether
the compiler makes them of constraints or they are written out (``MoEConfig.exchange``). Without a capacity tokens are
sorted by expert, and every device works on what its own experts are sent.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.dense import FeedForward
from switch_t5.layers.dropout import dropout, split_rng
from switch_t5.layers.even_rows import even_share
from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.parameter import parameter, parameter_axes
from switch_t5.layers.rematerialization import kept
from switch_t5.layers.row_blocks import Load
from switch_t5.partitioning.rules import (
    constrain,
    exchange_shards,
    gather_shards,
    is_partitioned,
    per_shard,
    shard_count,
    shard_index,
    sum_shards,
    target_platform,
)
from switch_t5.routing.assignment import Assignment, Choices, RowOrder, filled_slots, sort_by_expert
from switch_t5.routing.balance import RouterStats, router_stats
from switch_t5.routing.capacity import group_shape
from switch_t5.routing.dispatch import combine_rows, dispatch_rows, dispatcher
from switch_t5.routing.router import Routing, route, route_without_logits
from switch_t5.types import Array

TOKEN_AXES = ("batch", None)
CHOICE_AXES = ("batch", None, None)
DISPATCHED_AXES = ("batch", None, None)
EXPERT_AXES = ("expert", "expert_batch", None)


class LayerKeys(NamedTuple):
    """What a layer draws with: at the router's input, for its choice, in the experts and in the shared experts."""

    input: Array | None
    choice: Array | None
    experts: Array | None
    shared: Array | None


def layer_keys(rng: Array | None) -> LayerKeys:
    """The keys of a layer that is given ``rng``; None throughout where nothing is random."""
    # All at once: a key folded out of the experts' would be that of one of their rows.
    first, second, third, fourth = split_rng(rng, 4)
    return LayerKeys(input=first, choice=third, experts=second, shared=fourth)


class SparseLayer(nnx.Module):
    """A router before experts that a subclass makes: ``experts``, and ``shared_experts`` where there are any.

    ``in_axis`` and ``out_axis`` name what an expert takes and gives, ``summed_axis`` what its last product sums over.
    """

    in_axis: ClassVar[str] = "embed"
    summed_axis: ClassVar[str] = "expert_mlp"
    out_axis: ClassVar[str] = "embed"
    experts: Any
    shared_experts: Any

    def __init__(self, config: MoEConfig, emb_dim: int, convention: Initialization, *, rngs: nnx.Rngs) -> None:
        self.config = config
        num_experts = config.num_experts
        if config.router.has_kernel:
            init = initializer("router", convention, fan_in=emb_dim)
            # Every device routes its own tokens over all experts, so the router is whole everywhere.
            self.router = parameter(rngs, init, (emb_dim, num_experts), ("embed", None))
        if config.router.has_bias:
            self.router_bias = parameter(rngs, jax.nn.initializers.zeros, (num_experts,), (None,))

    def __call__(
        self, x: Array, mask: Array, *, tokens: Array, sequences: int, train: bool, rng: Array | None
    ) -> tuple[Array, RouterStats]:
        """Routes, dispatches, applies the experts and combines.

        A token with an entry or a logit that is infinite or not a number takes no slot and counts nowhere but in the
        statistics' ``nonfinite``, so that it cannot reach another token's output, whatever padding does.

        Args:
          x: ``[batch, length, embed]``.
          mask: ``[batch, length]`` bool; False for padding, see :class:`MoEConfig`.
          tokens: ``[batch, length]`` int32, entries of the vocabulary, for hash routing.
          sequences: sequences in a routing group.
          train: chooses the capacity factor, and noise and dropout where there is an ``rng``.
          rng: None where nothing is random.

        Returns:
          ``[batch, length, out]`` (zero for a token without a slot, but for shared experts) and the layer's
          statistics; ``out`` is ``embed`` for a feed-forward.
        """
        batch, length, emb_dim = x.shape
        groups, size = group_shape(batch, length, self.config.group_size, sequences)
        keys = layer_keys(rng)
        x = constrain(x.reshape(groups, size, emb_dim), (*TOKEN_AXES, self.in_axis))
        real, tokens = mask.reshape(groups, size), tokens.reshape(groups, size)
        if self.config.padding == "zeroed":
            x = jnp.where(real[..., None], x, 0)

        routing, stats = self.route(x, real, tokens, train=train, keys=keys)
        assignment = kept(routing.assignment)
        if not isinstance(assignment, Assignment):
            combined = kept(self._apply_to_choices(x, assignment, keys.experts, train=train))
        elif self._leaves_out_empty_slots():
            combined = self._apply_to_filled_slots(x, assignment, keys.experts)
        else:
            combined = self._apply_to_slots(x, assignment, keys.experts)
        if self.config.num_shared_experts:
            rate = self.config.expert_dropout_rate
            combined += self.shared_experts(x, hidden_axes=("batch", None, "mlp"), dropout_rate=rate, rng=keys.shared)
        return combined.reshape(batch, length, -1), stats

    def route(
        self, x: Array, real: Array, tokens: Array, *, train: bool, keys: LayerKeys
    ) -> tuple[Routing, RouterStats]:
        """What the router decides, and its statistics.

        Args:
          x: ``[G, S, D]``.
          real: ``[G, S]`` bool, False for padding.
          tokens: ``[G, S]`` int32, entries of the vocabulary.
          train: as in a call.
          keys: of :func:`layer_keys`.
        """
        config, everyone = self.config, jnp.ones_like(real)
        asking = everyone if config.padding in ("zeroed", "routed") else real
        logits, counted = self._router_logits(x, everyone if config.padding == "counted" else asking, keys.input)
        mask = counted & asking

        def choose(mask: Array) -> Routing:
            capacity = None if config.dispatch == "dropless" else config.capacity(real.shape[-1], train)
            if logits is None:
                return route_without_logits(config.router, config.num_experts, capacity, mask, tokens, rng=keys.choice)
            bias = jax.lax.stop_gradient(self.router_bias[...]) if config.router.has_bias else None
            return route(config.router, logits, capacity, mask, bias=bias, train=train, rng=keys.choice)

        routing = choose(mask)
        if config.padding == "counted":
            routing = dataclasses.replace(routing, load=choose(counted).load)
        return routing, router_stats(routing, logits, mask, asking, counted=counted, scope=config.balance_scope)

    def _router_logits(self, x: Array, mask: Array, rng: Array | None) -> tuple[Array | None, Array]:
        """``[G, S, E]`` in the router's dtype, and the mask without the tokens whose logits are not finite."""
        finite = jnp.all(jnp.isfinite(x), axis=-1)
        if not self.config.router.has_kernel:
            return None, mask & finite
        x = x.astype(self.config.router_dtype)
        # Taken out before the product, in whose derivative 0 times such a number would be none.
        x = jnp.where(finite[..., None], x, 0)
        if rng is not None and self.config.jitter_noise:
            noise = self.config.jitter_noise
            x *= jax.random.uniform(rng, x.shape, x.dtype, 1 - noise, 1 + noise)
        dropout_rng = None if rng is None else jax.random.fold_in(rng, 1)
        x = dropout(x, self.config.router_input_dropout_rate, dropout_rng, broadcast_dim=None)
        # Accelerators multiply float32 in fewer bits unless asked: the router is where they count.
        logits = kept(jnp.matmul(x, self.router[...].astype(x.dtype), precision=jax.lax.Precision.HIGHEST))
        finite &= jnp.all(jnp.isfinite(logits), axis=-1)
        return jnp.where(finite[..., None], logits, 0), mask & finite

    def _apply_to_slots(self, x: Array, assignment: Assignment, rng: Array | None) -> Array:
        """``[G, S, D]`` to ``[G, S, out]``, through slots ``[E, G, C, D]`` sharded by expert."""
        shape = (self.config.num_experts, x.shape[0], assignment.capacity)
        numbers = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        if self.config.exchange == "constraints":
            return self._through_slots(self.experts, x, assignment, numbers, rng)
        graph, params = nnx.split(self.experts)
        by_group = jax.tree.map(lambda leaf: ("batch", *(None,) * (leaf.ndim - 1)), assignment)
        in_axes = (parameter_axes(params), (*TOKEN_AXES, self.in_axis), by_group, EXPERT_AXES, None)

        def on_a_shard(params: nnx.State, *rest: Any) -> Array:
            return self._through_slots(nnx.merge(graph, params), *rest)

        return per_shard(on_a_shard, in_axes, (*TOKEN_AXES, self.out_axis))(params, x, assignment, numbers, rng)

    def _through_slots(
        self, experts: Any, x: Array, assignment: Assignment, numbers: Array, rng: Array | None
    ) -> Array:
        """:meth:`_apply_to_slots` of numbers ``[E, G, C]``: by constraints, or on a shard by what devices send."""
        method = dispatcher(self.config.dispatch)
        dispatched = constrain(method.dispatch(x, assignment), (*DISPATCHED_AXES, self.in_axis))
        dispatched = exchange_shards(dispatched, "expert", split=1, join=0)
        groups, num_experts, capacity, emb_dim = dispatched.shape
        by_expert = kept(constrain(jnp.swapaxes(dispatched, 0, 1), (*EXPERT_AXES, self.in_axis)))
        outputs = experts(
            by_expert.reshape(num_experts, groups * capacity, emb_dim),
            hidden_axes=("expert", "expert_batch", "expert_mlp"),
            dropout_rate=self.config.expert_dropout_rate,
            rng=rng,
            numbers=numbers.reshape(num_experts, groups * capacity),
        )
        outputs = constrain(outputs.reshape(num_experts, groups, capacity, -1), (*EXPERT_AXES, self.out_axis))
        outputs = exchange_shards(jnp.swapaxes(outputs, 0, 1), "expert", split=0, join=1)
        outputs = kept(constrain(outputs, (*DISPATCHED_AXES, self.out_axis)))
        combined = sum_shards(method.combine(outputs, assignment), over=self.summed_axis)
        return constrain(combined, (*TOKEN_AXES, self.out_axis))

    def _leaves_out_empty_slots(self) -> bool:
        """Whether slots are to be rows: one CPU device has no all-to-all, and multiplies as many rows as there are."""
        return self.config.dispatch != "einsum" and target_platform() == "cpu" and not is_partitioned()

    def _apply_to_filled_slots(self, x: Array, assignment: Assignment, rng: Array | None) -> Array:
        """:meth:`_apply_to_slots` without the slots that nobody has."""
        load = Load(most=assignment.slot.shape[0] * assignment.capacity)
        return self._apply_to_rows(self.experts, x, assignment.weight, filled_slots(assignment), load, rng)

    def _apply_to_choices(self, x: Array, choices: Choices, rng: Array | None, *, train: bool) -> Array:
        """``[G, S, D]`` to ``[G, S, out]`` without capacity.

        An all-to-all has blocks of one size, which a router without capacity does not give. So the devices that
        share out the experts gather each other's tokens, work on what their own experts are sent, and send sums back.
        """
        graph, params = nnx.split(self.experts)

        def on_a_shard(params: nnx.State, x: Array, expert: Array, weight: Array, rng: Array | None) -> Array:
            x, expert, weight = (gather_shards(value, "expert") for value in (x, expert, weight))
            expert, weight = kept((expert, weight))
            mine = self.config.num_experts // shard_count("expert")
            order = sort_by_expert(expert.reshape(-1, expert.shape[-1]) - shard_index("expert") * mine, mine)
            # A choice's number in the batch, which is the same on every mesh.
            order = dataclasses.replace(order, number=order.entry + shard_index("expert_batch") * expert.size)
            # Even rows are rounded by where they stand among others, and in evaluation no token may see another.
            load = Load(share=even_share(expert.size, self.config.num_experts) if train else 0)
            combined = self._apply_to_rows(nnx.merge(graph, params), x, weight, order, load, rng)
            return sum_shards(combined, scatter="expert", over=self.summed_axis)

        token_axes, out_axes = (*TOKEN_AXES, self.in_axis), (*TOKEN_AXES, self.out_axis)
        in_axes = (parameter_axes(params), token_axes, CHOICE_AXES, CHOICE_AXES, None)
        return per_shard(on_a_shard, in_axes, out_axes)(params, x, choices.expert, choices.weight, rng)

    def _apply_to_rows(
        self, experts: Any, x: Array, weight: Array, order: RowOrder, load: Load, rng: Array | None
    ) -> Array:
        """``[G, S, D]`` and weights ``[G, S, K]`` to ``[G, S, out]``, through rows sorted by expert."""
        groups, size, emb_dim = x.shape
        order = kept(order)
        outputs = experts(
            kept(dispatch_rows(x.reshape(groups * size, emb_dim), order)),
            dropout_rate=self.config.expert_dropout_rate,
            rng=rng,
            numbers=order.number,
            sizes=order.sizes,
            load=load,
        )
        return combine_rows(kept(outputs), weight.reshape(groups * size, -1), order).reshape(groups, size, -1)


class SwitchFeedForward(SparseLayer):
    """A sparse feed-forward: each token passes through the one expert that its router prefers."""

    def __init__(
        self,
        config: MoEConfig,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        convention: Initialization,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, emb_dim, convention, rngs=rngs)
        self.experts = FeedForward(emb_dim, mlp_dim, activations, convention, num_experts=config.num_experts, rngs=rngs)
        if config.num_shared_experts:
            shared_dim = config.num_shared_experts * mlp_dim
            self.shared_experts = FeedForward(emb_dim, shared_dim, activations, convention, rngs=rngs)
