"""``torchlamp info`` and ``models``."""

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
