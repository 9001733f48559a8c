"""What is computed once for all rows of a rollout: weights laid out, and shared prefixes.

A row's context is a prefix (its prompt but for the last token) followed by its own suffix (that
last token and what is generated after it). Prefixes are read-only and shared: rows with the same
prompt share one, and all unconditional rows share the longest, of which each uses as much as its
own prompt's length.
"""

import torch

from engine.model.generator import Generator
from engine.rollout.request import Prompts, Request
from engine.rollout.step_weights import StepWeights


class Prepared:
    """What rollouts of the same prompts and weights share.

    Attributes:
        generator: whose they are.
        weights: for a step.
        keys, values: (layers, U or U + 1, Hkv, P, head_dim), those of the prompts but for their
            last tokens; under guidance the unconditional ones come last.
    """

    @torch.no_grad()
    def __init__(self, generator: Generator, prompts: Prompts, request: Request) -> None:
        self.generator = generator
        self.weights = StepWeights(generator.weights, generator.head(request.level))
        prefixes = [p[:-1] for p in prompts.distinct]
        if request.guided:
            prefixes.append(generator.unconditional(prompts.longest)[:-1])
        self.keys, self.values = generator.prefill(prefixes)
