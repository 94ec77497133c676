"""Which checkpoints of a run are kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from switch_t5.errors import ConfigError, check_types

# Orbax takes most of a second to import; a run meets it with its first checkpoint.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept; the others are deleted once a newer one is whole.

    Attributes:
      keep: how many of the latest are kept; None keeps all.
      keep_period: additionally kept are those whose step is a multiple of this.
      keep_best: additionally kept are the best by the metric of this name, or by each of these; ``"tasks"`` means the
        score of each task that is evaluated.
      keep_best_mode: ``"min"`` where a smaller value of that metric is better, else ``"max"``; of a task's score a
        larger one always is.
      keep_best_count: how many of the best, by each metric, are kept.
      tolerated_failures: saves in a row that may fail, for a full disk say, before the run ends; each is told, and
        the next is tried at its time. The last save of a run must succeed.

    Raises:
      ConfigError: a value of a wrong type or out of range.
    """

    keep: int | None = 3
    keep_period: int | None = None
    keep_best: str | tuple[str, ...] | None = None
    keep_best_mode: str = "min"
    keep_best_count: int = 1
    tolerated_failures: int = 3

    @property
    def best_metrics(self) -> tuple[str, ...]:
        """The names of the metrics by which the best are kept."""
        best = self.keep_best
        return () if best is None else (best,) if isinstance(best, str) else tuple(best)

    def mode(self, metric: str) -> str:
        """``"min"`` or ``"max"``; a task's metrics are named ``<task>/<metric>``."""
        return "max" if "/" in metric else self.keep_best_mode

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("keep", "keep_period", "keep_best_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"CheckpointConfig.{name}", f"must be at least 1, got {value}.")
        if self.tolerated_failures < 0:
            raise ConfigError(
                "CheckpointConfig.tolerated_failures", f"must not be negative, got {self.tolerated_failures}."
            )
        if self.keep_best_mode not in ("min", "max"):
            raise ConfigError(
                "CheckpointConfig.keep_best_mode", f"must be 'min' or 'max', got {self.keep_best_mode!r}."
            )


def manager_options(
    config: CheckpointConfig, *, read_only: bool, before_commit: Callable[[], None] | None
) -> ocp.CheckpointManagerOptions:
    """Orbax's options for a configuration.

    Args:
      config: which checkpoints are kept.
      read_only: whether nothing is written or cleaned up.
      before_commit: called in the background when all files of a checkpoint are written; where it raises, the save has
        failed, and no checkpoint is deleted.
    """
    import orbax.checkpoint as ocp

    policies: list[Any] = [ocp.checkpoint_managers.LatestN(config.keep)]
    if config.keep_period is not None:
        policies.append(ocp.checkpoint_managers.EveryNSteps(config.keep_period))
    quality = functools.partial(_quality, name=None, mode="max")
    for metric in config.best_metrics:
        quality = functools.partial(_quality, name=metric, mode=config.mode(metric))
        policies.append(
            ocp.checkpoint_managers.BestN(
                get_metric_fn=quality,
                n=config.keep_best_count,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        # Orbax stores metrics only where it is told of a way to rank them.
        best_fn=quality,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
        # A folder that cannot be made then fails in `save`, at once, instead of in a thread for which
        # other threads wait many minutes.
        async_options=ocp.options.AsyncOptions(
            create_directories_asynchronously=False, post_finalization_callback=before_commit
        ),
    )


def _quality(metrics: Mapping[str, float] | None, *, name: str | None, mode: str) -> float:
    """How good a checkpoint is: greater is better; without the metric, or where it is NaN, the worst."""
    value = math.nan if name is None or metrics is None else metrics.get(name, math.nan)
    if math.isnan(value):
        return -math.inf
    return value if mode == "max" else -value
