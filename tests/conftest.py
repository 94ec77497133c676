"""Every test sees eight CPU devices, so that meshes are real without an accelerator."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Read when jax is first imported; as environment variables they also reach the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# A test's programs are small and run once or twice: XLA's own passes stay as they are, LLVM's would take half of the
# suite's time. Set to 0, the tests compile as a user's programs do.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    # Nor the loops that its newer emitters write, which take a third of what is left to compile.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()


@pytest.fixture(scope="module")
def compiled_as_users_do() -> Iterator[None]:
    """Programs of a module with LLVM's passes, where a claim is about them to the last bit."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model of 300 pieces trained on the first five addresses of the embedded corpus."""
    from switch_t5.data.documents import embedded_corpus_files, iterate_documents
    from switch_t5.data.vocabularies import train_sentencepiece

    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_sentencepiece(iterate_documents(embedded_corpus_files()[:5]), 300, path)
    return str(path)
