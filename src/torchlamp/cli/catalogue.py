"""``torchlamp rules`` and ``formats``: what a policy may name."""

import json as json_module
from dataclasses import asdict
from typing import Annotated, Any

import typer

from torchlamp.cli.common import app, one_line_errors

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
#: Operands that `formats` shows: a few of those that the grammar makes; the named block formats follow.
_OPERANDS = ("float32", "bf16", "int12", "int8", "int4", "int8/row", "e4m3fn/row", "e5m2/tensor", "tender4/8")
_FORMATS = ("ps1", "ps4", "ps23")


@app.command()
@one_line_errors
def rules(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ...]", help="These rules only, with their whole text."),
    ] = None,
    json: AsJson = False,
) -> None:
    """List the rules that choose what is recomputed: definition, source, an example."""
    import inspect

    from torchlamp.rules import RULES, rule_class
    from torchlamp.rules.catalogue import rule_entry

    chosen = [rule_class(name.partition(":")[0]) for name in names or RULES]
    entries = [rule_entry(rule) for rule in chosen]
    if json:
        print(json_module.dumps([asdict(entry) for entry in entries], indent=2, ensure_ascii=False))
        return
    for entry, rule in zip(entries, chosen, strict=True):
        print(f"{entry.examples[0]:26} {entry.role}, looks through: {entry.looks_through}")
        if names:
            print(
                "\n".join(
                    f"    {line}".rstrip() for line in inspect.cleandoc(rule.__doc__ or "").splitlines()
                )
            )
        else:
            print(f"    {entry.definition}")
    if not names:
        print(
            "One rule's text: torchlamp rules NAME. Formulas and derivations: docs/method.md and docs/sites.md."
        )


@app.command()
@one_line_errors
def formats(json: AsJson = False) -> None:
    """List number formats, accumulators, operands and transforms: layout, range, example."""
    found = _catalogue()
    if json:
        print(json_module.dumps(found, indent=2, ensure_ascii=False))
        return
    print("formats        bits  largest      smallest normal  unit roundoff  layout")
    for entry in found["formats"]:
        print(
            f"  {entry['name']:12} {entry['bits']:4}  {entry['largest']:<11.5g}  {entry['smallest_normal']:<15.5g}  "
            f"{entry['unit_roundoff']:13}  {entry['layout']}"
        )
    print("  and ps1..ps23, eXmY, ueXmY (X 2..8, Y 1..23), with -sat and -flush")
    print(
        "accumulators: a format, also with /unfused, /blockB, /promoteB, /fuseL/F or (scores) /onlineH; and by name"
    )
    for entry in found["accumulators"]:
        takes = f"  takes {', '.join(entry['operands'])}" if entry["operands"] else ""
        print(f"  {entry['name']:14} {entry['spelling']:15}{takes}")
    print("operands       bits  element, and the numbers that share a scale")
    for entry in found["operands"]:
        print(f"  {entry['name']:12} {entry['bits']:4g}  {entry['layout']}")
    print(
        "  and int2..int16 with /G, /row or /tensor, any format above alone, with /row or /tensor, tenderB/G"
    )
    print("transforms, in the order they are applied")
    for entry in found["transforms"]:
        print(f"  {entry['name']:12} {entry['summary']}")
    print("A policy spells them site=[operand@]accumulator[.transform...][+rule], for example")
    print("'ps4.center.sort+strict:0.1' or 'mlp_up=mxfp4@hopper-fp8+output:0.01'. Rules: torchlamp rules.")


def _catalogue() -> dict[str, list[dict[str, Any]]]:
    """Everything that `formats` lists; every entry has a policy as its example."""
    from torchlamp.arithmetic import accumulators
    from torchlamp.arithmetic.formats import NAMED, Format
    from torchlamp.arithmetic.operands import BLOCKS, Operand
    from torchlamp.arithmetic.transforms import TRANSFORMS
    from torchlamp.arithmetic.units import UNITS

    named = [Format.parse(name) for name in (*_FORMATS, *NAMED, "e5m2")]
    operands = [Operand.parse(name) for name in (*_OPERANDS, *BLOCKS)]
    return {
        "formats": [
            {
                "name": str(format),
                "bits": format.bits,
                "layout": format.layout,
                "largest": format.max,
                "smallest_normal": format.smallest_normal,
                "unit_roundoff": f"2^-{format.grid.mantissa_bits + 1}",
                "example": f"{format}+strict:0.1",
            }
            for format in named
        ],
        "accumulators": [
            {
                "name": name,
                "spelling": str(spelling),
                # Empty: any operand.
                "operands": list(UNITS[name].lengths) if name in UNITS else [],
                "example": f"{'scores' if 'online' in spelling else 'mlp_up'}={name}+none",
            }
            for name, spelling in accumulators.NAMED.items()
        ]
        + [
            {
                "name": name,
                "spelling": name,
                "operands": ["tenderB/G", "intB/row", "intB/tensor"]
                if register.shift
                else ["intB", "tenderB/G"],
                "example": f"mlp_up={'tender4/8' if register.shift else 'int8'}@{name}+none",
            }
            for name, register in accumulators.REGISTERS.items()
        ],
        "operands": [
            {
                "name": name,
                "bits": operand.bits,
                "layout": operand.summary,
                "example": f"mlp_up={name}@ps7+none",
            }
            for name, operand in zip((*_OPERANDS, *BLOCKS), operands, strict=True)
        ],
        "transforms": [
            {"name": name, "summary": transform.summary, "example": f"ps4.{name}+strict:0.1"}
            for name, transform in TRANSFORMS.items()
        ],
    }
