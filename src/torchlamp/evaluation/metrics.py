"""Per-token distances between the logits of a reference and of a tested run, in float64.

A vocabulary of 262k tokens makes a row of logits a megabyte, so everything is done on a few rows at a time,
in two reused float64 buffers that stay in the processor's cache; what a window leaves behind is a few numbers
per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Logits in a chunk: two float64 buffers of this size fit the second-level caches of two cores.
_CHUNK_CPU = 1 << 17
_CHUNK_DEVICE = 1 << 24


@dataclass(frozen=True)
class Reference:
    """What the tested runs of a window are compared with.

    Attributes
    ----------
    logits : Tensor
        float32 (length, vocabulary).
    tokens : Tensor
        int64 (length,): the window; token t + 1 is the correct answer to row t.
    log_sum_exp : Tensor
        float64 (length,).
    best : Tensor
        int64 (length,): the most probable token.
    cross_entropy : Tensor
        float64 (length - 1,), in nats.
    """

    logits: Tensor
    tokens: Tensor
    log_sum_exp: Tensor
    best: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True)
class TokenMetrics:
    """Figures per token of one window, on the CPU.

    Attributes
    ----------
    kl : Tensor
        float64 (length,): KL(reference || tested) in nats. Rounding can leave about -1e-15 where it is 0.
    flips : Tensor
        bool (length,): the most probable token differs.
    cross_entropy, reference_cross_entropy : Tensor
        float64 (length - 1,): of the next token, in nats.
    """

    kl: Tensor
    flips: Tensor
    cross_entropy: Tensor
    reference_cross_entropy: Tensor

    @property
    def delta_p(self) -> Tensor:
        """float64 (length - 1,): change of the correct token's probability, tested - reference."""
        return torch.exp(-self.cross_entropy) - torch.exp(-self.reference_cross_entropy)


class Comparer:
    """Compares logits window by window, keeping its buffers between the calls."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None

    def reference(self, logits: Tensor, tokens: Tensor) -> Reference:
        """Prepare the reference of a window.

        Parameters
        ----------
        logits : Tensor
            float32 (length, vocabulary), length >= 2.
        tokens : Tensor
            int64 (length,).
        """
        logits, tokens = _computable(logits), _computable(tokens)
        total = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        work, _ = self._chunk_buffers(logits)
        for start in range(0, len(logits), len(work)):
            rows = logits[start : start + len(work)]
            total[start : start + len(rows)] = _log_sum_exp(rows, work[: len(rows)])
        return Reference(logits, tokens, total, logits.argmax(dim=-1), _cross_entropy(logits, total, tokens))

    def compare(self, reference: Reference, logits: Tensor) -> TokenMetrics:
        """Compare a tested run's logits, float32 (length, vocabulary), with its window's reference."""
        logits = _computable(logits)
        total = torch.empty_like(reference.log_sum_exp)
        kl = torch.empty_like(total)
        first, second = self._chunk_buffers(logits)
        for start in range(0, len(logits), len(first)):
            part = slice(start, min(start + len(first), len(logits)))
            true, tested = reference.logits[part], logits[part]
            p, work = first[: len(true)], second[: len(true)]
            total[part] = _log_sum_exp(tested, work)
            torch.sub(true, reference.log_sum_exp[part, None], out=p).exp_()
            # Subtracted in float64: the difference of two close float32 logits carries the whole result.
            work.copy_(true).sub_(tested)
            kl[part] = p.mul_(work).sum(dim=-1).sub_(reference.log_sum_exp[part]).add_(total[part])
        for row in torch.nonzero(~torch.isfinite(kl)).flatten().tolist():
            kl[row] = _careful_kl(reference.logits[row], logits[row])
        return TokenMetrics(
            kl=kl.cpu(),
            flips=(logits.argmax(dim=-1) != reference.best).cpu(),
            cross_entropy=_cross_entropy(logits, total, reference.tokens).cpu(),
            reference_cross_entropy=reference.cross_entropy.cpu(),
        )

    def _chunk_buffers(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        vocabulary = logits.shape[-1]
        size = _CHUNK_CPU if logits.device.type == "cpu" else _CHUNK_DEVICE
        shape = (max(1, size // vocabulary), vocabulary)
        if (
            self._buffers is None
            or self._buffers[0].shape != shape
            or self._buffers[0].device != logits.device
        ):
            first, second = (torch.empty(shape, dtype=torch.float64, device=logits.device) for _ in range(2))
            self._buffers = first, second
        return self._buffers


def _log_sum_exp(rows: Tensor, work: Tensor) -> Tensor:
    """float64 (rows,), of float32 (rows, vocabulary); `work` is float64 of that shape and is overwritten."""
    highest = rows.amax(dim=-1).double()
    torch.sub(rows, highest[:, None], out=work)
    return work.exp_().sum(dim=-1).log_().add_(highest)


def _cross_entropy(logits: Tensor, log_sum_exp: Tensor, tokens: Tensor) -> Tensor:
    correct = logits[:-1].gather(1, tokens[1:, None]).squeeze(1)
    return log_sum_exp[:-1] - correct.double()


def _careful_kl(reference: Tensor, tested: Tensor) -> Tensor:
    """KL of one row where logits may be -inf: a token that the reference rules out adds nothing."""
    true, other = (torch.log_softmax(row.double(), dim=-1) for row in (reference, tested))
    return torch.where(true == -torch.inf, 0.0, true.exp() * (true - other)).sum()


def _computable(x: Tensor) -> Tensor:
    """The same values on a device that has float64."""
    return x.cpu() if x.device.type == "mps" else x
