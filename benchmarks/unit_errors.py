"""What the 13-bit accumulator of FP8 units loses on a real model's operands, by length of the sum and promotion.

    python benchmarks/unit_errors.py [--model smollm2-135m] [--windows 4]

Operands are e4m3fn/row: inputs of one layer's projections and their weights, and the projections of its first query
and key head, as they are before the rotation. The error is that of the sums alone, against float64 sums of the same
stored operands: root mean square over the entries of a window, relative to that of the exact sums; mean and standard
error over windows.
"""

import argparse
import pydoc_data.topics

import torch

import torchlamp

FORMS = (
    "hopper-fp8/promote32",
    "hopper-fp8/promote64",
    "hopper-fp8/promote128",
    "hopper-fp8",
    "ada-fp8",
    "ps13/promote128",
)
ROWS, COLUMNS, TOKENS = 48, 48, 256


def operands(model, tokens, layer):
    """Left (rows, K) and right (K, columns) operands of the layer's products, by name."""
    seen = {}
    block = model.model.layers[layer]
    modules = {"mlp_up": block.mlp.up_proj, "mlp_down": block.mlp.down_proj,
               "query": block.self_attn.q_proj, "key": block.self_attn.k_proj}  # fmt: skip
    hooks = [
        m.register_forward_hook(lambda _, x, y, n=n: seen.update({n: (x[0][0], y[0])}))
        for n, m in modules.items()
    ]
    with torch.no_grad():
        model(tokens[None])
    for hook in hooks:
        hook.remove()
    size = model.config.head_dim
    pairs = {"scores": (seen["query"][1][-ROWS:, :size], seen["key"][1][:COLUMNS, :size].T)}
    for name in ("mlp_up", "mlp_down"):
        pairs[name] = (seen[name][0][-ROWS:], modules[name].weight.detach()[:COLUMNS].T)
    return pairs


def error(left, right, form):
    """The relative root mean square error of the sums."""
    exact = (
        torchlamp.quantise(left, "e4m3fn/row").double() @ torchlamp.quantise(right, "e4m3fn/row", 0).double()
    )
    low = torchlamp.matmul(left.contiguous(), right.contiguous(), form, operands="e4m3fn/row")
    return float((low - exact).norm() / exact.norm())


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    model, tokenizer = torchlamp.load(options.model)
    text = "\n".join(pydoc_data.topics.topics.values())[: 8 * TOKENS * options.windows]
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    layer = len(model.model.layers) // 2
    windows = [operands(model, tokens[i * TOKENS : (i + 1) * TOKENS], layer) for i in range(options.windows)]
    print(f"{options.model}, layer {layer}, {options.windows} windows of {TOKENS} tokens")
    for name in windows[0]:
        for form in FORMS:
            errors = torch.tensor([error(*window[name], form) for window in windows])
            spread = float(errors.std() / len(errors) ** 0.5)
            print(
                f"{name:9} K={windows[0][name][0].shape[1]:5} {form:24} {errors.mean():.2e} +- {spread:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
