"""``switch-t5 convert``: a checkpoint of one format becomes one of another, with a certificate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.checkpoint.recognition import Recognised

_FORMATS = ("native", "t5x", "huggingface")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--from", dest="source", required=True, metavar="FOLDER", help="a checkpoint of any format")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where to write; must be new or empty")
    parser.add_argument("--format", required=True, choices=_FORMATS, help="what to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; by default as they are")
    parser.add_argument("--scanned", action="store_true", help="stack blocks for a scan, in our format or T5X's")
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model to lie beside a Hugging Face model")
    parser.add_argument("--verify", action="store_true", help="read what was written and compare it with the source")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Converts; prints the certificate's summary and returns 0."""
    from switch_t5.checkpoint.conversion import compare, plan, write
    from switch_t5.checkpoint.formats import HUGGING_FACE, read_checkpoint

    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    if tokenizer is not None and (args.format != HUGGING_FACE or not tokenizer.is_file()):
        raise UserError(f"--tokenizer={tokenizer} must be a file, and belongs to --format=huggingface alone.")
    source = read_checkpoint(args.source)
    _check_source(source)
    target = plan(source, args.to, args.format, dtype=args.dtype, scanned=args.scanned)
    certificate = write(source, target, tokenizer=tokenizer)
    if args.verify:
        certificate["verified"] = compare(source, read_checkpoint(str(target.path)))
        _rewrite(target.path, certificate)
    _summarise(certificate)
    write_json(certificate, args.json)
    return 0


def _check_source(source: Recognised) -> None:
    from switch_t5.checkpoint.formats import NATIVE, open_checkpoint
    from switch_t5.checkpoint.native_files import verify

    checkpoint = source.reader.checkpoint
    if checkpoint.format == NATIVE:
        verify(open_checkpoint(checkpoint.path))


def _rewrite(folder: Path, certificate: dict[str, Any]) -> None:
    from switch_t5.checkpoint.conversion import CERTIFICATE

    write_json(certificate, str(folder / CERTIFICATE))


def _summarise(certificate: dict[str, Any]) -> None:
    lines = [
        f"{certificate['from']['path']} ({certificate['from']['format']})",
        f"  -> {certificate['to']['path']} ({certificate['to']['format']})",
        f"{certificate['parameters']:,} parameters in {len(certificate['arrays']):,} arrays"
        + (", with the optimizer's state" if certificate["to"]["optimizer"] else ""),
    ]
    if "verified" in certificate:
        verified = certificate["verified"]
        lines.append(
            f"read again: {verified['arrays']:,} arrays, worst difference {verified['worst_absolute']:.3g} absolute, "
            f"{verified['worst_relative']:.3g} relative"
        )
    print("\n".join(lines), file=sys.stderr)
