"""The LM head from a low-bit copy: its largest logits are provably those of full precision.

`native/lowbit/head.hpp` is the kernel, `LowBitHead.reference` its readable equal; docs/decoding.md has the proof.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels.dispatch import as_native, native_for
from torchlamp.kernels.head_bounds import could_win, logit_bounds, max_norm
from torchlamp.kernels.look_ahead import softmax_gain
from torchlamp.kernels.low_bit_matrix import LowBitMatrix, check_kept, check_vectors

#: Rows that are widened to float64 at a time.
_SLAB_ROWS = 4096


@dataclass(eq=False)
class LowBitHead:
    """Logits of a vocabulary from a low-bit copy of the head, and from its own rows where they matter.

    Made by `pack`; the full-precision rows are the given weight itself.
    """

    head: LowBitMatrix
    #: (tokens, columns) float32, bfloat16 or float16.
    full: Tensor
    #: The largest 2-norm of a row, of the weight and of its copy, and the largest residual.
    largest_norm: float
    largest_error: float

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bits: int = 8) -> "LowBitHead":
        """Copy a head, float32, bfloat16 or float16 (tokens, columns) on the CPU, to `bits` 4, 8 or 12.

        Raises
        ------
        ValueError
            Other bits, or weights that aren't finite: nothing could be proven of them.
        TypeError
            Weights of other dtypes.
        """
        weight = as_native(weight, "any")
        head = LowBitMatrix.pack(weight, bits)
        error = float(head.errors.max()) if len(weight) else 0.0
        if not error < float("inf"):
            raise ValueError(
                f"the LM head's weights {tuple(weight.shape)} hold infinities, NaN or rows longer than float32: "
                "nothing can be proven of its argmax, leave it in full precision"
            )
        return cls(head, as_native(weight), max_norm(weight, head.errors), error)

    @classmethod
    def of(cls, weight: Tensor, tensors: Mapping[str, Tensor], bits: int) -> "LowBitHead":
        """The head of a weight over tensors that `tensors` once gave; the weight isn't read. ValueError as there."""
        check_kept(tensors, "largest", (2,), torch.float64)
        head = LowBitMatrix.of(tensors, bits, *weight.shape)
        norm, error = tensors["largest"].tolist()
        return cls(head, as_native(weight), norm, error)

    def tensors(self) -> dict[str, Tensor]:
        """All that was computed of the weight, for `of`: the copy's tensors, and both bounds in float64."""
        largest = torch.tensor([self.largest_norm, self.largest_error], dtype=torch.float64)
        return {**self.head.tensors(), "largest": largest}

    @torch.no_grad()
    def run(self, x: Tensor, threshold: float, top: int = 1) -> tuple[Tensor, int, int]:
        """Logits of a few vectors.

        Every token that could be among the `top` largest is computed in full precision, so that those are the
        full-precision ones, up to logits that float32 sums can't tell apart; so is every token whose weight
        2 z (1 - z) r exceeds the threshold, z its low-bit probability and r = errors |x| / sqrt(columns).

        Parameters
        ----------
        x : Tensor
            float32 (vectors, columns).
        threshold : float
            Below 0 every token is recomputed, at infinity only those for the top.
        top : int
            At least 1.

        Returns
        -------
        tuple
            float32 (vectors, tokens); tokens recomputed for the top; tokens recomputed in all.

        Raises
        ------
        ValueError
            Vectors of another shape or device, or a top below 1.
        TypeError
            Vectors that aren't float32.
        """
        x = check_vectors(x, self.head.columns)
        if top < 1:
            raise ValueError(f"top={top}: give at least 1")
        native = native_for(x)
        if native is None:
            return self.reference(x, threshold, top)
        logits = x.new_empty(len(x), len(self.full))
        bounds = (self.largest_norm, self.largest_error, top, threshold)
        selected = native.extension.head(
            native.instruction_set,
            self.head.kernel(native),
            self.full,
            x,
            logits,
            *bounds,
            torch.get_num_threads(),
        )
        return logits, *selected

    def reference(self, x: Tensor, threshold: float, top: int = 1) -> tuple[Tensor, int, int]:
        """`run` in torch, on the same copies."""
        low = self.head.products(x)
        bounds, norm = logit_bounds(x, self.head.errors, self.largest_norm)
        for_top = could_win(low, bounds, norm, self.largest_norm, top)
        z = low.softmax(dim=1)
        error = self.head.errors * norm / x.shape[1] ** 0.5
        weight = softmax_gain(z, error) * error
        # Written so that a NaN is recomputed.
        chosen = for_top | ~(weight <= threshold)
        logits = low
        for row, vector, which in zip(logits, x, chosen, strict=True):
            for tokens in which.nonzero()[:, 0].split(_SLAB_ROWS):
                # Exact but for one rounding, where the kernel sums in float32.
                row[tokens] = (self.full[tokens].double() @ vector.double()).float()
        return logits, int(for_top.sum()), int(chosen.sum())
