"""From a checkpoint of any format onto the devices: each reads its own part of each array, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from switch_t5.checkpoint import naming, native_layout, native_remote
from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.folder import is_url
from switch_t5.checkpoint.format_names import HUGGING_FACE, NATIVE
from switch_t5.checkpoint.formats import format_of, read_checkpoint
from switch_t5.checkpoint.huggingface import MAX_DISTANCE
from switch_t5.checkpoint.param_map import Placed, convert
from switch_t5.checkpoint.recognition import Recognised
from switch_t5.checkpoint.stored_arrays import Index, OpenCheckpoint, bounded
from switch_t5.errors import UserError
from switch_t5.model.config import TransformerConfig

_PARAMS = "params"


class Loaded(NamedTuple):
    """What was read.

    Attributes:
      params: structured, sharded and typed as asked.
      step: training steps done, where the checkpoint says.
    """

    params: Any
    step: int | None


def is_known(path: str) -> bool:
    """Whether a checkpoint holds a model that the tables know; one of ours may have more than they do.

    One of ours that is stacked otherwise than its reader wants is then read as another format would be; one with sparse
    attention, say, is not.
    """
    try:
        read_checkpoint(path, optimizer=False)
    except UserError:
        return False
    return True


def fitting(path: str, config: TransformerConfig, *, optimizer: bool = True) -> Recognised:
    """Opens the checkpoint at a path for a model; without ``optimizer`` whatever optimizer ours was trained with.

    Raises:
      UserError: it is of another architecture: the sentence says in what, and the gin that would fit.
    """
    wanted = Architecture.of(config)
    recognised = read_checkpoint(path, optimizer=optimizer)
    check_untold(recognised, config)
    differences = recognised.architecture.differences(wanted)
    if differences:
        gin = gin_flags(recognised.architecture)
        upcycle = " (runs/upcycle.gin makes a sparse model of it)" if wanted.dense == recognised.architecture else ""
        raise UserError(f"{path} is of another architecture: {'; '.join(differences)}. These would fit: {gin}{upcycle}")
    return recognised


def untold(architecture: Architecture) -> dict[str, Any]:
    """What of a model's configuration no array tells, with the values that every released model has."""
    return {"relpos_max_distance": MAX_DISTANCE, "mlp_activations": architecture.activations}


def check_untold(source: Recognised, config: TransformerConfig) -> None:
    """Checks what no array of a Hugging Face model tells, but its own configuration does.

    Raises:
      UserError: the configuration here has another value.
    """
    if source.reader.checkpoint.format != HUGGING_FACE:
        return
    for name, theirs in untold(source.architecture).items():
        ours = getattr(config, name)
        if ours != theirs and (name != "mlp_activations" or len(ours) == len(theirs)):
            raise UserError(
                f"TransformerConfig.{name} is {theirs!r} in {source.reader.checkpoint.path} and {ours!r} here: set it "
                f"to {theirs!r}."
            )


def gin_flags(architecture: Architecture) -> str:
    """An architecture as flags of a command."""
    lines = architecture.gin().splitlines() + ([] if architecture.is_sparse else ["TransformerConfig.moe = None"])
    return " ".join(f"--gin.{line.replace(' = ', '=')}" for line in lines)


def load_params(path: str, config: TransformerConfig, abstract_params: Any) -> Loaded:
    """Reads the parameters of a checkpoint for a model.

    Args:
      path: see :func:`switch_t5.checkpoint.formats.format_of`.
      config: the model's.
      abstract_params: a nested dictionary of jax.ShapeDtypeStruct with shardings.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it is of another architecture.
    """
    ours = _remote(path)
    if ours is not None and (native_remote.fits(ours, _PARAMS, abstract_params) or not is_known(path)):
        return Loaded(native_remote.restore_part(ours, _PARAMS, abstract_params), ours.step)
    recognised = fitting(path, config, optimizer=False)
    placed = native_places(config, None)
    leaves = naming.named_leaves({_PARAMS: abstract_params})
    read = placed_arrays(leaves, placed, reader_of(recognised), path)
    return Loaded(naming.like({_PARAMS: abstract_params}, read)[_PARAMS], recognised.reader.checkpoint.step)


def load_state(path: str, config: TransformerConfig, abstract_state: Any) -> Any:
    """Reads parameters, Adafactor's state and the step, so that training continues where it stopped.

    Args:
      path: see :func:`switch_t5.checkpoint.formats.format_of`.
      config: the model's.
      abstract_state: a training state of jax.ShapeDtypeStruct with shardings.

    Raises:
      UserError: as :func:`load_params`; or the checkpoint holds no optimizer's state, or one of another kind.
    """
    ours = _remote(path)
    if ours is not None and (native_remote.fits(ours, "", abstract_state) or not is_known(path)):
        return native_remote.restore_part(ours, "", abstract_state)
    recognised = fitting(path, config)
    step = recognised.reader.checkpoint.step
    if not recognised.moments or step is None:
        raise no_adafactor(path)
    placed = native_places(config, recognised.moments)
    leaves = naming.named_leaves(abstract_state)
    count = np.int32(step)
    scalars = {native_layout.STEP: count, native_layout.COUNT: count}
    arrays = {name: leaf for name, leaf in leaves.items() if name not in scalars}
    read = placed_arrays(arrays, placed, reader_of(recognised), path)
    for name, value in scalars.items():
        if name not in leaves:
            raise other_optimizer(path)
        read[name] = jax.device_put(value, leaves[name].sharding)
    return naming.like(abstract_state, read)


def _remote(path: str) -> OpenCheckpoint | None:
    """The checkpoint of ours at a URL; None for what lies on a disk, or is of another format."""
    if not is_url(path):
        return None
    form, place = format_of(path)
    return native_remote.open_remote(place) if form == NATIVE else None


def no_adafactor(path: str) -> UserError:
    """The error of a checkpoint without the state that is asked for."""
    return UserError(
        f"{path} holds no state of Adafactor: set TrainConfig.initial_checkpoint_optimizer = False to start the "
        "optimizer anew."
    )


def other_optimizer(path: str) -> UserError:
    """The error of a run whose optimizer cannot go on from what the checkpoint holds."""
    return UserError(f"{path} holds the state of Adafactor, and TrainConfig.optimizer is another.")


def native_places(config: TransformerConfig, moments: dict[str, tuple[str, ...]] | None) -> dict[str, Placed]:
    """Where each parameter (and moment) of a model lies in its training state."""
    architecture = Architecture.of(config)
    layout = native_layout.layout_of(architecture, scan_layers=config.scan_layers)
    return layout.place(architecture, native_layout.periods(architecture), moments)


Read = Callable[[Placed, Index], np.ndarray]
"""Reads a part of what belongs into one array of ours."""


def reader_of(recognised: Recognised) -> Read:
    """Reads from a checkpoint."""
    return lambda entry, index: convert(recognised.reader, entry, recognised.architecture, index)


def placed_arrays(leaves: dict[str, Any], placed: dict[str, Placed], read: Read, path: str) -> dict[str, jax.Array]:
    """Makes each array from the parts that its devices hold.

    Raises:
      UserError: the state wants an array that has no place, or one of another shape.
    """
    arrays = {}
    for name, leaf in leaves.items():
        entry = placed.get(name)
        if entry is None or entry.shape != tuple(leaf.shape):
            have = "nothing" if entry is None else f"shape {entry.shape}"
            hint = ""
            if name.startswith("opt_state/"):
                hint = "; T5X factors every stacked kernel: adafactor.factor_small_stacks = True does too"
            raise UserError(f"{path} has {have} for {name}, of shape {tuple(leaf.shape)} in this configuration{hint}.")

        def part(index: Index | None, entry: Placed = entry, leaf: Any = leaf) -> np.ndarray:
            assert index is not None
            return read(entry, bounded(index, leaf.shape)).astype(leaf.dtype)

        arrays[name] = jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, part)
    return arrays
