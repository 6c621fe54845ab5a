"""The kernels: numbers in, numbers out. Each native kernel has a torch twin that gives the same bits.

`specification` says what a kernel must know of a format and an accumulator; `products` and `recompute` choose
between the native kernel and its twin (`twins`); `rounding` and `fma` are what the twins are made of. `lowbit`, with
`reference_lowbit`, is of another kind: matrices that are stored in few bits, whose products agree to float32 rounding.
"""
