"""Array aliases and the one legend of axes and letters.

Shapes in docstrings are written with logical axis names, or with these letters:

======  ==========================================  =====================
letter  what it counts                              logical axis
======  ==========================================  =====================
B       sequences in a batch                        ``batch``
L       positions in a sequence (Q, T: the queries'  ``length``
        and keys' when they differ)
D       features of the residual stream             ``embed``
F       features inside a feed-forward              ``mlp``, ``expert_mlp``
H       attention heads                             ``heads``
K       features of one head                        ``kv``
V       vocabulary entries                          ``vocab``
G       routing groups                              ``batch``
S       tokens in a routing group                   none (never sharded)
E       experts                                     ``expert``
C       slots of one expert for one group           none (never sharded)
======  ==========================================  =====================

Two more logical axes belong to parameters (``layers``, the stacking axis of scanned blocks, and
``relpos_buckets``) and one to activations: ``expert_batch``, the groups of a dispatched array, whose
``expert`` axis has taken the mesh axis that they shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
"""A device array, or a tracer of one."""

Axes = tuple[str | None, ...]
"""One logical axis name for each dimension; None for a dimension that is never sharded."""

Batch = Mapping[str, Array]
"""Feature name to ``[batch, length]`` array; the names are those of seqio's encoder-decoder converter."""

Params = dict[str, Any]
"""A nested dictionary of parameters."""
