"""Trees and batches onto a mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from switch_t5.errors import ConfigError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.placement import batch_rows, batch_sharding, place_batch, tree_shardings

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """Two devices along each axis."""
    return make_mesh(MeshConfig(num_expert_partitions=2, num_model_partitions=2))


def test_one_process_holds_and_owns_every_row(mesh: Mesh) -> None:
    rows = batch_rows(mesh, 8)
    assert rows.held.tolist() == rows.owned.tolist() == [*range(8)]


def test_a_batch_is_split_by_sequences_over_data_and_expert(mesh: Mesh) -> None:
    batch = {"tokens": np.arange(40).reshape(8, 5), "weights": np.ones((8, 5), np.float32)}
    placed = place_batch(batch, mesh)
    for name, value in batch.items():
        assert placed[name].sharding == batch_sharding(mesh)
        assert placed[name].sharding.shard_shape(value.shape) == (2, 5)
        np.testing.assert_array_equal(placed[name], value)


def small_model(num_heads: int = 4) -> Model:
    return Model(
        TransformerConfig(
            vocab_size=16,
            emb_dim=8,
            num_heads=num_heads,
            head_dim=4,
            mlp_dim=16,
            num_encoder_layers=2,
            num_decoder_layers=2,
            moe=MoEConfig(4),
        )
    )


def test_a_models_parameters_have_their_shardings(mesh: Mesh) -> None:
    model = small_model()
    shardings = tree_shardings(mesh, model.abstract_params, model.axes)
    sparse = shardings["encoder"]["stack"]["blocks"]["layers_1"]
    assert shardings["embedding"]["table"].spec == PartitionSpec("model", "fsdp")
    assert sparse["mlp"]["experts"]["wi"].spec == PartitionSpec("expert", "fsdp", "model")
    assert sparse["mlp"]["experts"]["wo"].spec == PartitionSpec("expert", "model", "fsdp")
    assert sparse["mlp"]["router"].spec == PartitionSpec("fsdp", None)
    assert sparse["self_attention"]["out"].spec == PartitionSpec("model", None, "fsdp")
    assert sparse["mlp_norm"]["scale"].spec == PartitionSpec("fsdp")
    assert jax.tree.structure(shardings) == jax.tree.structure(model.abstract_params)


def test_an_error_names_the_parameter_by_its_path(mesh: Mesh) -> None:
    model = small_model(num_heads=3)
    with pytest.raises(ConfigError, match=r"^decoder/relative_position/embedding has 'heads' of size 3, which 2"):
        tree_shardings(mesh, model.abstract_params, model.axes)
