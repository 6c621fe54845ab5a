"""The file of a sweep's results: its name and layout, and the record of each point that counts."""

from collections.abc import Iterable
from typing import Any

#: Value of the key "schema" of each line. The other keys are described in docs/sweep.md.
SCHEMA = "torchlamp-sweep/1"
RESULTS = "results.jsonl"


def last_of_each(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records that count, by the key of their points in the order of first appearance.

    Of several records of one point the last one counts, but a failure doesn't replace a result.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        key = str(record.get("key", ""))
        if record.get("status") == "done" or found.get(key, {}).get("status") != "done":
            found[key] = record
    return found
