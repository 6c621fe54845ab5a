"""The file of a sweep's results: its name and layout, and the record of each point that counts."""

from collections.abc import Iterable
from typing import Any

#: Value of the key "schema" of each line. The other keys are described in docs/sweep.md.
SCHEMA = "torchlamp-sweep/1"
RESULTS = "results.jsonl"
#: Keys of a record, and of its point, that everybody reads.
_KEYS, _POINT_KEYS = ("key", "point", "status", "result"), ("model", "text", "tokens", "policy")


def record_problem(record: dict[str, Any]) -> str | None:
    """What keeps a record of such a file from being a point's, as "lacks ..." or "has ..."; None: nothing."""
    missing = [name for name in _KEYS if name not in record]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(record["point"], dict):
        return f"has the point {record['point']!r:.60}"
    missing = [name for name in _POINT_KEYS if name not in record["point"]]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [name for name in _POINT_KEYS if not isinstance(record["point"][name], str)]
    if wrong:
        return f"has the {wrong[0]} {record['point'][wrong[0]]!r:.60}"
    if record["status"] not in ("done", "failed"):
        return f"has status {record['status']!r:.60}"
    if record["status"] == "done" and not isinstance(record["result"], dict):
        return f"has the result {record['result']!r:.60}"
    return None


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
