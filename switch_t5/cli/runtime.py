"""What must be settled before JAX wakes its devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from switch_t5.errors import ConfigError, check_types


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The process' surroundings; nothing here changes a result.

    Attributes:
      num_cpu_devices: virtual devices that the CPU is divided into, where there is no accelerator; None for
        what the environment says.
      compilation_cache_dir: where compiled programs are kept for the next start; None keeps none.
    """

    num_cpu_devices: int | None = None
    compilation_cache_dir: str | None = "~/.cache/switch_t5/compiled"

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_cpu_devices is not None and self.num_cpu_devices < 1:
            raise ConfigError("RuntimeConfig.num_cpu_devices", f"must be at least 1, got {self.num_cpu_devices}.")

    def apply(self) -> None:
        """Configures JAX; to be called before its first array."""
        import jax

        if self.num_cpu_devices is not None:
            jax.config.update("jax_num_cpu_devices", self.num_cpu_devices)
        if self.compilation_cache_dir is not None:
            cache = Path(self.compilation_cache_dir).expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
