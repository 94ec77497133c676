"""Bytes that one device sends in a training step, by mesh axis and collective, and the least that would do.

A collective over n devices of an array of so many bytes a device sends, at best and as rings do it: an all-reduce
2 (n - 1) / n of them, an all-gather or reduce-scatter (n - 1) / n of the whole, an all-to-all (n - 1) / n (Chan et al.
2007, "Collective communication: theory, practice, and experience").

``sent`` is what this package's step sends. ``minimum`` is what its strategy must send, which is a mesh and a policy of
rematerialisation: each gradient summed once; parameters that lie in parts gathered once a pass; and in each pass of a
block, also where it is recomputed, tokens within the capacity factor to the experts and back, and one sum over the
model axis for each of its parts.

Compilers differ: XLA for accelerators adds what is to be summed over devices before it is sent, and sends kernels'
gradients in the dtype of activations, in which they are computed; XLA's CPU backend sends each term, in float32.
``merged`` says which is planned for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

from switch_t5.partitioning.mesh import BATCH_AXES
from switch_t5.planning.sizes import Block, SparseLayer, blocks
from switch_t5.planning.workload import MeshShape, Workload, is_kernel, shard_bytes

FLOAT32 = 4

_VOCABULARY_GRADIENTS = {False: 3, True: 2}
"""Of matrices with a row for each entry of the vocabulary: the encoder's, the decoder's and the output's; compilers
that add first sum both look-ups' as one."""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one purpose sends.

    Attributes:
      axis: the mesh axis, or several such as ``data+expert``.
      collective: its name in HLO.
      purpose: what for.
      sent: bytes from one device in a step.
      minimum: the least bytes.
    """

    axis: str
    collective: str
    purpose: str
    sent: float
    minimum: float


def ring_bytes(collective: str, size: int, nbytes: float) -> float:
    """Bytes that a device sends in a collective.

    Args:
      collective: its name in HLO.
      size: devices that take part.
      nbytes: of the whole array: what an all-reduce or all-to-all takes and gives, what an all-gather gives, what a
        reduce-scatter takes; what a collective-permute passes on.
    """
    if size == 1:
        return 0.0
    if collective == "collective-permute":
        return nbytes
    return nbytes * (size - 1) / size * (2 if collective == "all-reduce" else 1)


def transfers(workload: Workload, mesh: MeshShape, *, merged: bool) -> list[Transfer]:
    """All that a step sends, the same purposes joined; purposes that send nothing are left out.

    Args:
      workload: the step.
      mesh: its devices.
      merged: whether the compiler adds terms before it sends them, as all do but that for CPUs.
    """
    joined: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in _all(workload, mesh, merged):
        sums = joined[one.axis, one.collective, one.purpose]
        sums[0] += one.sent
        sums[1] += one.minimum
    return [Transfer(*key, *sums) for key, sums in joined.items() if sums[0]]


def _all(workload: Workload, mesh: MeshShape, merged: bool) -> Iterator[Transfer]:
    yield from _gradients(workload, mesh, merged)
    yield from _gathers(workload, mesh, merged)
    yield from _position_biases(workload, mesh)
    for block in blocks(workload, mesh):
        for layer in block.sparse_layers:
            yield from _exchanges(layer, block, workload, mesh)
        yield from _model_sums(block, workload, mesh, merged)
    yield from _vocabulary_sums(workload, mesh)


def _summed(size: int, axis: str, purpose: str, sent: float, minimum: float) -> Transfer:
    return Transfer(
        axis, "all-reduce", purpose, ring_bytes("all-reduce", size, sent), ring_bytes("all-reduce", size, minimum)
    )


def _gradients(workload: Workload, mesh: MeshShape, merged: bool) -> Iterator[Transfer]:
    """Sums over the devices that hold the same part of a parameter and saw other sequences."""
    narrow = _narrow(workload, merged)
    tables = sum(number for kind, number, _ in workload.params.kinds if "vocab" in kind.axes)
    for kind, number, name in workload.params.kinds:
        if "relpos_buckets" in kind.axes:
            continue
        one = shard_bytes(kind, mesh, name) * (narrow if is_kernel(kind) else 1.0)
        # Each use's gradient of the embedding is summed before they are added.
        times = number + (_VOCABULARY_GRADIENTS[merged] - tables) * name.startswith("embedding/")
        one *= mesh.along(kind.gathered_over - {*BATCH_AXES})  # Of which all devices along the axis make a gradient.
        purpose = "gradients of experts" if "expert" in kind.axes else "gradients of dense layers"
        sent, least = one * times * workload.microbatches, one * number
        parts = mesh.along(kind.gathered_over & {*BATCH_AXES})
        size, axis = _joined(mesh, {*BATCH_AXES} - set(itertools.chain(*kind.used)))
        if parts == 1:
            yield _summed(size, axis, purpose, sent, least)
            continue
        # At the least parts are dealt out, and then summed by those that hold the same.
        dealt_sent, dealt = (ring_bytes("reduce-scatter", parts, parts * nbytes) for nbytes in (sent, least))
        if size == parts and merged:
            yield Transfer(axis, "reduce-scatter", purpose, dealt_sent, dealt)
        else:
            # Where other devices have terms too, and by XLA for CPUs always, the whole is summed everywhere.
            then = ring_bytes("all-reduce", size // parts, least)
            yield Transfer(axis, "all-reduce", purpose, ring_bytes("all-reduce", size, parts * sent), dealt + then)


def _gathers(workload: Workload, mesh: MeshShape, merged: bool) -> Iterator[Transfer]:
    """Parameters that lie in parts, made whole: of blocks in each pass, others once."""
    narrow = _narrow(workload, merged)
    for kind, number, name in workload.params.kinds:
        parts, axis = _joined(mesh, kind.gathered_over)
        whole = number * parts * shard_bytes(kind, mesh, name) * (narrow if is_kernel(kind) else 1.0)
        once = ring_bytes("all-gather", parts, whole) * (2 if kind.in_blocks else 1)
        yield Transfer(axis, "all-gather", "parameters", once * workload.microbatches, once)


def _narrow(workload: Workload, merged: bool) -> float:
    """How much of a kernel is sent, or of its gradient: compilers for accelerators cast before they send."""
    return workload.itemsize / FLOAT32 if merged else 1.0


def _joined(mesh: MeshShape, axes: set[str]) -> tuple[int, str]:
    """Devices along some axes together, and the names of those axes that have more than one, in the mesh's order."""
    used = {axis: size for axis, size in mesh.axes().items() if axis in axes and size > 1}
    return math.prod(used.values()), "+".join(used)


def _position_biases(workload: Workload, mesh: MeshShape) -> Iterator[Transfer]:
    """Gradients of position biases, which are summed by distance, ``[heads, distances]``, on their way to buckets."""
    config = workload.config
    for decoder, layers in ((False, config.num_encoder_layers), (True, config.num_decoder_layers)):
        tables = layers if config.relpos_per_layer else 1
        column = tables * config.num_heads / workload.parts("heads", mesh) * FLOAT32
        sent = 2 * workload.length(decoder=decoder) * column * workload.microbatches
        least = min(sent, config.relpos_num_buckets * column)
        yield _summed(*_joined(mesh, set(BATCH_AXES)), "gradients of position biases", sent, least)


def _exchanges(layer: SparseLayer, block: Block, workload: Workload, mesh: MeshShape) -> Iterator[Transfer]:
    """Tokens to experts and back; a pass back in the backward pass, and one more forward where it is recomputed."""
    size, passes = mesh.expert, 1 + workload.forward_passes
    row = (layer.into + layer.out) * workload.itemsize
    if layer.moe.dispatch != "dropless":
        factor = ring_bytes("all-to-all", size, passes * layer.choices * row)
        yield Transfer("expert", "all-to-all", "tokens to experts and back", factor, factor)
        # Less than nothing where capacities are rounded down.
        rounding = ring_bytes("all-to-all", size, passes * (layer.slots - layer.choices) * row)
        yield Transfer("expert", "all-to-all", "slots that rounding and the least capacity add", rounding, 0.0)
        return
    minimum = ring_bytes("all-to-all", size, passes * layer.choices * row)
    for collective, entries, least in (("all-gather", layer.into, minimum), ("reduce-scatter", layer.out, 0.0)):
        nbytes = passes * size * block.tokens * entries * workload.itemsize
        sent = ring_bytes(collective, size, nbytes)
        yield Transfer("expert", collective, "tokens gathered for experts, sums dealt out", sent, least)


def _model_sums(block: Block, workload: Workload, mesh: MeshShape, merged: bool) -> Iterator[Transfer]:
    """Partial sums of outputs, and of the gradients of inputs, of heads and hidden activations that are split."""
    row = workload.config.emb_dim * workload.itemsize
    stream, again = block.tokens * row, workload.forward_passes

    def summed(purpose: str, split: str, sent: float, minimum: float) -> Transfer:
        return _summed(*_joined(mesh, set(workload.split_over(split))), purpose, sent, minimum)

    terms = 1 if merged else 3
    into = min(terms, block.dense_projections)
    outward = stream * block.dense_out
    yield summed("attention", "heads", again * outward + into * stream, again * outward + stream * (into > 0))
    if block.memory_tokens:
        # The encoder's output has one gradient of all layers, of which this is a layer's part.
        memory = block.memory_tokens * row / workload.config.num_decoder_layers
        sent = (again + 1) * stream + memory
        yield summed("cross-attention", "heads", sent, sent)
    if block.feed_forward is None or block.feed_forward.moe.num_shared_experts:
        # A recomputation leaves out the last product of a dense feed-forward, and of no other.
        forward = 1 if block.feed_forward is None else again
        branches = min(terms, len(workload.config.mlp_activations))
        yield summed("feed-forward", "mlp", (forward + branches) * stream, (forward + 1) * stream)
    for layer in block.sparse_layers:
        choices, rows, products, weights = layer.moe.router.experts_per_token, layer.slots, terms, 0.0
        if layer.moe.exchanges_by_itself:
            # A device adds a token's parts, and the gradients of its products, before they are summed.
            rows, products, weights = block.tokens, 1, block.tokens * choices * FLOAT32
        outward = rows * layer.out * workload.itemsize * layer.sums_out
        inward = min(products, layer.products) * rows * layer.into * workload.itemsize + weights
        least = stream * choices * (again * layer.sums_out + (layer.products > 0))
        split = "expert_mlp" if layer is block.feed_forward else "heads"
        yield summed("experts", split, again * outward + inward, least)


def _vocabulary_sums(workload: Workload, mesh: MeshShape) -> Iterator[Transfer]:
    """Rows of a split embedding, logarithms of sums over a split vocabulary, and the gradient of what met it."""
    emb, shards = workload.config.emb_dim, mesh.batch_shards
    embedded = workload.tokens / shards * emb * FLOAT32
    split = _joined(mesh, set(workload.split_over("vocab")))
    yield _summed(*split, "embedding", embedded, embedded / FLOAT32 * workload.itemsize)
    targets = workload.batch * workload.decoder_length / shards
    # A maximum, a sum and the target's own logit, whose row of the output's kernel is gathered whole.
    sent = targets * (2 + 2 * emb) * FLOAT32
    yield _summed(*split, "logits", sent, targets * (3 + emb) * FLOAT32)


def total_sent(found: list[Transfer]) -> float:
    """Bytes that a device sends in a step."""
    return math.fsum(one.sent for one in found)
