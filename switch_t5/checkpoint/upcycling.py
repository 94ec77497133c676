"""A sparse model from a dense checkpoint of any format: experts are copies of its feed-forwards.

Source: Komatsuzaki et al. 2022 (sparse upcycling). Everything but the routers is read from the checkpoint, strictly:
the dense model must be the sparse one without its experts. Moments of the optimizer are copied as their parameters
are; a router, which has none there, begins with moments of zero.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from switch_t5.checkpoint import naming, native_layout
from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.formats import read_checkpoint
from switch_t5.checkpoint.load import (
    check_untold,
    gin_flags,
    native_places,
    no_adafactor,
    other_optimizer,
    placed_arrays,
)
from switch_t5.checkpoint.param_map import Placed, Reader, axes_of, convert, parameters
from switch_t5.checkpoint.recognition import Recognised
from switch_t5.checkpoint.stored_arrays import Index
from switch_t5.errors import UserError
from switch_t5.model.config import TransformerConfig
from switch_t5.model.upcycling import UpcyclingConfig

_EXPERTS = "/mlp/experts/"
_ROUTER = re.compile("/mlp/router(_bias)?(/|$)")
"""Of the names of a router's parameters, and of their moments."""

NewParams = Callable[[tuple[str, ...]], Mapping[str, Any]]
"""Draws parameters of the sparse model by name, such as ``params/encoder/.../mlp/router``."""


def upcycle(
    path: str,
    config: TransformerConfig,
    upcycling: UpcyclingConfig,
    abstract: Any,
    new_params: NewParams,
    *,
    optimizer: bool,
) -> Any:
    """Reads a dense checkpoint as the start of a sparse model.

    Args:
      path: see :func:`switch_t5.checkpoint.formats.format_of`.
      config: the sparse model.
      upcycling: how its experts are made.
      abstract: jax.ShapeDtypeStruct with shardings: a nested dictionary ``{"params": ...}``, or with ``optimizer`` a
        training state.
      new_params: draws the routers.
      optimizer: whether Adafactor's moments and the step are carried over too.

    Returns:
      The structure of ``abstract``, each device holding its part.

    Raises:
      UserError: there is no checkpoint, it is damaged, sparse, of other sizes or without the optimizer's state.
    """
    source = _dense_checkpoint(path, config, optimizer=optimizer)
    kinds = _moments(source, config, path) if optimizer else None
    leaves = naming.named_leaves(abstract)
    made = dict(new_params(tuple(name for name in leaves if name.startswith("params/") and _ROUTER.search(name))))
    step = source.reader.checkpoint.step
    for name in (native_layout.STEP, native_layout.COUNT) if optimizer else ():
        if name not in leaves:
            raise other_optimizer(path)
        made[name] = jax.device_put(np.int32(step or 0), leaves[name].sharding)
    for name, leaf in leaves.items():
        if name.startswith("opt_state/moments/") and _ROUTER.search(name):
            made[name] = _zeros(leaf)
    reader: Any = UpcyclingReader(source.reader, config, upcycling)
    architecture = Architecture.of(config)

    def read(entry: Placed, index: Index) -> np.ndarray:
        return convert(reader, entry, architecture, index)

    rest = {name: leaf for name, leaf in leaves.items() if name not in made}
    made |= placed_arrays(rest, native_places(config, kinds), read, path)
    return naming.like(abstract, made)


def _zeros(leaf: Any) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        dims = [len(range(*at.indices(dim))) for at, dim in zip(index, leaf.shape, strict=True)]
        return np.zeros(dims, leaf.dtype)

    return jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, part)


def _dense_checkpoint(path: str, config: TransformerConfig, *, optimizer: bool) -> Recognised:
    """Opens a checkpoint of the dense model that a sparse one is to begin as."""
    wanted = Architecture.of(config).dense
    source = read_checkpoint(path, optimizer=optimizer)
    check_untold(source, config)
    found = source.architecture
    if any(found.encoder + found.decoder):
        experts = max(found.encoder_experts, found.decoder_experts)
        raise UserError(
            f"{path} is sparse already, with {experts} experts, and upcycling begins with a dense checkpoint: set "
            "TrainConfig.upcycling = None to start from it as it is."
        )
    differences = found.differences(wanted)
    if differences:
        raise UserError(
            f"{path} is not this model without its experts: {'; '.join(differences)}. These would fit: "
            f"{gin_flags(found)}"
        )
    return source


def _moments(source: Recognised, config: TransformerConfig, path: str) -> dict[str, tuple[str, ...]]:
    """The kinds of moments of each parameter of the sparse model that has a dense counterpart."""
    if not source.moments or source.reader.checkpoint.step is None:
        raise no_adafactor(path)
    names = parameters(Architecture.of(config))
    return {name: source.moments[dense] for name in names if (dense := _dense_name(name)) in source.moments}


def _dense_name(parameter: str) -> str:
    return parameter.replace(_EXPERTS, "/mlp/")


class UpcyclingReader:
    """A dense checkpoint seen as the sparse model that begins as it: what :class:`Reader` is for one that is stored."""

    def __init__(self, dense: Reader, config: TransformerConfig, upcycling: UpcyclingConfig) -> None:
        self._dense, self._config, self._upcycling = dense, config, upcycling

    def read(self, parameter: str, layers: tuple[int, ...], region: Mapping[str, slice]) -> np.ndarray:
        """Reads a part of a parameter; see :meth:`Reader.read`."""
        if _EXPERTS not in parameter:
            return self._dense.read(parameter, layers, region)
        copied = self._copied(parameter, layers, {axis: part for axis, part in region.items() if axis != "expert"})
        experts = range(region["expert"].start, region["expert"].stop)
        # The expert axis leads a parameter's axes, after that of blocks.
        values = np.repeat(copied[:, None], len(experts), axis=1)
        if self._upcycling.expert_noise and "@" not in parameter:
            values = values.astype(np.float32)
            for row, layer in enumerate(layers):
                for column, expert in enumerate(experts):
                    values[row, column] += self._noise(parameter, layer, expert, region)
        return values

    def _copied(self, parameter: str, layers: tuple[int, ...], region: Mapping[str, slice]) -> np.ndarray:
        """The dense kernel (or moment) that experts are copies of, compensated for the router's weights."""
        values = self._dense.read(_dense_name(parameter), layers, region)
        scale = self._scale(parameter)
        return values if scale == 1 else values.astype(np.float32) * np.float32(scale)

    def _scale(self, parameter: str) -> float:
        """What an output kernel is multiplied by; moments are copied as they are, for they follow the gradients."""
        moe = self._config.moe_of(decoder=parameter.startswith("decoder/"))
        assert moe is not None
        return self._upcycling.output_scale(moe) if parameter.endswith("/wo") else 1.0

    def _noise(self, parameter: str, layer: int, expert: int, region: Mapping[str, slice]) -> np.ndarray:
        """A part of one expert's noise, which is drawn whole, so that no mesh and no scan changes it."""
        axes = axes_of(parameter)[1:]
        key = (self._upcycling.seed, zlib.crc32(parameter.encode()), layer, expert)
        shape = tuple(self._dense.architecture.size(axis, parameter.split("/")[0]) for axis in axes)
        drawn = np.random.default_rng(key).standard_normal(shape, np.float32)
        scale = np.float32(self._upcycling.expert_noise * self._size(parameter, layer))
        return scale * drawn[tuple(region[axis] for axis in axes)]

    @functools.cache  # noqa: B019 (a reader lives as long as one loading)
    def _size(self, parameter: str, layer: int) -> float:
        """The root mean square of a copied kernel."""
        axes = axes_of(parameter)[1:]
        stack = parameter.split("/")[0]
        whole = {axis: slice(0, self._dense.architecture.size(axis, stack)) for axis in axes}
        return float(np.sqrt(np.mean(np.square(self._copied(parameter, (layer,), whole), dtype=np.float64))))
