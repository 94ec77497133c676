"""Leaves of a state by name.

A checkpoint holds plain nested dictionaries, whatever containers the state is made of (dataclasses, named
tuples, optimizer states): so it can be read without the classes that wrote it, and a leaf that does not fit
can be called by its name, such as ``params/decoder/embedding``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from switch_t5.errors import UserError

SEPARATOR = "/"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by their names, in the tree's own order.

    Raises:
      ValueError: two leaves have the same name.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator=SEPARATOR): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns named leaves as nested dictionaries: ``{"a/b": x}`` becomes ``{"a": {"b": x}}``."""
    nested: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split(SEPARATOR)
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return nested


def like(tree: Any, named: Mapping[str, Any]) -> Any:
    """Returns a pytree of ``tree``'s structure whose leaves are those of the same names in ``named``."""
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in named_leaves(tree)])


def part(named: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of named leaves that belong to one part of a state, such as ``"params"``; all of them where it is empty."""
    return {key: leaf for key, leaf in named.items() if not name or key.split(SEPARATOR)[0] == name}


def leaves_of_part(name: str, part: Any) -> dict[str, Any]:
    """The leaves of one part of a state, by their names in the whole; of the whole where ``name`` is empty."""
    return named_leaves({name: part} if name else part)


def check_fit(checkpoint: object, wanted: Mapping[str, Any], saved: Mapping[str, Any], *, dtypes: bool) -> None:
    """Checks that a checkpoint has the leaves that a run wants, see :func:`first_difference`.

    Raises:
      UserError: it has others; names the first.
    """
    difference = first_difference(wanted, saved, dtypes=dtypes)
    if difference is not None:
        raise UserError(f"The checkpoint {checkpoint} does not fit this configuration: {difference}.")


def first_difference(wanted: Mapping[str, Any], saved: Mapping[str, Any], *, dtypes: bool) -> str | None:
    """Says where the leaves of a checkpoint differ from those that a run wants.

    Args:
      wanted: what the run's configuration needs: objects with ``shape`` and ``dtype`` by name.
      saved: the same of the checkpoint.
      dtypes: whether a different dtype is a difference.

    Returns:
      A clause about the first leaf, in the run's order, that differs; None where nothing does.
    """
    for name, leaf in wanted.items():
        if name not in saved:
            return f"{name}, of shape {tuple(leaf.shape)} in this configuration, is not in the checkpoint"
        if tuple(saved[name].shape) != tuple(leaf.shape):
            return (
                f"{name} has shape {tuple(saved[name].shape)} in the checkpoint "
                f"and {tuple(leaf.shape)} in this configuration"
            )
        if dtypes and saved[name].dtype != leaf.dtype:
            return f"{name} is {saved[name].dtype} in the checkpoint and {leaf.dtype} in this configuration"
    for name, leaf in saved.items():
        if name not in wanted:
            return f"{name}, of shape {tuple(leaf.shape)} in the checkpoint, is not in this configuration"
    return None
