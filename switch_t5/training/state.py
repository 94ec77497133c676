"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax

from switch_t5.types import Array, Params


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps done (int32 scalar), parameters, and the optimizer's state."""

    step: Array
    params: Params
    opt_state: Any
