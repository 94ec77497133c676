"""Products of rows with their expert's matrix, against loops in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_t5.layers import grouped_matmul as grouped_matmul_module
from switch_t5.layers.grouped_matmul import grouped_matmul

EMBED, HIDDEN, EXPERTS = 3, 5, 4


def operands(rows: int, experts: int = EXPERTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(rows)
    shapes = (rows, EMBED), (experts, EMBED, HIDDEN), (rows, HIDDEN)
    x, kernel, dy = (random.normal(size=shape) for shape in shapes)
    return x, kernel, dy


def in_loops(x: np.ndarray, kernel: np.ndarray, dy: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """The product and its two derivatives."""
    y, dx, d_kernel = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    row = 0
    for expert, size in enumerate(sizes):
        for _ in range(size):
            y[row] = x[row] @ kernel[expert]
            dx[row] = kernel[expert] @ dy[row]
            d_kernel[expert] += np.outer(x[row], dy[row])
            row += 1
    return y, dx, d_kernel


@jax.jit
def found(x: jax.Array, kernel: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    y, pull = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, sizes), x, kernel)
    return y, *pull(dy)


def check(rows: int, sizes: list[int]) -> None:
    arrays = operands(rows, len(sizes))
    results = found(*(jnp.asarray(array, jnp.float32) for array in arrays), jnp.asarray(sizes, jnp.int32))
    for result, expected in zip(results, in_loops(*arrays, sizes), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 100), min_size=EXPERTS, max_size=EXPERTS))
def test_each_row_meets_its_own_matrix_and_rows_past_the_last_are_zero(cuts: list[int]) -> None:
    check(100, np.diff(sorted(cuts), prepend=0).tolist())


@pytest.mark.parametrize(
    "sizes",
    [
        [1024, 1, 0, 1535],  # Whole blocks and none, and a rest that needs all of the last rows.
        [0, 0, 0, 2560],
        [2560, 0, 0, 0],
        [1025, 1023, 17, 16],
        [0, 0, 0, 0],
    ],
)
def test_experts_of_more_rows_than_a_block_holds(sizes: list[int]) -> None:
    check(2560, sizes)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17])
def test_fewer_rows_than_the_smallest_block(rows: int) -> None:
    check(rows, [rows - 1, 0, 1])


def test_what_is_not_a_number_stays_with_its_expert() -> None:
    x, kernel, dy = operands(40)
    x[10:20] = dy[10:20] = np.nan
    sizes = [10, 10, 10, 10]
    arrays = (jnp.asarray(array, jnp.float32) for array in (x, kernel, dy))
    y, dx, d_kernel = (np.asarray(value) for value in found(*arrays, jnp.asarray(sizes)))
    for rows in (y, dx):
        assert np.isnan(rows[10:20]).all() and np.isfinite(np.delete(rows, slice(10, 20), axis=0)).all()
    assert np.isnan(d_kernel[1]).all() and np.isfinite(np.delete(d_kernel, 1, axis=0)).all()


def test_an_expert_without_rows_has_a_gradient_of_exactly_zero() -> None:
    arrays = (jnp.asarray(array, jnp.float32) for array in operands(30))
    _, _, d_kernel = found(*arrays, jnp.asarray([15, 0, 15, 0]))
    assert not np.asarray(d_kernel)[[1, 3]].any() and np.asarray(d_kernel)[[0, 2]].all()


def test_a_tpu_runs_a_kernel_of_its_own_a_gpu_ragged_products_and_a_cpu_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((8, 128, 128), jnp.float32))

    def program(platform: str) -> str:
        monkeypatch.setattr(grouped_matmul_module, "target_platform", lambda: platform)
        traced = jax.jit(lambda *args: grouped_matmul(*args)).trace(*shapes, jax.ShapeDtypeStruct((8,), jnp.int32))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "tpu_custom_call" in program("tpu")
    assert "ragged_dot" in program("cuda")
    on_cpu = program("cpu")
    assert "stablehlo.while" in on_cpu and "ragged_dot" not in on_cpu


@pytest.mark.parametrize("sizes", [[20, 0, 13, 7], [0, 0, 0, 40], [10, 5, 0, 3]])
def test_what_a_tpu_computes_is_the_same(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = operands(40)
    monkeypatch.setattr(grouped_matmul_module, "target_platform", lambda: "tpu")
    interpreted = functools.partial(grouped_matmul_module._megablox, interpret=True)
    monkeypatch.setattr(grouped_matmul_module, "_megablox", interpreted)
    x, kernel, dy = (jnp.asarray(array, jnp.float32) for array in arrays)
    y, pull = jax.vjp(lambda x, kernel: grouped_matmul(x, kernel, jnp.asarray(sizes, jnp.int32)), x, kernel)
    for result, expected in zip((y, *pull(dy)), in_loops(*arrays, sizes), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
