"""Times saving and restoring beside the disk and the memory themselves, and measures the host memory of each command.

    python scripts/benchmarks/checkpoint.py --json=checkpoint.json
    python scripts/benchmarks/checkpoint.py --parameters=2e8,1e9 --folder=/where/checkpoints/lie

The state is a Switch model's with Adafactor, nearly all of it experts. Each row runs in a process of its own, and its
peers in the same process, in turn with it:

- *save blocks* is the time until a save returns, after which the step may overwrite the state, beside one copy of the
  same bytes into memory that is new, as a save's must be. How much longer the first step after it takes than a usual
  one stands beside it: a copy put off until then would show there, and so do the threads that write.
- *save* runs until the checkpoint has its final name, beside one sequential write of as many bytes that ends in fsync.
  Neither deletes or overwrites an earlier one meanwhile.
- *restore* and *reshard* (onto four devices that share the experts) read files that the page cache has forgotten,
  beside one sequential read of as many bytes into one buffer, forgotten too.
- *convert* is the command, with ``--verify``.

A virtual machine gives memory that was freed back to its host and asks for it anew a page at a time, which took up to
ten times as long as clearing it where this was written. So before each of these, but for steps and conversions, a
process of its own takes three times the state's size and ends. ``--fresh_memory`` leaves memory as it is.

Host memory is the most that the process has held, libraries and compiler included, over what stays on its devices,
which on a CPU are host memory too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import add_common_flags, in_process, peak_resident_bytes, report

from switch_t5.cli.allocator import large_page_environment

EMB, MLP, HEADS, HEAD_DIM, LAYERS, VOCAB = 512, 2048, 8, 64, 6, 32128
QUICK: dict[str, Any] = {
    "emb_dim": 64,
    "mlp_dim": 128,
    "num_heads": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
BATCH, ENCODER_LENGTH, DECODER_LENGTH = 4, 128, 32
DEVICES = 4
"""Of the reshard; the number of experts is a multiple."""
BLOCK = 1 << 24
"""Bytes of one call of the plain reads and writes."""
TIME_BOUND = 1.5
CONVERSIONS = {
    "t5x": ("--format=t5x",),
    "t5x, uncompressed": ("--format=t5x", "--compression=none"),
    "huggingface": ("--format=huggingface",),
    "native": ("--format=native",),
}


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parameters", default="1e9", help="sizes of the model, roughly")
    parser.add_argument(
        "--folder", default=".", help="where files are written, and removed again; its disk is measured"
    )
    add_common_flags(parser, repeats=3)
    parser.add_argument("--fresh_memory", action="store_true", help="take memory as the machine has it")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        what, *row = json.loads(args.row)
        measure = {"save": measure_save, "restore": measure_restore, "convert": measure_convert}[what]
        print(json.dumps(measure(*row)))
        return 0
    rows = []
    for size in ["0"] if args.quick else args.parameters.split(","):
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint_benchmark_") as folder:
            rows += measure_size(int(float(size)), folder, 1 if args.quick else args.repeats, not args.fresh_memory)
    report(rows, table(rows), args.json)
    return 0


def measure_size(parameters: int, folder: str, repeats: int, at_hand: bool) -> list[dict[str, Any]]:
    """All rows of a model of so many parameters; 0 for a tiny one."""

    def run(*row: Any, devices: int = 1) -> list[dict[str, Any]]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **large_page_environment()}
        return in_process(__file__, f"--row={json.dumps(row)}", variables=variables)

    rows = run("save", parameters, folder, repeats, at_hand)
    rows += run("restore", parameters, folder, repeats, at_hand)
    rows += run("restore", parameters, folder, repeats, at_hand, devices=DEVICES)
    for name in CONVERSIONS:
        rows += run("convert", folder, name)
    sizes = {name: rows[0][name] for name in ("parameters", "state_bytes", "largest_bytes")}
    return [{**sizes, **row} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with what is to be reached."""
    lines = [
        "| parameters | | seconds | beside | its seconds | ratio | to reach | host MB | 3 x largest array + 1 GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compared = "– | – | – | –"
        if "peer" in row:
            ratio = row["seconds"] / row["peer_seconds"]
            compared = f"{row['peer']} | {row['peer_seconds']:.2f} | {ratio:.2f} | {row.get('bound', '–')}"
        memory = "– | –"
        if "host_bytes" in row:
            bound = f"{(3 * row['largest_bytes'] + 1e9) / 1e6:,.0f}" if row["what"].startswith("convert") else "–"
            memory = f"{row['host_bytes'] / 1e6:,.0f} | {bound}"
        lines.append(f"| {row['parameters']:,} | {row['what']} | {row['seconds']:.2f} | {compared} | {memory} |")
    return "\n".join(lines)


def measure_save(parameters: int, folder: str, repeats: int, at_hand: bool) -> list[dict[str, Any]]:
    """The rows of a save; leaves a checkpoint in the folder."""
    import jax

    from switch_t5.checkpoint.manager import Checkpointer
    from switch_t5.checkpoint.naming import named_leaves
    from switch_t5.checkpoint.retention import CheckpointConfig

    state, step = training(parameters)
    leaves = named_leaves(state)
    sizes = {
        "parameters": sum(leaf.size for name, leaf in leaves.items() if name.startswith("params/")),
        "state_bytes": sum(leaf.nbytes for leaf in leaves.values()),
        "largest_bytes": max(leaf.nbytes for leaf in leaves.values()),
    }
    del leaves
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> None:
        if at_hand and "step" not in name:
            fetch_memory(3 * sizes["state_bytes"])
        begin = time.perf_counter()
        function()
        seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def run_step() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state))

    number = 0
    with Checkpointer(folder, CheckpointConfig(keep=None)) as checkpointer:

        def clear() -> None:
            """Deletes what was written, but for the latest checkpoint."""
            (Path(folder) / "plain").unlink(missing_ok=True)
            for step in checkpointer.steps()[:-1]:
                shutil.rmtree(checkpointer.directory / str(step))
            os.sync()

        def save() -> None:
            nonlocal number
            number += 1
            assert checkpointer.save(number, state, {})

        def save_whole() -> None:
            save()
            checkpointer.wait()

        save_whole()
        peak = peak_resident_bytes()  # Before gradients and copies of the benchmark's own join in.
        run_step()
        seconds.clear()
        for _ in range(repeats):
            timed("copy", lambda: copy(state))
            timed("step", run_step)
            timed("blocks", save)
            timed("step after", run_step)
            checkpointer.wait()
            clear()
            timed("write", lambda: write(Path(folder) / "plain", sizes["state_bytes"]))
            timed("save", save_whole)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    blocks = {"what": "save blocks", "seconds": median["blocks"]}
    later = {"what": "the first step after it", "seconds": median["step after"]}
    whole = {"what": "save", "seconds": median["save"], "host_bytes": peak - sizes["state_bytes"]}
    return [
        {**sizes, **blocks, "peer": "a copy in memory", "peer_seconds": median["copy"], "bound": TIME_BOUND},
        {**blocks, "peer": "a training step", "peer_seconds": median["step"]},
        {**later, "peer": "a training step", "peer_seconds": median["step"]},
        {**whole, "peer": "the disk's write", "peer_seconds": median["write"], "bound": TIME_BOUND},
    ]


def measure_restore(parameters: int, folder: str, repeats: int, at_hand: bool) -> list[dict[str, Any]]:
    """The row of a restore onto the devices that there are."""
    import jax

    from switch_t5.checkpoint.manager import Checkpointer
    from switch_t5.partitioning.mesh import MeshConfig, make_mesh
    from switch_t5.partitioning.placement import tree_shardings
    from switch_t5.training.optimizers import state_axes
    from switch_t5.training.state import TrainState

    model, optimizer = parts(parameters)
    devices = len(jax.devices())
    mesh = make_mesh(MeshConfig(num_expert_partitions=devices))
    shapes = jax.eval_shape(lambda: initial(model, optimizer))
    axes = TrainState((), model.axes, state_axes(shapes.opt_state, shapes.params, model.axes))  # pyright: ignore[reportArgumentType]
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(mesh, shapes, axes),
    )
    plain = Path(folder) / "plain"
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    own, peer, peak, held = [], [], 0, 0
    with Checkpointer(folder, read_only=True) as checkpointer:
        for repeat in range(repeats):
            for path in (checkpointer.directory, plain):
                forget(path)
            if at_hand:
                fetch_memory(3 * state_bytes)
            begin = time.perf_counter()
            restored = jax.block_until_ready(checkpointer.restore(abstract).state)
            own.append(time.perf_counter() - begin)
            if repeat == 0:  # A later one finds memory that this one has left.
                peak = peak_resident_bytes()
                held = sum(shard.data.nbytes for leaf in jax.tree.leaves(restored) for shard in leaf.addressable_shards)
            del restored
            gc.collect()
            if at_hand:
                fetch_memory(3 * state_bytes)
            begin = time.perf_counter()
            read(plain)
            peer.append(time.perf_counter() - begin)
    return [
        {
            "what": "restore" if devices == 1 else f"reshard, 1 to {devices} devices",
            "seconds": statistics.median(own),
            "peer": "the disk's read",
            "peer_seconds": statistics.median(peer),
            "bound": TIME_BOUND,
            "host_bytes": peak - held,
        }
    ]


def measure_convert(folder: str, name: str) -> list[dict[str, Any]]:
    """The row of one of the conversions."""
    from switch_t5.cli import convert

    to = Path(folder) / "converted"
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    begin = time.perf_counter()
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        code = convert.run(parser.parse_args([f"--from={folder}", f"--to={to}", *CONVERSIONS[name], "--verify"]))
    assert code == 0, f"the conversion to {name} is not what was converted"
    seconds = time.perf_counter() - begin
    shutil.rmtree(to)
    return [{"what": f"convert to {name}", "seconds": seconds, "host_bytes": peak_resident_bytes()}]


def parts(parameters: int) -> tuple[Any, Any]:
    """The model, with as many experts as make so many parameters, and its optimizer."""
    from switch_t5.layers.moe_config import MoEConfig
    from switch_t5.model.config import TransformerConfig
    from switch_t5.model.functional import Model
    from switch_t5.training.optimizers import adafactor
    from switch_t5.training.schedules import rsqrt_decay

    attention = 3 * LAYERS * 4 * EMB * HEADS * HEAD_DIM
    dense = 2 * VOCAB * EMB + attention + LAYERS * 2 * EMB * MLP
    experts = max(1, round((parameters - dense) / (LAYERS * 2 * EMB * MLP) / DEVICES)) * DEVICES
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "emb_dim": EMB,
        "mlp_dim": MLP,
        "num_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_encoder_layers": LAYERS,
        "num_decoder_layers": LAYERS,
        "moe": MoEConfig(num_experts=experts, group_size=ENCODER_LENGTH),
    }
    model = Model(TransformerConfig(**(sizes if parameters else sizes | QUICK)))
    return model, adafactor(rsqrt_decay())(model.axes)


def initial(model: Any, optimizer: Any) -> Any:
    """A new training state."""
    import jax
    import jax.numpy as jnp

    from switch_t5.training.state import TrainState

    params = model.init(jax.random.key(0))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def training(parameters: int) -> tuple[Any, Callable[[Any], Any]]:
    """A training state and a step, which takes the state's memory over."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from switch_t5.training.losses import LossConfig
    from switch_t5.training.step import train_step

    model, optimizer = parts(parameters)
    random, decoder = np.random.default_rng(0), (BATCH, DECODER_LENGTH)
    batch = {
        "encoder_input_tokens": random.integers(1, VOCAB, (BATCH, ENCODER_LENGTH)).astype(np.int32),
        "decoder_input_tokens": random.integers(1, VOCAB, decoder).astype(np.int32),
        "decoder_target_tokens": random.integers(1, VOCAB, decoder).astype(np.int32),
        "decoder_loss_weights": np.ones(decoder, np.float32),
    }
    placed = jax.tree.map(jnp.asarray, batch)

    def step(state: Any, batch: Any) -> Any:
        return train_step(state, batch, model=model, optimizer=optimizer, config=LossConfig())[0]

    state = jax.jit(lambda: initial(model, optimizer))()
    program = jax.jit(step, donate_argnums=0).lower(state, placed).compile()
    return state, lambda state: program(state, placed)


def copy(state: Any) -> None:
    """Copies every array into memory of its own."""
    import jax
    import numpy as np

    copies = []
    for leaf in jax.tree.leaves(state):
        copies.append(np.empty(leaf.shape, leaf.dtype))
        np.copyto(copies[-1], np.asarray(leaf))


def write(path: Path, size: int) -> None:
    """Writes a new file of so many bytes that no file system can shrink, in order, down to the disk."""
    block = memoryview(os.urandom(BLOCK))
    with open(path, "wb", buffering=0) as file:
        for begin in range(0, size, BLOCK):
            file.write(block[: size - begin])
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Reads a file in order, into one buffer."""
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def fetch_memory(size: int) -> None:
    """Has a process of its own take so much memory, or half of what there is, and give it back."""
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    subprocess.run([sys.executable, "-c", f"b'1' * {min(size, available // 2)}"], check=True)


def forget(path: Path) -> None:
    """Has the page cache forget a file, or all below a folder."""
    for file in filter(Path.is_file, [path, *path.rglob("*")]):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
