"""Each file of configs/conventions sets what its row of ROUTING.md's table says, in any order that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from switch_t5.cli.build import ROOTS, RunSpec
from switch_t5.cli.config_files import packaged_configs
from switch_t5.cli.configuration import Configuration
from switch_t5.errors import UserError

Load = Callable[..., Configuration]

PRETRAIN = ("MODEL_DIR=/tmp/model", "VOCABULARY_PATH=cc_all.32000.100extra/sentencepiece.model")
# Of the model switch_base_e8: group size, factors and least capacity are 8192, 1.25, 2.0 and 4, and the initialization
# is T5X's.
FIELDS = (
    "initialization",
    "group_size",
    "train_capacity_factor",
    "eval_capacity_factor",
    "min_expert_capacity",
    "capacity_rounding",
    "expert_capacity",
    "padding",
    "jitter_noise",
    "load_balance_loss_weight",
    "router_z_loss_weight",
    "sparse_layer_reduction",
)
TABLE: dict[str, tuple[Any, ...]] = {
    "paper": ("paper", 8192, 1.25, 2.0, 4, "floor", None, "ignored", 0.01, 0.01, 0.0, "sum"),
    "mesh_tf": ("paper", 1024, 1.25, 2.0, 4, "floor", None, "counted", 0.01, 0.01, 0.0, "sum"),
    "t5x": ("t5x_switch", 8192, 1.25, 2.0, 4, "round", None, "zeroed", 0.0, 0.01, 0.0, "mean"),
    "huggingface": (
        "t5x_switch",
        "sequence",
        1.25,
        2.0,
        4,
        "round",
        64,
        "routed",
        0.01,
        0.001,
        0.001,
        "stack_mean",
    ),
}


def files(convention: str) -> tuple[str, str, str]:
    return "models/switch_base_e8.gin", f"conventions/{convention}.gin", "runs/pretrain.gin"


def values(spec: RunSpec) -> tuple[Any, ...]:
    parts = (spec.transformer, spec.transformer.moe, spec.loss)
    owners = [next(part for part in parts if hasattr(part, field)) for field in FIELDS]
    return tuple(getattr(owner, field) for owner, field in zip(owners, FIELDS, strict=True))


def test_the_table_has_every_convention() -> None:
    assert set(TABLE) == {path.stem for path in (packaged_configs() / "conventions").glob("*.gin")}


@pytest.mark.parametrize("convention", TABLE)
def test_a_convention_resolves_to_its_row(convention: str, load: Load) -> None:
    configuration = load(*files(convention), bindings=PRETRAIN)
    assert dict(zip(FIELDS, values(RunSpec.read(configuration)), strict=True)) == dict(
        zip(FIELDS, TABLE[convention], strict=True)
    )


@pytest.mark.parametrize("convention", TABLE)
def test_a_convention_may_stand_before_or_after_the_run(convention: str, load: Load) -> None:
    model, named, run = files(convention)
    orders = ((model, named, run), (model, run, named), (run, model, named))
    resolved = {load(*order, bindings=PRETRAIN).resolved(ROOTS) for order in orders}
    assert len(resolved) == 1


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_a_model_after_its_convention_is_refused(order: tuple[int, ...], load: Load) -> None:
    names = files("huggingface")
    with pytest.raises(UserError, match=r"give --gin_file=conventions/huggingface\.gin after .*switch_base_e8\.gin\.$"):
        load(*(names[index] for index in order), bindings=PRETRAIN)


def test_two_conventions_are_refused(load: Load) -> None:
    with pytest.raises(UserError, match=r"t5x\.gin and .*paper\.gin are two conventions: give one of them\.$"):
        load("models/switch_base_e8.gin", "conventions/t5x.gin", "conventions/paper.gin")


def test_the_quickstart_takes_a_convention_after_itself(load: Load) -> None:
    model_dir = "MODEL_DIR=/tmp/model"
    spec = RunSpec.read(load("runs/quickstart.gin", "conventions/mesh_tf.gin", bindings=(model_dir,)))
    assert values(spec) == TABLE["mesh_tf"]
    with pytest.raises(UserError, match=r"MoEConfig\.group_size is 1024 by .*give --gin_file=conventions/mesh_tf\.gin"):
        load("conventions/mesh_tf.gin", "runs/quickstart.gin", bindings=(model_dir,))


def test_a_flag_and_a_file_of_the_users_own_win_over_a_convention(load: Load, tmp_path: Any) -> None:
    own = tmp_path / "own.gin"
    own.write_text("MoEConfig.expert_capacity = 32\n")
    moe = load(*files("huggingface"), str(own), bindings=PRETRAIN).get("MoEConfig")
    assert (moe.expert_capacity, moe.padding) == (32, "routed")
    moe = load(*files("huggingface"), bindings=(*PRETRAIN, "MoEConfig.padding=ignored")).get("MoEConfig")
    assert (moe.expert_capacity, moe.padding) == (64, "ignored")


def test_a_convention_reaches_a_decoder_of_its_own(load: Load) -> None:
    flags = ("TransformerConfig.decoder_moe=@decoder/MoEConfig()", "decoder/MoEConfig.expert_dropout_rate=0.4")
    config = load(*files("huggingface"), bindings=(*PRETRAIN, *flags)).get("TransformerConfig")
    decoder = config.moe_of(decoder=True)
    assert (decoder.group_size, decoder.expert_capacity, decoder.padding) == ("sequence", 64, "routed")
    assert (decoder.expert_dropout_rate, config.moe.expert_dropout_rate) == (0.4, 0.0)


def test_a_misspelt_padding_is_one_sentence(load: Load) -> None:
    with pytest.raises(UserError) as caught:
        load(*files("t5x"), bindings=(*PRETRAIN, "MoEConfig.padding=route")).get("TransformerConfig")
    expected = "MoEConfig.padding must be one of 'ignored', 'counted', 'zeroed', 'routed', got 'route'"
    assert str(caught.value) == f"{expected} (set by --gin.MoEConfig.padding=route). Did you mean 'routed'?"
