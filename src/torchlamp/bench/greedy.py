"""Greedy texts of low-bit decoding against float32's, through `model.generate`."""

import time
from typing import Any

import torch
from torch import Tensor

from torchlamp.bench.turns import Bench, Target, Timing, Watch
from torchlamp.data.text import cut_windows, default_text
from torchlamp.models.quiet import quiet_transformers

PROMPT_TOKENS, MUST_AGREE = 48, 9
#: Prompts and new tokens, of a whole run and of a quick one.
PROMPTS, NEW_TOKENS = (10, 2), (256, 16)
FLOAT32, LOOKAHEAD = "float32 generate", "look-ahead generate"


def greedy(name: str, model: Any, tokenizer: Any, policy: Any = None, *, watch: Watch | None = None) -> Bench:
    """Ten prompts from the text, 256 new tokens each: how many texts are float32's, token for token.

    Both ways take turns prompt by prompt; their seconds are those of the whole `generate`.
    """
    from torchlamp.huggingface.prepare import prepare
    from torchlamp.huggingface.sharing_copy import sharing_copy

    watch = Watch() if watch is None else watch
    prompts, count = PROMPTS[watch.quick], NEW_TOKENS[watch.quick]
    title = f"greedy: {name}, {prompts} prompts of {PROMPT_TOKENS} tokens, {count} new ones"
    # Every other window, so that the prompts lie far apart.
    windows = cut_windows(tokenizer, [default_text()], prompts * 8, PROMPT_TOKENS)[::8]
    seconds: dict[str, list[float]] = {FLOAT32: [], LOOKAHEAD: []}
    agreed, first_differences = 0, []
    # The end-of-text token is never taken, so the second largest logit must be a full-precision one, too.
    prepared = prepare(sharing_copy(model), policy, top=2)
    for number, prompt in enumerate(windows):
        watch.step(title, number, prompts)
        full = _generate(model, prompt, count, seconds[FLOAT32])
        low = _generate(prepared.model, prompt, count, seconds[LOOKAHEAD])
        same = (full == low).long().cumprod(0).sum().item() if len(full) == len(low) else -1
        agreed += same == len(full)
        if same != len(full):
            first_differences.append(int(same))
        timings = _timings(seconds, count, first_differences)
        watch.so_far(Bench(title, timings, []))
    return Bench(
        title,
        timings,
        [
            Target("texts identical to float32's", float(agreed), MUST_AGREE, at_least=True),
            Target("times float32's tokens/s", timings[0].median / timings[1].median, 2.5, at_least=True),
        ],
    )


def _timings(seconds: dict[str, list[float]], count: int, differences: list[int]) -> list[Timing]:
    timings = []
    for label, times in seconds.items():
        values = torch.tensor(times)
        median = float(values.quantile(0.5))
        note = f"first differing tokens: {differences}" if label == LOOKAHEAD and differences else ""
        timings.append(
            Timing(
                label,
                median,
                float(values.min()),
                float(values.max()),
                per_second=count / median,
                note=note,
            )
        )
    return timings


def _generate(model: Any, prompt: Tensor, count: int, seconds: list[float]) -> Tensor:
    """`count` new tokens, int64; never ended by an end-of-text token, so that every text has the same length."""
    with quiet_transformers(), torch.inference_mode():
        start = time.perf_counter()
        output = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        seconds.append(time.perf_counter() - start)
    tokens: Tensor = output[0, len(prompt) :]
    return tokens
