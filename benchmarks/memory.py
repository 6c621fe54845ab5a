"""Resident memory of a process that loads a model, reads a prompt and decodes, in bytes a weight.

    python benchmarks/memory.py smollm2-135m [MODEL ...] [--policy POLICY ...] [--prompt 512] [--tokens 256]

Every figure is that of a process of its own, as the system counts it (Linux, VmRSS: its own memory and what it has in
memory of mapped files). What the libraries take whatever the model is measured in the same process, which first
prepares and runs a model of a few weights; it is reported apart. So is the tokenizer, which doesn't grow with the
model: a second process lets go of it as soon as the model is loaded. The benchmark itself trims and collects nothing
after that.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: 8 bits in all linear layers and in the cache, and no rule that reads columns of the down projections in full.
EIGHT = (
    "scores=int8.center.hadamard+running:0.01, values=int8+topz:0.02, qkv=int8, attention_out=int8, mlp_up=int8, "
    "mlp_down=int8, lm_head=int8+running:0.001"
)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def run(model: Any, prompt: int, tokens: int) -> Any:
    """Read a prompt, and decode so many tokens; what comes back holds the cache."""
    import torch

    ids = (torch.arange(prompt) * 37 % 400 + 5)[None]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options
        )


def run_small(policy: str, folder: str) -> Any:
    """A model of a few weights, run as the large one will be; afterwards the libraries have what they take."""
    import transformers

    from torchlamp.huggingface.prepare import prepare

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prepare(model, policy, resident=False)
    run(model, 64, 4)
    return model


def measure(name: str, policy: str, prompt: int, tokens: int, with_tokenizer: bool) -> dict[str, Any]:
    """Bytes of this process after each step, the model's weights, and the seconds of loading."""
    import torch

    import torchlamp

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = run_small(policy, folder)
        libraries = resident()
        start = time.perf_counter()
        model, tokenizer = torchlamp.load(name, precision=policy)
        seconds = time.perf_counter() - start
        if not with_tokenizer:
            del tokenizer
            gc.collect()
        loaded = resident()
        held = run(model, prompt, tokens)
        decoded = resident()
        del held
        after = resident()
    del small
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "libraries": libraries,
        "loaded": loaded,
        "decoded": decoded,
        "after": after,
        "load_seconds": seconds,
        "memory": str(torchlamp.prepared(model).memory),
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    """`measure` in a new process; the second of two, since the first may have to make the copies."""
    done = {}
    for _ in range(2):
        command = [sys.executable, __file__, "--measure", *arguments]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        done = json.loads(output.splitlines()[-1])
    return done


def main() -> None:
    """Measure each model under each policy, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as torchlamp.load takes it")
    parser.add_argument("--policy", nargs="+", default=["default", EIGHT])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--with-tokenizer", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        (name,), (policy,) = asked.models, asked.policy
        print(json.dumps(measure(name, policy, asked.prompt, asked.tokens, bool(asked.with_tokenizer))))
        return
    print(
        "bytes a weight, less the libraries: loaded, decoded, without the cache; all three without a tokenizer"
    )
    for name in asked.models:
        for policy in asked.policy:
            sizes = ["--prompt", str(asked.prompt), "--tokens", str(asked.tokens)]
            rows = [in_a_process(name, "--policy", policy, *sizes, "--with-tokenizer", n) for n in "10"]
            figures = [
                [(row[key] - row["libraries"]) / row["weights"] for key in ("loaded", "decoded", "after")]
                for row in rows
            ]
            words = "; ".join(" ".join(f"{figure:.2f}" for figure in line) for line in figures)
            whole, libraries = (f"{rows[0][key] / 1e6:.0f} MB" for key in ("decoded", "libraries"))
            print(f"{name}, {'8 bits' if policy == EIGHT else policy}: {words}")
            print(f"    {whole}, libraries {libraries}; loaded in {rows[0]['load_seconds']:.2f} s")
            print(f"    {rows[0]['memory']}", flush=True)


if __name__ == "__main__":
    main()
