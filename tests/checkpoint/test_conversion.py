"""Between formats: bitwise, both ways, whatever is stacked where."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.certificate import CERTIFICATE
from switch_t5.checkpoint.conversion import compare, plan, write
from switch_t5.checkpoint.formats import open_checkpoint, read_checkpoint
from switch_t5.checkpoint.huggingface import architecture_of, config_of, sparse_pattern
from switch_t5.checkpoint.load import load_params, load_state
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.checkpoint.native_files import verify
from switch_t5.checkpoint.t5x_files import key_value_store
from switch_t5.errors import UserError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.training.optimizers import adafactor
from switch_t5.training.state import TrainState
from switch_t5.types import Array
from tests.checkpoint.golden import abstract

SIZES: dict[str, Any] = {"vocab_size": 40, "emb_dim": 8, "num_heads": 2, "head_dim": 6, "mlp_dim": 12}
DENSE = TransformerConfig(**SIZES, num_encoder_layers=3, num_decoder_layers=2)
GATED = dataclasses.replace(DENSE, mlp_activations=("gelu", "linear"), tied_logits=False)
SWITCH = TransformerConfig(**SIZES, num_encoder_layers=4, num_decoder_layers=2, moe=MoEConfig(3))
SWITCH_AS_DENSE = dataclasses.replace(SWITCH, moe=None)
EVERY = dataclasses.replace(SWITCH, encoder_sparse_layers=1, decoder_sparse_layers=1)
SCANNED = dataclasses.replace(SWITCH, num_decoder_layers=4, scan_layers=True)
OWN_BIAS = dataclasses.replace(SCANNED, relpos_per_layer=True)
SCANNED_DENSE = dataclasses.replace(DENSE, scan_layers=True)
SCALABLE = dataclasses.replace(GATED, num_decoder_layers=3, scan_layers=True, relpos_per_layer=True)
GATED_SWITCH = dataclasses.replace(SWITCH, mlp_activations=("gelu", "linear"), tied_logits=False)


def state_of(config: TransformerConfig, *, factored: bool = True, any_bits: bool = False) -> TrainState:
    """A training state in which every number is another, such that none can be taken for one of elsewhere.

    They are normal draws, or with ``any_bits`` of any bits: a few of these are infinite or no numbers.
    """
    model = Model(config)
    options = {"min_dim_size_to_factor": 4, "factor_small_stacks": True} if factored else {"factored": False}
    make = adafactor(0.1, **options)(model.axes)

    def build() -> TrainState:
        params = model.init(jax.random.key(0))
        return TrainState(jnp.int32(0), params, make.init(params))

    shapes = jax.eval_shape(build)
    leaves, structure = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)

    def draw(leaf: Any) -> Array:
        if not leaf.shape:
            return jnp.asarray(17, leaf.dtype)
        if any_bits:
            return jnp.asarray(random.integers(0, 1 << 32, leaf.shape, np.uint32).view(leaf.dtype))
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)

    drawn = [draw(leaf) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def saved(folder: Path, state: TrainState) -> Path:
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(17, state, {})
    return folder


def converted(source: Path, to: Path, form: str, *, scanned: bool = False, dtype: str | None = None) -> Path:
    recognised = read_checkpoint(str(source))
    write(recognised, plan(recognised, str(to), form, dtype=dtype, scanned=scanned))
    return to


def assert_same(one: Any, other: Any) -> None:
    def compare_leaf(path: Any, a: Any, b: Any) -> None:
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare_leaf, one, other)


slow = pytest.mark.slow
T5X_CASES = {
    "dense": (DENSE, False, False),
    "switch": (SWITCH, False, True),
    "scanned": (SCANNED, False, True),
    "scanned there too": (OWN_BIAS, True, True),
    "scalable": (SCALABLE, True, True),
}
MORE_T5X_CASES = {
    "dense, factored": (DENSE, False, True),
    "gated": (GATED, False, True),
    "switch, whole moments": (SWITCH, False, False),
    "every": (EVERY, False, True),
    "gated switch": (GATED_SWITCH, False, True),
    "dense, scanned": (SCANNED_DENSE, False, True),
    "scalable, whole moments": (SCALABLE, True, False),
    "scanned there too, whole moments": (OWN_BIAS, True, False),
}


@pytest.mark.parametrize(
    ("config", "scanned", "factored"),
    [pytest.param(*case, id=name) for name, case in T5X_CASES.items()]
    + [pytest.param(*case, id=name, marks=slow) for name, case in MORE_T5X_CASES.items()],
)
def test_there_and_back_by_t5x_is_bitwise_with_the_optimizer(tmp_path, config, scanned, factored):
    state = state_of(config, factored=factored, any_bits=True)
    run = saved(tmp_path / "run", state)
    there = converted(run, tmp_path / "t5x", "t5x", scanned=scanned)
    back = converted(there, tmp_path / "back", "native", scanned=config.scan_layers)
    with Checkpointer(back, read_only=True) as checkpointer:
        assert_same(checkpointer.restore(abstract(state)).state, state)
    assert_same(load_state(str(there), config, abstract(state)), state)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(GATED, id="gated"),
        pytest.param(SCANNED, id="scanned"),
        pytest.param(SCANNED_DENSE, id="dense, scanned"),
        pytest.param(DENSE, id="dense", marks=slow),
        pytest.param(EVERY, id="every", marks=slow),
    ],
)
def test_there_and_back_by_hugging_face_is_bitwise(tmp_path, config):
    state = state_of(config, any_bits=True)
    there = converted(saved(tmp_path / "run", state), tmp_path / "hf", "huggingface")
    back = converted(there, tmp_path / "back", "native", scanned=config.scan_layers)
    with Checkpointer(back, read_only=True) as checkpointer:
        assert_same(checkpointer.restore_part("params", abstract(state.params)), state.params)


def test_there_and_back_by_t5x_in_bfloat16_is_bitwise(tmp_path):
    state = state_of(SWITCH)
    there = converted(saved(tmp_path / "run", state), tmp_path / "t5x", "t5x", dtype="bfloat16")
    back = converted(there, tmp_path / "back", "native")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    for read in (load_params(str(path), SWITCH, abstract(rounded)).params for path in (there, back)):
        assert_same(read, rounded)
    with Checkpointer(back, read_only=True) as checkpointer:
        assert_same(checkpointer.restore_part("params", abstract(rounded)), rounded)
        assert checkpointer.leaves(17)["params/embedding/table"].dtype == jnp.bfloat16


def test_each_device_reads_its_own_part(tmp_path):
    state = state_of(SWITCH)
    there = converted(saved(tmp_path / "run", state), tmp_path / "t5x", "t5x")
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))

    def sharded(leaf: Any) -> jax.ShapeDtypeStruct:
        even = [dim for dim, size in enumerate(leaf.shape) if size % 2 == 0]
        spec = PartitionSpec(*[("model" if dim == even[0] else None) for dim in range(len(leaf.shape))])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree.map(sharded, state.params)
    params = load_params(str(there), SWITCH, wanted).params
    assert_same(params, state.params)
    table = params["embedding"]["table"]
    assert table.addressable_shards[0].data.shape == (SIZES["vocab_size"] // 2, SIZES["emb_dim"])


def test_a_cast_is_measured_and_the_certificate_names_every_array(tmp_path):
    run = saved(tmp_path / "run", state_of(SWITCH))
    source = read_checkpoint(str(run))
    target = plan(source, str(tmp_path / "hf"), "huggingface", dtype="bfloat16", scanned=False)
    certificate = write(source, target)
    assert json.loads((tmp_path / "hf" / CERTIFICATE).read_text()) == certificate
    assert {entry["dtype"] for entry in certificate["arrays"].values()} == {"bfloat16"}
    assert len({entry["fingerprint"] for entry in certificate["arrays"].values()}) == len(certificate["arrays"])
    measured = compare(source, read_checkpoint(str(tmp_path / "hf")))
    assert 0 < measured["worst_relative"] < 2**-8
    assert not list(tmp_path.glob(".*.partial"))


def test_what_the_other_format_cannot_have_is_named(tmp_path):
    source = read_checkpoint(str(saved(tmp_path / "run", state_of(GATED_SWITCH))))
    with pytest.raises(UserError, match="no gated feed-forwards"):
        plan(source, str(tmp_path / "hf"), "huggingface", dtype=None, scanned=False)
    with pytest.raises(UserError, match="leave --scanned out"):
        plan(source, str(tmp_path / "t5x"), "t5x", dtype=None, scanned=True)
    with pytest.raises(UserError, match="is there already"):
        plan(source, str(tmp_path / "run"), "native", dtype=None, scanned=False)


def test_a_checkpoint_of_another_architecture_is_told_with_the_gin_that_fits(tmp_path):
    run = saved(tmp_path / "run", state_of(SWITCH))
    there = converted(run, tmp_path / "t5x", "t5x")
    other = dataclasses.replace(SWITCH, moe=MoEConfig(5))
    with pytest.raises(UserError, match=r"MoEConfig\.num_experts is 3 in the checkpoint and 5 here") as caught:
        load_params(str(there), other, abstract(Model(other).abstract_params))
    assert "--gin.MoEConfig.num_experts=3" in str(caught.value)


def test_a_dense_checkpoint_for_a_sparse_model_is_told_what_to_do_with_it(tmp_path):
    there = converted(saved(tmp_path / "run", state_of(SWITCH_AS_DENSE)), tmp_path / "t5x", "t5x")
    with pytest.raises(UserError, match=r"encoder_sparse_layers is None in the checkpoint") as caught:
        load_params(str(there), SWITCH, abstract(Model(SWITCH).abstract_params))
    assert str(caught.value).endswith("--gin.TransformerConfig.moe=None (runs/upcycle.gin makes a sparse model of it)")


@pytest.mark.parametrize("config", [DENSE, GATED, SWITCH, EVERY, OWN_BIAS])
def test_a_configuration_made_of_an_architecture_has_it(config):
    architecture = Architecture.of(config)
    assert Architecture.of(architecture.config(config.moe)) == architecture


def test_every_pattern_of_sparse_blocks_that_transformers_makes_is_written_as_a_number_that_makes_it():
    dense = dataclasses.replace(Architecture.of(DENSE), encoder_experts=3)
    patterns = {sparse_pattern(blocks, count) for blocks in range(1, 13) for count in range(blocks + 2)}
    assert {
        (False, True, False, False, True, False, False, True, False, False, True),
        (True,),
        (False, False),
    } <= patterns
    for pattern in patterns:
        if any(pattern):
            architecture = dataclasses.replace(dense, encoder=pattern)
            assert architecture_of(config_of(architecture, "float32"), "here", 1000) == architecture


def test_a_relative_path_of_t5x_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key_value_store("models/one").write("checkpoint", b"index").result()
    assert (tmp_path / "models" / "one" / "checkpoint").read_bytes() == b"index"


@pytest.mark.parametrize(
    ("tying", "divided"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        # As transformers 5 writes a model of version 1.1.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ({"tie_word_embeddings": True, "model_type": "mt5"}, False),
    ],
)
def test_tied_logits_are_those_that_transformers_divides(tying, divided):
    config = config_of(Architecture.of(DENSE), "float32")
    del config["tie_word_embeddings"]
    assert architecture_of(config | tying, "here", 1000).tied_logits == divided


def test_logits_of_the_embedding_as_it_is_have_a_copy_of_it_for_a_kernel(tmp_path):
    there = converted(saved(tmp_path / "run", state_of(DENSE)), tmp_path / "hf", "huggingface")
    file = there / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scale_decoder_outputs": False}))
    reader = read_checkpoint(str(there)).reader
    embedding, kernel = (reader.stored(name)[0].whole() for name in ("embedding", "logits"))
    np.testing.assert_array_equal(embedding, kernel)
    assert embedding.any()


def test_arrays_of_several_dtypes_are_rounded_to_none_of_them(tmp_path):
    there = converted(saved(tmp_path / "run", state_of(DENSE)), tmp_path / "hf", "huggingface")
    arrays = load_file(there / "model.safetensors")
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight".format
    arrays[name(0)] = arrays[name(0)].astype(jnp.bfloat16)
    save_file(arrays, there / "model.safetensors")
    back = converted(there, tmp_path / "back", "huggingface")
    found = load_file(back / "model.safetensors")
    for block in range(3):
        np.testing.assert_array_equal(found[name(block)], arrays[name(block)].astype(np.float32))


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
def test_a_name_may_have_what_a_url_gives_a_meaning(tmp_path, form):
    run = saved(tmp_path / "a%41b#c?d e", state_of(SWITCH))
    there = converted(run, tmp_path / "to%41b#c?d e", form)
    assert {path.name for path in tmp_path.iterdir()} == {run.name, there.name}
    assert verify(open_checkpoint(str(run)))
    compared = compare(read_checkpoint(str(run)), read_checkpoint(str(there)))
    assert (compared["worst_absolute"], compared["bound"]) == (0, 0)
