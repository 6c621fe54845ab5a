"""How the native sources include each other: existing paths, no circle, and arrows between the folders."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "native"
INCLUDES = {
    str(path.relative_to(NATIVE)): re.findall(
        r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE
    )
    for path in sorted(NATIVE.rglob("*.?pp"))
}
#: Which folders a folder's files may include, beside its own and the files of native itself.
ALLOWED = {
    "simd": set(),
    "lowbit": {"simd"},
    "simulation": {"simd"},
    "bindings": {"lowbit", "simulation"},
    "tests": {"lowbit", "simulation"},
}


def test_includes_are_paths_without_circles():
    assert len(INCLUDES) > 30
    for path, included in INCLUDES.items():
        missing = [name for name in included if name not in INCLUDES]
        assert not missing, f"{path} includes {missing}, which aren't files of native"
    TopologicalSorter(INCLUDES).prepare()  # raises CycleError, which names the circle


def test_arrows_between_folders():
    for path, included in INCLUDES.items():
        folder = path.split("/")[0]
        if folder not in ALLOWED:
            continue
        for name in included:
            other = name.split("/")[0]
            own = other == folder or "/" not in name
            assert own or other in ALLOWED[folder], f"{path} includes {name}"
