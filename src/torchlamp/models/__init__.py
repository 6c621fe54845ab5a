"""Loading, converting and caching language models."""
