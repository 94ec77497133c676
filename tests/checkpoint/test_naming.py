"""Leaves by name: nesting, and the first difference between two sets of them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from switch_t5.checkpoint import naming


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Record:
    first: Any
    second: Any


class _Pair(NamedTuple):
    left: Any
    right: Any


TREE = _Record(first={"b": 1, "a": [2, 3]}, second=_Pair(left=(), right=(4, None)))
NAMED = {"first/a/0": 2, "first/a/1": 3, "first/b": 1, "second/right/0": 4}


def test_leaves_are_named_by_fields_keys_and_positions_in_tree_order():
    named = naming.named_leaves(TREE)
    assert named == NAMED
    assert list(named) == list(NAMED)


def test_nested_names_are_dictionaries():
    assert naming.nest(NAMED) == {
        "first": {"a": {"0": 2, "1": 3}, "b": 1},
        "second": {"right": {"0": 4}},
    }


def test_a_tree_is_rebuilt_from_its_nested_names():
    assert naming.like(TREE, naming.named_leaves(naming.nest(NAMED))) == TREE


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        naming.named_leaves({"a": {"b": 1}, "a/b": 2})


def _leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("wanted", "saved", "clause"),
    [
        ({"a": _leaf(2)}, {"a": _leaf(2)}, None),
        (
            {"a": _leaf(2), "b": _leaf(2, 3), "c": _leaf(1)},
            {"a": _leaf(2), "b": _leaf(2, 4), "c": _leaf(5)},
            "b has shape (2, 4) in the checkpoint and (2, 3) in this configuration",
        ),
        (
            {"a": _leaf(2), "b": _leaf(3)},
            {"a": _leaf(2)},
            "b, of shape (3,) in this configuration, is not in the checkpoint",
        ),
        (
            {"a": _leaf(2)},
            {"a": _leaf(2), "b": _leaf(3)},
            "b, of shape (3,) in the checkpoint, is not in this configuration",
        ),
        (
            {"a": _leaf(2, dtype=jnp.bfloat16)},
            {"a": _leaf(2)},
            "a is float32 in the checkpoint and bfloat16 in this configuration",
        ),
    ],
)
def test_the_first_difference_is_named(wanted, saved, clause):
    assert naming.first_difference(wanted, saved, dtypes=True) == clause


def test_dtypes_may_differ_where_leaves_are_cast():
    wanted, saved = {"a": _leaf(2, dtype=jnp.bfloat16)}, {"a": _leaf(2)}
    assert naming.first_difference(wanted, saved, dtypes=False) is None
