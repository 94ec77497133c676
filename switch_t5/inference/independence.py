"""A model whose tokens do not compete, for decoding: what it says to one input depends on no other.

In training, tokens of a batch compete for their expert's slots. A text that were written otherwise because of the
texts beside it could not be reproduced, and a cache would not give what a full forward pass gives. So decoding routes
without capacity, each sequence in a group of its own. The parameters are the same.
"""

from __future__ import annotations

import dataclasses

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig


def independent(config: TransformerConfig) -> TransformerConfig:
    """The same model, but that no sequence's output depends on the others in its batch, nor on their number.

    Every token gets the experts that its router gives it, Sinkhorn's by its logits as in all evaluation. Of expert
    choice, which is made of competition, the tokens of one sequence still compete.

    Args:
      config: the model as it is trained.
    """
    fields = ("moe", "decoder_moe", "attention_moe")
    changed = {field: _without_competition(getattr(config, field)) for field in fields}
    return dataclasses.replace(config, **changed, remat_policy="none")


def _without_competition(moe: MoEConfig | None) -> MoEConfig | None:
    if moe is None:
        return None
    router = dataclasses.replace(moe.router, batch_prioritized=False)
    moe = dataclasses.replace(moe, group_size="sequence", router=router)
    if not router.needs_capacity:
        return dataclasses.replace(moe, expert_capacity=None, dispatch="dropless")
    if router.router == "expert_choice":
        return moe
    # A slot for each of a sequence's tokens with every expert.
    return dataclasses.replace(moe, expert_capacity=None, eval_capacity_factor=float(moe.num_experts))
