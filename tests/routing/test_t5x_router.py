"""The router against what Flaxformer's computed from the same probabilities."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.routing.assignment import Assignment, load_of
from switch_t5.routing.balance import load_balance_loss, router_stats
from switch_t5.routing.choice import expert_choice, top_k
from switch_t5.routing.dispatch import DISPATCHERS
from switch_t5.routing.router import Routing
from switch_t5.types import Array

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "t5x" / "router_golden.npz"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not GOLDEN.is_file(), reason=f"there are no golden router outputs at {GOLDEN}"),
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def mask_of(golden: dict[str, np.ndarray], ignore_padding: bool) -> Array:
    return jnp.asarray(golden["inputs"].any(-1) | (not ignore_padding))


def masks(assignment: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Dispatch mask and combine weights ``[G, S, E, C]``, by dispatching an identity and combining another."""
    groups, tokens, _ = assignment.slot.shape
    experts, capacity = assignment.num_experts, assignment.capacity
    gather = DISPATCHERS["gather"]
    dispatched = gather.dispatch(jnp.broadcast_to(jnp.eye(tokens), (groups, tokens, tokens)), assignment)
    slots = jnp.broadcast_to(jnp.eye(experts * capacity), (groups, experts * capacity, experts * capacity))
    combined = gather.combine(slots.reshape(groups, experts, capacity, -1), assignment)
    return np.moveaxis(dispatched, -1, 1), np.asarray(combined).reshape(groups, tokens, experts, capacity)


@pytest.mark.parametrize("capacity", [4, 8])
@pytest.mark.parametrize("ignore_padding", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_top_k_gives_flaxformers_slots_and_weights_bit_for_bit(
    golden: dict[str, np.ndarray], k: int, prioritized: bool, ignore_padding: bool, capacity: int
) -> None:
    case = f"masked_k{k}_bpr{int(prioritized)}_ign{int(ignore_padding)}_cap{capacity}"
    probs = jnp.asarray(golden["router_probs"])
    assignment = top_k(probs, capacity, mask_of(golden, ignore_padding), k=k, batch_prioritized=prioritized)
    dispatched, combined = masks(assignment)
    np.testing.assert_array_equal(dispatched, golden[f"{case}/dispatch_mask"])
    np.testing.assert_array_equal(combined, golden[f"{case}/combine_array"])


@pytest.mark.parametrize("capacity", [4, 8])
def test_expert_choice_gives_flaxformers_slots_and_weights_bit_for_bit(
    golden: dict[str, np.ndarray], capacity: int
) -> None:
    everyone = mask_of(golden, ignore_padding=False)
    dispatched, combined = masks(expert_choice(jnp.asarray(golden["router_probs"]), capacity, everyone))
    np.testing.assert_array_equal(dispatched, golden[f"experts_choose_ign0_cap{capacity}/dispatch_mask"])
    np.testing.assert_array_equal(combined, golden[f"experts_choose_ign0_cap{capacity}/combine_array"])


def test_router_losses_are_flaxformers_where_nothing_is_padding(golden: dict[str, np.ndarray]) -> None:
    probs, mask = jnp.asarray(golden["router_probs"]), jnp.ones((2, 24), bool)
    assignment = top_k(probs, 4, mask)
    routing = Routing(assignment, probs, load_of(assignment.expert, 4))
    stats = router_stats(routing, jnp.asarray(golden["router_logits"]), mask, mask)
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
    groups = load_balance_loss(probs, load_of(top_k(probs, 4, mask).expert, 4), mask)
    # f and P of the masked router are both smaller by the share of real tokens.
    share = np.asarray(mask).mean(-1)
    expected = float(golden["masked_k1_bpr0_ign1_cap4/auxiliary_loss"])
    assert float(jnp.mean(groups * share**2)) == pytest.approx(expected, rel=1e-6)
