"""Every gin file loads, builds its model by shapes alone, and amounts to what its golden says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from switch_t5.cli.build import ROOTS, Run, RunSpec
from switch_t5.cli.config_files import packaged_configs
from switch_t5.cli.configuration import Configuration
from switch_t5.errors import UserError
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model

Load = Callable[..., Configuration]

CONFIGS = packaged_configs()
MODEL_DIR = "MODEL_DIR=/tmp/model"
PRETRAIN = (MODEL_DIR, "VOCABULARY_PATH=cc_all.32000.100extra/sentencepiece.model")
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pretrain": (("models/switch_base_e8.gin",), PRETRAIN),
    "quickstart": ((), (MODEL_DIR,)),
    "finetune": (
        ("models/switch_base_e8.gin",),
        (*PRETRAIN, "MIXTURE_OR_TASK_NAME=super_glue_boolq_v102", "INITIAL_CHECKPOINT_PATH=/tmp/pretrained"),
    ),
    "finetune_superglue": (("models/switch_base_e8.gin",), (*PRETRAIN, "INITIAL_CHECKPOINT_PATH=/tmp/pretrained")),
    "distill": (("models/switch_base_e8.gin",), (*PRETRAIN, "TEACHER_CHECKPOINT_PATH=/tmp/teacher")),
    "upcycle": (("models/switch_base_e8.gin",), (*PRETRAIN, "INITIAL_CHECKPOINT_PATH=/tmp/dense")),
    "eval": ((), ()),
    "infer": ((), ()),
}
"""For each file of configs/runs the files that go before it, and what it leaves to the user."""
USED = (*ROOTS, "RuntimeConfig")
EXPERTS = (8, 16, 32, 64, 128, 256)


def parameter_table(model: Model) -> str:
    """A line a parameter, in the tree's order: its path, shape and logical axes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.abstract_params)
    lines = ["parameter\tshape\taxes"]
    for path, leaf in leaves:
        axes: Any = model.axes
        for key in path:
            axes = axes[key.key]
        assert leaf.dtype == "float32"
        names = ",".join(axis or "-" for axis in axes)
        lines.append(f"{'/'.join(key.key for key in path)}\t{','.join(map(str, leaf.shape))}\t{names}")
    return "\n".join(lines) + "\n"


def differing_parameters(one: Configuration, other: Configuration) -> set[str]:
    """The parameters in which two configurations differ."""
    return {sentence.split()[0] for sentence in one.difference(other.resolved(ROOTS))}


def test_every_model_file_resolves_to_its_golden_configuration(model_name, load, goldens):
    resolved = load(f"models/{model_name}.gin").resolved(["TransformerConfig"])
    goldens.check(f"models/{model_name}.gin", resolved)


def test_every_model_file_builds_the_parameters_of_its_golden_table(model_name, model, goldens):
    goldens.check(f"models/{model_name}.tsv", parameter_table(model(model_name)))


def test_every_run_file_resolves_to_its_golden_configuration(load: Load, goldens):
    assert sorted(RUNS) == sorted(path.stem for path in (CONFIGS / "runs").glob("*.gin"))
    for name, (before, bindings) in RUNS.items():
        configuration = load(*before, f"runs/{name}.gin", bindings=bindings)
        goldens.check(f"runs/{name}.gin", configuration.resolved(USED))


def test_the_quickstart_builds_the_parameters_of_its_golden_table(load: Load, goldens):
    config = load("runs/quickstart.gin", bindings=(MODEL_DIR,)).get("TransformerConfig")
    goldens.check("runs/quickstart.tsv", parameter_table(Model(config)))


def test_every_golden_belongs_to_a_gin_file(goldens):
    gin_files = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.gin")]
    known = {f"{path.as_posix()}{suffix}" for path in gin_files for suffix in (".gin", ".tsv")}
    orphans = goldens.names() - known
    if goldens.regenerate:
        for name in orphans:
            (goldens.folder / name).unlink()
    else:
        assert not orphans


def test_a_stale_golden_fails_with_the_difference_and_the_command_that_renews_it(goldens, tmp_path: Path):
    make = type(goldens)
    make(tmp_path, regenerate=True).check("a.gin", "one = 1\ntwo = 2\n")
    make(tmp_path, regenerate=False).check("a.gin", "one = 1\ntwo = 2\n")
    with pytest.raises(pytest.fail.Exception) as failure:
        make(tmp_path, regenerate=False).check("a.gin", "one = 1\ntwo = 3\n")
    message = str(failure.value)
    assert "-two = 2\n+two = 3" in message
    assert "one = 1" not in message
    assert "python -m pytest tests/configs --regenerate-goldens" in message


def test_a_model_file_holds_numbers_alone_and_fits_a_screen(model_name):
    text = (CONFIGS / "models" / f"{model_name}.gin").read_text()
    lines = text.splitlines()
    heads = {line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith("#")}
    macros = {line.split(" = ")[0] for line in lines if " = " in line and line[0] not in "# "}
    is_sparse = "switch" in model_name
    assert text.startswith("# ")
    assert "Numbers: " in text
    assert len(lines) <= 45
    assert not any(line.startswith(("include", "import")) for line in lines)
    assert heads == ({"TransformerConfig", "MoEConfig"} if is_sparse else {"TransformerConfig"})
    assert macros == ({"NUM_EXPERTS"} if is_sparse else set())


def test_every_model_trains_with_the_pretraining_file_in_either_order(model_name, load: Load):
    files = (f"models/{model_name}.gin", "runs/pretrain.gin")
    configuration, turned = (load(*order, bindings=PRETRAIN) for order in (files, files[::-1]))
    configuration.check_flags_have_effect(USED)
    assert configuration.resolved(USED) == turned.resolved(USED)
    spec = RunSpec.read(configuration)
    assert spec.transformer.dropout_rate == 0
    assert spec.data.task_feature_lengths == {"inputs": 512, "targets": 114}
    assert spec.data.batch_size * 512 == 2**20


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("t5_large", (1, 8)),
        ("t5_1_1_xxl", (1, 4)),
        ("switch_large_e128", (8, 1)),
        ("paper_switch_xxl", (2, 2)),
        ("switch_c_e2048", (8, 1)),
    ],
)
def test_a_pretraining_state_is_laid_out_on_a_mesh_of_eight(name: str, mesh: tuple[int, int], load: Load):
    bindings = (f"NUM_EXPERT_PARTITIONS={mesh[0]}", f"NUM_MODEL_PARTITIONS={mesh[1]}")
    configuration = load(f"models/{name}.gin", "runs/pretrain.gin", bindings=(*PRETRAIN, *bindings))
    run = Run(RunSpec.read(configuration))
    assert dict(run.mesh.shape) == {"data": 8 // mesh[0] // mesh[1], "fsdp": 1, "expert": mesh[0], "model": mesh[1]}
    leaves = jax.tree.leaves(run.abstract_state.params)
    largest = max(leaves, key=lambda leaf: leaf.size)
    assert largest.sharding.shard_shape(largest.shape) != largest.shape


def test_pretraining_uses_the_papers_rate_and_losses(load: Load):
    configuration = load("models/switch_base_e8.gin", "runs/pretrain.gin", bindings=PRETRAIN)
    spec = RunSpec.read(configuration)
    rate = spec.train.optimizer.learning_rate
    assert spec.train.train_steps == 550_000
    assert spec.train.optimizer.name == "adafactor"
    rates = np.asarray([rate(step) for step in (0, 10_000, 40_000)])
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.005], rtol=1e-6)
    assert (spec.loss.z_loss, spec.loss.load_balance_loss_weight) == (1e-4, 1e-2)


@pytest.mark.parametrize("missing", ["MODEL_DIR", "VOCABULARY_PATH"])
def test_pretraining_asks_for_what_only_the_user_knows(missing: str, load: Load):
    bindings = tuple(binding for binding in PRETRAIN if not binding.startswith(missing))
    with pytest.raises(UserError, match=f"--gin.{missing}=VALUE"):
        load("models/t5_small.gin", "runs/pretrain.gin", bindings=bindings)


def test_an_experts_flag_reaches_a_sparse_model(load: Load):
    flags = ("NUM_EXPERTS=4", "EXPERT_DROPOUT_RATE=0.4", "DROPOUT_RATE=0.1")
    configuration = load("models/switch_base_e8.gin", "runs/pretrain.gin", bindings=(*PRETRAIN, *flags))
    configuration.check_flags_have_effect(USED)
    config: TransformerConfig = configuration.get("TransformerConfig")
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.expert_dropout_rate, config.dropout_rate) == (4, 0.4, 0.1)


@pytest.mark.parametrize("flag", ["NUM_EXPERTS=4", "EXPERT_DROPOUT_RATE=0.4"])
def test_an_experts_flag_is_refused_for_a_dense_model(flag: str, load: Load):
    files = ("models/t5_base.gin", "runs/pretrain.gin")
    with pytest.raises(UserError, match=flag):
        load(*files, bindings=(*PRETRAIN, flag)).check_flags_have_effect(USED)


@pytest.mark.parametrize("experts", EXPERTS[1:])
def test_the_released_base_models_differ_in_their_experts_alone(experts: int, load: Load):
    one, other = load(f"models/switch_base_e{experts}.gin"), load("models/switch_base_e8.gin")
    assert differing_parameters(one, other) == {"MoEConfig.num_experts"}


def test_the_papers_shapes_differ_from_the_released_ones_where_they_are_known_to(load: Load):
    router = {"MoEConfig.capacity_rounding", "MoEConfig.jitter_noise", "TransformerConfig.initialization"}
    feed_forward = {"TransformerConfig.mlp_dim", "TransformerConfig.mlp_activations"}
    for released, paper, expected in (
        ("switch_base_e128", "paper_switch_base", router | feed_forward),
        ("switch_large_e128", "paper_switch_large", router | feed_forward),
        ("switch_xxl_e128", "paper_switch_xxl", router),
        ("switch_c_e2048", "paper_switch_c", router | {"TransformerConfig.num_heads"}),
    ):
        found = differing_parameters(load(f"models/{released}.gin"), load(f"models/{paper}.gin"))
        assert found == expected, paper


def test_mt5_differs_from_t5_1_1_in_its_vocabulary_alone(load: Load):
    for size in ("small", "base", "large", "xl", "xxl"):
        one, other = load(f"models/mt5_{size}.gin"), load(f"models/t5_1_1_{size}.gin")
        assert differing_parameters(one, other) == {"TransformerConfig.vocab_size"}


def test_deep_models_are_scanned_and_the_largest_recompute_activations(model_name, transformer):
    config: TransformerConfig = transformer(model_name)
    assert config.scan_layers == (config.num_encoder_layers > 12)
    is_base = config.num_encoder_layers <= 12
    if config.moe is not None:
        assert config.remat_policy == ("none" if is_base else "minimal")
    else:
        assert config.remat_policy == ("full" if model_name.endswith(("_xl", "_xxl")) else "none")


def test_every_stack_of_a_sparse_model_alternates_or_is_wholly_sparse(transformer):
    for name, pattern in (("switch_base_e8", (False, True)), ("switch_xxl_e128", (False, True))):
        config = transformer(name)
        assert config.encoder_pattern == config.decoder_pattern
        assert config.encoder_pattern == pattern * (config.num_encoder_layers // 2)
    assert transformer("switch_c_e2048").encoder_pattern == (True,) * 15
    dense = transformer("t5_base")
    assert dense.encoder_pattern == dense.decoder_pattern == (False,) * 12


def test_each_stack_may_have_a_router_of_its_own(load: Load):
    flags = (
        "RouterConfig.router='expert_choice'",
        "TransformerConfig.decoder_moe=@decoder/MoEConfig()",
        "decoder/RouterConfig.router='top_k'",
        "decoder/RouterConfig.num_selected_experts=2",
    )
    config: TransformerConfig = load("runs/quickstart.gin", bindings=(MODEL_DIR, *flags)).get("TransformerConfig")
    encoder, decoder = (config.moe_of(decoder=which) for which in (False, True))
    assert encoder is not None and decoder is not None
    assert (encoder.router.router, decoder.router.router) == ("expert_choice", "top_k")
    assert (encoder.group_size, decoder.group_size) == (512, 512)
    assert decoder.router.num_selected_experts == 2


ATTENTION = (
    "TransformerConfig.attention_moe=@attention/MoEConfig()",
    "TransformerConfig.encoder_sparse_attention=2",
    "TransformerConfig.decoder_sparse_attention=2",
)
"""The lines of ROUTING.md."""


def test_attention_may_be_sparse_and_inherits_what_feed_forwards_have(load: Load):
    flags = (*ATTENTION, "attention/MoEConfig.eval_capacity_factor=3.0")
    configuration = load("models/switch_base_e8.gin", "runs/pretrain.gin", bindings=(*PRETRAIN, *flags))
    configuration.check_flags_have_effect(USED)
    config = RunSpec.read(configuration).transformer
    assert config.attention_moe == dataclasses.replace(config.moe, eval_capacity_factor=3.0)
    assert (config.dtype, config.attention_expert_dtype) == ("bfloat16", "float32")
    block = Model(config).abstract_params["encoder"]["stack"]["blocks"]["layers_1"]
    assert block["self_attention"]["key_value"]["experts"]["key"].shape == (8, 768, 12, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("TransformerConfig.encoder_sparse_attention=2",), r"TransformerConfig\.attention_moe is missing, but enc"),
        (
            (*ATTENTION, "TransformerConfig.attention_sparse_projections=('keys',)"),
            r"got 'keys' .*\. Did you mean 'key'",
        ),
    ],
)
def test_a_mistake_in_sparse_attention_is_told_in_one_sentence(flags: tuple[str, ...], message: str, load: Load):
    with pytest.raises(UserError, match=message):
        load("runs/quickstart.gin", bindings=(MODEL_DIR, *flags)).get("TransformerConfig")


def test_a_router_that_a_decoder_cannot_have_is_refused_where_it_was_set(load: Load):
    with pytest.raises(UserError, match=r"RouterConfig\.router cannot serve a decoder.*set by --gin\.RouterConfig"):
        load("runs/quickstart.gin", bindings=(MODEL_DIR, "RouterConfig.router='sinkhorn'")).get("TransformerConfig")


def test_a_task_after_distillation_or_upcycling_keeps_the_start_and_brings_its_own_data(load: Load):
    task = (*PRETRAIN, "MIXTURE_OR_TASK_NAME=super_glue_boolq_v102")
    models = ("models/switch_base_e8.gin",)
    taught = (*task, "TEACHER_CHECKPOINT_PATH=/tmp/teacher")
    flags = {
        "distill": (*taught, "INITIAL_CHECKPOINT_PATH=None"),
        "distill, pre-trained": (*taught, "INITIALIZE_STUDENT=False", "INITIAL_CHECKPOINT_PATH=/tmp/dense"),
        "upcycle": (*task, "INITIAL_CHECKPOINT_PATH=/tmp/dense", "INITIAL_CHECKPOINT_OPTIMIZER=False"),
    }
    for name, bindings in flags.items():
        files = (*models, f"runs/{name.partition(',')[0]}.gin", "runs/finetune.gin")
        configuration = load(*files, bindings=bindings)
        configuration.check_flags_have_effect(USED)
        spec = RunSpec.read(configuration)
        assert spec.data.task_feature_lengths == {"inputs": 512, "targets": 62}
        assert spec.transformer.dropout_rate == 0.1
        assert (spec.train.upcycling is not None) == (name == "upcycle")
        assert (spec.train.distillation is not None) == (spec.transformer.moe is None) == (name != "upcycle")
        assert spec.loss.soft_loss_weight == (0 if name == "upcycle" else 0.25)
