"""What a conversion says of its result, and whether the result is still that."""

from __future__ import annotations

import json

from switch_t5.checkpoint.fingerprint import as_text
from switch_t5.checkpoint.folder import read_file
from switch_t5.checkpoint.native_files import fingerprint_of
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, OpenCheckpoint

CERTIFICATE = "conversion.json"
"""Lies beside what was converted; has shape, dtype and fingerprint of each array."""


def check_certificate(checkpoint: OpenCheckpoint) -> int:
    """Reads the arrays of a converted checkpoint and checks them against the certificate beside it.

    Returns:
      How many arrays were checked; 0 where no certificate is there.

    Raises:
      CheckpointDamaged: names the first array that is not as it was written, or the certificate is damaged.
    """
    file = f"{checkpoint.path}/{CERTIFICATE}"
    try:
        content = read_file(checkpoint.path, CERTIFICATE)
        if content is None:
            return 0
        promised = {name: entry["fingerprint"] for name, entry in json.loads(content)["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamaged(f"{file} is damaged ({str(error)[:100]}).") from error
    for name, fingerprint in promised.items():
        if name not in checkpoint.arrays:
            raise CheckpointDamaged(f"{checkpoint.path} lacks {name}, which {file} names.")
        if as_text(fingerprint_of(checkpoint.arrays[name])) != fingerprint:
            raise CheckpointDamaged(
                f"{checkpoint.path}: {name} is damaged, or was changed since: its values are not those of {file}; "
                "remove that file if they were meant to change."
            )
    return len(promised)
