"""Times the whole training step, dense and with experts, beside the floor of its own matrix multiplications.

    python scripts/benchmarks/train_step.py --json=train_step.json
    python scripts/benchmarks/train_step.py --experts=0,8 --peers
    python scripts/benchmarks/train_step.py --fine_tuning

Each row runs in a process of its own, which times the step (forward, backward, Adafactor) and the floor in turn, so
that a noisy machine troubles both alike. The floor is one program of all the matrix multiplications that the step
contains, forward and both of each one's derivatives, on arrays of the same shapes and batching, and nothing else.
``--peers`` times Hugging Face's model of the same sizes with its Adafactor, where transformers and torch are
installed (``--peer_python`` names an interpreter that has them), alternating with this project's rows.
``--fine_tuning`` then times the step in turn with one of fine-tuning on the same batch, as ``runs/finetune.gin`` has
it: dropout 0.1, and 0.4 in the experts.
``--large_pages`` gives every row, the peer's too, the malloc that ``switch-t5`` starts itself with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from timing import add_common_flags, in_process, peak_resident_bytes, report, times

from switch_t5.cli.allocator import large_page_environment

EMB, MLP, HEADS, HEAD_DIM, LAYERS, VOCAB = 256, 1024, 4, 64, 4, 32128
BATCH, ENCODER_LENGTH, DECODER_LENGTH = 8, 512, 114
CAPACITY_FACTOR = 1.25
TOKENS = BATCH * (ENCODER_LENGTH + DECODER_LENGTH)


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", default="0,8,32,64,128", help="rows, by number of experts; 0 is dense")
    add_common_flags(parser, repeats=15)
    parser.add_argument("--peers", action="store_true", help="also time Hugging Face's model")
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter with transformers and torch")
    parser.add_argument(
        "--fine_tuning", action="store_true", help="also time a step of fine-tuning beside each of ours"
    )
    parser.add_argument("--large_pages", action="store_true", help="ask malloc for large pages, as switch-t5 does")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peer_row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    repeats = 3 if args.quick else args.repeats
    if args.row is not None:
        print(json.dumps(measure(args.row, repeats, fine_tuning=args.fine_tuning)))
        return 0
    if args.peer_row is not None:
        print(json.dumps(measure_peer(args.peer_row, repeats)))
        return 0

    allocator = large_page_environment() if args.large_pages else {}
    if args.large_pages and not allocator:
        parser.error("--large_pages: this C library has none, or GLIBC_TUNABLES sets them already")
    rows = []
    for experts in [0, 8] if args.quick else [int(word) for word in args.experts.split(",")]:
        timed = f"--repeats={repeats}"
        also = ["--fine_tuning"] if args.fine_tuning else []
        rows.append(in_process(__file__, f"--row={experts}", timed, *also, variables=allocator))
        if args.peers and experts <= 64:
            rows.append(
                in_process(__file__, f"--peer_row={experts}", timed, python=args.peer_python, variables=allocator)
            )
    report(rows, table(rows), args.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratios that matter."""
    ours = {row["experts"]: row for row in rows if row["system"] == "switch_t5"}
    dense = ours.get(0)
    heading = (
        "| system | experts | wall s | CPU s | step / floor (wall) | over dense | tokens/s | peak MB | compile s |"
    )
    if fine_tuning := any("fine_tuning_wall_seconds" in row for row in rows):
        heading += " fine-tuning / step: wall | CPU |"
    lines = [heading, "|---" * (heading.count("|") - 1) + "|"]
    for row in rows:
        floor = row.get("floor_wall_seconds")
        ratio = f"{row['wall_seconds'] / floor:.2f}" if floor else "–"
        if row["system"] != "switch_t5" and row["experts"] in ours:
            ratio = f"{row['wall_seconds'] / ours[row['experts']]['wall_seconds']:.2f}x ours"
        same = dense if row["system"] == "switch_t5" else None
        over = f"{row['wall_seconds'] / same['wall_seconds']:.2f}" if same else "–"
        compile_seconds = f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "–"
        lines.append(
            f"| {row['system']} | {row['experts'] or 'dense'} | {row['wall_seconds']:.3f} | {row['cpu_seconds']:.3f} | "
            f"{ratio} | {over} | {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 1e6:,.0f} | {compile_seconds} |"
        )
        if fine_tuning:
            ratios = (
                _ratio(row, f"fine_tuning_{kind}_seconds", f"step_in_turn_{kind}_seconds") for kind in ("wall", "cpu")
            )
            lines[-1] += f" {' | '.join(ratios)} |"
    return "\n".join(lines)


def _ratio(row: dict[str, Any], above: str, below: str) -> str:
    return f"{row[above] / row[below]:.2f}" if above in row else "–"


def measure(experts: int, repeats: int, *, fine_tuning: bool = False) -> dict[str, Any]:
    """One row of this project."""
    import jax

    from switch_t5.training.optimizers import adafactor
    from switch_t5.training.schedules import rsqrt_decay

    compiled, run_step, compile_seconds = _training(reference_config(experts), adafactor(rsqrt_decay()))
    for _ in range(3):
        run_step()
    peak_bytes = peak_resident_bytes()  # Before the floor's arrays join in.
    products, floor = _floor(experts)
    seconds = times({"step": run_step, "floor": lambda: jax.block_until_ready(floor(products))}, repeats)
    memory = compiled.memory_analysis()
    assert memory is not None
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    row: dict[str, Any] = {
        "system": "switch_t5",
        "experts": experts,
        "tokens_per_second": TOKENS / seconds["step"][0],
        "peak_bytes": peak_bytes,
        "planned_bytes": planned + memory.temp_size_in_bytes,
        "compile_seconds": compile_seconds,
    }
    if fine_tuning:
        del products
        steps = {"step_in_turn": run_step, "fine_tuning": _fine_tuning(reference_config(experts))}
        seconds |= times(steps, repeats, warm_up=3)
    for name, (wall, cpu) in seconds.items():
        prefix = "" if name == "step" else f"{name}_"
        row |= {f"{prefix}wall_seconds": wall, f"{prefix}cpu_seconds": cpu}
    return row


def _training(config: Any, factory: Any) -> tuple[Any, Callable[[], None], float]:
    """A model's compiled step, what runs it on the benchmark's batch, and the compiler's seconds."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from switch_t5.model.functional import Model
    from switch_t5.training.losses import LossConfig
    from switch_t5.training.state import TrainState
    from switch_t5.training.step import train_step

    model = Model(config)
    optimizer = factory(model.axes)
    params = jax.jit(model.init)(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    batch = {name: jnp.asarray(value) for name, value in _batch(np.random.default_rng(0)).items()}
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=LossConfig())
    begin = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - begin

    def run_step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return compiled, run_step, compile_seconds


def _fine_tuning(config: Any) -> Callable[[], None]:
    """Runs a step of a model as ``runs/finetune.gin`` trains it."""
    import dataclasses

    from switch_t5.training.optimizers import adafactor
    from switch_t5.training.parameter_groups import parameter_groups
    from switch_t5.training.schedules import constant_schedule

    moe = config.moe and dataclasses.replace(config.moe, expert_dropout_rate=0.4)
    config = dataclasses.replace(config, moe=moe, dropout_rate=0.1)
    return _training(config, parameter_groups(adafactor(constant_schedule(1e-3))))[1]


def reference_config(experts: int) -> Any:
    """The model that the benchmarks of whole models share, dense or with every other block sparse."""
    from switch_t5.layers.moe_config import MoEConfig
    from switch_t5.model.config import TransformerConfig

    moe = experts and MoEConfig(
        num_experts=experts, group_size=BATCH * ENCODER_LENGTH, train_capacity_factor=CAPACITY_FACTOR
    )
    return TransformerConfig(
        vocab_size=VOCAB,
        emb_dim=EMB,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        mlp_dim=MLP,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        moe=moe or None,
    )


def _batch(random: Any) -> dict[str, Any]:
    import numpy as np

    decoder = (BATCH, DECODER_LENGTH)
    return {
        "encoder_input_tokens": random.integers(1, VOCAB, (BATCH, ENCODER_LENGTH)).astype(np.int32),
        "decoder_input_tokens": random.integers(1, VOCAB, decoder).astype(np.int32),
        "decoder_target_tokens": random.integers(1, VOCAB, decoder).astype(np.int32),
        "decoder_loss_weights": np.ones(decoder, np.float32),
    }


Product = tuple[str, tuple[int, ...], tuple[int, ...]]
"""An einsum and the shapes of its two factors."""


def matrix_products(experts: int) -> list[Product]:
    """Every matrix multiplication of the forward pass."""
    from switch_t5.routing.capacity import expert_capacity

    products = []
    for layer in range(LAYERS):
        for length in (ENCODER_LENGTH, DECODER_LENGTH):
            rows = BATCH * length
            products += attention_products(BATCH, length, length)
            if length == DECODER_LENGTH:
                products += attention_products(BATCH, DECODER_LENGTH, ENCODER_LENGTH)
            slots = expert_capacity(rows, experts, CAPACITY_FACTOR) if is_sparse(layer, experts) else 0
            products += feed_forward_products(BATCH, length, experts if slots else 0, slots)
    products.append(("bld,vd->blv", (BATCH, DECODER_LENGTH, EMB), (VOCAB, EMB)))
    return products


def is_sparse(layer: int, experts: int) -> bool:
    """Whether a block of the reference model has experts."""
    return experts > 0 and layer % 2 == 1


def attention_products(batch: int, queries: int, keys: int) -> list[Product]:
    """Of one attention, its projections included."""
    heads = (batch, HEADS)
    project = lambda length: ("bld,dhk->bhlk", (batch, length, EMB), (EMB, HEADS, HEAD_DIM))  # noqa: E731
    return [
        project(queries),
        project(keys),
        project(keys),
        ("bhqk,bhtk->bhqt", (*heads, queries, HEAD_DIM), (*heads, keys, HEAD_DIM)),
        ("bhqt,bhtk->bhqk", (*heads, queries, keys), (*heads, keys, HEAD_DIM)),
        ("bhqk,hkd->bqd", (*heads, queries, HEAD_DIM), (HEADS, HEAD_DIM, EMB)),
    ]


def feed_forward_products(batch: int, length: int, experts: int, slots: int) -> list[Product]:
    """Of one feed-forward: dense, or with a router and ``slots`` rows of each of ``experts``."""
    if not experts:
        return [
            ("bld,df->blf", (batch, length, EMB), (EMB, MLP)),
            ("blf,fd->bld", (batch, length, MLP), (MLP, EMB)),
        ]
    return [
        ("bld,de->ble", (batch, length, EMB), (EMB, experts)),
        ("ecd,edf->ecf", (experts, slots, EMB), (experts, EMB, MLP)),
        ("ecf,efd->ecd", (experts, slots, MLP), (experts, MLP, EMB)),
    ]


def _floor(experts: int) -> tuple[Any, Callable[[Any], Any]]:
    """The arrays and the compiled program of the matrix multiplications and their derivatives."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    products = matrix_products(experts)
    random, shared = np.random.default_rng(0), {}

    def array(shape: tuple[int, ...], key: Any) -> Any:
        if (shape, key) not in shared:
            shared[shape, key] = jnp.asarray(random.standard_normal(shape, np.float32))
        return shared[shape, key]

    inputs = []
    for index, (spec, left, right) in enumerate(products):
        output = jax.eval_shape(lambda a, b, spec=spec: jnp.einsum(spec, a, b), jnp.zeros(left), jnp.zeros(right))
        # Weights are each their own; activations, which a step has just computed, are shared.
        weight = None if spec.startswith("bhq") and right[0] == BATCH else index
        inputs.append((array(left, None), array(right, weight), array(output.shape, "cotangent")))

    def program(inputs: Any) -> Any:
        outputs = []
        for (spec, _, _), (left, right, cotangent) in zip(products, inputs, strict=True):
            value, derivative = jax.vjp(lambda a, b, spec=spec: jnp.einsum(spec, a, b), left, right)
            d_left, d_right = derivative(cotangent)
            # Weight gradients are results, as they are for the optimizer; of activations one entry is asked for.
            outputs.append((value.ravel()[0], d_left.ravel()[0], d_right))
        return outputs

    return inputs, jax.jit(program).lower(inputs).compile()


def peer_model(experts: int) -> Any:
    """Hugging Face's model of the sizes of :func:`reference_config`."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": EMB,
        "d_kv": HEAD_DIM,
        "d_ff": MLP,
        "num_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "num_heads": HEADS,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(0)
    if experts:
        config = transformers.SwitchTransformersConfig(
            **sizes,
            num_experts=experts,
            num_sparse_encoder_layers=LAYERS // 2,
            num_sparse_decoder_layers=LAYERS // 2,
            expert_capacity=int(ENCODER_LENGTH * CAPACITY_FACTOR / experts),
        )
        return transformers.SwitchTransformersForConditionalGeneration(config)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def measure_peer(experts: int, repeats: int) -> dict[str, Any]:
    """One row of Hugging Face's T5 or Switch Transformers, with its own Adafactor."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model = peer_model(experts)
    model.train()
    optimizer = transformers.Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=True)
    arrays = _batch(np.random.default_rng(0))
    inputs = torch.from_numpy(arrays["encoder_input_tokens"]).long()
    labels = torch.from_numpy(arrays["decoder_target_tokens"]).long()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()

    wall, cpu = times({"step": step}, repeats)["step"]
    return {
        "system": "huggingface",
        "experts": experts,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": TOKENS / wall,
        "peak_bytes": peak_resident_bytes(),
        "compile_seconds": 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
