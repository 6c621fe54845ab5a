"""Exact decoding against float32: tokens that differ, tokens a second, and the share of drafted tokens accepted.

    python benchmarks/exact.py OUT.jsonl [--model smollm2-135m --model gemma3-270m ...] [--quick]

Every prompt is continued by float32 and by `prepare(exact=True)`, one after the other. A line is added to OUT.jsonl for
each, and prompts that are there already aren't run again: the script may be stopped and started at any time. Unless
stopped it makes 20 texts of 500 tokens with each model, 10,000 tokens.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import torchlamp
from torchlamp.data.text import cut_windows, default_text
from torchlamp.models.quiet import quiet_transformers

MODELS = ["smollm2-135m", "gemma3-270m"]
PROMPTS, PROMPT_LENGTH, TOKENS = 20, 64, 500
QUICK_PROMPTS, QUICK_TOKENS = 2, 48


def main() -> None:
    """Run what isn't there yet, then print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="JSON lines, one for each prompt and model; is continued")
    parser.add_argument("--model", action="append", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="new tokens of each text")
    parser.add_argument("--quick", action="store_true", help="two short texts with each model")
    given = parser.parse_args()
    prompts, tokens = (QUICK_PROMPTS, QUICK_TOKENS) if given.quick else (PROMPTS, given.tokens)
    for name in given.model or MODELS:
        done = [row for row in rows(given.out) if row["model"] == name and row["tokens"] == tokens]
        wanted = [n for n in range(prompts) if n not in {row["prompt"] for row in done}]
        if wanted:
            compare(name, wanted, prompts, tokens, given.out)
        print(summary(name, [r for r in rows(given.out) if r["model"] == name and r["tokens"] == tokens]))


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, less one that was cut when the script was stopped."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}}")]


def compare(name: str, wanted: list[int], prompts: int, tokens: int, out: Path) -> None:
    """Continue these prompts both ways, and add a line for each."""
    model, tokenizer = torchlamp.load(name)
    windows = cut_windows(tokenizer, [default_text()], prompts, PROMPT_LENGTH)
    with quiet_transformers(), torch.inference_mode():
        for number in wanted:
            full, seconds = text(model, windows[number], tokens)
            with torchlamp.prepare(model, exact=True) as prepared:
                ours, exact_seconds = text(model, windows[number], tokens)
                counts = prepared.acceptance
            assert counts is not None
            pairs = zip(full, ours, strict=True)
            row = {
                "model": name, "prompt": number, "tokens": tokens,
                "different": sum(a != b for a, b in pairs), "seconds": seconds,
                "exact_seconds": exact_seconds, "acceptance": counts.to_dict(),
            }  # fmt: skip
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name}, prompt {number}: {row['different']} of {tokens} tokens differ, "
                f"{tokens / seconds:.1f} -> {tokens / exact_seconds:.1f} tokens/s, {counts}",
                flush=True,
            )


def text(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """New tokens after int64 (length,) tokens, and the seconds of the whole `generate`, the prompt included."""
    start = time.perf_counter()
    ids = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return ids[0, len(prompt) :].tolist(), time.perf_counter() - start


def summary(name: str, found: list[dict[str, Any]]) -> str:
    """One line."""
    count = sum(row["tokens"] for row in found)
    times = sum(row["seconds"] for row in found) / sum(row["exact_seconds"] for row in found)
    accepted, drafted, settled = (
        sum(row["acceptance"][key] for row in found) for key in ("accepted", "drafted", "settled")
    )
    return (
        f"{name}: {len(found)} prompts, {count:,} tokens, {sum(row['different'] for row in found)} different; "
        f"{times:.2f} times the tokens/s of float32, {accepted / drafted:.2%} of drafted tokens accepted, "
        f"{settled} settled by single steps"
    )


if __name__ == "__main__":
    main()
