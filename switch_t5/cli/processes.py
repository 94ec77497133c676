"""Several processes as one program: how they find each other, agree, speak, and end.

Nothing heavy is imported here at the top: the command line imports this module for every command.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.cli.configuration import Configuration
    from switch_t5.cli.runtime import RuntimeConfig

OF_ONE_START = (
    "RuntimeConfig.coordinator_address",
    "RuntimeConfig.num_processes",
    "RuntimeConfig.process_id",
    "RuntimeConfig.find_processes",
)
"""What says which process this is: no part of a run, and not in its ``config.gin``."""

_SENTENCE_BYTES = 2000
_SECONDS_FOR_LAST_WORDS = 5
_SECONDS_OF_AN_ATTEMPT, _SECONDS_BETWEEN_ATTEMPTS = 10, 1


def settle(configuration: Configuration, roots: Iterable[str]) -> None:
    """Applies a configuration's ``RuntimeConfig`` and, where this is one of several processes, joins the others.

    Args:
      configuration: of the command.
      roots: the configurables that all processes must have alike.

    Raises:
      UserError: a value is refused; the others cannot be found; they have another configuration or other devices.
    """
    runtime: RuntimeConfig = configuration.get("RuntimeConfig")
    runtime.apply()
    if not runtime.joins_others:
        return
    _find_each_other(runtime)

    import jax

    if jax.process_count() == 1:
        return
    _check_devices()
    _check_agreement(configuration, list(roots))
    if jax.process_index() > 0 and not runtime.log_all_processes:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def is_first() -> bool:
    """Whether this process writes the files: the only one, or the first of several."""
    import jax

    return jax.process_index() == 0


def if_first(path: str | None) -> str | None:
    """A path in the process that writes the files, None in the others."""
    return path if is_first() else None


def as_the_first(number: int) -> int:
    """A number as the first process has it; all call it together."""
    import jax

    if jax.process_count() == 1:
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextlib.contextmanager
def ending_alone() -> Iterator[None]:
    """One of several processes that fails inside this block says why and ends at once.

    At its exit JAX would wait for the others, which may be waiting for this one's part of a sum: that it has gone they
    learn from its connections, or from its heart, which beats no more. A process alone is left as it is.
    """
    try:
        yield
    except BaseException as error:
        if not _is_joined() or isinstance(error, SystemExit):
            raise
        code = _complain(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first():
            # Where it has gone JAX ends the others at once: they may be about to say the same, or more.
            time.sleep(_SECONDS_FOR_LAST_WORDS)
        os._exit(code)


def _is_joined() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def _complain(error: BaseException) -> int:
    """Says what happened, also where this process is silent otherwise; returns the exit code."""
    import jax

    sys.stderr = sys.__stderr__ or sys.stderr
    who = f"switch-t5: process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f"{who}: interrupted.", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    print(
        f"{who} ends by the error above. Where that is a connection or a heartbeat, another process has died: look at "
        "what it said, and start all of them again; a training run goes on from its last checkpoint.",
        file=sys.stderr,
    )
    return 1


def _reach(address: str, seconds: int) -> None:
    """Waits until somebody listens at an address: JAX, which finds nobody there, would abort the program.

    Raises:
      UserError: nobody does.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_OF_AN_ATTEMPT).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"Process 0 could not be reached at {address} within {seconds} s ({error}): is it running, was it "
                    "started with this address, and does the network let its port through? "
                    "RuntimeConfig.initialization_timeout_seconds gives it longer."
                ) from error
            time.sleep(_SECONDS_BETWEEN_ATTEMPTS)


def _find_each_other(runtime: RuntimeConfig) -> None:
    import jax

    address, seconds = runtime.address, runtime.initialization_timeout_seconds
    if address is not None and runtime.process_id == 0:
        print(f"waiting at {address} for {runtime.num_processes} processes, {seconds} s at most", file=sys.stderr)
    elif address is not None and runtime.process_id is not None:
        _reach(address, seconds)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=runtime.num_processes,
            process_id=runtime.process_id,
            cluster_detection_method=None if runtime.find_processes else "deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=runtime.heartbeat_timeout_seconds,
        )
    except ValueError as error:
        raise UserError(
            f"RuntimeConfig.find_processes is set, but JAX finds no cluster here ({str(error).rstrip('.')}): give "
            "coordinator_address, num_processes and process_id of RuntimeConfig."
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"The processes did not all meet at {address} within {seconds} s "
            f"({str(error).splitlines()[0].rstrip('.')}): was each of them started, with this address and number of "
            "processes and a number of its own?"
        ) from error


def _check_devices() -> None:
    """Refuses processes of unequal size, which no mesh divides evenly.

    Raises:
      UserError: says how many devices each has.
    """
    import jax

    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    if len(set(counts)) > 1:
        raise UserError(
            f"The processes have {', '.join(map(str, counts))} devices: each must have as many as the others."
        )


def _check_agreement(configuration: Configuration, roots: list[str]) -> None:
    """Compares the configurations of all processes with that of the first.

    Raises:
      UserError: one is another; raised in every process, with the differences.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    text = configuration.resolved(roots).encode()
    size = as_the_first(len(text))
    content = np.frombuffer(text[:size].ljust(size, b" "), np.uint8)
    first = np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().decode()
    differences = configuration.difference(
        first, ("RuntimeConfig.*",), place="process 0", words=("is", "in process 0 and here")
    )
    sentence = " ".join(differences).encode()[:_SENTENCE_BYTES].ljust(_SENTENCE_BYTES, b" ")
    all_said = np.asarray(multihost_utils.process_allgather(np.frombuffer(sentence, np.uint8)))
    for process in range(jax.process_count()):
        said = all_said[process].tobytes().decode(errors="ignore").strip()
        if said:
            raise UserError(
                f"The processes have different configurations; process {process} says: {said} Start all of them with "
                "the same files and flags."
            )
