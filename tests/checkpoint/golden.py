"""The golden checkpoints of other implementations, where they are, and models that read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from switch_t5.checkpoint.load import load_params
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.types import Params

FOLDER = Path(__file__).parents[3] / "shared" / "golden"
T5X = FOLDER / "t5x"
HUGGING_FACE = FOLDER / "huggingface"


def abstract(tree: Any) -> Any:
    """Shapes and dtypes on one device."""
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree)


def params_of(path: Path, config: TransformerConfig) -> Params:
    """A model's parameters out of a checkpoint of any format."""
    return load_params(str(path), config, abstract(Model(config).abstract_params)).params


def huggingface_folder(folder: Path, model: str, weights: str = "weights") -> Path:
    """A folder as ``save_pretrained`` writes it, of a golden model (``switch`` or ``t5v11``)."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = json.loads((HUGGING_FACE / "meta.json").read_text())
    kind = {"switch": "switch_transformers", "t5v11": "t5"}[model]
    config = meta[{"switch": "switch_config", "t5v11": "t5_config"}[model]]
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    shutil.copy(HUGGING_FACE / f"{model}_{weights}.safetensors", folder / "model.safetensors")
    return folder
