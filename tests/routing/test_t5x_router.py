"""The router against what Flaxformer's computed from the same probabilities."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.routing.assignment import top_1
from switch_t5.routing.balance import load_balance_loss, router_stats
from switch_t5.routing.dispatch import DISPATCHERS

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "t5x" / "router_golden.npz"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not GOLDEN.is_file(), reason=f"there are no golden router outputs at {GOLDEN}"),
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("capacity", [4, 8])
@pytest.mark.parametrize("ignore_padding", [False, True])
def test_dispatch_and_combine_are_flaxformers_bit_for_bit(
    golden: dict[str, np.ndarray], capacity: int, ignore_padding: bool
) -> None:
    case = f"masked_k1_bpr0_ign{int(ignore_padding)}_cap{capacity}"
    mask = jnp.asarray(golden["inputs"].any(-1) | (not ignore_padding))
    assignment = top_1(jnp.asarray(golden["router_probs"]), capacity, mask)
    identity = jnp.broadcast_to(jnp.eye(24), (2, 24, 24))
    dispatched = DISPATCHERS["gather"].dispatch(identity, assignment)
    np.testing.assert_array_equal(jnp.moveaxis(dispatched, -1, 1), golden[f"{case}/dispatch_mask"])
    combined = golden[f"{case}/combine_array"].sum((-1, -2))
    np.testing.assert_array_equal(assignment.weight * assignment.kept, combined)


def test_router_losses_are_flaxformers_where_nothing_is_padding(golden: dict[str, np.ndarray]) -> None:
    probs, mask = jnp.asarray(golden["router_probs"]), jnp.ones((2, 24), bool)
    stats = router_stats(jnp.asarray(golden["router_logits"]), probs, top_1(probs, 4, mask), mask)
    means = jax.tree.map(float, {k: v for k, v in stats.means().items() if k.endswith("loss")})
    assert means["load_balance_loss"] == pytest.approx(
        float(golden["masked_k1_bpr0_ign0_cap4/auxiliary_loss"]), rel=1e-6
    )
    assert means["router_z_loss"] == pytest.approx(float(golden["masked_k1_bpr0_ign0_cap4/router_z_loss"]), rel=1e-6)


def test_with_padding_the_balance_loss_divides_by_real_tokens_where_flaxformer_divides_by_all(
    golden: dict[str, np.ndarray],
) -> None:
    """Its masked and its scattering router disagree here; ours stays 1 for an even load however much is padding."""
    probs, mask = jnp.asarray(golden["router_probs"]), jnp.asarray(golden["inputs"].any(-1))
    groups = load_balance_loss(probs, top_1(probs, 4, mask).expert, mask)
    # f and P of the masked router are both smaller by the share of real tokens.
    share = np.asarray(mask).mean(-1)
    expected = float(golden["masked_k1_bpr0_ign1_cap4/auxiliary_loss"])
    assert float(jnp.mean(groups * share**2)) == pytest.approx(expected, rel=1e-6)
