"""Vocabularies: bytes, or SentencePiece from a file, each with its sentinels; and training SentencePiece."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from switch_t5.errors import UserError
from switch_t5.storage import storage_errors, writable_directory

if TYPE_CHECKING:
    import seqio

BYTES = "bytes"
EXTRA_IDS = 100

# Below this, the 256 pieces of byte fallback would take too many pieces from the words.
_BYTE_FALLBACK_FROM_SIZE = 2048
_SENTINEL = re.compile(r"▁?<extra_id_\d+>")
# What SentencePiece says of a size that the text, or its letters, do not allow.
_SIZE_TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\).*?<= (\d+)", re.DOTALL)
_SIZE_TOO_LOW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def load_vocabulary(path: str | None, extra_ids: int = EXTRA_IDS) -> seqio.Vocabulary:
    """Returns the vocabulary at `path`, its last `extra_ids` pieces being span corruption's sentinels.

    Args:
      path: a SentencePiece model, local or on `gs://`, such as T5's
        `cc_all.32000.100extra/sentencepiece.model`; or 'bytes' or None for UTF-8 bytes.
      extra_ids: sentinels to add behind the pieces. A model that holds sentinels of its own gets no others.

    Raises:
      UserError: there is no such file, it is no SentencePiece model with T5's special pieces, or it holds
        fewer pieces than sentinels.
    """
    from switch_t5.data.tensorflow_runtime import seqio

    if path is None or path == BYTES:
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    pieces = _read_pieces(path)
    own = sum(bool(_SENTINEL.fullmatch(piece)) for piece in pieces)
    if own:
        extra_ids = 0
    _check_size(len(pieces) - own, own or extra_ids, f"Vocabulary {path}")
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=extra_ids)
    if vocabulary.tokenizer.pad_id() != 0 or vocabulary.eos_id != 1:
        raise UserError(
            f"Vocabulary {path} has padding {vocabulary.tokenizer.pad_id()} and end of sequence "
            f"{vocabulary.eos_id}; T5's are 0 and 1: train one with `switch-t5 data vocabulary`."
        )
    return vocabulary


def count_pieces(path: str) -> int:
    """Returns the number of pieces in a SentencePiece model's file.

    Raises:
      UserError: the file cannot be read or is no such model.
    """
    return len(_read_pieces(path))


def count_sentinels(vocabulary: seqio.Vocabulary) -> int:
    """Returns how many sentinels stand at the end of a vocabulary."""
    if vocabulary.extra_ids:
        return vocabulary.extra_ids
    tokenizer: Any = getattr(vocabulary, "tokenizer", None)
    if tokenizer is None:
        return 0
    return sum(bool(_SENTINEL.fullmatch(tokenizer.IdToPiece(i))) for i in range(tokenizer.GetPieceSize()))


def vocabulary_fingerprint(vocabulary: seqio.Vocabulary) -> str:
    """Tells vocabularies apart by their SentencePiece model with its sentinels; those without by kind and size."""
    model: Any = getattr(vocabulary, "sp_model", None)
    if model is None:
        return f"{type(vocabulary).__name__}, {vocabulary.vocab_size} entries"
    return hashlib.sha256(model).hexdigest()


def begins_with_pieces_of(vocabulary: seqio.Vocabulary, model: bytes, what: str) -> bool:
    """Whether the first pieces of a vocabulary are those of a SentencePiece model.

    Args:
      vocabulary: of any kind.
      model: the content of its file.
      what: that file, for the sentence.

    Raises:
      UserError: it is no such model.
    """
    tokenizer: Any = getattr(vocabulary, "tokenizer", None)
    pieces = _pieces(model, what)
    if tokenizer is None or tokenizer.GetPieceSize() < len(pieces):
        return False
    return pieces == [tokenizer.IdToPiece(number) for number in range(len(pieces))]


def decode(vocabulary: seqio.Vocabulary, ids: Sequence[int]) -> str:
    """Returns the text of `ids` up to the first end of sequence, sentinels as `<extra_id_0>` and so on.

    Padding is left out. (A byte vocabulary's own `decode` would drop the sentinels.)
    """
    from switch_t5.data.tensorflow_runtime import seqio

    ids = [int(token) for token in ids if token != vocabulary.pad_id]
    if not isinstance(vocabulary, seqio.ByteVocabulary):
        return vocabulary.decode(ids)
    if vocabulary.eos_id in ids:
        ids = ids[: ids.index(vocabulary.eos_id)]
    first_sentinel = vocabulary.vocab_size - vocabulary.extra_ids
    text, run = "", []
    for token in [*ids, vocabulary.vocab_size]:
        if token < first_sentinel:
            run.append(token)
            continue
        text += vocabulary.decode(run)
        run = []
        if token < vocabulary.vocab_size:
            text += f"<extra_id_{vocabulary.vocab_size - 1 - token}>"
    return text


def train_sentencepiece(
    texts: Iterable[str],
    size: int,
    path: str | os.PathLike[str],
    *,
    extra_ids: int = EXTRA_IDS,
    byte_fallback: bool | None = None,
) -> None:
    """Trains a unigram SentencePiece model as T5's is and writes it atomically.

    Padding is piece 0, end of sequence 1, unknown 2; there is no beginning of sequence. The sentinels are not
    in the file: `load_vocabulary` adds them, so the whole vocabulary has `size + extra_ids` entries.

    Args:
      texts: documents; each line counts as a sentence.
      size: pieces in the file.
      path: the file to write; its folder is made.
      extra_ids: sentinels that will be added on loading.
      byte_fallback: whether letters outside the vocabulary are spelt in bytes rather than unknown; by default
        from 2048 pieces on.

    Raises:
      UserError: `size` does not suit the text or its sentinels, there is no text, or the file cannot be
        written.
    """
    import sentencepiece

    _check_size(size, extra_ids, "A new vocabulary")
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file: name the file that the vocabulary is to be written to.")
    folder = writable_directory(Path(path).parent, "The vocabulary's folder")
    model = io.BytesIO()
    mistakes: list[UserError] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from filter(str.strip, text.splitlines())
        except UserError as mistake:  # SentencePiece makes its own error of whatever is raised here.
            mistakes.append(mistake)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=size >= _BYTE_FALLBACK_FROM_SIZE if byte_fallback is None else byte_fallback,
            # A longer line would be left out: SentencePiece cuts words from it, so its length costs nothing.
            max_sentence_length=1 << 30,
            # The result depends on how the text is shared out among threads, so never on the machine's cores.
            num_threads=4,
            minloglevel=2,
        )
    except (UserError, RuntimeError, OSError) as error:
        if mistakes:
            raise mistakes[0] from None
        raise UserError(_training_failure(str(error), size)) from None
    with storage_errors(f"Writing {path}"):
        _write_atomically(model.getvalue(), Path(path), folder)


def _read_pieces(path: str) -> list[str]:
    if path.startswith(("http://", "https://")):
        raise UserError(f"Vocabulary {path} is on the web: download it and give the file's path (or gs://...).")
    try:
        serialized = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Vocabulary {path} cannot be read: {error.strerror or error}.") from None
    return _pieces(serialized, f"Vocabulary {path}")


def _pieces(serialized: bytes, what: str) -> list[str]:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(serialized)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise UserError(f"{what} is not a SentencePiece model.")
    return [piece.piece for piece in model.pieces]


def _check_size(pieces: int, sentinels: int, what: str) -> None:
    if pieces < sentinels:
        raise UserError(
            f"{what} of {pieces} pieces is smaller than its {sentinels} sentinels: it needs more pieces, or "
            "fewer extra_ids."
        )


def _training_failure(message: str, size: int) -> str:
    if found := _SIZE_TOO_HIGH.search(message):
        return f"The text gives at most {found[1]} pieces, fewer than the vocabulary's size of {size}."
    if found := _SIZE_TOO_LOW.search(message):
        return f"The text's letters alone take {found[1]} pieces, more than the vocabulary's size of {size}."
    if "sentences_.empty()" in message:
        return "There is no text to train a vocabulary on."
    return f"SentencePiece could not train a vocabulary of {size} pieces: {' '.join(message.split())}"


def _write_atomically(data: bytes, path: Path, folder: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
