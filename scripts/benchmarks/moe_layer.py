"""Times the sparse layer, forward and backward, beside a dense feed-forward and the floor of its experts' products.

    python scripts/benchmarks/moe_layer.py --json=moe_layer.json
    python scripts/benchmarks/moe_layer.py --sizes=512x2048 --experts=8,64 --dispatch=gather,dropless --routes=zipf
    python scripts/benchmarks/moe_layer.py --peers --peer_python=/path/to/python/with/deepspeed

The layer is all of router, losses, dispatch, experts and combine. The floor is its experts' two matrix multiplications
alone, with their derivatives: on ``[expert, capacity, embed]`` where there is a capacity, and for ``dropless`` one
product for each expert on exactly the tokens that it got. ``balanced`` routes give every expert the same number of
tokens, ``zipf`` routes give the i-th expert a share in 1/i. All return the gradients of their input and of their
weights. A layer, its floor and a dense feed-forward on the same tokens are timed in turn, in a process for each layer.
Nothing is random, neither jitter nor dropout. Ours and DeepSpeed's have their balance loss, Hugging Face's has none.
Seconds are the least of the repeats, for what else a machine does only adds to them. Ratios are of CPU seconds, and in
brackets of wall seconds, which a shared machine makes vary more. Temporary memory is XLA's own account of the layer's
program, over that of what is dispatched: the tokens in their slots or rows, their hidden activations and their outputs.

The processes keep the memory that they have freed, in large pages: gigabytes that are returned and asked for anew at
each step can take longer than the layer, and on a virtual machine any time. ``--fresh_memory`` leaves that to malloc.

``--peers`` times the layers of DeepSpeed and Hugging Face in a process of their own on the same tokens and routes,
beside PyTorch's dense feed-forward: those of ``--peers=deepspeed`` or ``--peers=huggingface`` alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from timing import add_common_flags, in_process, kept_memory_environment, report, times

TOKENS, CAPACITY_FACTOR = 8192, 1.25
WARM_UP = 4
"""Rounds until what a process keeps no longer grows: gigabytes of gradients find their places anew in each."""

NAMES = ("size", "experts", "routes", "dispatch")
"""What a row is called by."""

PEERS = ("deepspeed", "huggingface")


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="512x2048,768x3072", help="embed x mlp of each row")
    parser.add_argument("--experts", default="8,32,64,128,256", help="experts of each row")
    parser.add_argument("--dispatch", default="gather,dropless,auto,einsum", help="the methods to time")
    parser.add_argument("--routes", default="balanced,zipf", help="balanced, zipf, or both")
    parser.add_argument("--group_size", type=int, default=TOKENS, help="tokens of a routing group, of ours alone")
    parser.add_argument("--fresh_memory", action="store_true", help="give memory back and ask anew at each step")
    parser.add_argument("--peers", nargs="?", const=",".join(PEERS), default="", help="also time the layers of others")
    parser.add_argument("--peer_python", default=sys.executable, help="an interpreter with torch and the peers")
    add_common_flags(parser, repeats=7)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--peer_row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for peer in filter(None, args.peers.split(",")):
        if peer not in PEERS:
            parser.error(f"--peers must be some of {', '.join(PEERS)}, got {peer!r}.")
    if args.row is not None:
        print(json.dumps(measure(*json.loads(args.row), group_size=args.group_size, repeats=args.repeats)))
        return 0
    if args.peer_row is not None:
        print(json.dumps(measure_peer(*json.loads(args.peer_row), repeats=args.repeats)))
        return 0
    if args.quick:
        args.sizes, args.experts, args.repeats = "64x128", "8", 3
    variables = {} if args.fresh_memory else kept_memory_environment()

    def run(flag: str, *row: Any, python: str = sys.executable) -> Any:
        flags = f"--{flag}={json.dumps(row)}", f"--repeats={args.repeats}", f"--group_size={args.group_size}"
        return in_process(__file__, *flags, python=python, variables=variables)

    def finished(row: dict[str, Any]) -> dict[str, Any]:
        cells = (f"{label} {cell}" for label, cell in columns(row).items())
        print(*(row[name] for name in NAMES), *cells, sep="  ", file=sys.stderr, flush=True)
        return row

    rows = []
    for size, experts, routes in itertools.product(
        args.sizes.split(","), map(int, args.experts.split(",")), args.routes.split(",")
    ):
        rows += [finished(run("row", size, experts, routes, method)) for method in args.dispatch.split(",")]
        for peer in filter(None, args.peers.split(",")):
            rows.append(finished(run("peer_row", size, experts, routes, peer, python=args.peer_python)))
    report(rows, table(rows), args.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each size, number of experts and routes, and in it each layer's seconds and ratios."""
    lines: dict[tuple[Any, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        lines.setdefault((row["size"], row["experts"], row["routes"]), {})[row["dispatch"]] = columns(row)
    labels = {layer: list(cells) for by in lines.values() for layer, cells in by.items()}
    heading = ["embed x mlp", "experts", "routes"]
    for layer, (first, *others) in labels.items():
        heading += [f"{layer}: {first}", *others]
    cells = [[*map(str, key), *(cell for layer in labels for cell in by[layer].values())] for key, by in lines.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *cells))


def columns(row: dict[str, Any]) -> dict[str, str]:
    """A layer's cells: CPU seconds, ratios of CPU and (wall) seconds, and temporary over dispatched memory."""

    def ratio(of: str) -> str:
        cpu, wall = (row[f"{kind}seconds"] / row[f"{of}_{kind}seconds"] for kind in ("cpu_", "wall_"))
        return f"{cpu:.2f} ({wall:.2f})"

    seconds = f"{row['cpu_seconds']:.3f}"
    if row["system"] != "switch_t5":
        return {"CPU s": seconds, "/ dense": ratio("dense")}
    memory = row["temporary_bytes"] / row["dispatched_bytes"]
    return {"CPU s": seconds, "/ floor": ratio("floor"), "/ dense": ratio("dense"), "temporary": f"{memory:.2f}"}


def measure(size: str, experts: int, routes: str, method: Any, *, group_size: int, repeats: int) -> dict[str, Any]:
    """The layer with one method of dispatch, its floor, and a dense feed-forward."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from switch_t5.layers.dense import FeedForward
    from switch_t5.layers.moe import SwitchFeedForward
    from switch_t5.layers.moe_config import MoEConfig

    emb_dim, mlp_dim = (int(part) for part in size.split("x"))
    tokens, router, counts = routed_tokens(emb_dim, experts, routes)
    x = jnp.asarray(tokens).reshape(-1, group_size, emb_dim)
    mask, ids = jnp.ones(x.shape[:2], bool), jnp.ones(x.shape[:2], jnp.int32)
    wi, wo = jnp.ones((experts, emb_dim, mlp_dim)), jnp.ones((experts, mlp_dim, emb_dim))
    config = MoEConfig(experts, group_size=group_size, train_capacity_factor=CAPACITY_FACTOR, dispatch=method)
    capacity = TOKENS // group_size * config.capacity(group_size, train=True)

    dense = FeedForward(emb_dim, mlp_dim, ("relu",), "paper", rngs=nnx.Rngs(0))
    dense_graph, dense_params = nnx.split(dense)
    # Without values of their own: gigabytes, drawn for nothing.
    layer = nnx.eval_shape(lambda: SwitchFeedForward(config, emb_dim, mlp_dim, ("relu",), "paper", rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    nnx.replace_by_pure_dict(params, {"router": jnp.asarray(router), "experts": {"wi": wi, "wo": wo}})

    def dense_loss(params: Any, x: Any) -> Any:
        axes = ("batch", "length", "mlp")
        return jnp.sum(nnx.merge(dense_graph, params)(x, hidden_axes=axes, dropout_rate=0.0, rng=None))

    def layer_loss(params: Any, x: Any) -> Any:
        y, stats = nnx.merge(graph, params)(x, mask, tokens=ids, sequences=1, train=True, rng=None)
        return jnp.sum(y) + stats.load_balance_loss

    def inputs(*leading: int) -> tuple[Any, Any]:
        return jnp.ones((*leading, emb_dim)), jnp.ones((*leading, mlp_dim))

    if method == "dropless":
        # Views of one expert each: slices would be copies, gigabytes of them.
        each = ([jax.device_put(kernel) for kernel in np.asarray(stack)] for stack in (wi, wo))
        floor, floor_arguments = each_by_itself, ([(*inputs(n), i, o) for n, i, o in zip(counts, *each, strict=True)],)
    else:
        floor, floor_arguments = products, (*inputs(experts, capacity), wi, wo)
    layer_program = compiled(jax.grad(layer_loss, argnums=(0, 1)), params, x)
    dense_program = compiled(jax.grad(dense_loss, argnums=(0, 1)), dense_params, x)
    floor_program = compiled(floor, *floor_arguments)
    seconds = times(
        {
            "layer": lambda: jax.block_until_ready(layer_program(params, x)),
            "floor": lambda: jax.block_until_ready(floor_program(*floor_arguments)),
            "dense": lambda: jax.block_until_ready(dense_program(dense_params, x)),
        },
        repeats,
        WARM_UP,
        min,
    )
    memory = layer_program.memory_analysis()
    assert memory is not None
    return {
        "system": "switch_t5",
        "size": size,
        "experts": experts,
        "dispatch": method,
        "routes": routes,
        "cpu_seconds": seconds["layer"][1],
        "floor_cpu_seconds": seconds["floor"][1],
        "dense_cpu_seconds": seconds["dense"][1],
        **wall(seconds),
        "temporary_bytes": memory.temp_size_in_bytes,
        "dispatched_bytes": 4 * (TOKENS if method == "dropless" else experts * capacity) * (2 * emb_dim + mlp_dim),
        "largest_load": max(counts),
    }


def wall(seconds: dict[str, tuple[float, float]]) -> dict[str, float]:
    """A row's wall seconds, named as its CPU seconds are."""
    return {f"{'' if name == 'layer' else name + '_'}wall_seconds": pair[0] for name, pair in seconds.items()}


def each_by_itself(experts: Any) -> Any:
    """:func:`products` of each expert."""
    return [products(*expert) for expert in experts]


def compiled(function: Any, *arguments: Any) -> Any:
    """The program of a function on arrays like these."""
    import jax

    return jax.jit(function).lower(*arguments).compile()


def products(x: Any, hidden: Any, wi: Any, wo: Any) -> Any:
    """The products of experts and nothing else, each by itself on arrays that are there."""
    import jax
    import jax.numpy as jnp

    into, d_into = jax.vjp(jnp.matmul, x, wi)
    out, d_out = jax.vjp(jnp.matmul, hidden, wo)
    d_x, d_wi = d_into(hidden)
    d_hidden, d_wo = d_out(x)
    return into.ravel()[0], out.ravel()[0], d_x, d_hidden.ravel()[0], d_wi, d_wo


def measure_peer(size: str, experts: int, routes: str, peer: str, *, repeats: int) -> dict[str, Any]:
    """The layer of DeepSpeed or Hugging Face on the same tokens, with the same router."""
    import torch  # pyright: ignore[reportMissingImports]

    emb_dim, mlp_dim = (int(part) for part in size.split("x"))
    tokens, router, _ = routed_tokens(emb_dim, experts, routes)
    torch.manual_seed(0)

    def feed_forward() -> Any:
        into, out = (torch.nn.Linear(a, b, bias=False) for a, b in ((emb_dim, mlp_dim), (mlp_dim, emb_dim)))
        return torch.nn.Sequential(into, torch.nn.ReLU(), out)

    def deepspeed() -> Any:
        from deepspeed.moe.experts import Experts  # pyright: ignore[reportMissingImports]
        from deepspeed.moe.sharded_moe import MOELayer, TopKGate  # pyright: ignore[reportMissingImports]

        gate = TopKGate(emb_dim, experts, k=1, capacity_factor=CAPACITY_FACTOR, min_capacity=4, use_rts=False)
        gate.wg.weight.data = torch.from_numpy(router.T.copy())
        return MOELayer(gate, Experts(feed_forward(), experts), "none", 1, experts)

    def huggingface() -> Any:
        import transformers  # pyright: ignore[reportMissingImports]
        from transformers.models.switch_transformers import (  # pyright: ignore[reportMissingImports]
            modeling_switch_transformers as modeling,
        )

        config = transformers.SwitchTransformersConfig(
            d_model=emb_dim,
            d_ff=mlp_dim,
            num_experts=experts,
            expert_capacity=int(TOKENS * CAPACITY_FACTOR / experts),
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
        layer = modeling.SwitchTransformersSparseMLP(config)
        layer.router.classifier.weight.data = torch.from_numpy(router.T.copy())
        return layer

    x = torch.from_numpy(tokens[None]).requires_grad_()

    def step(module: Any, *more: Any) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        loss = module(x, *more).sum()
        (loss + getattr(module, "l_aux", 0.0)).backward()

    layer, more = (deepspeed(), (None,)) if peer == "deepspeed" else (huggingface(), ())
    dense = feed_forward()
    seconds = times({"layer": lambda: step(layer, *more), "dense": lambda: step(dense)}, repeats, WARM_UP, min)
    return {
        "system": peer,
        "size": size,
        "experts": experts,
        "dispatch": peer,
        "routes": routes,
        "cpu_seconds": seconds["layer"][1],
        "dense_cpu_seconds": seconds["dense"][1],
        **wall(seconds),
    }


def routed_tokens(emb_dim: int, experts: int, routes: str) -> tuple[Any, Any, list[int]]:
    """Tokens ``[tokens, embed]``, a router ``[embed, experts]`` that sends them as ``routes`` says, and counts."""
    import numpy as np

    random = np.random.default_rng(0)
    router = random.normal(size=(emb_dim, experts)) / np.sqrt(emb_dim)
    share = np.ones(experts) if routes == "balanced" else 1 / np.arange(1, experts + 1)
    counts = np.floor(TOKENS * share / share.sum()).astype(int)
    counts[0] += TOKENS - counts.sum()
    chosen = random.permutation(np.repeat(np.arange(experts), counts))
    # Along its expert's column a token's logit is far above the others.
    x = random.normal(size=(TOKENS, emb_dim)) + 8 * (router / np.linalg.norm(router, axis=0)).T[chosen]
    x, router = x.astype(np.float32), router.astype(np.float32)
    return x, router, np.bincount(np.argmax(x @ router, axis=-1), minlength=experts).tolist()


if __name__ == "__main__":
    sys.exit(main())
