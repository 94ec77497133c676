"""Every test sees eight CPU devices, so that meshes are real without an accelerator."""

from __future__ import annotations

import os

# Read when jax is first imported; as environment variables they also reach the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
