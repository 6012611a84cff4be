"""memhead: the language-model head without its logits. Imports torch only."""

from memhead.chunked import chunked_linear
from memhead.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from memhead.logprobs import LinearLogprobs, LowRankUpdate, linear_logprobs
from memhead.predicted import predicted_tokens
from memhead.support import supported_logprobs, truncation_support

__all__ = [
    "LinearCrossEntropy",
    "LinearLogprobs",
    "LowRankUpdate",
    "chunked_linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "predicted_tokens",
    "supported_logprobs",
    "truncation_support",
]
__version__ = "0.1.0"
