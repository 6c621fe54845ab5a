"""Whether a low pass of scores is to be trusted: how large its errors are where its own probabilities lie.

Every look-ahead starts from the probabilities of the low pass. Where these are wrong by factors, the keys that matter
look as if they didn't (docs/method.md 4.12).
"""

from collections.abc import Mapping

import torch

from torchlamp.arithmetic.low_operands import overflow_warning
from torchlamp.simulation.attention_call import AttentionCall
from torchlamp.simulation.score_operands import ScoreOperands
from torchlamp.simulation.softmax import capped_logits, visible_softmax
from torchlamp.simulation.visibility import window

#: Rows of a sample that are looked at: the last ones, and at most one of so many.
ROWS, ONE_OF = 8, 16
#: Expected error of a logit, in nats, beyond which a row is doubtful: a factor e in a probability.
LARGEST_ERROR = 1.0
#: Share of doubtful rows beyond which a run says that its low pass isn't to be trusted.
LARGEST_SHARE = 0.15


@torch.no_grad()
def doubt(call: AttentionCall, operands: ScoreOperands) -> tuple[int, int] | None:
    """How many rows of an attention call are looked at, and in how many the low pass errs by more than `LARGEST_ERROR`.

    Of row i it is rho_i = (sum_j z_j (s_j r_j)^2)^(1/2), the error of a logit as the low pass' own probabilities z
    weight it, r the expected error that the rule `running` has and s the slope of a softcap. Stored keys, float32
    accumulators and calls of few queries (steps of decoding) aren't looked at: None.
    """
    queries, keys = operands.query.shape[2], operands.key.shape[2]
    count = min(ROWS, queries // ONE_OF)
    if not count or call.keys is not None or call.accumulator.format.grid.is_float32:
        return None
    rows = range(queries - count, queries)
    looked_at = doubtful = 0
    for sample in range(len(operands.query)):
        seen = window(call.seen, sample, rows, keys, operands.query.device)
        if seen.last <= seen.first:
            continue
        at, shown = slice(rows.start, rows.stop), slice(seen.first, seen.last)
        low = operands.low_scores(sample, at, shown, call, squares=True)
        scores, squares = low.sums, low.squares
        assert squares is not None
        lacking = operands.lacking(sample, at, shown)
        if lacking is not None:
            scores = scores + lacking
        hidden = None if seen.visible is None else ~seen.visible
        logits, slope = capped_logits(scores, call.softcap, None)
        probabilities = visible_softmax(logits, hidden, call.sinks)
        error = squares.sqrt().mul_(call.error_scale)
        if slope is not None:
            error *= slope
        rho = (probabilities * error.square()).sum(-1).sqrt()
        sees = probabilities.sum(-1) > 0
        looked_at += int(sees.sum())
        # A row with scores that aren't finite has no probabilities at all.
        broken = ~probabilities.sum(-1).isfinite()
        looked_at += int(broken.sum())
        doubtful += int((broken | (sees & ~(rho <= LARGEST_ERROR))).sum())
    return (looked_at, doubtful) if looked_at else None


def low_pass_warning(doubt: tuple[int, int], overflow: Mapping[str, tuple[int, int]]) -> str | None:
    """One line about a low pass that isn't to be trusted; None for others.

    Parameters
    ----------
    doubt : pair of int
        Rows of scores that were looked at, and doubtful ones.
    overflow : mapping
        Of each site: sums that didn't fit an integer register, and all.
    """
    lines = [doubt_warning(*doubt)]
    for site, (overflowed, sums) in overflow.items():
        line = overflow_warning(overflowed, sums)
        lines.append(None if line is None else f"at {site} {line}")
    return "; ".join(line for line in lines if line is not None) or None


def doubt_warning(rows: int, doubtful: int) -> str | None:
    """One line for a run with too many doubtful rows among those looked at; None for others."""
    if doubtful <= LARGEST_SHARE * rows:
        return None
    return (
        f"the low pass of the scores isn't to be trusted: in {doubtful / rows:.0%} of the rows looked at, "
        "probabilities err by more than a factor e; name the transform 'center', more bits, or the rule 'upper-running'"
    )
