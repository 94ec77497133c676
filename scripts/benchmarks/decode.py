"""Times decoding beside its floor, dense and with experts, greedy and by beam search.

    python scripts/benchmarks/decode.py --json=decode.json
    python scripts/benchmarks/decode.py --experts=0,8 --batches=8 --beams=1 --peers --peer_python=/path/to/python

The model is that of ``train_step.py``, an input has 512 tokens, an output 64, and none ends before. Each row runs in a
process of its own, which times the whole (encoder and all steps), the same with one token, the encoder with the
decoder's keys and values of its output, which are made once for an input, and the floor's products, again and again. A
step is the difference of the first two over 63. The first three each come after a read of a gigabyte, so that none
begins with weights in the processor's cache.

The floor is the encoder's and those keys' and values' products, and for each step the larger of two: the step's own
products, on arrays of the same shapes; and one read of the weights that a step needs at the bandwidth with which this
machine reads a matrix of a gigabyte for one row. Of the experts a step needs as many as it has tokens, at the most. A
loop may take less: steps after the first find what of the weights the cache has kept.

Memory is what XLA plans for the program, arguments and results included, over weights and cache.

``--peers`` times ``generate`` of Hugging Face's model of the same sizes, on as many tokens, where torch and
transformers are installed (``--peer_python`` names an interpreter that has them).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from typing import Any

from timing import add_common_flags, in_process, report, times
from train_step import (
    EMB,
    ENCODER_LENGTH,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MLP,
    VOCAB,
    Product,
    attention_products,
    feed_forward_products,
    is_sparse,
    peer_model,
    reference_config,
)

NEW_TOKENS = 64
NEVER = -1
"""No token ends an output."""


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", default="0,8,32,64", help="rows, by number of experts; 0 is dense")
    parser.add_argument("--batches", default="1,8,64", help="rows, by inputs of a batch")
    parser.add_argument("--beams", default="1,4", help="rows, by hypotheses of an input; 1 is greedy")
    add_common_flags(parser, repeats=5)
    parser.add_argument("--peers", action="store_true", help="also time Hugging Face's model")
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter with transformers and torch")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--peer_row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        print(json.dumps(measure(*json.loads(args.row), repeats=args.repeats)))
        return 0
    if args.peer_row is not None:
        print(json.dumps(measure_peer(*json.loads(args.peer_row), repeats=args.repeats)))
        return 0
    if args.quick:
        args.experts, args.batches, args.beams, args.repeats = "8", "1", "1", 2

    def run(flag: str, *row: int, python: str = sys.executable) -> Any:
        found = in_process(__file__, f"--{flag}={json.dumps(row)}", f"--repeats={args.repeats}", python=python)
        print(table([found]).splitlines()[-1], file=sys.stderr, flush=True)
        return found

    rows = []
    for beams, batch, experts in itertools.product(
        *(map(int, words.split(",")) for words in (args.beams, args.batches, args.experts))
    ):
        rows.append(run("row", experts, batch, beams))
        if args.peers:
            rows.append(run("peer_row", experts, batch, beams, python=args.peer_python))
    report(rows, table(rows), args.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratios that matter, of wall time."""
    ours = {_shape(row): row for row in rows if row["system"] == "switch_t5"}
    lines = [
        "| system | experts | batch | beams | tokens/s | whole s | / floor | step ms | encoder ms | first token / "
        "(encoder + step) | memory / (weights + cache) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row["batch"] * NEW_TOKENS / row["wall_seconds"]
        cells = [row["system"], row["experts"] or "dense", row["batch"], row["beams"], f"{rate:,.0f}"]
        if row["system"] == "switch_t5":
            step, encoder = row["step_seconds"], row["encoder_seconds"]
            cells += [f"{row['wall_seconds']:.3f}", f"{row['wall_seconds'] / row['floor_seconds']:.2f}"]
            cells += [f"{1e3 * step:.2f}", f"{1e3 * encoder:.1f}", f"{row['first_seconds'] / (encoder + step):.2f}"]
            cells.append(f"{row['planned_bytes'] / row['needed_bytes']:.2f}")
        else:
            same = ours.get(_shape(row))
            ratio = f" ({row['wall_seconds'] / same['wall_seconds']:.2f}x ours)" if same else ""
            cells += [f"{row['wall_seconds']:.3f}{ratio}", *["–"] * 5]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _shape(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["experts"], row["batch"], row["beams"]


def measure(experts: int, batch: int, beams: int, *, repeats: int) -> dict[str, Any]:
    """One row of this project."""
    import jax
    import jax.numpy as jnp

    from switch_t5.inference.config import DecodingConfig
    from switch_t5.inference.decoding import decode
    from switch_t5.inference.independence import independent
    from switch_t5.model.functional import Model
    from switch_t5.model.incremental import new_cache

    model = Model(independent(reference_config(experts)))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (batch, ENCODER_LENGTH), 2, VOCAB)
    numbers = jnp.arange(batch)
    config = DecodingConfig(num_beams=beams)

    def decoding(max_length: int) -> Any:
        program = functools.partial(decode, model, config=config, max_length=max_length, eos_id=NEVER)
        return jax.jit(program).lower(params, tokens, numbers).compile()

    def encoding(params: Any, tokens: Any) -> Any:
        module = model.bind(params)
        cache = new_cache(module, module.encode(tokens)[0], tokens, beams, 1, beams=beams > 1)
        return [(block.cross_key, block.cross_value) for block in cache.blocks]

    whole, first = decoding(NEW_TOKENS), decoding(1)
    encoder = jax.jit(encoding).lower(params, tokens).compile()
    encoder_floor, step_floor = (_program(rows) for rows in _products(experts, batch, beams))
    read, bytes_read = _read()
    seconds = times(
        {
            "encoder floor": encoder_floor,
            "step floor": step_floor,
            "read": read,
            "whole": lambda: jax.block_until_ready(whole(params, tokens, numbers)),
            "read before the encoder": read,
            "encoder": lambda: jax.block_until_ready(encoder(params, tokens)),
            "read before the first": read,
            "first": lambda: jax.block_until_ready(first(params, tokens, numbers)),
        },
        repeats,
    )
    wall = {name: seconds[name][0] for name in seconds}
    bandwidth = bytes_read / wall["read"]
    step_floor_seconds = max(wall["step floor"], _step_bytes(experts, batch * beams) / bandwidth)
    memory = whole.memory_analysis()
    assert memory is not None
    cache = 4 * 2 * LAYERS * batch * EMB * (beams * NEW_TOKENS + ENCODER_LENGTH)
    return {
        "system": "switch_t5",
        "experts": experts,
        "batch": batch,
        "beams": beams,
        "wall_seconds": wall["whole"],
        "cpu_seconds": seconds["whole"][1],
        "first_seconds": wall["first"],
        "encoder_seconds": wall["encoder"],
        "step_seconds": (wall["whole"] - wall["first"]) / (NEW_TOKENS - 1),
        "floor_seconds": wall["encoder floor"] + NEW_TOKENS * step_floor_seconds,
        "step_floor_seconds": step_floor_seconds,
        "bytes_per_second": bandwidth,
        "planned_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "needed_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + cache,
    }


def _products(experts: int, batch: int, beams: int) -> tuple[list[Product], list[Product]]:
    """The matrix multiplications of the encoder (and of its keys and values for the decoder), and of a step."""
    heads, rows = (batch, HEADS), batch * beams
    encoder: list[Product] = []
    step: list[Product] = []
    for layer in range(LAYERS):
        sparse = is_sparse(layer, experts)
        encoder += attention_products(batch, ENCODER_LENGTH, ENCODER_LENGTH)
        encoder += feed_forward_products(
            batch, ENCODER_LENGTH, experts if sparse else 0, -(-batch * ENCODER_LENGTH // experts) if sparse else 0
        )
        encoder += [("bld,dhk->bhlk", (batch, ENCODER_LENGTH, EMB), (EMB, HEADS, HEAD_DIM))] * 2
        # Self-attention over all that may have been said, cross-attention over what is cached of the input.
        past = [
            ("bhk,bhtk->bht", (rows, HEADS, HEAD_DIM), (rows, HEADS, NEW_TOKENS, HEAD_DIM)),
            ("bht,bhtk->bhk", (rows, HEADS, NEW_TOKENS), (rows, HEADS, NEW_TOKENS, HEAD_DIM)),
        ]
        crossed = [
            ("bhqk,bhtk->bhqt", (*heads, beams, HEAD_DIM), (*heads, ENCODER_LENGTH, HEAD_DIM)),
            ("bhqt,bhtk->bhqk", (*heads, beams, ENCODER_LENGTH), (*heads, ENCODER_LENGTH, HEAD_DIM)),
        ]
        square = [("rd,de->re", (rows, EMB), (EMB, EMB))]
        step += square * 4 + past + square * 2 + crossed
        busy = min(experts, rows)
        step += feed_forward_products(batch, beams, busy if sparse else 0, -(-rows // busy) if sparse else 0)
    step.append(("rd,vd->rv", (rows, EMB), (VOCAB, EMB)))
    return encoder, step


def _program(products: list[Product]) -> Any:
    """A call of one program of matrix multiplications."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)
    arrays = [
        tuple(jnp.asarray(random.standard_normal(shape, np.float32)) for shape in factors) for _, *factors in products
    ]

    def program(arrays: Any) -> Any:
        return [jnp.einsum(spec, *pair) for (spec, *_), pair in zip(products, arrays, strict=True)]

    compiled = jax.jit(program).lower(arrays).compile()
    return lambda: jax.block_until_ready(compiled(arrays))


def _step_bytes(experts: int, tokens: int) -> int:
    """Bytes of the weights that one step of the decoder needs."""
    feed_forwards = sum(
        min(experts, tokens) * 2 * EMB * MLP + EMB * experts if is_sparse(layer, experts) else 2 * EMB * MLP
        for layer in range(LAYERS)
    )
    return 4 * (LAYERS * 6 * EMB * EMB + feed_forwards + VOCAB * EMB)


def _read() -> tuple[Any, int]:
    """A call that reads a matrix once, and the bytes of it."""
    import jax
    import jax.numpy as jnp

    row, matrix = jnp.ones((1, 8192)), jnp.ones((8192, 32768))
    compiled = jax.jit(jnp.matmul).lower(row, matrix).compile()
    return lambda: jax.block_until_ready(compiled(row, matrix)), matrix.nbytes


def measure_peer(experts: int, batch: int, beams: int, *, repeats: int) -> dict[str, Any]:
    """One row of Hugging Face's ``generate``."""
    import torch  # pyright: ignore[reportMissingImports]

    model = peer_model(experts).eval()
    inputs = torch.randint(2, VOCAB, (batch, ENCODER_LENGTH), generator=torch.Generator().manual_seed(1))
    asked = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "num_beams": beams, "do_sample": False}

    def generate() -> None:
        with torch.inference_mode():
            output = model.generate(inputs, **asked)
        assert output.shape[1] == NEW_TOKENS + 1, output.shape  # The start token leads.

    wall, cpu = times({"whole": generate}, repeats)["whole"]
    return {
        "system": "huggingface",
        "experts": experts,
        "batch": batch,
        "beams": beams,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
    }


if __name__ == "__main__":
    sys.exit(main())
