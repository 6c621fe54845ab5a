"""The one file format of results: a dataclass, its JSON, and files that survive a crash."""
