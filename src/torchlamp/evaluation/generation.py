"""Greedy generation, streamed as it comes: under a simulated policy, with low-bit decoding, or in float32."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlamp.models.quiet import quiet_transformers
from torchlamp.policy.decodable import settings
from torchlamp.policy.policy import Policy

AnyPolicy = Policy | None


@dataclass(frozen=True)
class Generated:
    """What a generation gave: the new tokens, seconds until the first and from there to the last, rates, memory."""

    ids: list[int]
    prompt_seconds: float
    seconds: float
    #: Site -> recomputed / eligible.
    rates: dict[str, float]
    #: In words; empty where nothing was copied.
    memory: str = ""

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second once the prompt is read, which also gives the first token."""
        return (self.tokens - 1) / self.seconds if self.seconds > 0 and self.tokens > 1 else 0.0


def read_any_policy(text: str | None) -> AnyPolicy:
    """A policy with stored operands, for the decoding kernels, or one that is simulated; None stays None, the default.

    Raises
    ------
    ValueError
        A policy that can't be read, or a stored operand in one that the kernels don't run.
    """
    if text is None:
        return None
    policy = Policy.parse(text)
    if policy.has_stored:
        settings(policy)
    return policy


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    policy: str | Policy | None,
    tokens: int,
    write: Callable[[str], None],
    *,
    full_precision: bool = False,
) -> Generated:
    """Continue a prompt greedily, handing each finished piece of text to `write`.

    Parameters
    ----------
    model, tokenizer
        As `torchlamp.load` gives them.
    prompt : str
        Text to continue.
    policy : str or Policy, optional
        One with stored operands runs on the decoding kernels, any other is simulated; None is `prepare`'s default.
    tokens : int
        New tokens at most.
    write : callable
        Is handed each piece of text.
    full_precision : bool
        Run the model as it is, in float32, whatever the policy.

    Raises
    ------
    ValueError
        An empty prompt, a number of tokens below 1, or more than the model's context holds.
    """
    from torchlamp.data.text import check_context

    if tokens < 1:
        raise ValueError(f"{tokens} tokens to generate: give at least 1")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        raise ValueError("the prompt is empty: give at least one word")
    length = ids.shape[-1]
    check_context(model, length + tokens, f"prompt tokens and new ones, {length} + {tokens} =")
    chosen = read_any_policy(policy) if isinstance(policy, str) else policy
    with (
        quiet_transformers(),
        torch.inference_mode(),
        running_under(model, chosen, full_precision) as running,
    ):
        done = stream(model, tokenizer, ids, tokens, write)
    return Generated(done.ids, done.prompt_seconds, done.seconds, rates_of(running), _memory(running))


@dataclass(frozen=True)
class Streamed:
    """New tokens, seconds until the first and from there to the last, and the cache that holds all but the last."""

    ids: list[int]
    prompt_seconds: float
    seconds: float
    cache: Any


def stream(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    tokens: int,
    write: Callable[[str], None],
    *,
    cache: Any = None,
    skip_prompt: bool = False,
) -> Streamed:
    """Greedy `tokens` behind `ids`, int64 (1, length), whose first ones a cache may hold already."""
    from transformers import TextStreamer

    times: list[float] = []

    class Streamer(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    more = {} if cache is None else {"past_key_values": cache}
    with quiet_transformers(), torch.inference_mode():
        start = time.perf_counter()
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=Streamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **more,
        )
    # The streamer is handed the prompt first, then token after token.
    new = output.sequences[0, ids.shape[-1] :].tolist()
    return Streamed(new, times[1] - start, times[-1] - times[1], output.past_key_values)


def running_under(model: Any, policy: AnyPolicy, full_precision: bool = False) -> AbstractContextManager[Any]:
    """A block in which the model runs under a policy: prepared, simulated, or as it is in float32."""
    if full_precision:
        return nullcontext()
    if policy is not None and not policy.has_stored:
        from torchlamp.huggingface.lookahead import lookahead

        return lookahead(model, policy)
    from torchlamp.huggingface.prepare import prepare

    return prepare(model, policy)


def rates_of(running: Any) -> dict[str, float]:
    """Site -> recomputed / eligible of what `running_under` gave."""
    if running is None:
        return {}
    return dict(getattr(running, "statistics", running).rates)


def _memory(running: Any) -> str:
    memory = getattr(running, "memory", None)
    return "" if memory is None else str(memory)
