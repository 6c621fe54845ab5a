"""Timings and contestants, measured in turns."""
