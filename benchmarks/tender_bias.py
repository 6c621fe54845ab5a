"""Where Tender's error comes from in front of a down projection: `python benchmarks/tender_bias.py [MODEL]`.

A channel that is huge in one row gets half of that as its bias, so that *every* row carries it into the sum with the
quantised weights, while it is added back with the weights in full. The table shows, for the layers with the largest
inputs and without the row that has the largest number, the error of the outputs relative to their norm: all of it, and
what each of its causes would make alone. One forward pass of 128 tokens of Python's documentation, in float32.
"""

import sys
from pydoc_data.topics import topics

import torch
from torch import Tensor

import torchlamp
from torchlamp.arithmetic.operands import Operand
from torchlamp.arithmetic.tender import Ranges, Tables

OPERANDS, LAYERS, TOKENS = ("tender8/8", "tender4/14"), 3, 128


def inputs(name: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Inputs (tokens, channels) and weights (outputs, channels) of every down projection, by layer."""
    model, tokenizer = torchlamp.load(name)
    text = tokenizer("\n".join(topics[key] for key in sorted(topics)))["input_ids"]
    seen: dict[int, Tensor] = {}
    downs = {number: layer.mlp.down_proj for number, layer in enumerate(model.model.layers)}
    for number, module in downs.items():
        module.register_forward_hook(lambda _, given, __, n=number: seen.__setitem__(n, given[0][0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor(text[:TOKENS])[None])
    return seen, {number: module.weight.detach() for number, module in downs.items()}


def errors(x: Tensor, weight: Tensor, name: str) -> dict[str, float]:
    """Relative errors of the outputs of all rows but that of the largest input: all, and by cause."""
    operand, others = Operand.parse(name), torch.ones(len(x), dtype=torch.bool)
    others[int(x.abs().argmax()) // x.shape[1]] = False
    tables = Tables.of(Ranges.of(x[None]), operand.block)
    left, codes = tables.codes(x[None])
    stored, bias, y = torchlamp.quantise(weight, operand.right), tables.bias[0, 0], x @ weight.T
    change = (stored - weight).T
    parts = {
        "all": codes.values[0] @ stored.T + bias @ weight.T - y,
        "bias times weights' error": (-bias @ change).expand_as(y),
        "inputs times weights' error": x @ change,
        "inputs' error": (codes.values[0] - left[0]) @ weight.T,
    }
    return {cause: float(part[others].norm() / y[others].norm()) for cause, part in parts.items()}


def main() -> None:
    """Print the table."""
    seen, weights = inputs(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
    for layer in sorted(seen, key=lambda n: -float(seen[n].abs().max()))[:LAYERS]:
        x = seen[layer]
        print(f"layer {layer}: largest input {x.abs().max():.0f}, median {x.abs().median():.2g}")
        for name in OPERANDS:
            found = errors(x, weights[layer], name)
            print(f"  {name:11} " + "; ".join(f"{cause} {value:.2g}" for cause, value in found.items()))


if __name__ == "__main__":
    main()
