"""What the formats of checkpoints are called; without an import, so that a command's flags can name them at once."""

NATIVE, T5X, HUGGING_FACE = FORMATS = ("native", "t5x", "huggingface")
