"""The same method for real: low-bit copies, key-value store, MLP and head."""
