"""A run's first state from another run's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli.build import Run, RunSpec
from switch_t5.cli.configuration import Configuration
from switch_t5.cli.trained import load_params, load_state, load_teacher, student_state, upcycled_state
from switch_t5.cli.trained_vocabulary import check_embedding, check_vocabulary
from switch_t5.data.pipeline import BatchIterator, DataConfig
from switch_t5.errors import ConfigError, UserError
from switch_t5.model.upcycling import UpcyclingConfig
from switch_t5.training.state import TrainState
from tests.integration.conftest import TINY
from tests.model.small import examples, packed, unpacked

UPCYCLED = (
    "MoEConfig.router=@RouterConfig()",
    "MoEConfig.dispatch=dropless",
    "RouterConfig.num_selected_experts=2",
    "RouterConfig.renormalize_weights=True",
    "TrainConfig.upcycling=@UpcyclingConfig()",
    "TrainConfig.initial_checkpoint_path=unused",
)


def run_of(*settings: str) -> Run:
    configuration = Configuration.load([str(TINY)], ("MODEL_DIR=unused", "TEXTS=unused", *settings))
    return Run(RunSpec.read(configuration))


def upcycled(run: Run, path: str) -> TrainState:
    """A sparse run's start from a dense checkpoint."""
    return upcycled_state(run, path, UpcyclingConfig())


def nats(run: Run, params: object) -> float:
    """The held-out loss of a batch, per token."""
    pairs = [(30 - 3 * row, 3 + row) for row in range(8)]
    batch = unpacked(examples(pairs, vocab_size=384), 32, 16)
    sums = run.eval_step(params, run.place({name: np.asarray(value) for name, value in batch.items()}))  # pyright: ignore[reportArgumentType]
    return float(sums["nats"] / sums["tokens"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dense run's folder, and its loss."""
    run, folder = run_of("TransformerConfig.moe=None"), tmp_path_factory.mktemp("dense")
    state = run.init_state()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, state, {})
    return folder, nats(run, state.params)


@pytest.mark.multidevice
def test_an_upcycled_run_begins_on_its_mesh_at_the_dense_loss_with_the_routers_of_its_configuration(dense) -> None:
    folder, dense_loss = dense
    run = run_of(*UPCYCLED)
    state = upcycled_state(run, str(folder), UpcyclingConfig())
    assert int(state.step) == 0
    assert nats(run, state.params) == pytest.approx(dense_loss, rel=1e-5)
    drawn = naming.named_leaves(run.init_state().params)
    made = naming.named_leaves(state.params)
    routers = [name for name in made if name.endswith("router")]
    assert len(routers) == 2
    for name in routers:
        np.testing.assert_array_equal(made[name], drawn[name])
    for leaf, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(run.abstract_state.params), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.multidevice
def test_a_run_that_is_stacked_otherwise_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    one, other = (
        run_of("TransformerConfig.moe=None", f"TransformerConfig.scan_layers={scan}") for scan in (False, True)
    )
    random = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = random.standard_normal(leaf.shape) if leaf.shape else 3
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    state = jax.tree.map(drawn, one.abstract_state)
    with Checkpointer(tmp_path / "one") as checkpointer:
        checkpointer.save(3, state, {})
    stacked = load_state(other, str(tmp_path / "one"))
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, other.abstract_state)
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(3, stacked, {})
    back = load_state(one, str(tmp_path / "other"))
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_an_upcycling_without_sparse_layers_or_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"this model has none: give TransformerConfig\.moe, or set None\."):
        run_of(*UPCYCLED, "TransformerConfig.moe=None")
    with pytest.raises(ConfigError, match=r"upcycling has no effect without TrainConfig\.initial_checkpoint_path"):
        run_of(*UPCYCLED, "TrainConfig.initial_checkpoint_path=None")


DISTILLED = (
    "TransformerConfig.moe=None",
    "teacher/TransformerConfig.moe=@MoEConfig()",
    "DistillationConfig.teacher=@teacher/TransformerConfig()",
    "TrainConfig.distillation=@DistillationConfig()",
)


def tokens() -> dict[str, np.ndarray]:
    """A training batch, packed as the data pipeline would."""
    content = [[example] for example in examples([(30 - 3 * row, 3 + row) for row in range(8)], vocab_size=384)]
    return {name: np.asarray(value) for name, value in packed(content, 32, 16).items()}


@pytest.fixture(scope="module")
def taught_by(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainState]:
    """A teacher's folder, and what it holds."""
    run, folder = run_of("TrainConfig.seed=5"), tmp_path_factory.mktemp("teacher")
    state = run.init_state()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, state, {})
    return str(folder), state


@pytest.mark.multidevice
def test_a_step_reads_the_teacher_on_the_same_mesh_and_leaves_it_as_it_is(taught_by) -> None:
    folder, teacher_state = taught_by
    mixture = ("LossConfig.hard_loss_weight=0.75", "LossConfig.soft_loss_weight=0.25")
    run = run_of(*DISTILLED, *mixture, f"DistillationConfig.checkpoint_path={folder}")
    teacher = load_teacher(run)
    assert teacher is not None
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(teacher)]
    step, state = run.compile_train_step(), run.init_state()
    state, _ = step(state, run.place(tokens()), teacher)
    state, metrics = step(state, run.place(tokens()), teacher)
    assert 0 < float(metrics["soft_cross_entropy"]) != float(metrics["cross_entropy"])
    for was, leaf, saved in zip(before, jax.tree.leaves(teacher), jax.tree.leaves(teacher_state.params), strict=True):
        np.testing.assert_array_equal(leaf, was)
        np.testing.assert_array_equal(leaf, saved)
        assert leaf.sharding.is_equivalent_to(saved.sharding, leaf.ndim)


@pytest.mark.multidevice
def test_a_soft_weight_of_zero_is_bitwise_plain_training_from_the_teachers_weights(taught_by) -> None:
    folder, teacher_state = taught_by
    start = ("DistillationConfig.initialize_student=True", f"DistillationConfig.checkpoint_path={folder}")
    run, plain = run_of(*DISTILLED, *start), run_of("TransformerConfig.moe=None")
    assert (run.teacher, load_teacher(run)) == (None, None)
    state = student_state(run, folder)
    taught, own = (naming.named_leaves(tree) for tree in (teacher_state.params, state.params))
    for name in set(taught) & set(own):
        np.testing.assert_array_equal(own[name], taught[name])
    copy = plain.with_params(jax.tree.map(lambda leaf: leaf + 0, state.params))
    after, metrics = run.compile_train_step()(state, run.place(tokens()))
    wanted, plain_metrics = plain.compile_train_step()(copy, plain.place(tokens()))
    assert metrics["loss"] == plain_metrics["loss"]
    assert set(metrics) == set(plain_metrics)
    jax.tree.map(np.testing.assert_array_equal, after.params, wanted.params)


@pytest.fixture(scope="module")
def of_a_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a dense run with a position in data of 284 bytes and 100 sentinels."""
    batches = BatchIterator(
        DataConfig("sotu_span_corruption", {"inputs": 32, "targets": 16}, 8, num_shards=2), repeat=True
    )
    next(batches)
    folder = tmp_path_factory.mktemp("bytes")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, run_of("TransformerConfig.moe=None").init_state(), batches.get_state())
    return str(folder)


@pytest.mark.parametrize("load", [load_params, load_state, student_state, upcycled])
@pytest.mark.parametrize("at", ["{}", "{}/checkpoints/3", "file://{}"])
def test_a_checkpoint_of_another_vocabulary_is_refused_and_of_the_same_is_read(of_a_vocabulary, load, at) -> None:
    settings = UPCYCLED if load is upcycled else ("TransformerConfig.moe=None",)
    place = at.format(of_a_vocabulary)
    load(run_of(*settings), place)
    with pytest.raises(UserError, match=r"another vocabulary \(ByteVocabulary, 359 entries, where this run's is"):
        load(run_of(*settings, "DataConfig.extra_ids=50"), place)


def test_a_teacher_of_another_vocabulary_is_refused(of_a_vocabulary) -> None:
    teacher = ("teacher/TransformerConfig.moe=None", f"DistillationConfig.checkpoint_path={of_a_vocabulary}")
    run = run_of(*DISTILLED, *teacher, "LossConfig.soft_loss_weight=0.25", "DataConfig.extra_ids=50")
    with pytest.raises(UserError, match=r"^DistillationConfig\.checkpoint_path: .* another vocabulary"):
        load_teacher(run)


def test_the_pieces_of_a_hugging_face_folder_are_the_vocabularys_first(vocabulary_file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    own = run_of(f"DataConfig.vocabulary_path={vocabulary_file}", "TransformerConfig.vocab_size=512")
    check_vocabulary(own, str(tmp_path))
    shutil.copy(vocabulary_file, tmp_path / "spiece.model")
    check_vocabulary(own, str(tmp_path))
    check_vocabulary(own, f"file://{tmp_path}")
    other = tmp_path / "other.model"
    other.write_bytes(Path(vocabulary_file).read_bytes().replace("▁the".encode(), "▁tha".encode()))
    pieces = f"DataConfig.vocabulary_path={other}", "TransformerConfig.vocab_size=512"
    for run in (run_of(), run_of(*pieces)):
        for place in (str(tmp_path), f"file://{tmp_path}"):
            with pytest.raises(UserError, match=r"another vocabulary \(that of its spiece\.model\): set DataConfig"):
                check_vocabulary(run, place)


def test_a_checkpoint_of_pieces_tells_them_apart_and_one_that_says_nothing_passes(
    vocabulary_file: str, of_a_vocabulary: str, tmp_path: Path
) -> None:
    pieces = run_of(f"DataConfig.vocabulary_path={vocabulary_file}", "TransformerConfig.vocab_size=512")
    with pytest.raises(UserError, match=r"ByteVocabulary, 359 entries, where this run's is pieces and sentinels of"):
        check_vocabulary(pieces, of_a_vocabulary)
    copy = tmp_path / "copy"
    shutil.copytree(of_a_vocabulary, copy)
    positions = copy / "checkpoints" / "3" / "data"
    for shard in positions.glob("shard_*"):
        shard.write_bytes(b"torn")
    check_vocabulary(pieces, str(copy))
    shutil.rmtree(positions)
    check_vocabulary(pieces, str(copy))


def test_a_vocabulary_larger_than_the_embedding_is_refused(vocabulary_file: str) -> None:
    with pytest.raises(ConfigError, match="is 384, smaller than the vocabulary's 400 entries; 512 is the next"):
        check_embedding(run_of(f"DataConfig.vocabulary_path={vocabulary_file}"))


def test_mistakes_about_a_teacher_are_one_sentence(tmp_path) -> None:
    path = "DistillationConfig.checkpoint_path=/no/teacher"
    with pytest.raises(UserError, match=r"^DistillationConfig\.checkpoint_path: /no/teacher does not exist: name a "):
        load_teacher(run_of(*DISTILLED, path, "LossConfig.soft_loss_weight=0.25"))
    with pytest.raises(UserError, match=r"^DistillationConfig\.checkpoint_path: /no/teacher does not exist: name a "):
        student_state(run_of(*DISTILLED, path, "DistillationConfig.initialize_student=True"), "/no/teacher")
    with pytest.raises(ConfigError, match=r"soft_loss_weight is 0\.25, but there is no teacher: give TrainConfig\."):
        run_of("LossConfig.soft_loss_weight=0.25")
    with pytest.raises(ConfigError, match="has a vocabulary of 512 entries and the student one of 384"):
        run_of(*DISTILLED, path, "LossConfig.soft_loss_weight=0.25", "teacher/TransformerConfig.vocab_size=512")
    with pytest.raises(ConfigError, match=r"and DistillationConfig\.initialize_student both say"):
        run_of(
            *DISTILLED, path, "DistillationConfig.initialize_student=True", "TrainConfig.initial_checkpoint_path=/one"
        )
    with pytest.raises(ConfigError, match=r"group_size is 96, 3 sequences of 32 tokens"):
        run_of(*DISTILLED, path, "LossConfig.soft_loss_weight=0.25", "MoEConfig.group_size=96", "BATCH_SIZE=8")
