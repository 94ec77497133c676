"""Whether a run's vocabulary is the one that a checkpoint was trained with, as far as the checkpoint says.

One of ours says it in its positions in the data; a Hugging Face folder may hold its SentencePiece model. T5X's say
nothing, nor do those that were converted. That the embedding has a row for every piece is asked of all.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from switch_t5.errors import ConfigError, UserError

if TYPE_CHECKING:
    from switch_t5.cli.build import Run

_HUGGING_FACE_MODEL = "spiece.model"


def check_embedding(run: Run) -> None:
    """Checks that every piece of the run's vocabulary has a row in the embedding.

    Raises:
      ConfigError: it has not.
    """
    from switch_t5.data.pipeline import get_vocabulary

    size, rows = get_vocabulary(run.spec.data).vocab_size, run.spec.transformer.vocab_size
    if size > rows:
        raise ConfigError(
            "TransformerConfig.vocab_size",
            f"is {rows}, smaller than the vocabulary's {size} entries; {-(-size // 128) * 128} is the next "
            "multiple of 128.",
        )


def check_vocabulary(run: Run, path: str) -> None:
    """Checks the run's vocabulary against what a checkpoint says of its own, and against the embedding.

    Args:
      run: what is to use the checkpoint.
      path: see :func:`switch_t5.checkpoint.formats.format_of`.

    Raises:
      UserError: it was trained with another, the embedding has too few rows, or there is no checkpoint.
    """
    from switch_t5.checkpoint.folder import read_file
    from switch_t5.checkpoint.format_names import HUGGING_FACE, NATIVE
    from switch_t5.checkpoint.formats import format_of
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.vocabularies import begins_with_pieces_of, vocabulary_fingerprint

    form, place = format_of(path)
    if form == NATIVE and (saved := _saved_fingerprint(place)) is not None:
        ours = vocabulary_fingerprint(get_vocabulary(run.spec.data))
        if saved != ours:
            raise _another(path, f"{_told(saved)}, where this run's is {_told(ours)}")
    if form == HUGGING_FACE and (model := read_file(place, _HUGGING_FACE_MODEL)) is not None:
        file = f"{place}/{_HUGGING_FACE_MODEL}"
        if not begins_with_pieces_of(get_vocabulary(run.spec.data), model, file):
            raise _another(path, f"that of its {_HUGGING_FACE_MODEL}")
    check_embedding(run)


def _saved_fingerprint(place: str) -> str | None:
    """What :func:`~switch_t5.data.vocabularies.vocabulary_fingerprint` gave the run that saved; None if unknown."""
    from switch_t5.checkpoint.data_positions import open_position
    from switch_t5.checkpoint.folder import is_url
    from switch_t5.checkpoint.manager import locate_checkpoint
    from switch_t5.checkpoint.native_remote import open_remote
    from switch_t5.checkpoint.run_folder import DIRECTORY
    from switch_t5.data.iterator_state import saved_description

    if is_url(place):
        folder = open_remote(place).path
    else:
        model_dir, step = locate_checkpoint(place)
        folder = f"{model_dir}/{DIRECTORY}/{step}"
    # Who wants parameters does not need the position: one that cannot be read says nothing.
    with contextlib.suppress(UserError, OSError), contextlib.ExitStack() as stack:
        position = open_position(folder)
        if position is not None:
            return saved_description(stack.enter_context(position)).get("vocabulary")
    return None


def _told(fingerprint: str) -> str:
    return fingerprint if " " in fingerprint else f"pieces and sentinels of the fingerprint {fingerprint[:12]}"


def _another(path: str, which: str) -> UserError:
    return UserError(
        f"{path} was trained with another vocabulary ({which}): set DataConfig.vocabulary_path and "
        "DataConfig.extra_ids as they were."
    )
