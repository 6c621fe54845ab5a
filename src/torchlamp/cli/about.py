"""``torchlamp info``, ``models`` and ``formats``."""

import json as json_module
from typing import Annotated, Any

import typer

from torchlamp.cli.common import app, one_line_errors


@app.command()
@one_line_errors
def info(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show versions, threads, the processor, which kernels run and why others don't, and the cache."""
    from torchlamp.evaluation.environment import environment, kernels
    from torchlamp.models.cache import cache_folder

    record: dict[str, Any] = environment()
    record["kernels"] = kernels()
    record["cache_folder"] = str(cache_folder())
    if json:
        print(json_module.dumps(record, indent=2))
        return
    native = record.pop("kernels")
    record["kernels"] = (
        "native" if native["native"] else f"torch reference (slow), because {native['why_not']}"
    )
    record |= {f"kernel {name}": state for name, state in native["features"].items()}
    record["cpu_features"] = " ".join(record["cpu_features"]) or "unknown"
    width = max(map(len, record))
    for key, value in record.items():
        print(f"{key.replace('_', ' '):{width}}  {'none' if value is None else value}")


@app.command()
@one_line_errors
def models() -> None:
    """List the models with short names: installed or how to install them, and what the cache holds."""
    from torchlamp.models.cache import cache_folder, entry_size
    from torchlamp.models.load import cache_entry
    from torchlamp.models.packaged import PACKAGED

    for name, packaged in PACKAGED.items():
        print(f"{name}  {packaged.description}")
        if (version := packaged.installed()) is None:
            print(f"    not installed; run: {packaged.install}")
            continue
        size = entry_size(cache_entry(name))
        print(f"    package {packaged.distribution} {version} installed")
        print(
            f"    converted copy: {size / 1e6:.0f} MB"
            if size
            else "    converted copy: none yet, the first load makes one"
        )
    print(
        "Also: any .gguf file, a transformers folder, or a hub name. "
        f"Converted copies are in {cache_folder()}"
    )


#: Operands that `formats` shows: a few of those that the grammar makes; the named block formats follow.
_OPERANDS = ("float32", "bf16", "int12", "int8", "int4", "int8/row", "e4m3fn/row", "e5m2/tensor")


@app.command()
@one_line_errors
def formats() -> None:
    """List number formats, accumulators, operands and transforms: what a policy may name."""
    from torchlamp.arithmetic import accumulators
    from torchlamp.arithmetic.formats import NAMED, Format
    from torchlamp.arithmetic.operands import BLOCKS, Operand
    from torchlamp.arithmetic.transforms import TRANSFORMS
    from torchlamp.arithmetic.units import UNITS

    print("formats        bits  largest      smallest normal  unit roundoff")
    for name in ("ps1", "ps4", "ps23", *NAMED, "e5m2"):
        format = Format.parse(name)
        print(
            f"  {name:12} {format.bits:4}  {format.max:<11.5g}  {format.smallest_normal:<15.5g}  "
            f"2^-{format.grid.mantissa_bits + 1}"
        )
    print("  and ps1..ps23, eXmY, ueXmY (X 2..8, Y 1..23), with -sat and -flush")
    print("accumulators: a format, also with /unfused, /blockB, /promoteB or /fuseL/F; and by name")
    for name, spelling in accumulators.NAMED.items():
        takes = f"  takes {', '.join(UNITS[name].lengths)}" if name in UNITS else ""
        print(f"  {name:14} {spelling:15}{takes}")
    print("operands       bits  element, and the numbers that share a scale")
    for name in (*_OPERANDS, *BLOCKS):
        operand = Operand.parse(name)
        print(f"  {name:12} {operand.bits:4g}  {operand.summary}")
    print("  and int2..int16 with /G, /row or /tensor, any format above alone, with /row or /tensor")
    print("transforms, in the order they are applied")
    for name, transform in TRANSFORMS.items():
        print(f"  {name:12} {transform.summary}")
    print("A policy spells them site=[operand@]accumulator[.transform...][+rule], for example")
    print("'ps4.center.sort+strict:0.1' or 'mlp_up=mxfp4@hopper-fp8+output:0.01'.")
