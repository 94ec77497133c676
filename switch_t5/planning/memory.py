"""Bytes that a training step takes of one device and of a host, by arithmetic."""

from __future__ import annotations

import dataclasses
import math

from switch_t5.planning.sizes import Block, SparseLayer, blocks
from switch_t5.planning.workload import Arrays, MeshShape, Workload, is_kernel, shard_bytes

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device, by kind.

    Attributes:
      parameters: float32.
      optimizer: its state.
      gradients: float32; a sum beside those of one part where the batch is cut into microbatches.
      activations: what the forward pass keeps for the backward pass, with the largest block's gradients.
      logits: and their gradient, float32, the largest array of the forward pass.
      dispatch_buffers: rows on their way to experts and back, kept or in flight.
      gathered: parameters made whole along ``fsdp``, and their gradients before these are dealt out: those outside
        the blocks, and one block's.
      cast: kernels in the dtype of activations. Of scanned blocks compilers cast all at once, before the loop; others,
        and such as are gathered in the loop, one after the other.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    dispatch_buffers: int
    gathered: int
    cast: int

    @property
    def total(self) -> int:
        """All of it at once.

        That is the worst moment of a scanned step, whose stacked gradients are there from the backward pass's start
        and whose stacked activations to its end. Where blocks are written out gradients take the place of
        activations, and it is an upper bound.
        """
        return sum(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes of a process that holds several devices.

    Attributes:
      loading: what its devices are given of a checkpoint, each distinct part once.
      saving: the same, for at worst it writes all it holds; processes that hold copies write nothing.
    """

    loading: int
    saving: int


def device_memory(workload: Workload, mesh: MeshShape) -> DeviceMemory:
    """Counts the bytes of one device.

    Raises:
      ConfigError: an array cannot be sharded so.
    """
    parameters = workload.params.shard_bytes(mesh)
    activations, buffers = _activations(workload, mesh)
    rows = workload.batch * workload.decoder_length / mesh.batch_shards / workload.microbatches
    return DeviceMemory(
        parameters=parameters,
        optimizer=workload.opt_state.shard_bytes(mesh),
        gradients=parameters * (1 if workload.microbatches == 1 else 2),
        activations=math.ceil(activations),
        logits=math.ceil(2 * rows * workload.config.vocab_size / workload.parts("vocab", mesh) * FLOAT32),
        dispatch_buffers=math.ceil(buffers),
        gathered=math.ceil(_gathered(workload, mesh)),
        cast=_cast(workload, mesh),
    )


def _cast(workload: Workload, mesh: MeshShape) -> int:
    if not workload.config.scan_layers or workload.itemsize == FLOAT32:
        return 0
    return sum(
        shard_bytes(kind, mesh, name) // FLOAT32 * workload.itemsize * number
        for kind, number, name in workload.params.kinds
        if kind.in_blocks and is_kernel(kind) and kind.gathered(mesh) == 1
    )


def _gathered(workload: Workload, mesh: MeshShape) -> float:
    sparse = [bool(block.sparse_layers) for block in blocks(workload, mesh)]
    total = 0.0
    for kind, number, name in workload.params.kinds:
        parts = kind.gathered(mesh)
        if parts > 1:
            whole = number * parts * shard_bytes(kind, mesh, name)
            total += 2 * whole / ((sum(sparse) if "expert" in kind.axes else len(sparse)) if kind.in_blocks else 1)
    return total


def host_memory(workload: Workload, mesh: MeshShape, devices_per_host: int) -> HostMemory:
    """Counts the bytes of the first process, whose devices are neighbours along the model and the expert axis."""
    devices = min(devices_per_host, mesh.size)
    size = sum(_distinct(arrays, mesh, devices) for arrays in (workload.params, workload.opt_state))
    return HostMemory(loading=size, saving=size)


def _distinct(arrays: Arrays, mesh: MeshShape, devices: int) -> int:
    total = 0
    for kind, number, name in arrays.kinds:
        shard = shard_bytes(kind, mesh, name)
        total += number * shard * min(devices, kind.nbytes // shard if shard else 1)
    return total


def _activations(workload: Workload, mesh: MeshShape) -> tuple[float, float]:
    """Activations and dispatch buffers, in bytes."""
    parts = workload.microbatches
    found = list(blocks(workload, mesh))
    each = [(_kept(block, workload, mesh) / parts, _buffers(block, workload) / parts) for block in found]
    stream = [block.tokens * workload.config.emb_dim * workload.itemsize / parts for block in found]
    # Between the stacks: embedded tokens, and what comes out of each.
    ends = 2 * workload.tokens / mesh.batch_shards / parts * workload.config.emb_dim * workload.itemsize
    working = max(kept for kept, _ in each)
    in_flight = max(buffers for _, buffers in each)
    all_buffers = sum(buffers for _, buffers in each) + in_flight
    match workload.config.remat_policy:
        case "none":
            return ends + sum(kept for kept, _ in each) + working, all_buffers
        case "minimal":
            # In the backward pass one block is there twice, as gradients too.
            kept = sum(_kept_of_products(block, workload, mesh) for block in found) / parts
            return ends + kept + 2 * working, all_buffers
        case "full":
            # A block's input is all that is kept.
            return ends + sum(stream) + 2 * working, 2 * in_flight


def _kept(block: Block, workload: Workload, mesh: MeshShape) -> float:
    """Bytes that a block's backward pass reads, dispatch buffers left out."""
    config, item = workload.config, workload.itemsize
    emb, heads = config.emb_dim, config.num_heads / workload.parts("heads", mesh)
    width = heads * config.head_dim
    norms = 3 if block.memory_tokens else 2
    # Each norm's input and output; queries and what attention gives; keys and values; weights and their sums.
    entries = norms * 2 * block.tokens * emb * item
    entries += block.tokens * 4 * width * item
    entries += block.tokens * heads * (block.length * item + FLOAT32)
    if block.memory_tokens:
        entries += (2 * block.tokens + 2 * block.memory_tokens) * width * item
        entries += block.tokens * heads * (block.memory_length * item + FLOAT32)
    branches = len(config.mlp_activations)
    hidden = config.mlp_dim / workload.parts("mlp", mesh) * (branches + (branches > 1))
    if block.feed_forward is None:
        entries += block.tokens * hidden * item
    else:
        entries += block.tokens * block.feed_forward.moe.num_shared_experts * hidden * item
    return entries + sum(_kept_by_experts(layer, block, item) for layer in block.sparse_layers)


def _kept_of_products(block: Block, workload: Workload, mesh: MeshShape) -> float:
    """Bytes that are kept of a block where all that is cheap is computed again, dispatch buffers left out."""
    config, item = workload.config, workload.itemsize
    width = config.num_heads / workload.parts("heads", mesh) * config.head_dim
    # The residual stream before each part of the block; queries, keys, values and what attention gives.
    entries = (3 if block.memory_tokens else 2) * block.tokens * config.emb_dim + block.tokens * 4 * width
    entries += 2 * (block.tokens + block.memory_tokens) * width if block.memory_tokens else 0
    sparse = block.feed_forward
    shared = 1 if sparse is None else sparse.moe.num_shared_experts
    branches = len(config.mlp_activations)
    entries += block.tokens * shared * branches * config.mlp_dim / workload.parts("mlp", mesh)
    if sparse is not None:
        hidden = branches * config.mlp_dim / workload.parts("expert_mlp", mesh)
        entries += sparse.held * hidden
    return entries * item + sum(block.tokens * layer.moe.num_experts * FLOAT32 for layer in block.sparse_layers)


def _kept_by_experts(layer: SparseLayer, block: Block, item: int) -> float:
    """Hidden activations, and the router's logits and probabilities in float32."""
    return layer.held * layer.hidden * item + 2 * block.tokens * layer.moe.num_experts * FLOAT32


def _buffers(block: Block, workload: Workload) -> float:
    """Rows as the experts get them and give them back, which their gradients and the weights' are made of."""
    return sum(layer.held * (layer.into + layer.out) * workload.itemsize for layer in block.sparse_layers)
