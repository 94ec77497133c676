"""Random models through transformers and through this library: both directions, forward and backward, live.

transformers runs in float64, so that all that is measured is ours: in float32 it would be no nearer to the truth.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from switch_t5.checkpoint import conversion, huggingface_files
from switch_t5.checkpoint.formats import read_checkpoint
from switch_t5.checkpoint.live_comparison import LOGITS_BOUND
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli.main import main
from switch_t5.data.vocabularies import load_vocabulary
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.losses import LossConfig, batch_totals
from switch_t5.training.state import TrainState
from switch_t5.training.step import batch_loss
from switch_t5.types import Array, Params
from tests.checkpoint.golden import params_of
from tests.model.small import random_params

WHY = "needs torch and transformers, which the extra `parity` installs"
torch: Any = pytest.importorskip("torch", reason=WHY)
transformers: Any = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.parity

RTOL, ATOL = 1e-4, 1e-5
"""Of logits and of each gradient; the absolute bound is a share of the array's largest entry."""
LOSS_RTOL = 1e-5

SIZES: dict[str, Any] = {"vocab_size": 48, "emb_dim": 16, "num_heads": 2, "head_dim": 6, "mlp_dim": 20}
"""No two alike, so that no axis can be taken for another."""
LENGTHS = {"encoder": 40, "decoder": 24}
"""Long enough that position biases are of the logarithmic buckets too."""


def dense(encoder: int, decoder: int, **fields: Any) -> TransformerConfig:
    return TransformerConfig(**SIZES, num_encoder_layers=encoder, num_decoder_layers=decoder, **fields)


def switch(encoder: tuple[int, ...], decoder: tuple[int, ...], *, blocks: tuple[int, int], **fields: Any) -> Any:
    capacity = fields.pop("expert_capacity", 64)
    moe = MoEConfig(3, group_size="sequence", expert_capacity=capacity, padding="routed", jitter_noise=0.0)
    layers = {"encoder_sparse_layers": encoder, "decoder_sparse_layers": decoder}
    return dense(*blocks, moe=moe, **layers, **fields)


GATED: dict[str, Any] = {"mlp_activations": ("gelu", "linear")}
UNTIED: dict[str, Any] = {"tied_logits": False}
CONFIGS = {
    "dense, ReLU, tied (v1.0)": dense(2, 3),
    "dense, gated, tied": dense(1, 2, **GATED),
    "dense, gated, untied (v1.1)": dense(2, 1, **GATED, **UNTIED),
    "switch, every block": switch((0, 1), (0, 1), blocks=(2, 2)),
    "switch, every other": switch((1, 3), (1,), blocks=(4, 2)),
    "switch, every third": switch((1, 4), (1,), blocks=(6, 3)),
    "switch, encoder alone": switch((1,), (), blocks=(2, 2)),
    "switch, decoder alone": switch((), (1, 3), blocks=(1, 4)),
    "switch, untied": switch((1,), (0,), blocks=(2, 1), **UNTIED),
    "switch, overflowing": switch((1,), (1,), blocks=(2, 2), expert_capacity=5),
}
each_config = pytest.mark.parametrize("name", CONFIGS)


def batch_of(padded: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = {stack: random.integers(2, 48, (3, length)).astype(np.int32) for stack, length in LENGTHS.items()}
    if padded:
        tokens["encoder"][1, 31:] = tokens["decoder"][0, 17:] = 0
    inputs = np.pad(tokens["decoder"][:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": tokens["encoder"],
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": tokens["decoder"],
        "decoder_loss_weights": (tokens["decoder"] > 0).astype(np.float32),
    }


def router_weights(config: TransformerConfig) -> dict[str, float]:
    """Of the router's losses, where transformers has them and means the same: one sparse layer in each sparse stack."""
    counts = [sum(pattern) for pattern in (config.encoder_pattern, config.decoder_pattern)]
    every = [len(pattern) == 1 and pattern[0] for pattern in (config.encoder_pattern, config.decoder_pattern)]
    if max(counts) != 1 or any(every):
        return {"load_balance_loss_weight": 0.0, "router_z_loss_weight": 0.0}
    return {"load_balance_loss_weight": 0.01, "router_z_loss_weight": 0.002}


@dataclasses.dataclass(frozen=True)
class Computed:
    logits: np.ndarray
    loss: float
    gradients: Params


@functools.cache
def compiled(name: str, padded: bool) -> Any:
    config = CONFIGS[name]
    model, batch = Model(config), jax.tree.map(jnp.asarray, batch_of(padded))
    weights = dict.fromkeys(router_weights(config), 0.0) if padded else router_weights(config)
    loss_config = LossConfig(z_loss=0.0, sparse_layer_reduction="stack_mean", **weights)

    def compute(params: Params) -> tuple[Array, Array, Params]:
        def loss(params: Params) -> tuple[Array, Any]:
            return batch_loss(
                params, batch, None, batch_totals(batch, loss_config, config), model=model, config=loss_config
            )

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        module = model.bind(params)
        return logits(module(batch)[0], module.output_kernel()), value, gradients

    return jax.jit(compute)


def ours(name: str, params: Params, padded: bool) -> Computed:
    values, loss, gradients = compiled(name, padded)(params)
    return Computed(np.asarray(values), float(loss), gradients)


def theirs(name: str, module: Any, folder: Path, padded: bool) -> Computed:
    """What transformers computes in float64; its gradients, as a checkpoint, are read by our tables."""
    batch = {key: torch.tensor(value, dtype=torch.long) for key, value in batch_of(padded).items()}
    targets = batch["decoder_target_tokens"]
    module = module.double().eval()
    module.zero_grad()
    more = {}
    if CONFIGS[name].moe is not None:
        weights = router_weights(CONFIGS[name])
        module.router_aux_loss_coef, module.router_z_loss_coef = weights.values()
        more["output_router_logits"] = not padded and any(weights.values())
        for part in module.modules():
            if hasattr(part, "classifier"):
                part.dtype = torch.float64
    output = module(
        input_ids=batch["encoder_input_tokens"],
        attention_mask=(batch["encoder_input_tokens"] > 0).long(),
        decoder_input_ids=batch["decoder_input_tokens"],
        labels=torch.where(targets > 0, targets, -100),
        **more,
    )
    output.loss.backward()
    gradients = {
        key: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).float().numpy()
        for key, parameter in module.named_parameters()
    }
    folder.mkdir()
    module.config.save_pretrained(folder)
    save_file(gradients, folder / "model.safetensors")
    return Computed(output.logits.detach().numpy(), output.loss.item(), params_of(folder, CONFIGS[name]))


def assert_close(one: np.ndarray, other: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(one, other, rtol=RTOL, atol=ATOL * np.abs(other).max(), err_msg=what)


def assert_agree(name: str, params: Params, module: Any, folder: Path) -> None:
    for padded in (True, False):
        mine, other = ours(name, params, padded), theirs(name, module, folder / f"gradients_{padded}", padded)
        real = batch_of(padded)["decoder_target_tokens"] > 0
        assert_close(mine.logits[real], other.logits[real], "logits")
        np.testing.assert_allclose(mine.loss, other.loss, rtol=LOSS_RTOL)
        jax.tree_util.tree_map_with_path(
            lambda path, one, two: assert_close(np.asarray(one), np.asarray(two), jax.tree_util.keystr(path)),
            mine.gradients,
            other.gradients,
        )


def share_embedding(module: Any) -> None:
    """One parameter, so that its gradient is the sum of all."""
    for stack in (module.encoder, module.decoder):
        stack.embed_tokens.weight = module.shared.weight


def their_config(config: TransformerConfig) -> Any:
    """Of transformers' own classes, by their own parameters."""
    sizes = {"vocab_size": 48, "d_model": 16, "num_heads": 2, "d_kv": 6, "d_ff": 20}
    layers = {"num_layers": config.num_encoder_layers, "num_decoder_layers": config.num_decoder_layers}
    common = {**sizes, **layers, "tie_word_embeddings": config.tied_logits}
    if config.moe is None:
        projection = "gated-gelu" if len(config.mlp_activations) == 2 else "relu"
        return transformers.T5Config(**common, feed_forward_proj=projection)
    counts = {}
    for stack, pattern in (("encoder", config.encoder_pattern), ("decoder", config.decoder_pattern)):
        # More sparse blocks than blocks: its step is then 0, and no block sparse.
        counts[f"num_sparse_{stack}_layers"] = sum(pattern) or len(pattern) + 1
    capacity = config.moe.expert_capacity
    return transformers.SwitchTransformersConfig(**common, **counts, num_experts=3, expert_capacity=capacity)


def their_model(config: TransformerConfig) -> Any:
    torch.manual_seed(0)
    module = transformers.AutoModelForSeq2SeqLM.from_config(their_config(config))
    for key, parameter in module.named_parameters():
        if "layer_norm" in key:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    if not config.tied_logits:
        # transformers 5 makes one matrix of every T5 and four of an untied Switch; here both have two.
        module.lm_head.weight = torch.nn.Parameter(torch.randn_like(module.lm_head.weight))
        share_embedding(module)
    return module


@each_config
def test_a_model_of_theirs_computes_the_same_here(name: str, tmp_path: Path) -> None:
    module = their_model(CONFIGS[name])
    module.save_pretrained(tmp_path / "theirs")
    params = jax.tree.map(jnp.asarray, params_of(tmp_path / "theirs", CONFIGS[name]))
    assert_agree(name, params, module, tmp_path)


def saved(folder: Path, config: TransformerConfig) -> Path:
    """A checkpoint of ours with the numbers of :func:`random_params`."""
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, TrainState(jnp.int32(3), random_params(Model(config)), {}), {})
    return folder


@each_config
def test_a_model_of_ours_computes_the_same_there(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = random_params(Model(config))
    run, there = saved(tmp_path / "run", config), tmp_path / "theirs"
    assert main(["convert", f"--from={run}", f"--to={there}", "--format=huggingface"]) == 0
    written = json.loads((there / "config.json").read_text())
    if config.moe is not None and config.moe.expert_capacity != 64:
        # What no array tells: the user's to say.
        (there / "config.json").write_text(json.dumps(written | {"expert_capacity": config.moe.expert_capacity}))
    module, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(there, output_loading_info=True)
    assert not any(loading.values()), loading
    for stack in (module.encoder, module.decoder):
        assert torch.equal(stack.embed_tokens.weight, module.shared.weight)
    share_embedding(module)
    assert module.config.architectures == [type(module).__name__]
    assert_agree(name, params, module, tmp_path)
    assert read_checkpoint(str(there)).architecture == read_checkpoint(str(run)).architecture


def test_shards_and_a_tokenizer_open_there(vocabulary_file: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_files, "_SHARD_BYTES", 20_000)
    run, there = saved(tmp_path / "run", CONFIGS["switch, every other"]), tmp_path / "theirs"
    words = ["convert", f"--from={run}", f"--to={there}", "--format=huggingface", f"--tokenizer={vocabulary_file}"]
    assert main(words) == 0
    assert len(list(there.glob("model-*.safetensors"))) > 2
    module, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(there, output_loading_info=True)
    assert not any(loading.values()), loading
    params = random_params(Model(CONFIGS["switch, every other"]))
    np.testing.assert_array_equal(module.shared.weight.detach().numpy(), params["embedding"]["table"])
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(there), load_vocabulary(vocabulary_file)
    text = "The people of the United States"
    assert tokenizer(text).input_ids == [*ours.encode(text), 1]
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == ours.vocab_size - 1


VERIFIED = {"dense, gated, tied": None, "switch, every other": None, "switch, encoder alone": "bfloat16"}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_runs_both_programs_whichever_side_is_theirs(name: str, tmp_path: Path, capsys) -> None:
    run = saved(tmp_path / "run", CONFIGS[name])
    dtype = [] if VERIFIED[name] is None else [f"--dtype={VERIFIED[name]}"]
    for form, source in (("huggingface", run), ("native", tmp_path / "huggingface")):
        words = ["convert", f"--from={source}", f"--to={tmp_path / form}", f"--format={form}", "--verify", "--json=-"]
        assert main([*words, *dtype]) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)["verified"]["logits"]
        assert found["worst_absolute"] > 0 and 0 < found["worst_relative"] < found["bound"] == LOGITS_BOUND
        assert found["tokens"] == 36
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
        assert f"{versions}: logits of 36 tokens" in captured.err


def test_verify_tells_a_model_that_computes_otherwise_though_its_arrays_are_the_same(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    """Its positions are counted in other buckets, of which no array tells."""

    def compare(*args: Any, **more: Any) -> Any:
        file = tmp_path / "to" / "config.json"  # Read already by us, who would refuse this, and not yet by them.
        file.write_text(json.dumps(json.loads(file.read_text()) | {"relative_attention_max_distance": 24}))
        return right(*args, **more)

    right = conversion.compare
    monkeypatch.setattr(conversion, "compare", compare)
    run = saved(tmp_path / "run", CONFIGS["dense, ReLU, tied (v1.0)"])
    words = ["convert", f"--from={run}", f"--to={tmp_path / 'to'}", "--format=huggingface", "--verify", "--json=-"]
    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)["verified"]
    assert found["worst_absolute"] == 0 and not found["passed"]
    assert found["logits"]["worst_relative"] > found["logits"]["bound"]


def test_verify_leaves_out_what_does_not_fit_into_memory(tmp_path: Path, capsys, monkeypatch) -> None:
    run = saved(tmp_path / "run", CONFIGS["dense, ReLU, tied (v1.0)"])
    asked = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else asked(name))
    words = ["convert", f"--from={run}", f"--to={tmp_path / 'to'}", "--format=huggingface", "--verify"]
    assert main(words) == 0
    assert "transformers was not run: it would take 0.0 GB of memory" in capsys.readouterr().err
