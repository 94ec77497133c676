"""``switch-t5 convert``: a checkpoint of one format becomes one of another, with a certificate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_t5.checkpoint.format_names import FORMATS, HUGGING_FACE, T5X
from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.checkpoint.recognition import Recognised


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--from", dest="source", required=True, metavar="FOLDER", help="a checkpoint of any format")
    parser.add_argument(
        "--to", required=True, metavar="FOLDER", help="where to write; must be new or empty, but for T5X"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; by default as they are")
    parser.add_argument("--scanned", action="store_true", help="stack blocks for a scan, in our format or T5X's")
    parser.add_argument("--tokenizer", metavar="FILE", help="a SentencePiece model to lie beside a Hugging Face model")
    parser.add_argument("--compression", choices=("gzip", "none"), help="of a T5X checkpoint; gzip, as T5X does")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read what was written and compare it with the source; exits with 1 where they differ too much",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Converts, and prints the certificate's summary.

    Returns:
      0; or 1 where ``--verify`` found a difference beyond its bound.
    """
    from switch_t5.checkpoint.certificate import check_certificate
    from switch_t5.checkpoint.conversion import plan, write
    from switch_t5.checkpoint.formats import open_checkpoint, recognised
    from switch_t5.data.vocabularies import count_pieces

    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    if tokenizer is not None and args.format != HUGGING_FACE:
        raise UserError(f"--tokenizer={tokenizer} belongs to --format=huggingface alone.")
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise UserError(f"--tokenizer={tokenizer} is no file: name a SentencePiece model.")
        count_pieces(str(tokenizer))  # Which refuses any other file.
    if args.compression is not None and args.format != T5X:
        raise UserError(f"--compression={args.compression} belongs to --format=t5x alone.")
    checkpoint = open_checkpoint(args.source)
    source = recognised(checkpoint)
    target = plan(source, args.to, args.format, dtype=args.dtype, scanned=args.scanned)
    check_certificate(checkpoint)  # Or the one of the result would vouch for damage.
    certificate = write(source, target, tokenizer=tokenizer, compression=args.compression or "gzip")
    if args.verify:
        certificate["verified"] = _verify(source, target.path, args.dtype)
        _rewrite(target.path, certificate)
    _summarise(certificate)
    write_json(certificate, args.json)
    return 0 if certificate.get("verified", {"passed": True})["passed"] else 1


def _verify(source: Recognised, path: Path, dtype: str | None) -> dict[str, Any]:
    """What the certificate says of the result, read anew: of its arrays, of its logits, and whether both are right."""
    from switch_t5.checkpoint.conversion import compare
    from switch_t5.checkpoint.formats import read_checkpoint
    from switch_t5.checkpoint.live_comparison import compare_logits

    written = read_checkpoint(str(path))
    verified = compare(source, written, dtype)
    logits = compare_logits(source, written, dtype)
    passed = all(_within(found) for found in (verified, logits) if "bound" in found)
    return {**verified, "logits": logits, "passed": passed}


def _within(found: dict[str, Any]) -> bool:
    return found["worst_relative"] <= found["bound"]  # Not so for a NaN.


def _rewrite(folder: Path, certificate: dict[str, Any]) -> None:
    from switch_t5.checkpoint.certificate import CERTIFICATE
    from switch_t5.checkpoint.conversion import sync_path

    write_json(certificate, str(folder / CERTIFICATE))
    sync_path(folder / CERTIFICATE)


def _summarise(certificate: dict[str, Any]) -> None:
    lines = [
        f"{certificate['from']['path']} ({certificate['from']['format']})",
        f"  -> {certificate['to']['path']} ({certificate['to']['format']})",
        f"{certificate['parameters']:,} parameters in {len(certificate['arrays']):,} arrays"
        + (", with the optimizer's state" if certificate["to"]["optimizer"] else ""),
    ]
    if certificate["left_out"]:
        lines.append(f"left out: {certificate['left_out']}")
    if "verified" in certificate:
        verified = certificate["verified"]
        logits = verified["logits"]
        lines.append(_differences(f"read again: {verified['arrays']:,} arrays", verified))
        if "bound" in logits:
            lines.append(_differences(f"{logits['software']}: logits of {logits['tokens']} tokens", logits))
        else:
            lines.append(f"transformers was not run: {logits['left_out']}.")
    print("\n".join(lines), file=sys.stderr)


def _differences(what: str, found: dict[str, Any]) -> str:
    verdict = "within" if _within(found) else "BEYOND"
    return (
        f"{what}, worst difference {found['worst_absolute']:.3g} absolute, {found['worst_relative']:.3g} relative, "
        f"{verdict} {found['bound']:.3g}"
    )
