"""What must be settled before JAX wakes its devices."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from switch_t5.errors import ConfigError, check_types


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The process' surroundings, which may differ from process to process; nothing here changes a result.

    Attributes:
      num_cpu_devices: virtual devices that the CPU is divided into, where there is no accelerator; None for
        what the environment says.
      compilation_cache_dir: where compiled programs are kept for the next start; None keeps none.
      coordinator_address: ``host:port`` where process 0 of several listens and the others find it; None for what
        JAX_COORDINATOR_ADDRESS says, or for a process alone.
      num_processes: of how many processes this is one.
      process_id: which of them, from 0.
      find_processes: whether JAX asks the cluster (Cloud TPU, GKE, SLURM, Open MPI) for what of these three is None.
      initialization_timeout_seconds: how long processes wait for each other at the start.
      heartbeat_timeout_seconds: after how long without a sign of life a process counts as dead, and ends the others.
      log_all_processes: whether processes other than the first write to the terminal too.
    """

    num_cpu_devices: int | None = None
    compilation_cache_dir: str | None = "~/.cache/switch_t5/compiled"
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    find_processes: bool = False
    initialization_timeout_seconds: int = 300
    heartbeat_timeout_seconds: int = 30
    log_all_processes: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        least = {
            "num_cpu_devices": 1,
            "num_processes": 1,
            "process_id": 0,
            "initialization_timeout_seconds": 1,
            "heartbeat_timeout_seconds": 1,
        }
        for field, number in least.items():
            value = getattr(self, field)
            if value is not None and value < number:
                raise ConfigError(f"RuntimeConfig.{field}", f"must be at least {number}, got {value}.")
        self._check_processes()

    def _check_processes(self) -> None:
        address = self.address
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise ConfigError("RuntimeConfig.coordinator_address", f"must be host:port, got {address!r}.")
        if self.find_processes:
            return
        for field in ("num_processes", "process_id"):
            if address is not None and getattr(self, field) is None:
                raise ConfigError(
                    f"RuntimeConfig.{field}",
                    f"must be given with the coordinator's address, {address}; on a cluster that JAX knows set "
                    "RuntimeConfig.find_processes = True.",
                )
            if address is None and getattr(self, field) is not None and self.num_processes != 1:
                raise ConfigError(
                    f"RuntimeConfig.{field}", "has no effect without RuntimeConfig.coordinator_address = 'host:port'."
                )
        if self.process_id is not None and self.process_id >= (self.num_processes or 1):
            raise ConfigError(
                "RuntimeConfig.process_id",
                f"is {self.process_id}, but {self.num_processes or 1} process(es) are numbered from 0.",
            )

    @property
    def address(self) -> str | None:
        """Where process 0 listens, by configuration or environment."""
        return self.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")

    @property
    def joins_others(self) -> bool:
        """Whether this process is to be one of several."""
        return self.find_processes or (self.address is not None and self.num_processes != 1)

    def apply(self) -> None:
        """Configures JAX; to be called before its first array."""
        import jax

        if self.num_cpu_devices is not None:
            jax.config.update("jax_num_cpu_devices", self.num_cpu_devices)
        if self.compilation_cache_dir is not None:
            cache = Path(self.compilation_cache_dir).expanduser()
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
