"""switch_t5: Switch Transformers in JAX, from a laptop's CPU to a TPU."""

__version__ = "0.1.0"
