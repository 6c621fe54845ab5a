"""A result of an evaluation with its comparisons, made without a model."""

import dataclasses

from torchlamp.results.result import REFERENCE_POLICY, Result


def make(role="tested", **changes) -> Result:
    values = {f.name: 0.25 for f in dataclasses.fields(Result)} | {
        "model": "m", "text": "t", "windows": 2, "window_length": 8, "policy": "ps4+strict:0.1", "seed": 0,
        "partial": False, "tokens_sha256": "00", "role": role, "environment": {"threads": 2, "kernels": "native"},
        "kl_percentiles": {"50": 0.1, "99": 0.5, "max": 1.0}, "recompute_rate_by_layer": [0.5, 0.25], "comparisons": (),
        "recompute_rate_by_site": {"scores": 0.25}, "recompute_rate_by_head": [[0.5, 0.5], [0.25, 0.25]],
        "recompute_rate_by_position": [0.25], "block_rates": {"entry": 0.25},
        "tile_rates": {"0": 0.25, "1": 0.5, "2+": 0.25, "sub_block": 0.5, "saturated": 0.0},
        "kl_by_window": [0.25, 0.25],
        "flip_by_window": [0.0, 0.5], "log_perplexity_ratio_by_window": [0.0, 0.5],
        "flip_bits_by_window": ["00", "f0"], "kl_by_move": [], "calibration": None, "overflowed_by_site": {"qkv": 0},
        "sizes": {"head": 16, "hidden": 32, "mlp": 64},
    }  # fmt: skip
    return Result(**(values | changes))


def whole(**changes) -> Result:
    others = (
        make("reference", policy=REFERENCE_POLICY, kl_mean=0.0),
        make("plain", policy="ps4+none", kl_mean=2.5),
        make("random-like", policy="ps4+random-like:strict:0.1", kl_mean=2.0),
    )
    return make(comparisons=others, **changes)
