"""Sizes of activations on one device, which memory and communication are both counted from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.switch_attention import routed_together
from switch_t5.planning.counts import expert_slots
from switch_t5.planning.workload import MeshShape, Workload


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """A layer of experts on one device.

    Attributes:
      moe: its numbers.
      slots: rows that the device's experts are given, empty ones too; what all its peers send it is as many.
      held: rows that the device has room for: its slots, or without capacity all that its peers along ``expert`` chose.
      choices: rows that the capacity factor allows for before any rounding, the least that can be sent.
      into: entries of a row that is sent to the experts.
      out: entries of a row that comes back.
      hidden: entries of all hidden activations of a row.
      products: first products, whose input gradients are summed over the model axis one by one; 0 where none is.
      sums_out: whether the experts' output is a sum over the model axis.
    """

    moe: MoEConfig
    slots: float
    held: float
    choices: float
    into: float
    out: float
    hidden: float
    products: int
    sums_out: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """One block on one device.

    Attributes:
      tokens: of the residual stream.
      memory_tokens: that cross-attention reads; 0 in an encoder.
      length: positions in a sequence.
      memory_length: the same of what cross-attention reads.
      feed_forward: the sparse feed-forward, or None where it is dense.
      projections: the sparse projections of self-attention, a layer for each router.
      dense_projections: how many of query, key and value are dense.
      dense_out: whether the output's projection is.
    """

    tokens: float
    memory_tokens: float
    length: int
    memory_length: int
    feed_forward: SparseLayer | None
    projections: tuple[SparseLayer, ...]
    dense_projections: int
    dense_out: bool

    @property
    def sparse_layers(self) -> tuple[SparseLayer, ...]:
        """All of its layers of experts."""
        return (*self.projections, *((self.feed_forward,) if self.feed_forward else ()))


def blocks(workload: Workload, mesh: MeshShape) -> Iterator[Block]:
    """Yields every block as one device has it for its share of a whole batch; a microbatch has its part of that."""
    config = workload.config
    for decoder in (False, True):
        length = workload.length(decoder=decoder)
        tokens = workload.batch * length / mesh.batch_shards
        memory_length = workload.encoder_length if decoder else 0
        for sparse, sparse_attention in zip(*config.patterns(decoder=decoder), strict=True):
            names = config.sparse_projections if sparse_attention else ()
            yield Block(
                tokens=tokens,
                memory_tokens=workload.batch * memory_length / mesh.batch_shards,
                length=length,
                memory_length=memory_length,
                feed_forward=_feed_forward(workload, mesh, decoder=decoder) if sparse else None,
                projections=_projections(workload, mesh, decoder=decoder) if sparse_attention else (),
                dense_projections=sum(name not in names for name in ("query", "key", "value")),
                dense_out="out" not in names,
            )


def _rows(workload: Workload, mesh: MeshShape, moe: MoEConfig, *, decoder: bool) -> tuple[float, float]:
    length = workload.length(decoder=decoder)
    sequences = workload.config.sequences_per_group(workload.encoder_length)
    slots = expert_slots(moe, workload.batch, length, sequences) / mesh.batch_shards
    if moe.dispatch == "dropless":
        return slots, slots
    if moe.expert_capacity is not None:
        return slots, slots
    return slots, workload.batch * length * moe.train_capacity_factor / mesh.batch_shards


def _held(moe: MoEConfig, slots: float, mesh: MeshShape) -> float:
    return slots * (mesh.expert if moe.dispatch == "dropless" else 1)


def _feed_forward(workload: Workload, mesh: MeshShape, *, decoder: bool) -> SparseLayer:
    config = workload.config
    moe = config.moe_of(decoder=decoder)
    assert moe is not None
    branches = len(config.mlp_activations)
    hidden = config.mlp_dim / workload.parts("expert_mlp", mesh) * (branches + (branches > 1))
    slots, choices = _rows(workload, mesh, moe, decoder=decoder)
    return SparseLayer(
        moe, slots, _held(moe, slots, mesh), choices, config.emb_dim, config.emb_dim, hidden, branches, sums_out=True
    )


def _projections(workload: Workload, mesh: MeshShape, *, decoder: bool) -> tuple[SparseLayer, ...]:
    config, moe = workload.config, workload.config.attention_moe
    assert moe is not None
    width = config.num_heads * config.head_dim / workload.parts("heads", mesh)
    slots, choices = _rows(workload, mesh, moe, decoder=decoder)
    return tuple(
        SparseLayer(moe, slots, _held(moe, slots, mesh), choices, width, config.emb_dim, 0, 0, sums_out=True)
        if names == ("out",)
        else SparseLayer(
            moe,
            slots,
            _held(moe, slots, mesh),
            choices,
            config.emb_dim,
            len(names) * width,
            0,
            len(names),
            sums_out=False,
        )
        for names in routed_together(config.sparse_projections)
    )
