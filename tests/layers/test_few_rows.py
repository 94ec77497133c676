"""Products of a few rows with a kernel's transpose, against NumPy's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.few_rows import times_transpose


@pytest.mark.parametrize("experts", [(), (3,)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_rows_meet_the_transpose_of_their_own_kernel(experts: tuple[int, ...], dtype: type, tolerance: float) -> None:
    random = np.random.default_rng(0)
    rows, kernel = (jnp.asarray(random.normal(size=(*experts, *size)), dtype) for size in ((4, 6), (5, 6)))
    product = times_transpose(rows, kernel)
    assert product.dtype == dtype
    expected = np.asarray(rows, np.float64) @ np.swapaxes(np.asarray(kernel, np.float64), -1, -2)
    np.testing.assert_allclose(np.asarray(product, np.float64), expected, atol=tolerance)
