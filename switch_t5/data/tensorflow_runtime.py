"""TensorFlow and seqio, set up once for reading data on the host's CPU.

Importing this module takes several seconds, nearly all of it TensorFlow's own import, so other modules import
it inside functions, or are themselves imported that way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# What native code prints while it loads: absl's prefix of severity, date and thread, and its two companions.
_NATIVE_LOG_LINE = re.compile(
    rb"[IWE]\d{4} |WARNING: All log messages before absl|To enable the following instructions"
)

_CHATTY_PACKAGES = re.compile(r"[/\\](seqio|tensorflow_datasets)[/\\]")


@contextlib.contextmanager
def _native_log_dropped() -> Iterator[None]:
    """Holds back file descriptor 2 and passes on all but the log lines of native code.

    TensorFlow's libraries print before any Python can lower their log level, whatever the environment says.
    """
    sys.stderr.flush()
    try:
        real = os.dup(2)
    except OSError:  # There is no standard error to keep clean.
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if not _NATIVE_LOG_LINE.match(line):
                    os.write(2, line)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# oneDNN announces itself, and plays no part in reading data.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

with _native_log_dropped():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # The accelerators belong to JAX: TensorFlow would reserve all of a GPU's memory.
    for _kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], _kind)

tf.get_logger().setLevel("ERROR")
# Both warn of what is deliberate here, and log what they then raise. The logger is shared with others, hence
# a filter.
logging.getLogger("absl").addFilter(lambda record: not _CHATTY_PACKAGES.search(record.pathname))

__all__ = ["seqio", "tf", "tfds"]
