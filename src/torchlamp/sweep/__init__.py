"""Grids of policies over models and texts, resumable, here or on a cluster."""
