"""Texts and data sets, and how they are cut into windows."""
