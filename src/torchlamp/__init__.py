"""Look-ahead mixed precision (LAMP) for transformer inference in PyTorch."""
