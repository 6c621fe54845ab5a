"""The kernels: numbers in, numbers out. Each native kernel has a readable reference in torch.

`native` loads the extension, `dispatch` chooses between native kernel and reference, `constants` holds the numbers that
both share. `specification` says what a kernel must know of a format and an accumulator. `products` and `recompute` have
`reference`, which gives the same bits and is made of `rounding` and `fma`; fused `attention` has the tile loop of
`torchlamp.simulation`. Low-bit copies (`reference_lowbit`, `reference_decoding`) agree to float32 rounding; the rooms
above call their kernels.
"""
