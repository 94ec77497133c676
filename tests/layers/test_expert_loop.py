"""The experts' feed-forward on sorted rows, in blocks and in even shares, against loops in float64."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.even_rows import even_choice, even_rows, even_share
from switch_t5.layers.expert_loop import expert_loop
from switch_t5.layers.row_blocks import Load
from tests.jaxprs import equations

EMBED, HIDDEN = 3, 5


def hidden(keep: jax.Array, gate: jax.Array, value: jax.Array) -> jax.Array:
    """Twice differentiable, gated and with dropout."""
    return jnp.where(keep, jnp.tanh(gate) * value, 0)


def operands(rows: int, experts: int, mlp: int = HIDDEN) -> list[np.ndarray]:
    """``x``, two kernels into, one out, what is kept, and the output's gradient."""
    random = np.random.default_rng(rows)
    shapes = (rows, EMBED), (experts, EMBED, mlp), (experts, EMBED, mlp), (experts, mlp, EMBED)
    arrays = [random.normal(size=shape) for shape in shapes]
    return [*arrays, random.random((rows, mlp)) < 0.8, random.normal(size=(rows, EMBED))]


def in_loops(arrays: list[np.ndarray], sizes: list[int]) -> tuple[np.ndarray, ...]:
    """The output, and the gradients of ``x`` and the kernels, row by row."""
    x, wi_0, wi_1, wo, keep, dy = arrays
    y, dx, d_wi_0, d_wi_1, d_wo = (np.zeros(array.shape) for array in (dy, x, wi_0, wi_1, wo))
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        gate, value = x[row] @ wi_0[expert], x[row] @ wi_1[expert]
        activated = keep[row] * np.tanh(gate) * value
        y[row] = activated @ wo[expert]
        d_activated = keep[row] * (wo[expert] @ dy[row])
        d_gate, d_value = d_activated * value / np.cosh(gate) ** 2, d_activated * np.tanh(gate)
        dx[row] = wi_0[expert] @ d_gate + wi_1[expert] @ d_value
        d_wi_0[expert] += np.outer(x[row], d_gate)
        d_wi_1[expert] += np.outer(x[row], d_value)
        d_wo[expert] += np.outer(activated, dy[row])
    return y, dx, d_wi_0, d_wi_1, d_wo


@functools.partial(jax.jit, static_argnums=0)
def found(load: Load, arrays: list[jax.Array], sizes: jax.Array) -> tuple[jax.Array, ...]:
    x, wi_0, wi_1, wo, keep, dy = arrays
    y, pull = jax.vjp(lambda x, a, b, wo: expert_loop(hidden, load, x, (a, b), wo, keep, sizes), x, wi_0, wi_1, wo)
    return y, *pull(dy)


def as_float32(arrays: list[np.ndarray]) -> list[jax.Array]:
    """As JAX multiplies them; masks stay masks."""
    return [jnp.asarray(array, bool if array.dtype == bool else jnp.float32) for array in arrays]


# Shares of 11 are taken of [10, 10, 10, 10] and [33], and half of them, 5, of [9, 7, 5, 6], [0, 25, 4, 7] and
# [6, 7, 5, 0]; shares of 6 of all of these, and half of them, 3, of [20, 3, 3, 1]; shares of 1 wherever three of four
# experts have rows, or the only one.
@pytest.mark.parametrize("load", [Load(), Load(most=40), Load(share=1), Load(share=6), Load(share=11)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        [10, 10, 10, 10],
        [9, 7, 5, 6],
        [0, 25, 4, 7],
        [6, 7, 5, 0],
        [20, 3, 3, 1],
        [40, 0, 0, 0],
        [0, 0, 0, 40],
        [0, 0, 0, 0],
        [33],
    ],
    ids=str,
)
def test_each_row_meets_its_own_expert_and_rows_past_the_last_are_zero(load: Load, sizes: list[int]) -> None:
    arrays = operands(40, len(sizes))
    results = found(load, as_float32(arrays), jnp.asarray(sizes, jnp.int32))
    for result, expected in zip(results, in_loops(arrays, sizes), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [Load(), Load(most=2560)], ids=str)
@pytest.mark.parametrize("sizes", [[1025, 1023, 0, 512], [2560, 0, 0, 0], [1, 0, 2500, 9]], ids=str)
def test_an_expert_of_several_blocks_meets_all_of_its_rows_once(load: Load, sizes: list[int]) -> None:
    arrays = operands(2560, len(sizes))
    results = found(load, as_float32(arrays), jnp.asarray(sizes, jnp.int32))
    for result, expected in zip(results, in_loops(arrays, sizes), strict=True):
        # A kernel's gradient is a sum over as many rows as the expert has.
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("mlp", [HIDDEN, EMBED - 1])
@pytest.mark.parametrize("sizes", [[20, 20, 20, 20], [70, 70, 70, 70], [90, 66, 65, 59], [130, 50, 50, 50]], ids=str)
def test_even_shares_of_many_rows_are_multiplied_otherwise_and_are_the_same(sizes: list[int], mlp: int) -> None:
    rows = sum(sizes)
    arrays = operands(rows, 4, mlp)
    results = found(Load(share=rows // 4), as_float32(arrays), jnp.asarray(sizes, jnp.int32))
    for result, expected in zip(results, in_loops(arrays, sizes), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize(
    ("share", "width", "forward", "backward"),
    [(16, 5, 0, 0), (17, 5, 1, 0), (17, 3, 0, 0), (17, 2, 1, 0), (64, 5, 2, 0), (65, 5, 1, 2), (65, 3, 0, 2)],
)
def test_even_rows_go_expert_by_expert_where_turning_them_takes_longer(
    share: int, width: int, forward: int, backward: int
) -> None:
    x, wi, wo = (jnp.zeros(shape) for shape in ((6 * share, 3), (6, 3, width), (6, width, 3)))
    sizes, load = jnp.full(6, share), Load(share=share)

    def loops(function: Callable[..., Any], *arguments: Any) -> int:
        """Loops over all experts that are not those over blocks, for the share and for half of it up to 64."""
        found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        return sum(equation.primitive.name == "scan" and equation.params["length"] == 6 for equation in found)

    def layer(x: jax.Array, wi: jax.Array, wo: jax.Array) -> jax.Array:
        return expert_loop(lambda keep, value: jnp.tanh(value), load, x, (wi,), wo, None, sizes)

    assert loops(layer, x, wi, wo) == forward
    both = loops(lambda *arguments: jax.vjp(layer, *arguments)[1](x), x, wi, wo)
    assert both == forward + backward


@pytest.mark.parametrize("sizes", [[10, 10, 10, 10], [9, 7, 5, 6]], ids=str)
def test_a_bfloat16_layer_is_as_near_as_its_numbers_allow(sizes: list[int]) -> None:
    arrays = operands(40, 4)
    narrow = [jnp.asarray(array, bool if array.dtype == bool else jnp.bfloat16) for array in arrays]
    results = found(Load(share=6), narrow, jnp.asarray(sizes, jnp.int32))
    for result, expected in zip(results, in_loops(arrays, sizes), strict=True):
        # Four products and sums of ten rows, each rounded to 8 bits.
        np.testing.assert_allclose(result.astype(jnp.float32), expected, atol=0.03 * np.abs(expected).max())


def test_even_rows_are_the_first_of_each_expert_and_go_back_where_they_came_from() -> None:
    rows = jnp.arange(1.0, 11)[:, None]  # 3 of the first expert, 2, 1, 1, 2, and 1 of nobody.
    even = even_rows(10, jnp.asarray([3, 2, 1, 1, 2]), 2)
    assert int(even.share) == 2
    taken = even.take(rows)
    np.testing.assert_array_equal(taken[..., 0], [[1, 2], [4, 5], [6, 0], [7, 0], [8, 9]])
    assert even.take(rows > 0).dtype == bool
    put = even.put(10 * taken, jnp.zeros_like(rows))
    np.testing.assert_array_equal(put[:, 0], [10, 20, 0, 40, 50, 60, 70, 80, 90, 0])


def test_no_row_is_even_where_loads_are_skewed() -> None:
    even, skewed = [20, 6, 5, 5], [20, 6, 5, 4]  # 26 and 25 of 40 places.
    assert int(even_rows(40, jnp.asarray(even), 10).share) == 10
    assert int(even_rows(40, jnp.asarray(skewed), 10).share) == 0
    # Nor where most of the rows are nobody's, however even the others.
    assert int(even_rows(40, jnp.asarray([2, 2, 2, 2]), 10).share) == 0
    none = even_rows(40, jnp.asarray(skewed), 10)
    rows = jnp.ones((40, 1))
    np.testing.assert_array_equal(none.put(jnp.zeros((4, 10, 1)), rows), rows)


@pytest.mark.parametrize(
    ("share", "sizes", "expected"),
    [(3, (4, 2), [10, 20, 30, 0, 50, 60]), (4, (5, 1), [10, 20, 0, 0, 0, 60]), (3, (6, 0), [-1] * 6)],
)
def test_even_rows_are_worked_on_together_where_there_are_any(
    share: int, sizes: tuple[int, int], expected: list[int]
) -> None:
    even = even_choice(6, jnp.asarray(sizes), share)
    rows = jnp.arange(1.0, 7)[:, None]
    worked = even.work(lambda even, rows: even.put(10 * even.take(rows)), lambda rows: jnp.full_like(rows, -1), rows)
    np.testing.assert_array_equal(worked[:, 0], expected)


@pytest.mark.parametrize(
    ("share", "sizes", "expected"),
    [
        (8, [8, 8, 5, 0], [8, 0]),  # 21 of 32 places.
        (8, [20, 5, 4, 3], [0, 4]),  # 20 of 32, 15 of 16.
        (8, [30, 2, 0, 0], [0, 0]),  # 10 of 32, 6 of 16.
        (64, [128, 33, 32, 32], [0, 32]),  # 161 of 256, 128 of 128.
        (7, [26, 2, 2, 2], [0, 3]),  # 13 of 28, 9 of 12.
        (1, [4, 0, 0, 0], [0]),
        (65, [130, 34, 33, 33], [0]),  # 165 of 260; half a share would fill all of its places.
        (0, [8, 8, 8, 8], []),
    ],
)
def test_half_a_share_of_few_rows_is_taken_where_a_whole_one_is_not(
    share: int, sizes: list[int], expected: list[int]
) -> None:
    choice = even_choice(sum(sizes), jnp.asarray(sizes), share)
    assert [int(even.share) for even in choice.choices] == expected
    assert int(choice.share) == sum(expected)


def test_the_share_of_an_expert_is_even_and_none_where_kernels_are_small_beside_rows() -> None:
    assert even_share(8192, 256) == 32
    assert even_share(100, 8) == 13
    assert even_share(8192, 64) == 128
    assert even_share(8192, 63) == 0


def test_no_product_is_computed_for_experts_that_do_not_use_it():
    """A block's product stands in its own loop, of one turn or none: XLA moves what no turn changes out of a loop."""
    program = found.lower(Load(), as_float32(operands(64, 4)), jnp.asarray([10, 20, 30, 4])).compile().as_text()
    assert program is not None
    one = re.compile(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
    computations: dict[str, str] = dict(one.findall(program))
    called = {name: re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", body) for name, body in computations.items()}

    def multiplies(name: str) -> bool:
        return " dot(" in computations[name] or any(map(multiplies, called[name]))

    assert sum(map(multiplies, computations)) > 20
    for name, body in computations.items():
        assert not (" while(" in body and multiplies(name)), name


@pytest.mark.parametrize(
    ("load", "sizes"),
    [
        (Load(), [0, 5, 0]),
        (Load(), [9, 0, 0]),
        (Load(), [1, 0, 15]),
        (Load(), [2, 22, 0]),
        (Load(most=90), [3, 15, 6]),
        (Load(most=4), [4, 1, 4]),
    ],
    ids=str,
)
def test_few_rows_are_all_worked_on(load: Load, sizes: list[int]) -> None:
    arrays = operands(sum(sizes), len(sizes))
    results = found(load, as_float32(arrays), jnp.asarray(sizes, jnp.int32))
    for one, other in zip(results, in_loops(arrays, sizes), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
