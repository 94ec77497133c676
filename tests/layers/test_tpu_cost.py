"""What the sparse layer costs on a TPU, by XLA's own count of the program that it compiles for one; none is needed.

In that count a megablox kernel is what it declares: the products of its rows, without the rest of the tiles that two
experts share.

``libtpu`` holds the compiler, and jax[tpu] names its version; without it these are skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from switch_t5.conformance.cells import BATCH, FEATURES, LENGTH, ROUTERS, example_inputs, make_layer
from switch_t5.layers.dense import FeedForward
from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import partitioned

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

TOKENS, EMBED, HIDDEN = 8192, 512, 2048
AXES = ("batch", "length", "mlp")
ONE_CHIP = MeshConfig(num_devices=1)


@pytest.fixture(autouse=True, scope="module")
def without_a_tpu() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield


def compiled(
    module: nnx.Module,
    call: Callable[[Any, jax.Array], jax.Array],
    *,
    shape: tuple[int, int, int] = (1, TOKENS, EMBED),
    dtype: Any = jnp.bfloat16,
    mesh_config: MeshConfig = ONE_CHIP,
) -> jax.stages.Compiled:
    """The value and all gradients, of an input of that shape, on chips of a v5e."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh(mesh_config, topology.devices)
    whole = NamedSharding(mesh, PartitionSpec())
    graph, params = nnx.split(module)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), params)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def step(params: nnx.State, x: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: call(nnx.merge(graph, params), x), params, x)
        return y, pull(dy)

    with partitioned(mesh):
        return jax.jit(step).lower(params, x, x).compile()


def flops(module: nnx.Module, call: Callable[[Any, jax.Array], jax.Array]) -> float:
    """Of :func:`compiled`, on one chip."""
    costs = compiled(module, call).cost_analysis()
    assert costs is not None
    return costs["flops"]


@functools.cache
def dense_flops() -> float:
    dense = FeedForward(EMBED, HIDDEN, ("relu",), "paper", rngs=nnx.Rngs(0))
    return flops(dense, lambda dense, x: dense(x, hidden_axes=AXES, dropout_rate=0.0, rng=None))


def test_the_dense_layer_is_six_products() -> None:
    assert dense_flops() == pytest.approx(6 * 2 * TOKENS * EMBED * HIDDEN, rel=0.01)


@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize(("dispatch", "limit"), [("gather", 1.30), ("dropless", 1.05)])
def test_the_sparse_layer_costs_little_more_than_its_capacity(dispatch: Any, limit: float, experts: int) -> None:
    config = MoEConfig(experts, group_size=TOKENS, train_capacity_factor=1.25, dispatch=dispatch)
    layer = SwitchFeedForward(config, EMBED, HIDDEN, ("relu",), "paper", rngs=nnx.Rngs(0))
    mask, ids = jnp.ones((1, TOKENS), bool), jnp.ones((1, TOKENS), jnp.int32)

    def call(layer: Any, x: jax.Array) -> jax.Array:
        y, stats = layer(x, mask, tokens=ids, sequences=1, train=True, rng=None)
        return y + stats.load_balance_loss.astype(y.dtype)

    ratio = flops(layer, call) / dense_flops()
    # Below, and no program that leaves work out: every token is multiplied.
    assert 1.0 <= ratio <= limit


@pytest.mark.parametrize(
    "mesh_config", [ONE_CHIP, MeshConfig(num_expert_partitions=2, num_model_partitions=2)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dropless_layer_of_the_conformance_cells_compiles(dtype: Any, mesh_config: MeshConfig) -> None:
    layer = make_layer(ROUTERS["top_2"].config, "dropless", example_inputs(dtype))
    mask, ids = jnp.ones((BATCH, LENGTH), bool), jnp.ones((BATCH, LENGTH), jnp.int32)

    def call(layer: Any, x: jax.Array) -> jax.Array:
        return layer(x, mask, tokens=ids, sequences=1, train=True, rng=None)[0]

    program = compiled(layer, call, shape=(BATCH, LENGTH, FEATURES), dtype=dtype, mesh_config=mesh_config)
    assert "tpu_custom_call" in str(program.as_text())  # Mosaic's kernels.
