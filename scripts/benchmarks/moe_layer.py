"""Times the sparse layer, forward and backward, beside a dense feed-forward and the floor of its experts' products.

    python scripts/benchmarks/moe_layer.py --json=moe_layer.json
    python scripts/benchmarks/moe_layer.py --sizes=512x2048 --experts=8,64 --dispatch=gather

Each row runs in a process of its own, which times in turn the whole layer (router, losses, dispatch, experts,
combine), the dense feed-forward of the same size on the same tokens, and the floor: the experts' two matrix
multiplications alone on ``[expert, capacity, embed]``, with their derivatives. All return the gradients of their input
and of their weights. ``balanced`` routes give every expert the same number of tokens, ``zipf`` routes give the i-th
expert a share in 1/i. Temporary memory is XLA's own account of the layer's program.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from timing import add_common_flags, in_process, report, times

TOKENS, CAPACITY_FACTOR = 8192, 1.25


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", default="512x2048,768x3072", help="embed x mlp of each row")
    parser.add_argument("--experts", default="8,32,64,128,256", help="experts of each row")
    parser.add_argument("--dispatch", default="gather", help="gather, einsum (whose masks need much memory), or both")
    parser.add_argument("--routes", default="balanced", help="balanced, zipf, or both")
    add_common_flags(parser, repeats=9)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row is not None:
        size, experts, dispatch, routes = json.loads(args.row)
        print(json.dumps(measure(size, experts, dispatch, routes, args.repeats)))
        return 0
    if args.quick:
        args.sizes, args.experts, args.repeats = "64x128", "8", 3
    rows = [
        in_process(__file__, f"--row={json.dumps([size, int(experts), dispatch, routes])}", f"--repeats={args.repeats}")
        for size in args.sizes.split(",")
        for experts in args.experts.split(",")
        for dispatch in args.dispatch.split(",")
        for routes in args.routes.split(",")
    ]
    report(rows, table(rows), args.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the ratios that matter, of CPU seconds."""
    lines = [
        "| embed x mlp | experts | dispatch | routes | layer CPU s | / floor | / dense | temporary MB | / dispatched |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["cpu_seconds"]
        lines.append(
            f"| {row['size']} | {row['experts']} | {row['dispatch']} | {row['routes']} | {seconds:.3f} | "
            f"{seconds / row['floor_cpu_seconds']:.2f} | {seconds / row['dense_cpu_seconds']:.2f} | "
            f"{row['temporary_bytes'] / 1e6:,.0f} | {row['temporary_bytes'] / row['dispatched_bytes']:.2f} |"
        )
    return "\n".join(lines)


def measure(size: str, experts: int, dispatch: Any, routes: str, repeats: int) -> dict[str, Any]:
    """One row."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from switch_t5.layers.dense import FeedForward
    from switch_t5.layers.moe import SwitchFeedForward
    from switch_t5.layers.moe_config import MoEConfig

    emb_dim, mlp_dim = (int(part) for part in size.split("x"))
    config = MoEConfig(experts, group_size=TOKENS, train_capacity_factor=CAPACITY_FACTOR, dispatch=dispatch)
    layer = SwitchFeedForward(config, emb_dim, mlp_dim, ("relu",), "paper", rngs=nnx.Rngs(0))
    dense = FeedForward(emb_dim, mlp_dim, ("relu",), "paper", rngs=nnx.Rngs(0))
    x, router = routed_tokens(np.random.default_rng(0), emb_dim, experts, routes)
    layer.router[...] = jnp.asarray(router)
    capacity = layer.config.capacity(TOKENS, train=True)
    mask, ids = jnp.ones((1, TOKENS), bool), jnp.ones((1, TOKENS), jnp.int32)
    layer_graph, layer_params = nnx.split(layer)
    dense_graph, dense_params = nnx.split(dense)

    def layer_loss(params: Any, x: Any) -> Any:
        y, stats = nnx.merge(layer_graph, params)(x, mask, tokens=ids, sequences=1, train=True, rng=None)
        return jnp.sum(y) + stats.load_balance_loss, stats.expert_load

    def dense_loss(params: Any, x: Any) -> Any:
        axes = ("batch", "length", "mlp")
        return jnp.sum(nnx.merge(dense_graph, params)(x, hidden_axes=axes, dropout_rate=0.0, rng=None))

    def floor(slots: Any, wi: Any, wo: Any, hidden: Any) -> Any:
        # Each product by itself, on arrays that are there, so that nothing but products is timed.
        into, d_into = jax.vjp(jnp.matmul, slots, wi)
        out, d_out = jax.vjp(jnp.matmul, hidden, wo)
        d_slots, d_wi = d_into(hidden)
        d_hidden, d_wo = d_out(slots)
        return into.ravel()[0], out.ravel()[0], d_slots, d_hidden.ravel()[0], d_wi, d_wo

    def compiled(function: Any, *arguments: Any) -> Any:
        return jax.jit(function).lower(*arguments).compile()

    kernels = nnx.to_pure_dict(layer_params)["experts"]
    slots = jnp.ones((experts, capacity, emb_dim))
    of_floor = (slots, kernels["wi"], kernels["wo"], jnp.ones((experts, capacity, mlp_dim)))
    programs = {
        "layer": (compiled(jax.grad(layer_loss, argnums=(0, 1), has_aux=True), layer_params, x), (layer_params, x)),
        "dense": (compiled(jax.grad(dense_loss, argnums=(0, 1)), dense_params, x), (dense_params, x)),
        "floor": (compiled(floor, *of_floor), of_floor),
    }
    _, load = programs["layer"][0](layer_params, x)
    seconds = times(
        {name: lambda run=run, args=args: jax.block_until_ready(run(*args)) for name, (run, args) in programs.items()},
        repeats,
    )
    memory = programs["layer"][0].memory_analysis()
    assert memory is not None
    return {
        "size": size,
        "experts": experts,
        "dispatch": dispatch,
        "routes": routes,
        "cpu_seconds": seconds["layer"][1],
        "floor_cpu_seconds": seconds["floor"][1],
        "dense_cpu_seconds": seconds["dense"][1],
        "wall_seconds": seconds["layer"][0],
        "temporary_bytes": memory.temp_size_in_bytes,
        "dispatched_bytes": 4 * experts * capacity * (emb_dim + mlp_dim),
        "largest_load": float(np.asarray(load).max()),
    }


def routed_tokens(random: Any, emb_dim: int, experts: int, routes: str) -> tuple[Any, Any]:
    """Tokens ``[1, tokens, embed]`` and a router ``[embed, experts]`` that sends them as ``routes`` says."""
    import jax.numpy as jnp
    import numpy as np

    router = random.normal(size=(emb_dim, experts)) / np.sqrt(emb_dim)
    share = np.ones(experts) if routes == "balanced" else 1 / np.arange(1, experts + 1)
    counts = np.floor(TOKENS * share / share.sum()).astype(int)
    counts[0] += TOKENS - counts.sum()
    chosen = random.permutation(np.repeat(np.arange(experts), counts))
    # Along its expert's column a token's logit is far above the others.
    x = random.normal(size=(TOKENS, emb_dim)) + 8 * (router / np.linalg.norm(router, axis=0)).T[chosen]
    return jnp.asarray(x[None], jnp.float32), np.asarray(router, np.float32)


if __name__ == "__main__":
    sys.exit(main())
