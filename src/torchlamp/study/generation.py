"""Greedy generation under a policy, streamed as it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchlamp.compositions.policy import Policy
from torchlamp.study.quiet import quiet_transformers


@dataclass(frozen=True)
class Generated:
    """What a generation gave: new tokens, wall seconds, and the recompute rate of all its passes."""

    tokens: int
    seconds: float
    recompute_rate: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the pass over the prompt included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def generate(
    model: Any, tokenizer: Any, prompt: str, policy: str | Policy, tokens: int, write: Callable[[str], None]
) -> Generated:
    """Continue a prompt greedily under a policy, handing each finished piece of text to `write`.

    Raises
    ------
    ValueError
        An empty prompt, a number of tokens below 1, or more than the model's context holds.
    """
    from transformers import TextStreamer

    from torchlamp.integrations.huggingface import lookahead
    from torchlamp.study.text import check_context

    if tokens < 1:
        raise ValueError(f"{tokens} tokens to generate: give at least 1")
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"]
    if ids.shape[-1] == 0:
        raise ValueError("the prompt is empty: give at least one word")
    length = ids.shape[-1]
    check_context(model, length + tokens, f"prompt tokens and new ones, {length} + {tokens} =")

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    with quiet_transformers(), torch.inference_mode(), lookahead(model, policy) as statistics:
        start = time.perf_counter()
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer(tokenizer, skip_prompt=False, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
        seconds = time.perf_counter() - start
    return Generated(output.shape[-1] - length, seconds, statistics.recompute_rate)
