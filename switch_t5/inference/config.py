"""How texts are decoded: the numbers, validated once."""

from __future__ import annotations

import dataclasses

from switch_t5.errors import ConfigError, check_types, closest

SPLITS = ("train", "validation", "test")
"""Those that labelled tasks may have, by the tasks' names for them."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How tokens are chosen.

    Attributes:
      num_beams: hypotheses of a beam search; 1 is greedy, or sampling where there is a temperature.
      length_penalty: alpha; a beam's score is its log-probability over ``((5 + length) / 6)^alpha`` (Wu et al. 2016),
        its end of sequence counted. T5's is 0.6; 0 ranks by probability.
      temperature: of sampling; logits are divided by it. 0 takes the most probable token.
      top_k: sampling draws from this many of the most probable tokens; 0 from all.
      top_p: and from the fewest of them that together have this probability (Holtzman et al. 2020); 1 from all.
      num_return_sequences: outputs of an input: independent samples, or the best beams.
      max_length: tokens of an output, the end of sequence counted; None takes the targets' length.
      batch_size: inputs decoded together; None takes the data's.
      seed: of sampling. A draw depends on it, on the input's number and on the sample's, and on nothing else.
    """

    num_beams: int = 1
    length_penalty: float = 0.6
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_return_sequences: int = 1
    max_length: int | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        least = {
            "num_beams": 1,
            "length_penalty": 0,
            "temperature": 0,
            "top_k": 0,
            "num_return_sequences": 1,
            "seed": 0,
        }
        for field, bound in (least | {"max_length": 1, "batch_size": 1}).items():
            value = getattr(self, field)
            if value is not None and value < bound:
                raise ConfigError(f"DecodingConfig.{field}", f"must be at least {bound}, got {value}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError("DecodingConfig.top_p", f"must be above 0 and at most 1, got {self.top_p}.")
        self._check_method()

    def _check_method(self) -> None:
        if self.num_beams > 1 and self.temperature:
            raise ConfigError(
                "DecodingConfig.temperature",
                f"is {self.temperature}, but a search of {self.num_beams} beams draws nothing: set it to 0, or "
                "num_beams to 1.",
            )
        for field, neutral in (("top_k", 0), ("top_p", 1.0)):
            value = getattr(self, field)
            if value != neutral and not self.temperature:
                raise ConfigError(
                    f"DecodingConfig.{field}",
                    f"is {value}, which has no effect without a temperature: set one, such as 1.",
                )
        count = self.num_return_sequences
        if self.num_beams > 1 and count > self.num_beams:
            raise ConfigError(
                "DecodingConfig.num_return_sequences",
                f"is {count}, more than the {self.num_beams} beams that are kept: set num_beams to {count} or more.",
            )
        if self.num_beams == 1 and not self.temperature and count > 1:
            raise ConfigError(
                "DecodingConfig.num_return_sequences",
                f"is {count}, but greedy decoding has one answer: set a temperature, or num_beams.",
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Which tasks are scored, in training every ``TrainConfig.eval_period`` steps and by ``switch-t5 eval``.

    Attributes:
      tasks: their names; None takes those of the mixture that have metrics, an empty tuple none.
      split: which rows.
      num_examples: the first so many of each task; None takes all.
    """

    tasks: tuple[str, ...] | None = None
    split: str = "validation"
    num_examples: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.split not in SPLITS:
            raise ConfigError(
                "EvaluationConfig.split",
                f"must be one of {', '.join(SPLITS)}, got {self.split!r}.{closest(self.split, SPLITS)}",
            )
        if self.num_examples is not None and self.num_examples < 1:
            raise ConfigError("EvaluationConfig.num_examples", f"must be at least 1, got {self.num_examples}.")
