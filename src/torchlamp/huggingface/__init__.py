"""Hugging Face transformers: finding sites, patching and undoing, attention functions, caches."""
