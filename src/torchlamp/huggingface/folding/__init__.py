"""Static transforms that pass into a model's weights: where they can, and how (docs/transforms.md 8)."""
