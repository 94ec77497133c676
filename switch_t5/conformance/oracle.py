"""Reference of routing in pure NumPy float64, written from the papers' equations, token by token.

It shares no code with the library, so that an error of one is not an error of both. Loops are plain and slow.

G groups of S tokens, E experts, D features, F hidden features. ``logits`` and ``probs`` are [G, S, E]; ``mask`` is
[G, S], False at padding, which takes no slot and counts nowhere; where padding is routed, it is all True. ``capacity``
is the number of slots that an expert has for one group, or None where it is never full. Routers return routes group by
group, in the order in which slots are asked for. Ties between experts go to the lower index, ties between tokens to
the earlier token.

Every continuous function also takes complex numbers, so that ``gradients`` can differentiate it by the complex
step. Choices and comparisons then read real parts alone: a router that is called again with perturbed logits
makes the same choices and returns weights that follow the logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Route:
    """A token's ``choice``-th selection, from 0; ``position`` is its slot inside the expert, None where it was full."""

    group: int
    token: int
    choice: int
    expert: int
    position: int | None
    weight: float


def _numbers(values: Any) -> Array:
    return np.asarray(values, np.complex128 if np.iscomplexobj(values) else np.float64)


def _sum(values: Any) -> Any:
    """The correctly rounded sum: it does not depend on the order, so equal multisets of numbers tie exactly."""
    values = _numbers(values)
    total = math.fsum(values.real)
    return complex(total, math.fsum(values.imag)) if np.iscomplexobj(values) else total


def _real_tokens(mask: Array) -> list[tuple[int, int]]:
    return [(group, token) for group, token in np.ndindex(mask.shape) if mask[group, token]]


def _largest(scores: Any, count: int, among: Sequence[int] | None = None) -> list[int]:
    """Indices of the largest scores in descending order, ties to the lower index."""
    candidates = range(len(scores)) if among is None else among
    if count > len(candidates):
        raise ValueError(f"{count} choices asked of {len(candidates)} candidates")
    return sorted(candidates, key=lambda index: (-scores[index], index))[:count]


def _choice_major(choices: dict[tuple[int, int], list[tuple[int, Any]]], capacity: int | None) -> list[Route]:
    """Slots for all first choices, then for all second ones, and so on: Lepikhin et al. 2020, algorithm 1.

    ``choices`` has the pairs of expert and weight of each (group, token), tokens in order of priority.
    """
    routes = []
    taken: dict[tuple[int, int], int] = {}
    for choice in range(max(map(len, choices.values()), default=0)):
        for (group, token), selected in choices.items():
            if choice < len(selected):
                expert, weight = selected[choice]
                slot = taken.get((group, expert), 0)
                position = slot if capacity is None or slot < capacity else None
                routes.append(Route(group, token, choice, expert, position, weight))
                taken[group, expert] = slot + 1
    return sorted(routes, key=lambda route: route.group)


def softmax(logits: Array) -> Array:
    """Router probabilities [..., E] of logits [..., E]: Fedus et al. 2022, equation 1."""
    logits = _numbers(logits)
    result = np.empty_like(logits)
    for index in np.ndindex(logits.shape[:-1]):
        powers = np.exp(logits[index] - max(np.real(logits[index])))
        result[index] = powers / _sum(powers)
    return result


def _sigmoid(values: Any) -> Array:
    values = _numbers(values)
    small = np.exp(np.where(values.real >= 0, -values, values))  # Never above one, whatever the sign.
    return np.where(values.real >= 0, 1.0, small) / (1.0 + small)


def normalized_sigmoid(logits: Array) -> Array:
    """Sigmoids divided by their sum over experts, [..., E]: DeepSeek-V3 2024, equation 15, made probabilities."""
    scores = _sigmoid(logits)
    return scores / scores.sum(axis=-1, keepdims=True)


def _logsumexp(values: Array) -> Any:
    shift = max(np.real(values))
    return shift + np.log(_sum(np.exp(values - shift)))


def top_k(
    logits: Array,
    mask: Array,
    capacity: int | None,
    *,
    k: int = 1,
    renormalize: bool = False,
    batch_prioritized: bool = False,
    gumbel: Array | None = None,
) -> list[Route]:
    """The k most probable experts of each token: Fedus et al. 2022, equation 2, for k = 1.

    ``renormalize`` divides by the sum of the k selected probabilities, dropped or not (Jiang et al. 2024, section
    2.1). ``batch_prioritized`` visits tokens in descending order of their largest probability (Riquelme et al. 2021,
    section 4). ``gumbel`` [G, S, E] is added to the logits for choosing, never for weights or priority.
    """
    probs = softmax(logits)
    scores = np.real(_numbers(logits)) + (0.0 if gumbel is None else np.real(gumbel))
    order = _real_tokens(mask)
    if batch_prioritized:
        order.sort(key=lambda index: -max(probs[index].real))
    choices = {}
    for index in order:
        experts = _largest(scores[index], k)
        divisor = _sum(probs[index][experts]) if renormalize else 1.0
        choices[index] = [(expert, probs[index][expert].item() / divisor) for expert in experts]
    return _choice_major(choices, capacity)


def gshard_top_2(logits: Array, mask: Array, capacity: int | None, *, uniform: Array) -> list[Route]:
    """The two best experts, the second where twice its weight exceeds ``uniform`` [G, S]: GShard 2020, algorithm 1."""
    probs = softmax(logits)
    choices = {}
    for index in _real_tokens(mask):
        first, second = _largest(np.real(logits)[index], 2)
        p1, p2 = probs[index][first].item(), probs[index][second].item()
        w1, w2 = p1 / (p1 + p2), p2 / (p1 + p2)
        choices[index] = [(first, w1)]
        if 2 * w2.real > uniform[index]:
            choices[index].append((second, w2))
    return _choice_major(choices, capacity)


def expert_choice(logits: Array, mask: Array, capacity: int | None) -> list[Route]:
    """Each expert takes its ``capacity`` most probable tokens: Zhou et al. 2022, section 3.2.

    Routes go expert by expert in descending order of probability; ``choice`` is the expert's index.
    """
    probs = softmax(logits)
    routes = []
    for group in range(len(probs)):
        tokens = [token for token in range(mask.shape[1]) if mask[group, token]]
        count = len(tokens) if capacity is None else min(capacity, len(tokens))
        for expert in range(probs.shape[-1]):
            column = probs[group, :, expert]
            for position, token in enumerate(_largest(np.real(column), count, among=tokens)):
                routes.append(Route(group, token, expert, expert, position, column[token].item()))
    return routes


def given(experts: Array, mask: Array, capacity: int | None) -> list[Route]:
    """Experts [G, S] from a hash of the token (Roller et al. 2021, section 3) or at random; weights are one."""
    return _choice_major({index: [(int(experts[index]), 1.0)] for index in _real_tokens(mask)}, capacity)


def no_token_left_behind(logits: Array, mask: Array, capacity: int | None, *, rounds: int) -> list[Route]:
    """Tokens without a slot ask their next expert, in ``rounds``: Fedus et al. 2022, appendix B.

    One route a token, of choice 0: slots as they are given, then the tokens that got none, each with its first choice.
    """
    probs = softmax(logits)
    waiting = _real_tokens(mask)
    ranking = {index: _largest(np.real(logits)[index], rounds) for index in waiting}
    taken = np.zeros((len(probs), probs.shape[-1]), int)
    routes = []
    for round_index in range(rounds):
        asking, waiting = waiting, []
        for group, token in asking:
            expert = ranking[group, token][round_index]
            slot = int(taken[group, expert])
            if capacity is None or slot < capacity:
                routes.append(Route(group, token, 0, expert, slot, probs[group, token, expert].item()))
                taken[group, expert] += 1
            else:
                waiting.append((group, token))
    firsts = [(group, token, ranking[group, token][0]) for group, token in waiting]
    routes += [Route(group, token, 0, first, None, probs[group, token, first].item()) for group, token, first in firsts]
    return sorted(routes, key=lambda route: route.group)


def sinkhorn(logits: Array, mask: Array, capacity: int | None, *, iterations: int, k: int = 1) -> list[Route]:
    """Balanced choices: Lewis et al. 2021 (BASE), Clark et al. 2022, section 3.1 (S-BASE)."""
    plain = np.real(_numbers(logits))  # The plan has no gradient.
    groups = zip(plain, mask, strict=True)
    potentials = np.array([[_sinkhorn_potentials(rows[real], iterations)] for rows, real in groups])
    # Like noise, potentials move choices and leave weights alone.
    return top_k(logits, mask, capacity, k=k, gumbel=potentials)


def _sinkhorn_potentials(logits: Array, iterations: int) -> Array:
    """Potentials [E] of the experts for the real tokens' logits [n, E], in log space."""
    n, num_experts = logits.shape
    v = np.zeros(num_experts)
    for _ in range(iterations if n else 0):
        u = np.array([-_logsumexp(logits[s] + v) for s in range(n)])
        v = np.array([math.log(n / num_experts) - _logsumexp(logits[:, e] + u) for e in range(num_experts)])
    return v


def sigmoid_top_k(
    logits: Array,
    mask: Array,
    capacity: int | None,
    *,
    k: int,
    bias: Array,
    num_expert_groups: int = 1,
    num_limited_groups: int = 1,
    scale: float = 1.0,
) -> list[Route]:
    """Sigmoid scores with a bias for balance: DeepSeek-V3 2024, equations 12-16 and section 2.1.2.

    ``bias`` [E] is added to the scores for choosing, never for weights, which ``scale`` multiplies. A token chooses
    from the ``num_limited_groups`` best of ``num_expert_groups`` equal groups of consecutive experts.
    """
    scores = _sigmoid(logits)
    choices = {}
    for index in _real_tokens(mask):
        selection = scores[index].real + np.real(bias)
        experts = _largest(selection, k, _limited_experts(selection, k, num_expert_groups, num_limited_groups))
        total = _sum(scores[index][experts])
        choices[index] = [(expert, scale * scores[index][expert].item() / total) for expert in experts]
    return _choice_major(choices, capacity)


def _limited_experts(selection: Array, k: int, num_groups: int, num_limited: int) -> list[int]:
    """Experts of the best groups; a group's score is the sum of its largest ``k / num_limited`` selection scores."""
    groups = np.split(selection, num_groups)
    kept = _largest([_sum(sorted(group, reverse=True)[: max(1, k // num_limited)]) for group in groups], num_limited)
    return [expert for expert in range(len(selection)) if expert // len(groups[0]) in kept]


def hashed(tokens: Array, num_experts: int) -> Array:
    """Two rounds of multiply and shift on 32 bits (the first two primes of xxHash)."""
    result = np.empty(np.shape(tokens), np.int64)
    for index in np.ndindex(result.shape):
        bits = int(tokens[index]) * 0x9E3779B1 % 2**32
        bits = (bits ^ bits >> 15) * 0x85EBCA77 % 2**32
        result[index] = (bits ^ bits >> 13) % num_experts
    return result


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.where(np.real(x) > 0, x, 0.0),
    "linear": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))),
    "silu": lambda x: x * _sigmoid(x),
}


def experts_forward(x: Array, wi: Sequence[Array], wo: Array, activation: Sequence[str]) -> Array:
    """Every expert on every token, [..., D] to [E, ..., D]: Shazeer 2020, equations 2 and 6.

    ``wi`` is one kernel [E, D, F], or two for gated experts, ``wo`` is [E, F, D]; ``activation`` has a name for each
    kernel of ``wi``: relu, linear, gelu (tanh form) or silu.
    """
    outputs = []
    for expert in range(len(wo)):
        projections = [_numbers(x) @ _numbers(kernel[expert]) for kernel in wi]
        hidden = [_ACTIVATIONS[name](value) for name, value in zip(activation, projections, strict=True)]
        outputs.append(np.prod(hidden, axis=0) @ _numbers(wo[expert]))
    return np.stack(outputs)


def combine(x: Array, routes: Sequence[Route], wi: Sequence[Array], wo: Array, activations: Sequence[str]) -> Array:
    """The weighted sum over kept routes, [G, S, D] to [G, S, D]: Fedus et al. 2022, equation 2."""
    y = np.zeros(np.shape(x), np.result_type(np.float64, x, wo, *wi, *(route.weight for route in routes)))
    for route in (route for route in routes if route.position is not None):
        index, one = (route.group, route.token), [route.expert]
        y[index] += route.weight * experts_forward(x[index], [kernel[one] for kernel in wi], wo[one], activations)[0]
    return y


def _selections(probs: Array, routes: Sequence[Route], mask: Array, first_only: bool) -> Array:
    """Selections of each expert, [G, E]."""
    counts = np.zeros((probs.shape[0], probs.shape[-1]))
    if first_only:
        # The most probable expert, not the route's: a token may have taken a slot of a later round's expert.
        picks = [(index[0], _largest(probs[index].real, 1)[0]) for index in _real_tokens(mask)]
    else:
        picks = [(route.group, route.expert) for route in routes]
    for pick in picks:
        counts[pick] += 1
    return counts


def load_balance_loss(
    probs: Array,
    routes: Sequence[Route],
    mask: Array,
    *,
    scope: str = "group",
    first_choice_only: bool = False,
) -> Any:
    """E times the sum over experts of f_i P_i, [G]: Fedus et al. 2022, equations 4-6; 0 for padding alone.

    The ``scope`` "batch" has one f and one P over all groups and returns a scalar. f counts all selections, or each
    token's most probable expert (``first_choice_only``, GShard's algorithm 1).
    """
    probs = _numbers(probs)
    counts = _selections(probs, routes, mask, first_choice_only)
    losses = []
    for groups in {"group": [[group] for group in range(len(probs))], "batch": [list(range(len(probs)))]}[scope]:
        f = counts[groups].sum(axis=0) / max(counts[groups].sum(), 1)
        tokens = [probs[index] for index in _real_tokens(mask) if index[0] in groups]
        p = [_sum([token[expert] for token in tokens]) / max(len(tokens), 1) for expert in range(len(f))]
        losses.append(len(f) * _sum(f * np.array(p)))
    return losses[0] if scope == "batch" else np.array(losses)


def padding_counted_load_balance_loss(
    probs: Array, experts: Array, mask: Array, counted: Array, *, scope: str = "group"
) -> Any:
    """The mean loss over all groups where padding takes no slot but is counted, a scalar: Mesh TensorFlow's moe.py.

    f and P are means over the tokens ``counted`` [G, S], padding among them, of their first choices ``experts``
    [G, S] and of probs. P is then multiplied by each token's ``mask``, so that the mean over the tokens counted of
    the batch weighs each group's loss by its real tokens.
    """
    probs = _numbers(probs)
    total, everyone = [], _real_tokens(counted)
    for group, token in everyone:
        if not mask[group, token]:
            continue
        those = [index for index in everyone if scope == "batch" or index[0] == group]
        loss = []
        for expert in range(probs.shape[-1]):
            f = sum(int(experts[index]) == expert for index in those) / len(those)
            loss.append(f * _sum([probs[index][expert] for index in those]) / len(those))
        total.append(probs.shape[-1] * _sum(loss))
    return _sum(total) / max(len(everyone), 1)


def router_z_loss(logits: Array, mask: Array) -> Array:
    """Squared logsumexp of each token's logits, 0 at padding, [G, S]: Zoph et al. 2022, equation 5."""
    logits = _numbers(logits)
    loss = np.zeros(logits.shape[:-1], logits.dtype)
    for index in _real_tokens(mask):
        loss[index] = np.square(_logsumexp(logits[index]))
    return loss


def _squared_variation(values: list[Any]) -> Any:
    """Population variance over squared mean; 0 for values that are all 0."""
    mean = _sum(values) / len(values)
    variance = _sum([np.square(value - mean) for value in values]) / len(values)
    return variance / np.square(mean) if mean.real else 0.0


def importance_loss(probs: Array, mask: Array) -> Array:
    """Squared variation [G] of the experts' importance: Shazeer et al. 2017, equations 6-7; 0 for padding alone."""
    groups = zip(probs, mask, strict=True)
    importance = [[_sum(rows[real, expert]) for expert in range(rows.shape[-1])] for rows, real in groups]
    return np.array([_squared_variation(values) for values in importance])


def _normal_cdf(value: Any) -> Any:
    x = float(np.real(value))
    phi = 0.5 * math.erfc(-x / math.sqrt(2.0))
    # erfc has no complex form; to first order the imaginary part is the density times the step.
    density = math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return complex(phi, density * float(np.imag(value))) if np.iscomplexobj(value) else phi


def load_loss(logits: Array, noisy_logits: Array, mask: Array, *, k: int, noise_std: float) -> Array:
    """Squared variation [G] of the experts' smooth load: Shazeer et al. 2017, equations 8-11; 0 for padding alone.

    The k choices were made by ``noisy_logits`` [G, S, E]; the thresholds follow them where they are complex.
    """
    logits, noisy_logits = _numbers(logits), _numbers(noisy_logits)
    experts = range(logits.shape[-1])
    load: list[list[Any]] = [[0.0 for _ in experts] for _ in logits]
    for group, token in _real_tokens(mask):
        noisy = noisy_logits[group, token]
        for expert in experts:
            others = [other for other in experts if other != expert]
            if k > len(others):  # The expert is always among the k.
                load[group][expert] += 1.0
            else:
                threshold = noisy[_largest(noisy.real, k, others)[-1]]
                load[group][expert] += _normal_cdf((logits[group, token, expert] - threshold) / noise_std)
    return np.array([_squared_variation(values) for values in load])


def statistics(
    probs: Array, routes: Sequence[Route], mask: Array, num_experts: int, *, first_choice_only: bool = False
) -> dict[str, Any]:
    """Sums over real tokens: ``tokens``, ``expert_load`` [E], ``dropped``, ``entropy`` in nats, ``confidence``.

    Selections are counted as in ``load_balance_loss``, before capacity; a token is dropped where no expert kept it.
    """
    probs = np.real(probs).reshape(*np.shape(mask), num_experts)
    tokens = _real_tokens(mask)
    kept = {(route.group, route.token) for route in routes if route.position is not None}
    return {
        "tokens": len(tokens),
        "expert_load": _selections(probs, routes, mask, first_choice_only).sum(axis=0),
        "dropped": sum(index not in kept for index in tokens),
        "entropy": -sum(p * math.log(p) for index in tokens for p in probs[index].tolist() if p > 0),
        "confidence": sum(max(probs[index].tolist()) for index in tokens),
    }


def gradients(function: Callable[[dict[str, Array]], Any], arrays: dict[str, Array]) -> dict[str, Array]:
    """Exact derivatives of a real scalar function by the complex step: Squire and Trapp 1998, equation 6."""
    # f(x + ih) = f(x) + ih f'(x) + O(h^2) subtracts nothing, so h can be far below the rounding of f.
    step = 1e-30
    point = {name: np.array(value, np.float64) for name, value in arrays.items()}
    result = {name: np.zeros_like(value) for name, value in point.items()}
    for name, value in point.items():
        for index in np.ndindex(value.shape):
            perturbed = value.astype(np.complex128)
            perturbed[index] += 1j * step
            result[name][index] = np.imag(np.asarray(function({**point, name: perturbed}))).item() / step
    return result
