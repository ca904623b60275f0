"""OLMoE with tied embeddings: vLLM's class leaves the output matrix of such a checkpoint at zero, and every token is token 0."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.olmoe import OlmoeForCausalLM


class TiedOlmoeForCausalLM(OlmoeForCausalLM):
    """vLLM's OLMoE, which loads the embedding matrix as output matrix where the config ties them."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load the weights, and the tied one twice."""

        def both() -> Iterator[tuple[str, torch.Tensor]]:
            for name, value in weights:
                yield name, value
                if name == "model.embed_tokens.weight" and self.config.tie_word_embeddings:
                    yield "lm_head.weight", value

        return super().load_weights(both())
