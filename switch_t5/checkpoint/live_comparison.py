"""A fixed batch through transformers and through this library's model: the proof of a conversion that shares no table.

transformers and PyTorch are imported here alone, and only when a comparison asks for them.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding

from switch_t5.checkpoint import huggingface
from switch_t5.checkpoint.folder import is_url
from switch_t5.checkpoint.format_names import HUGGING_FACE
from switch_t5.checkpoint.load import load_params
from switch_t5.checkpoint.recognition import Recognised
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.types import Array, Batch, Params

LOGITS_BOUND = 1e-4
"""Of the worst difference of two logits, as a share of the largest logit: some ten times what float32 rounds away."""

_ROWS, _INPUTS, _TARGETS = 2, 48, 24


def compare_logits(source: Recognised, target: Recognised, dtype: str | None) -> dict[str, Any]:
    """Runs transformers on the side that is in Hugging Face's format, and our model on the other one, in float32.

    Of two such sides transformers runs the target. A side whose parameters were cast on the way is cast likewise
    before it runs, so that the difference is the programs' and not the cast's, which :func:`compare` measures.

    Args:
      source: what was converted.
      target: what was written, opened anew.
      dtype: what the parameters were cast to; None where they were not.

    Returns:
      ``worst_absolute`` difference of the logits, ``worst_relative`` as a share of the largest, ``bound`` of the
      latter, ``tokens`` compared and ``software``; or ``left_out`` alone, which says why nothing was run.
    """
    if HUGGING_FACE not in (source.reader.checkpoint.format, target.reader.checkpoint.format):
        return {"left_out": "neither side is in Hugging Face's format"}
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return {"left_out": f"torch and transformers cannot be imported ({error})"}
    theirs_is_target = target.reader.checkpoint.format == HUGGING_FACE
    theirs, ours = (target, source) if theirs_is_target else (source, target)
    if is_url(theirs.reader.checkpoint.path):
        return {"left_out": f"transformers reads from a disk alone, and not {theirs.reader.checkpoint.path}"}
    model = Model(source.architecture.config(_moe(theirs)))
    # One model at a time in float32, and once more what is read of it.
    needed = 8 * sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        return {"left_out": f"it would take {needed / 1e9:.1f} GB of memory, and there are {memory / 1e9:.1f} GB"}
    batch = _batch(source.architecture.vocab_size)
    expected = _theirs(theirs, batch, None if theirs_is_target else dtype, torch, transformers)
    found = _ours(ours, model, batch, dtype if theirs_is_target else None)
    real = batch["decoder_target_tokens"] > 0
    difference = float(np.abs(found - expected)[real].max())
    return {
        "worst_absolute": difference,
        "worst_relative": difference / (float(np.abs(expected[real]).max()) or 1.0),
        "bound": LOGITS_BOUND,
        "tokens": int(real.sum()),
        "software": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def _batch(vocab_size: int) -> dict[str, np.ndarray]:
    """The same tokens for every model of a vocabulary, the second row padded; longer than position biases are exact."""
    random = np.random.default_rng(0)
    inputs = random.integers(2, vocab_size, (_ROWS, _INPUTS), dtype=np.int32)
    targets = random.integers(2, vocab_size, (_ROWS, _TARGETS), dtype=np.int32)
    inputs[1, 3 * _INPUTS // 4 :] = targets[1, _TARGETS // 2 :] = 0
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }


def _theirs(
    side: Recognised, batch: dict[str, np.ndarray], cast: str | None, torch: Any, transformers: Any
) -> np.ndarray:
    path = side.reader.checkpoint.path
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Theirs are of no use to who converts.
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation="eager"
        )
        if cast is not None:
            model = model.to(getattr(torch, cast)).to(torch.float32)
        with torch.no_grad():
            inputs = torch.from_numpy(batch["encoder_input_tokens"]).long()
            output = model.eval()(
                input_ids=inputs,
                attention_mask=(inputs > 0).long(),
                decoder_input_ids=torch.from_numpy(batch["decoder_input_tokens"]).long(),
                use_cache=False,
            )
    return output.logits.numpy()


def _ours(side: Recognised, model: Model, batch: dict[str, np.ndarray], cast: str | None) -> np.ndarray:
    device = SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), model.abstract_params
    )
    params = load_params(side.reader.checkpoint.path, model.config, wanted).params
    if cast is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(cast)).astype(leaf.dtype), params)

    @jax.jit
    def forward(params: Params, batch: Batch) -> Array:
        module = model.bind(params)
        return logits(module(batch)[0], module.output_kernel())

    with jax.default_matmul_precision("float32"):  # An accelerator's default multiplies rougher than PyTorch does.
        return np.asarray(forward(params, batch))


def _moe(theirs: Recognised) -> MoEConfig | None:
    """Sparse layers as transformers has them: a capacity in tokens of a row, and padding a token as any other."""
    experts = max(theirs.architecture.encoder_experts, theirs.architecture.decoder_experts)
    if not experts:
        return None
    capacity = int((theirs.reader.checkpoint.config or {}).get(huggingface.CAPACITY) or huggingface.DEFAULT_CAPACITY)
    return MoEConfig(experts, group_size="sequence", expert_capacity=capacity, padding="routed", jitter_noise=0.0)
