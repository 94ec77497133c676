"""A sparse model begins as the dense one whose checkpoint it is made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.upcycling import upcycle
from switch_t5.errors import ConfigError, UserError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.upcycling import UpcyclingConfig, check_upcycled, even_weight
from switch_t5.routing.router import RouterConfig
from switch_t5.training.state import TrainState
from switch_t5.types import Params
from tests.checkpoint.damage import flip
from tests.checkpoint.golden import abstract
from tests.checkpoint.test_conversion import DENSE, GATED, SWITCH, assert_same, converted, saved, state_of
from tests.model.small import examples, random_params, unpacked

RENORMALIZED = RouterConfig(num_selected_experts=2, renormalize_weights=True)
AS_IT_IS = UpcyclingConfig()


def sparse(dense: TransformerConfig, router: RouterConfig = RENORMALIZED, **more: Any) -> TransformerConfig:
    return dataclasses.replace(dense, moe=MoEConfig(4, router=router, dispatch="dropless"), **more)


def random_routers(model: Model) -> Any:
    """Draws the parameters asked for; of routers so large that each token has a favourite."""
    leaves = naming.named_leaves({"params": random_params(model, scale=2.0, seed=7)})
    return lambda names: {name: leaves[name] for name in names}


def even_routers(names: tuple[str, ...]) -> dict[str, jax.Array]:
    return {name: jnp.zeros((8, 4)) for name in names}


def upcycled(
    path: Path, config: TransformerConfig, upcycling: UpcyclingConfig = AS_IT_IS, routers: Any = None
) -> Params:
    model = Model(config)
    wanted = {"params": abstract(model.abstract_params)}
    drawn = routers or random_routers(model)
    return upcycle(str(path), config, upcycling, wanted, drawn, optimizer=False)["params"]


def outputs(config: TransformerConfig, params: Params) -> np.ndarray:
    batch = unpacked(examples([(9, 5), (4, 6), (7, 3)], vocab_size=40), 10, 6)
    hidden = jax.jit(lambda params: Model(config).bind(params)(batch)[0])(params)
    # What comes out at padding, which experts leave out and a dense layer does not, nothing reads.
    return np.asarray(hidden)[np.asarray(batch["decoder_target_tokens"]) > 0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    state = state_of(DENSE)
    state = dataclasses.replace(state, params=random_params(Model(DENSE)))
    return saved(tmp_path_factory.mktemp("dense"), state), state


def experts_of(params: Params, stack: str, layer: int) -> dict[str, np.ndarray]:
    block = params[stack]["stack"]["blocks"][f"layers_{layer}"]
    return {name: np.asarray(kernel) for name, kernel in block["mlp"]["experts"].items()}


def kernels_of(params: Params, stack: str, layer: int) -> dict[str, np.ndarray]:
    block = params[stack]["stack"]["blocks"][f"layers_{layer}"]
    return {name: np.asarray(kernel) for name, kernel in block["mlp"].items()}


@pytest.mark.parametrize(
    ("router", "routers"),
    [
        pytest.param(RENORMALIZED, None, id="weights that add to one, whatever the router says"),
        pytest.param(RouterConfig(), even_routers, id="raw weights of an even router, compensated"),
        pytest.param(RouterConfig(num_selected_experts=3), even_routers, id="three raw weights"),
        pytest.param(RouterConfig(router="hash"), None, id="weights of one"),
    ],
)
def test_an_upcycled_model_begins_with_the_dense_models_output(dense, router, routers) -> None:
    path, state = dense
    config = sparse(DENSE, router)
    params = upcycled(path, config, routers=routers)
    np.testing.assert_allclose(outputs(config, params), outputs(DENSE, state.params), rtol=2e-5, atol=2e-5)


def test_without_compensation_raw_weights_change_the_output(dense) -> None:
    path, state = dense
    config = sparse(DENSE, RouterConfig())
    params = upcycled(path, config, UpcyclingConfig(compensate_weights=False), even_routers)
    assert np.abs(outputs(config, params) - outputs(DENSE, state.params)).max() > 1e-2
    for name, kernel in experts_of(params, "encoder", 1).items():
        np.testing.assert_array_equal(kernel[3], kernels_of(state.params, "encoder", 1)[name])


def test_weights_of_an_even_router_are_known() -> None:
    def weight(**settings: Any) -> float:
        return even_weight(MoEConfig(8, router=RouterConfig(**settings), train_capacity_factor=2.0))

    assert weight() == 1 / 8
    assert weight(num_selected_experts=2) == 1 / 4
    assert weight(num_selected_experts=2, renormalize_weights=True) == 1
    assert weight(router="sigmoid_top_k", num_selected_experts=2, weight_scale=2.5) == 2.5
    assert weight(router="expert_choice") == 1 / 4
    assert weight(router="no_token_left_behind") == 1 / 8
    assert [weight(router=name) for name in ("gshard_top_2", "hash", "random")] == [1, 1, 1]
    assert UpcyclingConfig(compensate_weights=False).output_scale(MoEConfig(8)) == 1


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
def test_experts_are_bitwise_the_dense_feed_forward_and_all_else_is_as_it_was(tmp_path, form) -> None:
    state = state_of(GATED)
    path = saved(tmp_path / "run", state)
    path = path if form == "native" else converted(path, tmp_path / form, form)
    config = sparse(GATED)
    made = upcycled(path, config)
    copies = 0
    for stack, layer in (("encoder", 1), ("decoder", 1)):
        for name, kernel in experts_of(made, stack, layer).items():
            for expert in range(4):
                np.testing.assert_array_equal(kernel[expert], kernels_of(state.params, stack, layer)[name])
                copies += 1
    assert copies == 2 * 3 * 4
    was, now = (naming.named_leaves(tree) for tree in (state.params, made))
    both = set(was) & set(now)
    assert set(was) - both == {
        f"{stack}/stack/blocks/layers_1/mlp/{name}"
        for stack in ("encoder", "decoder")
        for name in ("wi_0", "wi_1", "wo")
    }
    assert_same({name: now[name] for name in both}, {name: was[name] for name in both})


def test_a_scanned_model_of_a_dense_one_that_is_not_has_the_same_numbers(tmp_path) -> None:
    four = dataclasses.replace(DENSE, num_encoder_layers=4)
    path = saved(tmp_path / "run", state_of(four))
    written_out = upcycled(path, sparse(four))
    scanned_config = sparse(four, scan_layers=True)
    shapes = naming.named_leaves({"params": Model(scanned_config).abstract_params})
    noise = UpcyclingConfig(expert_noise=0.5)
    scanned = upcycled(
        path, scanned_config, noise, lambda names: {name: jnp.zeros(shapes[name].shape) for name in names}
    )
    noisy = upcycled(path, sparse(four), noise)
    stacked = scanned["encoder"]["stack"]["blocks"]["layers_1"]["mlp"]["experts"]["wi"]
    for period, layer in enumerate((1, 3)):
        np.testing.assert_array_equal(stacked[period], experts_of(noisy, "encoder", layer)["wi"])
    assert not np.array_equal(stacked[0], experts_of(written_out, "encoder", 1)["wi"])


@pytest.mark.parametrize("factored", [True, False])
def test_the_optimizers_state_and_the_step_are_carried_over(tmp_path, factored) -> None:
    state = state_of(DENSE, factored=factored)
    path = saved(tmp_path / "run", state)
    config = sparse(DENSE)
    wanted = state_of(config, factored=factored)
    made = upcycle(str(path), config, AS_IT_IS, abstract(wanted), random_routers(Model(config)), optimizer=True)
    assert (int(made.step), int(made.opt_state.count)) == (17, 17)
    was, now = (tree.opt_state.moments["encoder"]["stack"]["blocks"]["layers_1"]["mlp"] for tree in (state, made))
    for name in ("wi", "wo"):
        for kind, moment in was[name].items():
            copied = np.asarray(now["experts"][name][kind])
            np.testing.assert_array_equal(copied, np.broadcast_to(np.asarray(moment), copied.shape))
    assert {kind: float(jnp.abs(moment).max()) for kind, moment in now["router"].items()} == dict.fromkeys(
        now["router"], 0
    )
    assert now["router"]
    other = state.opt_state.moments["embedding"]["table"]
    assert_same(made.opt_state.moments["embedding"]["table"], other)


def test_noise_is_of_its_size_differs_by_expert_and_follows_the_seed_alone(dense) -> None:
    path, state = dense
    config = sparse(DENSE)
    noisy = UpcyclingConfig(expert_noise=0.5, seed=3)
    one, again = (upcycled(path, config, noisy) for _ in range(2))
    assert_same(one, again)
    other = upcycled(path, config, dataclasses.replace(noisy, seed=4))
    kernel = kernels_of(state.params, "encoder", 1)["wi"]
    noise = experts_of(one, "encoder", 1)["wi"] - kernel
    assert np.std(noise) == pytest.approx(0.5 * np.sqrt(np.mean(np.square(kernel))), rel=0.15)
    drawn = [noise[0], noise[1], noise[2], experts_of(other, "encoder", 1)["wi"][0] - kernel]
    drawn += [(experts_of(one, "decoder", 1)["wi"] - kernels_of(state.params, "decoder", 1)["wi"])[0]]
    correlations = np.corrcoef([values.ravel() for values in drawn]) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 0.45


def test_no_mesh_changes_noise_and_each_device_makes_its_own_part(dense) -> None:
    path, _ = dense
    config, noisy = sparse(DENSE), UpcyclingConfig(expert_noise=0.5)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "model"))
    model = Model(config)

    def spread(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("expert", "model") if "/experts/" in name else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    leaves = naming.named_leaves({"params": model.abstract_params})
    wanted = naming.like({"params": model.abstract_params}, {name: spread(name, leaf) for name, leaf in leaves.items()})
    made = upcycle(str(path), config, noisy, wanted, random_routers(model), optimizer=False)["params"]
    wi = made["encoder"]["stack"]["blocks"]["layers_1"]["mlp"]["experts"]["wi"]
    assert wi.addressable_shards[0].data.shape == (2, 4, 12)
    np.testing.assert_array_equal(wi, experts_of(upcycled(path, config, noisy), "encoder", 1)["wi"])


def test_what_is_not_the_dense_model_is_refused_with_what_differs(tmp_path, dense) -> None:
    path, _ = dense
    with pytest.raises(
        UserError, match=r"is not this model without its experts: TransformerConfig\.num_encoder_layers is 3 in"
    ) as caught:
        upcycled(path, sparse(DENSE, num_encoder_layers=4, mlp_activations=("gelu", "linear")))
    assert "TransformerConfig.mlp_activations is ('relu',) in the checkpoint and ('gelu', 'linear') here" in str(
        caught.value
    )
    assert "--gin.TransformerConfig.num_encoder_layers=3" in str(caught.value)
    switch = saved(tmp_path / "switch", state_of(SWITCH))
    with pytest.raises(UserError, match=r"is sparse already, with 3 experts.* TrainConfig\.upcycling = None"):
        upcycled(switch, sparse(DENSE, num_encoder_layers=4))
    bare = converted(path, tmp_path / "hf", "huggingface")
    config = sparse(DENSE)
    wanted, routers = abstract(state_of(config)), random_routers(Model(config))
    with pytest.raises(
        UserError, match=r"no state of Adafactor: set TrainConfig\.initial_checkpoint_optimizer = False"
    ):
        upcycle(str(bare), config, AS_IT_IS, wanted, routers, optimizer=True)
    with pytest.raises(UserError, match="does not exist"):
        upcycled(tmp_path / "nothing", config)


def test_a_damaged_dense_checkpoint_is_not_trained_on(tmp_path) -> None:
    path = saved(tmp_path / "run", state_of(DENSE))
    data = max((path / "checkpoints" / "17" / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    flip(data)
    with pytest.raises(UserError, match="damaged"):
        upcycled(path, sparse(DENSE))


def test_models_that_no_dense_one_can_begin_are_refused() -> None:
    check_upcycled(sparse(DENSE))
    with pytest.raises(ConfigError, match="this model has none"):
        check_upcycled(DENSE)
    with pytest.raises(ConfigError, match="num_shared_experts is not made from a dense checkpoint"):
        check_upcycled(dataclasses.replace(DENSE, moe=MoEConfig(4, num_shared_experts=1)))
    with pytest.raises(ConfigError, match="attention_moe is not made from a dense checkpoint"):
        check_upcycled(dataclasses.replace(sparse(DENSE), attention_moe=MoEConfig(4), encoder_sparse_attention=2))
    with pytest.raises(ConfigError, match=r"expert_noise must not be negative, got -0\.1\."):
        UpcyclingConfig(expert_noise=-0.1)
