"""Keys and values of one attention layer, twice: low-bit and full precision, and attention over both.

`KeyValueArrays` are plain tensors and know nothing of lengths: `torchlamp.compositions.lookahead_store` does. The
native kernels (native/drive_decode.hpp) fill and read them; the torch twins are in `torchlamp.kernels.twins_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlamp.kernels import native, twins_decode
from torchlamp.kernels.decode_types import Attended, StoreFormat, Thresholds
from torchlamp.kernels.twins_lowbit import ROWS, code_bytes, group_count


@dataclass(eq=False)
class KeyValueArrays:
    """The tensors of one layer's store: batch B, key heads H, capacity C (a multiple of 16), sizes D and Dv.

    Scales are bfloat16 patterns in int16, for torch can't index uint16.
    """

    form: StoreFormat
    #: uint8 (B, H, C / 16, bytes of a block) and int16 (B, H, C / 16, groups * 16): `twins_lowbit.pack_blocks`.
    key_codes: Tensor
    key_scales: Tensor
    #: float32 (B, H, C): 2-norm of a key minus its low-bit copy, NaN where that isn't finite.
    key_errors: Tensor
    #: uint8 (B, H, C, bytes of a row) and int16 (B, H, C, groups): `twins_lowbit.pack_lines`.
    value_codes: Tensor
    value_scales: Tensor
    #: (B, H, C, D) and (B, H, C, Dv); scales int16 (B, H, C, groups) where they are integers.
    full_keys: Tensor
    full_values: Tensor
    full_key_scales: Tensor | None
    full_value_scales: Tensor | None
    #: float32 (B, H, D), or None where nothing is subtracted.
    mean: Tensor | None
    _native: tuple[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def empty(
        cls, form: StoreFormat, shape: tuple[int, int, int], sizes: tuple[int, int], device: torch.device
    ) -> KeyValueArrays:
        """Zeros for (batch, key heads, capacity) and (key size, value size); the capacity is rounded up to 16.

        Raises
        ------
        ValueError
            A Hadamard rotation of keys whose size is no power of two.
        """
        batch, heads, capacity = shape
        capacity = -(-capacity // ROWS) * ROWS
        size, value_size = sizes
        if form.hadamard and size & (size - 1):
            raise ValueError(f"hadamard=True, but keys have size {size}: only powers of two can be rotated")
        groups, value_groups = group_count(size), group_count(value_size)

        def zeros(*tail: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, heads, *tail, dtype=dtype, device=device)

        blocks, integers = capacity // ROWS, form.full == "int16"
        return cls(
            form,
            zeros(blocks, ROWS * code_bytes(form.key_bits, size), dtype=torch.uint8),
            zeros(blocks, groups * ROWS, dtype=torch.int16),
            zeros(capacity, dtype=torch.float32),
            zeros(capacity, code_bytes(form.value_bits, value_size), dtype=torch.uint8),
            zeros(capacity, value_groups, dtype=torch.int16),
            zeros(capacity, size, dtype=form.full_dtype),
            zeros(capacity, value_size, dtype=form.full_dtype),
            zeros(capacity, groups, dtype=torch.int16) if integers else None,
            zeros(capacity, value_groups, dtype=torch.int16) if integers else None,
            zeros(size, dtype=torch.float32) if form.center else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    def replaced(self, tensors: dict[str, Tensor]) -> KeyValueArrays:
        """The same store with other tensors."""
        return replace(self, **tensors, _native=None)  # type: ignore[arg-type]

    @property
    def capacity(self) -> int:
        """Positions that it holds."""
        return self.full_keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[bool, bool]:
        """Write keys (B, H, n, D) and values (B, H, n, Dv), float32, to the positions from `start`.

        Returns whether a finite number was too large for float16, and whether a value isn't finite.
        """
        kernel = self._kernel()
        if kernel is None:
            return twins_decode.append(self, keys, values, start)
        flags = kernel.append(_array(keys), _array(values), start, torch.get_num_threads())
        return bool(flags & 1), bool(flags & 2)

    def attend(
        self,
        query: Tensor,
        *,
        first: int,
        last: int,
        thresholds: Thresholds,
        scaling: float,
        mask: Tensor | None = None,
        causal: bool = False,
        sinks: Tensor | None = None,
        softcap: float = 0.0,
        strange: bool = False,
    ) -> Attended:
        """Attention of queries over the positions first ... last - 1.

        Parameters
        ----------
        query
            float32 (B, heads, queries, D), heads a multiple of H.
        first, last
            The positions that there are; a query that sees none of them gets the mean of their values.
        thresholds
            What is recomputed and read in full.
        scaling
            Factor of the scores.
        mask
            bool (B, queries, last - first), True = visible.
        causal
            Query i of n sees positions before last - n + i + 1.
        sinks
            float32 (heads,): a logit that enters the normaliser but has no value.
        softcap
            c > 0: logits are c tanh(score / c).
        strange
            Values may be infinite or NaN: all of them are read in full precision.
        """
        kernel = self._kernel()
        if kernel is None:
            return twins_decode.attend(
                self, query, first, last, thresholds, scaling, mask, causal, sinks, softcap, strange
            )
        batch, heads, queries, _ = query.shape
        output = torch.empty(batch, queries, heads, self.full_values.shape[3])
        key_heads = self.full_keys.shape[1]
        counts = torch.empty(batch * queries * (heads + key_heads + 1), dtype=torch.int32)
        totals = kernel.attend(
            _array(query),
            output.numpy(),
            counts.numpy(),
            first,
            last,
            None if mask is None else _array(mask).view(np.uint8),
            causal,
            None if sinks is None else _array(sinks),
            scaling,
            softcap,
            thresholds.scores,
            thresholds.values,
            thresholds.skip,
            strange,
            torch.get_num_threads(),
        )
        return Attended(output, totals, counts)

    def full(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys (B, H, last - first, D) and values (B, H, last - first, Dv) of the full copies, in float32."""
        return twins_decode.full(self, first, last)

    def _kernel(self) -> Any:
        """The native object over the tensors, made anew when another instruction set is asked for, or None."""
        isa = native.instruction_set()
        made = self._native  # read once: other threads may replace it
        if made is None or made[0] != isa:
            if isa is None or self.key_codes.device.type != "cpu":
                return None
            kernel = native.extension().KeyValueStore(
                isa,
                self.key_codes.view(-1),
                _patterns(self.key_scales),
                self.key_errors.view(-1),
                self.value_codes.view(-1),
                _patterns(self.value_scales),
                self.full_keys,
                self.full_values,
                _patterns(self.full_key_scales),
                _patterns(self.full_value_scales),
                None if self.mean is None else self.mean.view(-1),
                self.form.key_bits,
                self.form.value_bits,
                self.form.centred_copy,
                self.form.hadamard,
            )
            self._native = made = (isa, kernel)
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}


def _patterns(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.view(-1).view(torch.uint16)


def _array(x: Tensor) -> Any:
    """The tensor as its memory says, contiguous in its last dimension; an array reaches the kernel in half the time."""
    if x.requires_grad or x.is_neg():
        x = x.detach().resolve_neg()
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.numpy()
