"""What a run asks of batch, groups, experts and mesh together, before anything is compiled."""

from __future__ import annotations

import dataclasses

import pytest

from switch_t5.cli.build import RunSpec, check_batch
from switch_t5.cli.configuration import Configuration
from switch_t5.errors import ConfigError
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from tests.integration.conftest import TINY

MESH = MeshConfig(num_expert_partitions=4)
DECODER = ("TransformerConfig.decoder_moe=@decoder/MoEConfig()", "decoder/MoEConfig.num_experts=6")


def check(*settings: str, mesh: MeshConfig = MESH) -> None:
    configuration = Configuration.load([str(TINY)], ("MODEL_DIR=unused", "TEXTS=unused", *settings))
    check_batch(dataclasses.replace(RunSpec.read(configuration), mesh=mesh), make_mesh(mesh))


def test_what_fits_is_accepted() -> None:
    check()
    check(*DECODER, mesh=MeshConfig(num_expert_partitions=2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("MoEConfig.num_experts=6",), "the 6 experts of the encoder; 3 does."),
        # Of what divides the decoder's six alone, 3 is as near; it would not divide the encoder's four.
        (DECODER, "the 6 experts of the decoder; 2 does."),
        ((*DECODER, "TransformerConfig.encoder_sparse_layers='none'"), "the 6 experts of the decoder; 3 does."),
    ],
)
def test_expert_partitions_that_do_not_divide_the_experts_of_a_stack_are_refused(
    settings: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(*settings)
    assert str(caught.value) == f"MeshConfig.num_expert_partitions is 4, which does not divide {sentence}"


def test_expert_partitions_have_to_divide_the_experts_of_attention() -> None:
    attention = ("TransformerConfig.attention_moe=@attention/MoEConfig()", "attention/MoEConfig.num_experts=6")
    alone = ("TransformerConfig.encoder_sparse_layers='none'", "TransformerConfig.encoder_sparse_attention=2")
    with pytest.raises(ConfigError, match="does not divide the 6 experts of the encoder; 2 does"):
        check(*attention, *alone)
    check(*attention, *alone, mesh=MeshConfig(num_expert_partitions=2))
    with pytest.raises(ConfigError, match="does not divide the 6 experts of the encoder; 3 does"):
        check(*attention, *alone, "TransformerConfig.moe=None")


def test_experts_of_a_stack_without_sparse_layers_need_not_divide() -> None:
    decoder = ("TransformerConfig.decoder_moe=@decoder/MoEConfig()", "decoder/MoEConfig.num_experts=8")
    check(*decoder, "MoEConfig.num_experts=6", "TransformerConfig.encoder_sparse_layers='none'")


def test_a_group_that_does_not_divide_a_devices_share_of_a_microbatch_is_refused_with_one_that_does() -> None:
    # Of 24 sequences a device has three, and a group would be two; the length is 32.
    with pytest.raises(ConfigError, match=r"group_size is 64, 2 sequences of 32 tokens, which .* set it to 32\."):
        check("BATCH_SIZE=24", "MoEConfig.group_size=64")
    check("BATCH_SIZE=16", "MoEConfig.group_size=64")
    # Told at once, however large.
    with pytest.raises(ConfigError, match=r"which do not divide .* set it to 96\."):
        check("BATCH_SIZE=24", f"MoEConfig.group_size={10**22}")


def test_a_model_without_sparse_layers_has_no_groups_that_could_not_divide() -> None:
    dense = ("TransformerConfig.encoder_sparse_layers='none'", "TransformerConfig.decoder_sparse_layers='none'")
    check("BATCH_SIZE=24", "MoEConfig.group_size=64", *dense)


def test_a_group_size_without_a_divisor_of_the_length_near_it_is_refused() -> None:
    # The only divisor of 31 below 16 is 1.
    lengths = "DataConfig.task_feature_lengths={'inputs': 31, 'targets': 16}"
    with pytest.raises(ConfigError, match=r"group_size is 16, but 31 tokens of inputs have no divisor near it"):
        check(lengths, "MoEConfig.group_size=16")


def test_a_load_loss_without_gaussian_noise_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check("LossConfig.load_loss_weight=0.1")
    assert str(caught.value) == (
        "LossConfig.load_loss_weight is 0.1, but the load loss is of gaussian noise, which no router here has; set "
        "RouterConfig.exploration = 'gaussian', or the weight to 0."
    )
    check("LossConfig.load_loss_weight=0.1", "MoEConfig.router=@RouterConfig()", "RouterConfig.exploration=gaussian")


def test_an_importance_loss_without_probabilities_is_refused() -> None:
    settings = ("LossConfig.importance_loss_weight=0.1", "MoEConfig.router=@RouterConfig()")
    with pytest.raises(ConfigError, match=r"importance_loss_weight is 0\.1, but no router here has probabilities"):
        check(*settings, "RouterConfig.router=hash")
    check(*settings)


def test_a_weight_of_a_balance_that_no_decoder_has_is_refused() -> None:
    weight = "LossConfig.decoder_load_balance_loss_weight=0.1"
    check(weight)
    with pytest.raises(ConfigError, match=r"^LossConfig\.decoder_load_balance_loss_weight has no effect: no block of "):
        check(weight, "TransformerConfig.decoder_sparse_layers='none'")
