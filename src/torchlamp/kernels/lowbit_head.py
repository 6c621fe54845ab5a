"""The LM head from a low-bit copy: its largest logits are provably those of full precision.

`native/lowbit_head.hpp` is the kernel, `LowBitHead.twin` its readable equal; docs/decoding.md has the proof.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlamp.kernels import native
from torchlamp.kernels.lowbit import LowBitMatrix
from torchlamp.kernels.twins_lowbit import quantise_vector

#: Above 1 by more than float32 norms and bounds round.
_ABOVE = 1 + 1e-6


@dataclass
class LowBitHead:
    """Logits of a vocabulary from a low-bit copy of the head, and from its own rows where they matter.

    Made by `pack`; the full-precision rows are the given weight itself.
    """

    head: LowBitMatrix
    #: (tokens, columns) float32.
    full: Tensor
    #: The largest 2-norm of a row, of the weight and of its copy, and the largest residual.
    largest_norm: float
    largest_error: float

    @classmethod
    @torch.no_grad()
    def pack(cls, weight: Tensor, bits: int = 8) -> "LowBitHead":
        """Copy a head, float32 (tokens, columns) on the CPU, to `bits` 4, 8 or 12.

        Raises
        ------
        ValueError
            Other bits, or weights that aren't finite: nothing could be proven of them.
        TypeError
            Weights that aren't float32.
        """
        weight = weight.detach().resolve_neg()
        head = LowBitMatrix.pack(weight, bits)
        error = float(head.errors.max()) if len(weight) else 0.0
        norm = float(weight.norm(dim=1).max()) if len(weight) else 0.0
        if not error + norm < float("inf"):
            raise ValueError(
                "the LM head's weights hold infinities or NaN: nothing can be proven of its argmax"
            )
        rows = weight if weight.stride(1) == 1 else weight.contiguous()
        # The copy's rows are at most their residual longer.
        return cls(head, rows, (norm + error) * _ABOVE, error)

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
        """
        if not native.available():
            return self.twin(x, threshold, top)
        logits = x.new_empty(len(x), len(self.full))
        bounds = (self.largest_norm, self.largest_error, top, threshold)
        selected = native.extension().head(
            native.instruction_set(),
            self.head.kernel(),
            self.full,
            x,
            logits,
            *bounds,
            torch.get_num_threads(),
        )
        return logits, *selected

    def twin(self, x: Tensor, threshold: float, top: int = 1) -> tuple[Tensor, int, int]:
        """`run` in torch, on the same copies."""
        low = self.head.products(x)
        columns = x.shape[1]
        norm = x.norm(dim=1, keepdim=True) * _ABOVE
        codes, scales = quantise_vector(x)
        copy = (codes.view(len(x), -1, 32).double() * scales.double()[..., None]).flatten(1)[:, :columns]
        residual = (x.double() - copy).norm(dim=1, keepdim=True).float()
        slack = self.largest_norm * (residual + norm * 2.0**-24 * (columns / 8 + 32))
        bound = self.head.errors * norm + slack
        lower = torch.nan_to_num(low - bound, nan=-torch.inf)
        best = lower.topk(min(top, lower.shape[1]), dim=1).values[:, -1:]
        could_win = ~(low + bound < best)
        z = low.softmax(dim=1)
        weight = 2 * z * (1 - z) * self.head.errors * norm / columns**0.5
        # Written so that a NaN is recomputed.
        chosen = could_win | ~(weight <= threshold)
        return torch.where(chosen, x @ self.full.T, low), int(could_win.sum()), int(chosen.sum())
