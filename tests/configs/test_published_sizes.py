"""The models' parameter counts against what was published, and against arithmetic on their shapes.

The shapes are written out here once more, from the papers, so that a gin file's number is checked twice.
"""

from __future__ import annotations

import dataclasses

import pytest

from switch_t5.model.functional import Model
from switch_t5.planning.counts import active_parameter_count, parameter_count

T5_VOCABULARY, MT5_VOCABULARY = 32128, 250112


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape; ``matrices`` of a feed-forward is 3 where it is gated."""

    emb: int
    heads: int
    head: int
    mlp: int
    layers: int
    matrices: int
    tied: bool
    vocabulary: int = T5_VOCABULARY
    experts: int = 1
    sparse: int = 0
    """Sparse layers of each stack."""

    def parameters(self, experts: int | None = None) -> int:
        """Counts every weight; with ``experts``, only so many of each sparse layer's, whose router stays."""
        attention = 4 * self.emb * self.heads * self.head
        expert = self.matrices * self.emb * self.mlp
        sparse = (self.experts if experts is None else experts) * expert + self.emb * self.experts
        feed_forwards = (self.layers - self.sparse) * expert + self.sparse * sparse
        final_norm_and_positions = self.emb + 32 * self.heads
        encoder = self.layers * (attention + 2 * self.emb) + feed_forwards + final_norm_and_positions
        decoder = self.layers * (2 * attention + 3 * self.emb) + feed_forwards + final_norm_and_positions
        return encoder + decoder + self.vocabulary * self.emb * (1 if self.tied else 2)


V1 = {
    "small": Shape(512, 8, 64, 2048, 6, 2, True),
    "base": Shape(768, 12, 64, 3072, 12, 2, True),
    "large": Shape(1024, 16, 64, 4096, 24, 2, True),
    "xl": Shape(1024, 32, 128, 16384, 24, 2, True),
    "xxl": Shape(1024, 128, 128, 65536, 24, 2, True),
}
V1_1 = {
    "small": Shape(512, 6, 64, 1024, 8, 3, False),
    "base": Shape(768, 12, 64, 2048, 12, 3, False),
    "large": Shape(1024, 16, 64, 2816, 24, 3, False),
    "xl": Shape(2048, 32, 64, 5120, 24, 3, False),
    "xxl": Shape(4096, 64, 64, 10240, 24, 3, False),
}
SWITCH_C = Shape(2080, 32, 64, 6144, 15, 2, False, experts=2048, sparse=15)
SWITCH_XXL = dataclasses.replace(V1_1["xxl"], experts=128, sparse=12)

SHAPES = {
    **{f"t5_{size}": shape for size, shape in V1.items()},
    **{f"t5_1_1_{size}": shape for size, shape in V1_1.items()},
    **{f"mt5_{size}": dataclasses.replace(shape, vocabulary=MT5_VOCABULARY) for size, shape in V1_1.items()},
    **{
        f"switch_base_e{experts}": dataclasses.replace(V1["base"], experts=experts, sparse=6)
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch_large_e128": dataclasses.replace(V1["large"], experts=128, sparse=12),
    "switch_xxl_e128": SWITCH_XXL,
    "switch_c_e2048": dataclasses.replace(SWITCH_C, heads=30),
    "paper_switch_base": dataclasses.replace(V1_1["base"], tied=True, experts=128, sparse=6),
    "paper_switch_large": dataclasses.replace(V1_1["large"], tied=True, experts=128, sparse=12),
    "paper_switch_xxl": SWITCH_XXL,
    "paper_switch_c": SWITCH_C,
}

# Raffel et al. 2020, section 3.7 ("approximately"); T5's released_checkpoints.md; Xue et al. 2021, table 1.
PUBLISHED_ROUGHLY = {
    "t5_small": 60e6,
    "t5_base": 220e6,
    "t5_large": 770e6,
    "t5_xl": 2.8e9,
    "t5_xxl": 11e9,
    "t5_1_1_small": 77e6,
    "t5_1_1_base": 250e6,
    "t5_1_1_large": 800e6,
    "t5_1_1_xl": 3e9,
    "t5_1_1_xxl": 11e9,
    "mt5_small": 300e6,
    "mt5_base": 580e6,
    "mt5_large": 1.2e9,
    "mt5_xl": 3.7e9,
    "mt5_xxl": 13e9,
}

# Fedus et al. 2022 in billions: the teachers of table 7, with one decimal, and table 9, with none. Table 9's
# 26B of Switch-Large is the released shape's count; the shape that it prints has 27.1B.
PUBLISHED_BILLIONS = {
    "switch_base_e16": (1.1, 1),
    "switch_base_e32": (2.0, 1),
    "switch_base_e64": (3.8, 1),
    "switch_base_e128": (7.4, 1),
    "switch_base_e256": (14.7, 1),
    "switch_large_e128": (26, 0),
    "switch_xxl_e128": (395, 0),
    "switch_c_e2048": (1571, 0),
    "paper_switch_base": (7, 0),
    "paper_switch_large": (27, 0),
    "paper_switch_xxl": (395, 0),
    "paper_switch_c": (1571, 0),
}


def test_every_model_has_the_parameters_of_its_shape(model_name, model):
    built: Model = model(model_name)
    assert parameter_count(built.abstract_params) == SHAPES[model_name].parameters()


def test_a_token_passes_one_expert_of_every_sparse_layer(model_name, model):
    built: Model = model(model_name)
    shape = SHAPES[model_name]
    assert active_parameter_count(built.config, built.abstract_params, built.axes) == shape.parameters(experts=1)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_ROUGHLY.items())
def test_a_dense_model_has_about_the_published_parameters(name: str, published: float):
    # Published with one to three digits, some cut off and not rounded.
    assert SHAPES[name].parameters() == pytest.approx(published, rel=0.055)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_BILLIONS.items())
def test_a_sparse_model_has_the_published_billions(name: str, published: tuple[float, int]):
    billions, digits = published
    assert round(SHAPES[name].parameters() / 1e9, digits) == billions


def test_exact_counts_agree_with_other_implementations():
    # Hugging Face's models of the same names, copies of tied arrays left out.
    exact = {
        "t5_small": 60_506_624,
        "t5_base": 222_903_552,
        "t5_large": 737_668_096,
        "t5_xl": 2_851_598_336,
        "t5_xxl": 11_307_321_344,
        "t5_1_1_base": 247_577_856,
        "t5_1_1_xxl": 11_135_332_352,
        "mt5_small": 300_176_768,
        "mt5_base": 582_401_280,
        "mt5_large": 1_229_581_312,
        "switch_base_e8": 619_339_008,
    }
    assert {name: SHAPES[name].parameters() for name in exact} == exact


def test_a_switch_model_is_active_as_its_dense_sibling_and_its_routers_are():
    routers = 12 * 768 * 128
    assert SHAPES["switch_base_e128"].parameters(experts=1) == SHAPES["t5_base"].parameters() + routers


def test_switch_xxl_has_the_papers_size_with_128_experts_and_not_with_the_64_that_table_9_prints():
    halved = dataclasses.replace(SWITCH_XXL, experts=64)
    assert round(SWITCH_XXL.parameters() / 1e9) == 395
    assert round(halved.parameters() / 1e9) == 201
