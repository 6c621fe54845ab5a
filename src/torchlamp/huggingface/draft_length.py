"""How many tokens to draft before a check, and what became of those that were drafted."""

from dataclasses import dataclass

#: Time of a drafted token, and of one token more in a check, in units of a check of one token.
DRAFT_COST, CHECK_COST = 0.15, 0.03
MAX_DRAFT = 24
#: Share of older drafts that each check forgets.
_FORGET = 0.1


@dataclass
class Acceptance:
    """Counts of drafted tokens, over all texts of a prepared model."""

    #: Tokens that were drafted, and those of them that float32 confirmed.
    drafted: int = 0
    accepted: int = 0
    #: Float32 passes over several tokens.
    checks: int = 0
    #: New tokens of all texts.
    tokens: int = 0
    #: Tokens too close to call in a check, settled by single float32 steps, and the steps that took.
    settled: int = 0
    single_steps: int = 0
    #: The largest difference of a logit between a check and single steps that was seen.
    difference: float = 0.0

    @property
    def rate(self) -> float:
        """Accepted / drafted tokens; 0 where none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def to_dict(self) -> dict[str, float]:
        """All figures by their names, for JSON."""
        return {**vars(self), "rate": self.rate}

    def __str__(self) -> str:
        each = self.tokens / self.checks if self.checks else 0.0
        return (
            f"{self.accepted:,} of {self.drafted:,} drafted tokens accepted ({self.rate:.2%}), {each:.1f} tokens a "
            f"check, {self.settled} settled by single steps"
        )


class DraftLength:
    """The number of tokens to draft, from the share that was accepted lately.

    If each drafted token is accepted with probability a, independently, a draft of n tokens and the check's own token
    give (1 - a^(n+1)) / (1 - a) tokens on average, for the time 1 + (`DRAFT_COST` + `CHECK_COST`) n. The n with the
    most tokens a time is taken. It depends on tokens alone, not on a clock, so that results can be repeated.
    """

    def __init__(self) -> None:
        # As if 9 of 10 had been accepted before.
        self._accepted, self._judged = 9.0, 10.0

    def note(self, accepted: int, drafted: int) -> None:
        """So many tokens of a draft were accepted; those after the first rejected one were not judged."""
        keep = 1 - _FORGET
        self._accepted = keep * self._accepted + accepted
        self._judged = keep * self._judged + min(accepted + 1, drafted)

    def next(self) -> int:
        """Tokens of the next draft, 1 to `MAX_DRAFT`."""
        a = min(self._accepted / self._judged, 0.999)

        def speed(n: int) -> float:
            return (1 - a ** (n + 1)) / (1 - a) / (1 + (DRAFT_COST + CHECK_COST) * n)

        return max(range(1, MAX_DRAFT + 1), key=speed)
