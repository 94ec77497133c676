"""The tables of Hugging Face: T5 v1.0 and v1.1, mT5, Switch Transformers; and their ``config.json``.

Linear layers are stored ``[out, in]`` and every expert by itself. Source: transformers' ``modeling_t5`` and
``modeling_switch_transformers`` (5.23), and models that it wrote.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from switch_t5.checkpoint.architecture import STACKS, Architecture
from switch_t5.checkpoint.param_map import BLOCK_AXES, Layout, Rule
from switch_t5.checkpoint.stored_arrays import Index, StoredArray, pieces
from switch_t5.errors import UserError

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Copies of ``shared.weight`` that a folder may hold; ``lm_head.weight`` is one more where logits are tied."""
HEAD = "lm_head.weight"
_EMBEDDING = "shared.weight"
# Stands in the first T5 checkpoints, and no version of the model has read it.
_UNUSED_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_MAX_DISTANCE = "relative_attention_max_distance"
MAX_DISTANCE = 128
"""Distances from here on share a bucket, in every released model."""
CAPACITY, DEFAULT_CAPACITY = "expert_capacity", 64
"""Slots of an expert for a row of tokens: a field of ``config.json``, and what transformers takes without it."""
T5, SWITCH, MT5 = "t5", "switch_transformers", "mt5"
ARCHITECTURES = {
    T5: "T5ForConditionalGeneration",
    MT5: "MT5ForConditionalGeneration",
    SWITCH: "SwitchTransformersForConditionalGeneration",
}

_ATTENTION = {"query": ("q", "(heads kv) embed"), "key": ("k", "(heads kv) embed"), "value": ("v", "(heads kv) embed")}
_ATTENTION["out"] = ("o", "embed (heads kv)")


def _block_rule(stack: str, parameter: str, dense: str) -> Rule | None:
    """The rule of a block's parameter; ``dense`` is how a dense feed-forward is called."""
    sublayers = ["self_attention", "mlp"] if stack == "encoder" else ["self_attention", "cross_attention", "mlp"]
    layer, *rest = parameter.removesuffix("_norm").split("/")
    if layer not in sublayers:
        return None
    prefix = f"{stack}.block.{{layer}}.layer.{sublayers.index(layer)}"
    if parameter.endswith("_norm"):
        return Rule(f"{stack}/{parameter}", f"{prefix}.layer_norm.weight", "embed")
    if layer != "mlp":
        module = "SelfAttention" if layer == "self_attention" else "EncDecAttention"
        name, axes = _ATTENTION[rest[0]]
        return Rule(f"{stack}/{parameter}", f"{prefix}.{module}.{name}.weight", axes)
    if rest == ["router"]:
        return Rule(f"{stack}/{parameter}", f"{prefix}.mlp.router.classifier.weight", "expert embed")
    axes = "embed mlp" if rest[-1] == "wo" else "mlp embed"
    module = "mlp.experts.expert_{expert}" if rest[0] == "experts" else dense
    return Rule(f"{stack}/{parameter}", f"{prefix}.{module}.{rest[-1]}.weight", axes)


def _layout(name: str, dense: str) -> Layout:
    rules = [Rule("embedding", _EMBEDDING, "vocab embed"), Rule("logits", HEAD, "vocab embed")]
    for stack in STACKS:
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(Rule(f"{stack}/shared_relative_position", bias, "relpos_buckets heads"))
        rules.append(Rule(f"{stack}/norm", f"{stack}.final_layer_norm.weight", "embed"))
        found = [_block_rule(stack, parameter, dense) for parameter in BLOCK_AXES if parameter != "relative_position"]
        rules += [rule for rule in found if rule is not None]
    return Layout(name, tuple(rules))


DENSE_LAYOUT = _layout("Hugging Face's T5", "DenseReluDense")
SWITCH_LAYOUT = _layout("Hugging Face's Switch Transformers", "mlp")
LAYOUTS = (DENSE_LAYOUT, SWITCH_LAYOUT)


def layout_of(architecture: Architecture) -> Layout:
    """The table of a model."""
    return SWITCH_LAYOUT if architecture.is_sparse else DENSE_LAYOUT


def sparse_pattern(num_layers: int, num_sparse: int) -> tuple[bool, ...]:
    """Which blocks transformers makes sparse of a configuration's numbers: none where it asks for more than all."""
    step = num_layers // num_sparse if num_sparse > 0 else num_layers
    return tuple(step > 0 and (step == 1 or index % step == 1) for index in range(num_layers))


def _sparse_count(blocks: tuple[bool, ...]) -> int | None:
    """The number of which transformers makes these blocks sparse; None where there is none."""
    counts = range(len(blocks) + 1, 0, -1)
    return next((count for count in counts if sparse_pattern(len(blocks), count) == blocks), None)


def architecture_of(config: Mapping[str, Any], path: str, num_arrays: int) -> Architecture:
    """The model that a ``config.json`` describes.

    Args:
      config: what stands in it.
      path: the folder, for messages.
      num_arrays: how many arrays lie beside it; a model cannot have more blocks and experts.

    Raises:
      UserError: it is of another kind of model, lacks a number, or computes something that ours does not.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{path}/config.json describes a model of type {kind!r}: {', '.join(ARCHITECTURES)} can be read."
        )
    numbers = {}
    for name in ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers"):
        numbers[name] = _count(config, name, path)
    if max(numbers["num_layers"], _count(config, "num_decoder_layers", path, 1)) > num_arrays:
        raise UserError(f"{path}/config.json has more blocks than there are arrays, {num_arrays}.")
    encoder_layers = numbers["num_layers"]
    decoder_layers = _count(config, "num_decoder_layers", path, encoder_layers)
    encoder, decoder, experts = (False,) * encoder_layers, (False,) * decoder_layers, 0
    if kind == SWITCH:
        if config.get("router_bias"):
            raise UserError(f"{path}/config.json has router_bias, which our router has not.")
        experts = _count(config, "num_experts", path, 8)
        encoder = sparse_pattern(encoder_layers, _count(config, "num_sparse_encoder_layers", path, 3, least=0))
        decoder = sparse_pattern(decoder_layers, _count(config, "num_sparse_decoder_layers", path, 3, least=0))
        if experts * sum(encoder + decoder) > num_arrays:
            raise UserError(f"{path}/config.json has more experts in all blocks than there are arrays, {num_arrays}.")
    projection = str(config.get("feed_forward_proj", "relu" if kind != MT5 else "gated-gelu"))
    activation = projection if kind != SWITCH else str(config.get("dense_act_fn", "relu"))
    if activation not in (("relu",) if kind == SWITCH else ("relu", "gated-gelu")):
        raise UserError(f"{path}/config.json has the feed-forward {activation!r}: relu and gated-gelu can be read.")
    for name, ours in (("layer_norm_epsilon", 1e-6), (_MAX_DISTANCE, MAX_DISTANCE)):
        if config.get(name, ours) != ours:
            raise UserError(f"{path}/config.json has {name} {config[name]}, where {ours} can be read.")
    return Architecture(
        vocab_size=numbers["vocab_size"],
        emb_dim=numbers["d_model"],
        num_heads=numbers["num_heads"],
        head_dim=numbers["d_kv"],
        mlp_dim=numbers["d_ff"],
        relpos_num_buckets=_count(config, "relative_attention_num_buckets", path, 32),
        encoder=encoder,
        decoder=decoder,
        encoder_experts=experts if any(encoder) else 0,
        decoder_experts=experts if any(decoder) else 0,
        gated=activation.startswith("gated"),
        tied_logits=_scales_tied_logits(config),
    )


def _scales_tied_logits(config: Mapping[str, Any]) -> bool:
    """Whether logits are the embedding's, divided by the root of its width, as in T5 v1.0.

    transformers 5 writes of every T5 that its embeddings are tied, and apart whether it divides. An mT5 never does.
    """
    tied = config.get("tie_word_embeddings") is not False
    return {T5: bool(config.get("scale_decoder_outputs", tied)), SWITCH: tied, MT5: False}[config["model_type"]]


def _count(config: Mapping[str, Any], name: str, path: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(name, default)
    value = default if value is None else value
    # The largest released number is a vocabulary's; beyond it a damaged or hostile file must not size anything.
    most = 1 << 24
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{path}/config.json has {name} = {value!r}, where a number from {least} to {most:,} belongs.")
    return value


def config_of(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """A ``config.json`` for a model.

    Raises:
      UserError: transformers has no such model: what it lacks is named.
    """
    sparse = architecture.is_sparse
    config: dict[str, Any] = {
        "model_type": SWITCH if sparse else T5,
        "architectures": [ARCHITECTURES[SWITCH if sparse else T5]],
        "dtype": dtype,
        "vocab_size": architecture.vocab_size,
        "d_model": architecture.emb_dim,
        "d_kv": architecture.head_dim,
        "d_ff": architecture.mlp_dim,
        "num_layers": len(architecture.encoder),
        "num_decoder_layers": len(architecture.decoder),
        "num_heads": architecture.num_heads,
        "relative_attention_num_buckets": architecture.relpos_num_buckets,
        _MAX_DISTANCE: MAX_DISTANCE,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": architecture.tied_logits,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    if architecture.relpos_per_layer:
        raise UserError(
            "Hugging Face's T5 shares one relative position bias among blocks, and this model has one each."
        )
    if not sparse:
        return config | {"feed_forward_proj": "gated-gelu" if architecture.gated else "relu", "dropout_rate": 0.0}
    if architecture.gated:
        raise UserError("Hugging Face's Switch Transformers have no gated feed-forwards, and this model has.")
    counts = {stack: _sparse_count(architecture.blocks(stack)) for stack in STACKS}
    for stack, count in counts.items():
        if count is None:
            blocks = architecture.blocks(stack)
            raise UserError(
                f"Hugging Face's Switch Transformers cannot have the sparse {stack} blocks "
                f"{[index for index, sparse_block in enumerate(blocks) if sparse_block]} of {len(blocks)}."
            )
    experts = {architecture.experts(stack) for stack in STACKS if any(architecture.blocks(stack))}
    if len(experts) > 1:
        raise UserError("Hugging Face's Switch Transformers have as many experts in encoder and decoder.")
    return config | {
        "num_experts": experts.pop(),
        "num_sparse_encoder_layers": counts["encoder"],
        "num_sparse_decoder_layers": counts["decoder"],
        "router_bias": False,
        "router_dtype": "float32",
        "dense_act_fn": "relu",
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
    }


def copies_of_embedding(architecture: Architecture) -> dict[str, str]:
    """Arrays to be written once more, by another name: transformers 5 shares no embeddings of an untied Switch."""
    return dict.fromkeys(COPIES, _EMBEDDING) if architecture.is_sparse and not architecture.tied_logits else {}


def without_copies(
    arrays: Mapping[str, StoredArray], config: Mapping[str, Any], architecture: Architecture, path: str
) -> dict[str, StoredArray]:
    """The arrays less copies of tied ones, the embedding by its own name, and what transformers ignores too.

    Copies are compared before the embedding is first read. Where logits are the embedding's as they are, which ours
    are not, the output kernel is a copy of it.

    Raises:
      UserError: a copy has another shape; later, when the embedding is read, another number.
    """
    copies = (*COPIES, HEAD) if architecture.tied_logits else COPIES
    kept = {name: array for name, array in arrays.items() if name not in copies and name != _UNUSED_BIAS}
    same = [name for name in (_EMBEDDING, *copies) if name in arrays]
    if same:
        kept[_EMBEDDING] = _compared(arrays, same, path)
    if not architecture.tied_logits and config.get("tie_word_embeddings", True) and _EMBEDDING in kept:
        kept.setdefault(HEAD, kept[_EMBEDDING])
    return kept


def _compared(arrays: Mapping[str, StoredArray], names: list[str], path: str) -> StoredArray:
    """The first of the arrays; before it is read the others are compared with it, piece by piece."""
    first = arrays[names[0]]

    def differing(name: str) -> UserError:
        tied = "tie_word_embeddings" if name == HEAD else "one embedding"
        return UserError(
            f"{path} holds {name}, which differs from {names[0]}, and its config.json says {tied}: refused."
        )

    @functools.cache
    def compare() -> None:
        for index in pieces(first.shape, first.dtype.itemsize):
            values = first.read(index)
            for name in names[1:]:
                if not np.array_equal(values, arrays[name].read(index), equal_nan=True):
                    raise differing(name)

    def read(index: Index) -> np.ndarray:
        compare()
        return first.read(index)

    for name in names[1:]:
        if arrays[name].shape != first.shape:
            raise differing(name)
    return dataclasses.replace(first, read=read)
