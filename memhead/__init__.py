"""memhead: the language-model head without its logits. Imports torch only."""

from memhead.logprobs import LinearLogprobs, LowRankUpdate, linear_logprobs

__all__ = ["LinearLogprobs", "LowRankUpdate", "linear_logprobs"]
__version__ = "0.1.0"
