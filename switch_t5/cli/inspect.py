"""``switch-t5 inspect``: what a checkpoint of any format holds, and whether it is whole."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from typing import Any

from switch_t5.cli.output import add_json_flag, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "checkpoint", help="a MODEL_DIR or a checkpoint of ours, a T5X or a Hugging Face folder, or a URL"
    )
    parser.add_argument("--deep", action="store_true", help="read every array; ours and converted ones are checked")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what the checkpoint holds and returns 0.

    Raises:
      UserError: it is damaged, not whole, or none.
    """
    from switch_t5.checkpoint.format_names import NATIVE
    from switch_t5.checkpoint.formats import open_checkpoint, recognised
    from switch_t5.checkpoint.native_layout import has_unknown_optimizer
    from switch_t5.errors import UserError

    checkpoint = open_checkpoint(args.checkpoint)
    result: dict[str, Any] = {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "step": checkpoint.step,
        "bytes": sum(array.nbytes for array in checkpoint.arrays.values()),
    }
    try:
        found = recognised(checkpoint)
    except UserError:
        if checkpoint.format != NATIVE:
            raise
        # A model of ours may have layers that no other format knows; its files were checked when it was opened.
        result["architecture"] = None
        names = [name for name in checkpoint.arrays if name.startswith("params/")]
        moments = any(name.startswith("opt_state/") for name in checkpoint.arrays)
    else:
        architecture = found.architecture
        result["layout"] = found.layout.name
        result["architecture"] = architecture.gin_values()
        result["experts"] = {
            stack: {"count": architecture.experts(stack), "blocks": [i for i, s in enumerate(blocks) if s]}
            for stack, blocks in (("encoder", architecture.encoder), ("decoder", architecture.decoder))
        }
        names = [name for name in found.reader.checkpoint.arrays if _is_parameter(name)]
        moments = bool(found.moments)
    arrays = checkpoint.arrays
    result["parameters"] = sum(math.prod(arrays[name].shape) for name in names if name in arrays)
    result["dtypes"] = dict(Counter(arrays[name].dtype.name for name in names if name in arrays))
    unknown = checkpoint.format == NATIVE and has_unknown_optimizer(arrays)
    result["optimizer"] = "unknown" if unknown else "adafactor" if moments else None
    result["arrays"] = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "bytes": array.nbytes}
        for name, array in arrays.items()
    }
    result["integrity"] = _integrity(checkpoint, args.deep)
    _print(result)
    write_json(result, args.json)
    return 0


def _is_parameter(name: str) -> bool:
    return not name.startswith(("opt_state/", "state/"))


def _integrity(checkpoint: Any, deep: bool) -> str:
    """Says what was checked; damage is an error before it is said."""
    from switch_t5.checkpoint.certificate import check_certificate
    from switch_t5.checkpoint.format_names import NATIVE
    from switch_t5.checkpoint.native_files import verify
    from switch_t5.checkpoint.stored_arrays import pieces

    if not deep:
        return "files are there; --deep reads every array"
    if checkpoint.format == NATIVE:
        checked = verify(checkpoint)
        return (
            f"{checked} arrays as they were saved" if checked else "saved without a manifest: nothing to check against"
        )
    if checked := check_certificate(checkpoint):
        return f"{checked} arrays as they were converted"
    for array in checkpoint.arrays.values():
        for index in pieces(array.shape, array.dtype.itemsize):
            array.read(index)
    return f"{len(checkpoint.arrays)} arrays can be read; the format has no checksums"


def _print(result: dict[str, Any]) -> None:
    shown = ("path", "format", "layout", "step", "parameters", "bytes", "dtypes", "optimizer", "integrity")
    for name in shown:
        value = result.get(name)
        if value is not None:
            print(f"{name:11} {value:,}" if isinstance(value, int) else f"{name:11} {value}", file=sys.stderr)
    for stack, experts in result.get("experts", {}).items():
        if experts["count"]:
            blocks = ", ".join(map(str, experts["blocks"]))
            print(f"{'experts':11} {experts['count']} in {stack} blocks {blocks}", file=sys.stderr)
    for name, value in (result["architecture"] or {}).items():
        print(f"{'':11} {name} = {value!r}", file=sys.stderr)
    width = max(len(name) for name in result["arrays"])
    for name, array in result["arrays"].items():
        print(f"{name:{width}}  {array['dtype']:9} {array['bytes']:>15,}  {tuple(array['shape'])}")
