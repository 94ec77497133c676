"""What the backward pass finds kept, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive

from switch_t5.partitioning.rules import gathers_parameters

RematPolicy = Literal["none", "minimal", "full"]
"""What a block computes again: nothing; all that is cheap; everything."""

_KEPT = "kept"


def kept(tree: Any) -> Any:
    """Marks arrays that the policy ``minimal`` keeps: what a product, a sum over devices or an exchange gave."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), tree)


def rematerialized(function: Callable[..., Any], remat_policy: RematPolicy, params: Any) -> Callable[..., Any]:
    """``function``, of which the backward pass is left what the policy says.

    Parameters that lie in parts (``fsdp``) are gathered inside ``function``, and again in the backward pass, so that
    no more than a block's are ever whole.

    Args:
      function: a block of a model.
      remat_policy: ``none``; ``minimal``, which repeats no product but that of queries and keys, and nothing that
        devices send, though experts without a capacity, or in a CPU's loop, may repeat theirs; or ``full``, which keeps
        ``function``'s arguments alone.
      params: its parameters, or their shapes.
    """
    match remat_policy:
        case "full":
            return jax.checkpoint(function)
        case "minimal":
            return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
        case "none" if gathers_parameters():
            return jax.checkpoint(function, policy=_all_but_kernels(params))
        case "none":
            return function


def _all_but_kernels(params: Any) -> Callable[..., bool]:
    """What is kept for the backward pass: all but gathered parameters as they are multiplied, which are made again."""
    # By shape: an activation as large as a parameter is made again too, if it was reshaped or cast.
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    made_of_one = ("sharding_constraint", "convert_element_type", "reshape")

    def is_kept(primitive: Primitive, *inputs: ShapedArray, **_: Any) -> bool:
        return primitive.name not in made_of_one or inputs[0].shape not in shapes

    return is_kept
