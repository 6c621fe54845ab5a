"""The simulation's kernels on an NVIDIA GPU: equal to the CPU's? how fast? Under ten minutes, one table.

    python benchmarks/gpu.py [--quick] [--json OUT]     # on a machine with a GPU: pip install "torchlamp[gpu]"
    python benchmarks/gpu.py --compile 90               # without one: compile for a compute capability, and count

1. Products of every accumulator form, bit for bit those of the CPU; attention under the threshold rules: the same
   entries recomputed but for ties, outputs to rounding.
2. Times of products, beside torch's float32 matmul.
3. Whole forwards of a random model of a billion parameters (Llama type, 16 layers, 32/8 heads of 64) over 2048 tokens,
   beside float32 `sdpa`.

Medians of interleaved turns. The table is Markdown, for docs/gpu.md.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

FORMS = (
    "ps4",
    "ps22",
    "ps4/unfused",
    "ps7/block32",
    "ps13/promote128",
    "e4m3fn",
    "ue5m3",
    "volta",
    "hopper-fp8",
    "ampere",
)
RULES = ("none", "strict:0.1", "running:0.02", "relaxed:0.05", "topz:0.01")
FORWARDS = ("ps4+none", "ps4+strict:0.1", "ps4.center.sort+strict:0.1", "ps4+running:0.02")


def main() -> int:
    """Compile, or measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", metavar="CAPABILITY", help="such as 80, 89, 90, 100; needs no GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    parser.add_argument("--json", metavar="OUT", help="also write the figures there")
    options = parser.parse_args()
    if options.compile:
        compile_all(int(options.compile), options.quick)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use: --compile 90 compiles the kernels without one", file=sys.stderr)
        return 1
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    figures["differences"] = equality(options.quick)
    figures["products"] = product_times(options.quick)
    figures["forwards"] = forward_times(options.quick)
    print(table(figures))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    return 0 if not any(figures["differences"].values()) else 1


def compile_all(capability: int, quick: bool) -> None:
    """Compile every kernel, or one of each kind, and print its fused multiply-adds and its lone products."""
    from torchlamp.arithmetic import Accumulator
    from torchlamp.kernels.gpu import attention, products
    from torchlamp.kernels.gpu.rounding import grid_numbers
    from torchlamp.kernels.gpu.sums import form_numbers

    for form in ("ps4", "ps4/unfused", "hopper-fp8") if quick else FORMS:
        accumulation = Accumulator.parse(form).accumulation
        numbers = {
            "GRID": grid_numbers(accumulation.grid),
            "FORM": form_numbers(accumulation),
            "RESULT": grid_numbers(accumulation.result),
        }
        plain = {"SCALED": False, "CAUSAL": True, "SQUARES": False, "INTERPRETED": False, "BM": 16, "BN": 64}
        report(capability, products._products, f"products {form}", {**numbers, **plain})
        if form not in (("ps4",) if quick else ("ps4", "hopper-fp8")):
            continue
        flags = dict.fromkeys(
            ("SELECTS", "CAUSAL", "MASKED", "CAPPED", "SINKS", "SHIFTED", "NOTES"), True
        ) | {"INTERPRETED": False}
        for weight in range(1 if quick else 4):
            shape = {"WEIGHT": weight, "BM": 16, "BN": 64, "BV": 64}
            report(capability, attention._attention, f"attention {form}/{weight}", numbers | flags | shape)
    report(capability, products._recompute, "recompute", {"SCALED": True, "INTERPRETED": False, "BLOCK": 128})


def report(capability: int, kernel: Any, name: str, constants: dict[str, Any]) -> None:
    """Compile a kernel and print a line."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "a": "*fp32", "b": "*fp32", "out": "*fp32", "squares": "*fp32", "values": "*fp32", "marked": "*i32",
        "q": "*fp32", "xq": "*fp32", "key": "*fp32", "xkey": "*fp32", "value": "*fp32", "output": "*fp32",
        "selected": "*i32", "noted": "*u8", "bound": "*fp32", "mask": "*u8", "shift": "*fp32", "sinks": "*fp32",
        "scaling": "fp32", "softcap": "fp32", "error_scale": "fp32",
    }  # fmt: skip
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    places = {(kernel.arg_names.index(argument),): constant for argument, constant in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
    )
    code = compiled.asm["ptx"]
    fused, alone = code.count("fma.rn.f32"), code.count("mul.rn.f32") + code.count("mul.f32")
    print(f"{name} {fused} {alone} {len(compiled.asm['cubin'])} bytes", flush=True)


def equality(quick: bool) -> dict[str, int]:
    """Numbers that differ from the CPU's, by what was computed: all must be 0 but for ties of attention."""
    import torch

    from torchlamp.arithmetic import Accumulator
    from torchlamp.kernels.attention import fused_attention
    from torchlamp.kernels.products import products
    from torchlamp.kernels.recompute import recompute

    generator = torch.Generator().manual_seed(0)
    size = 64 if quick else 512
    a = torch.randn(8, size, 96, generator=generator) * 2.0 ** torch.randint(
        -12, 12, (8, size, 96), generator=generator
    )
    b = torch.randn(2, 96, size, generator=generator)
    found: dict[str, int] = {}
    for form in FORMS:
        accumulation = Accumulator.parse(form).accumulation
        here = products(a, b, accumulation, scaling=0.125, causal=3, squares=True)
        there = products(a.cuda(), b.cuda(), accumulation, scaling=0.125, causal=3, squares=True)
        found[f"products {form}"] = sum(
            int((x.view(torch.int32) != y.cpu().view(torch.int32)).sum())
            for x, y in zip(here, there, strict=True)
            if x is not None and y is not None
        )
    mask = torch.rand(8, size, size, generator=generator) < 0.03
    scores = torch.zeros(8, size, size)
    own = scores.cuda()
    recompute(scores, a, b, mask, 0.3)
    recompute(own, a.cuda(), b.cuda(), mask.cuda(), 0.3)
    found["recompute"] = int((scores.view(torch.int32) != own.cpu().view(torch.int32)).sum())

    query = torch.randn(2, 8, size, 64, generator=generator)
    key, value = (torch.randn(2, 2, size, 64, generator=generator) for _ in range(2))
    how: dict[str, Any] = {
        "threshold": 0.02, "by_length": False, "scaling": 0.25, "error_scale": 2.0**-7, "mask": None,
        "causal": True, "softcap": None, "sinks": None,
    }  # fmt: skip
    accumulation = Accumulator.parse("ps4").accumulation
    for weight in ("strict", "running", "relaxed", "topz"):
        mine = fused_attention(query, key, value, accumulation, weight=weight, **how)
        other = fused_attention(*(x.cuda() for x in (query, key, value)), accumulation, weight=weight, **how)
        if mine is None or other is None:
            raise SystemExit("attention: no fused kernel here; build the extension and install Triton")
        far = (mine[0] - other[0].cpu()).abs() > 1e-4 * mine[0].abs().amax()
        changed = (mine[1] - other[1].cpu()).abs().sum() > 1e-4 * mine[1].sum()
        found[f"attention {weight}"] = int(far.sum()) + int(changed)
    return found


def product_times(quick: bool) -> dict[str, float]:
    """Median milliseconds of products 32 x 2048 x 64 x 2048, causal."""
    import torch

    from torchlamp.arithmetic import Accumulator
    from torchlamp.kernels.products import products

    size = 256 if quick else 2048
    a, b = torch.randn(32, size, 64, device="cuda"), torch.randn(8, 64, size, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "torch float32 matmul": lambda: a @ b.repeat_interleave(4, dim=0)
    }
    for form in FORMS:
        accumulation = Accumulator.parse(form).accumulation
        calls[form] = lambda how=accumulation: products(a, b, how, scaling=0.125, causal=0)
    return timed(calls, 3 if quick else 9)


def forward_times(quick: bool) -> dict[str, float]:
    """Median milliseconds of a forward of a random Llama of a billion parameters."""
    import torch
    import transformers

    import torchlamp

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=2 if quick else 16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32000, (1, 256 if quick else 2048), device="cuda")

    def plain() -> object:
        return model(tokens, use_cache=False)

    def under(policy: str) -> Callable[[], object]:
        def call() -> object:
            with torchlamp.lookahead(model, policy):
                return model(tokens, use_cache=False)

        return call

    with torch.inference_mode():
        return timed({"float32 sdpa": plain} | {p: under(p) for p in FORWARDS}, 2 if quick else 5)


def timed(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds of each call over interleaved turns, after one of each that compiles."""
    import torch

    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                seen[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in seen.items()}


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{figures['device']}, torch {figures['torch']}, {figures['date']}",
        "",
        "| What | ms | against the first |",
        "|---|---:|---:|",
    ]
    for part in ("products", "forwards"):
        first = next(iter(figures[part].values()))
        lines += [f"| {name} | {ms:.2f} | {ms / first:.1f} |" for name, ms in figures[part].items()]
    wrong = {name: count for name, count in figures["differences"].items() if count}
    lines += ["", f"Differences from the CPU: {wrong or 'none'}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
