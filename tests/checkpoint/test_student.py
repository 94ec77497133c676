"""A student starts with what its teacher has beside experts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.student import start_student
from switch_t5.errors import UserError
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from tests.checkpoint.test_conversion import GATED_SWITCH, SCANNED, SWITCH, converted, saved, state_of
from tests.model.small import random_params


def dense(config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(config, moe=None)


@pytest.mark.parametrize(
    ("teacher", "form"),
    [(SWITCH, "native"), (GATED_SWITCH, "t5x"), (SWITCH, "huggingface"), (SCANNED, "native")],
    ids=["ours", "T5X's, gated", "Hugging Face's", "scanned"],
)
def test_a_student_has_the_teachers_values_where_both_have_them_and_drawn_ones_in_place_of_experts(
    tmp_path, teacher, form
) -> None:
    state = state_of(teacher)
    path = saved(tmp_path / "run", state)
    path = path if form == "native" else converted(path, tmp_path / form, form)
    student = dataclasses.replace(dense(teacher), scan_layers=False)
    before = random_params(Model(student))
    after = naming.named_leaves(start_student(str(path), student, before))
    drawn, taught = naming.named_leaves(before), naming.named_leaves(state.params)
    kept = {name for name in after if np.array_equal(after[name], drawn[name])}
    sparse = {
        f"{stack}/stack/blocks/layers_{layer}/mlp/{name}"
        for stack in ("encoder", "decoder")
        for layer in range(1, len(teacher.encoder_pattern if stack == "encoder" else teacher.decoder_pattern), 2)
        for name in (("wi",) if len(teacher.mlp_activations) == 1 else ("wi_0", "wi_1"))
        for name in (name, "wo")
    }
    assert kept == sparse
    if teacher.scan_layers:
        query = taught["encoder/stack/blocks/layers_1/self_attention/query"]
        np.testing.assert_array_equal(after["encoder/stack/blocks/layers_3/self_attention/query"], query[1])
        return
    assert set(after) - kept == {name for name in taught if "/experts/" not in name and not name.endswith("/router")}
    for name in set(after) - kept:
        np.testing.assert_array_equal(after[name], taught[name])


def test_a_scanned_student_has_both_kinds_of_blocks_in_one_array(tmp_path) -> None:
    state = state_of(SCANNED)
    path = saved(tmp_path / "run", state)
    before = random_params(Model(dense(SCANNED)))
    after = start_student(str(path), dense(SCANNED), before)
    name = "encoder/stack/blocks/layers_0/mlp/wi"
    found, drawn, taught = (naming.named_leaves(tree)[name] for tree in (after, before, state.params))
    np.testing.assert_array_equal(found[0::2], taught)
    np.testing.assert_array_equal(found[1::2], drawn[1::2])


def test_a_teacher_of_other_sizes_is_told_with_the_gin_that_fits(tmp_path) -> None:
    path = saved(tmp_path / "run", state_of(SWITCH))
    other = dataclasses.replace(dense(SWITCH), num_encoder_layers=3)
    with pytest.raises(UserError) as caught:
        start_student(str(path), other, random_params(Model(other)))
    assert "TransformerConfig.num_encoder_layers is 4 in the checkpoint and 3 here" in str(caught.value)
    assert "MoEConfig" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        start_student(str(tmp_path / "nothing"), other, random_params(Model(other)))
