"""A dense student that starts from what a sparse teacher has beside its experts (Fedus et al. 2022, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.format_names import NATIVE
from switch_t5.checkpoint.formats import read_checkpoint
from switch_t5.checkpoint.load import check_untold, gin_flags, native_places, placed_arrays
from switch_t5.checkpoint.param_map import Placed, Reader, convert
from switch_t5.checkpoint.stored_arrays import Index, OpenCheckpoint, StoredArray
from switch_t5.errors import UserError
from switch_t5.model.config import TransformerConfig
from switch_t5.types import Params


def start_student(path: str, config: TransformerConfig, drawn: Params) -> Params:
    """Replaces a student's newly drawn parameters by the teacher's where the teacher has them.

    Args:
      path: the teacher's checkpoint, see :func:`switch_t5.checkpoint.formats.format_of`.
      config: the student's model, dense.
      drawn: its parameters, on their devices; those in the place of experts are kept.

    Raises:
      UserError: there is no checkpoint, it is damaged, or not the student with experts.
    """
    teacher = read_checkpoint(path, optimizer=False)
    check_untold(teacher, config)
    wanted = Architecture.of(config)
    differences = teacher.architecture.dense.differences(wanted)
    if differences:
        raise UserError(
            f"{path} is of a teacher that the student cannot start from: {'; '.join(differences)}. These would fit: "
            f"{gin_flags(teacher.architecture.dense)}; or set DistillationConfig.initialize_student = False."
        )
    places = native_places(config, None)
    leaves = naming.named_leaves({"params": drawn})
    reader: Any = StudentReader(teacher.reader, _reader_of_drawn(leaves, places, wanted))

    def read(entry: Placed, index: Index) -> np.ndarray:
        return convert(reader, entry, wanted, index)

    return naming.like({"params": drawn}, placed_arrays(leaves, places, read, path))["params"]


def _reader_of_drawn(leaves: Mapping[str, jax.Array], places: dict[str, Placed], architecture: Architecture) -> Reader:
    """Parameters in memory as a checkpoint's."""
    arrays = {
        name: StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype), lambda index, leaf=leaf: np.asarray(leaf[index]))
        for name, leaf in leaves.items()
    }
    return Reader(OpenCheckpoint("the student", NATIVE, arrays), places, architecture)


class StudentReader:
    """The teacher's parameters, and where it has none, because its block is sparse, those that were drawn."""

    def __init__(self, teacher: Reader, drawn: Reader) -> None:
        self._teacher, self._drawn = teacher, drawn

    def read(self, parameter: str, layers: tuple[int, ...], region: Mapping[str, slice]) -> np.ndarray:
        """Reads a part of a parameter; see :meth:`Reader.read`."""
        taught = self._teacher.layers(parameter)
        if parameter in self._teacher and taught >= set(layers):
            return self._teacher.read(parameter, layers, region)
        values = self._drawn.read(parameter, layers, region)
        for row, layer in enumerate(layers):
            if layer in taught:
                values[row] = self._teacher.read(parameter, (layer,), region)[0]
        return values
