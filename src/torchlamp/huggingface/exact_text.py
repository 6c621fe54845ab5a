"""One exact text: the low-bit model drafts, float32 checks several tokens at once, single float32 steps settle ties.

A check of n tokens sums in another order than n single steps do, so that its logits, and the keys and values that it
leaves, differ from theirs by rounding. Where the two largest scores are closer than a bound of that difference, the
check can't tell which token single steps would take. Then the cache is taken back to the last state that single steps
made (at first the prompt's), and everything since runs again in single steps, exactly as plain `generate` would.
"""

from typing import Any

import torch
from torch import Tensor

from torchlamp.huggingface.draft_length import DraftLength
from torchlamp.huggingface.exact_model import ExactModel, crop_to, last_logits, put_state, state

#: Single steps at the beginning of the first text, which measure how much checks differ.
MEASURED = 8


class ExactText:
    """One call of `generate`: a batch of one, greedy or sampled; its arguments are those of transformers' `_sample`.

    `generator` draws the samples; None draws its seed from torch's global generator.
    """

    def __init__(
        self,
        both: ExactModel,
        ids: Tensor,
        processor: Any,
        stopping: Any,
        config: Any,
        given: dict[str, Any],
        streamer: Any = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.both, self.ids, self.processor, self.stopping, self.config = (
            both,
            ids,
            processor,
            stopping,
            config,
        )
        self.given, self.streamer = given, streamer
        self.cache = given["past_key_values"]
        self.prompt, self.length, self.finished = ids.shape[1], DraftLength(), False
        self.sampled = bool(config.do_sample)
        if self.sampled and generator is None:
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator().manual_seed(seed)
        self.generator = generator

    def run(self) -> None:
        """Make the text; `ids` (1, length) and `cache` are then what plain `generate` returns."""
        model = self.both.model
        output = model._prefill(self.ids, self.config, self.given)
        #: Tokens in the cache that `ids` doesn't have.
        self.before = self.cache.get_seq_length() - self.prompt
        self._single(output.logits[0, -1].float())
        self._note_single_state()
        if not self.sampled and self.both.bound is None and not self.finished:
            self._measure()
        if not self.finished:
            self.low_cache = self.both.draft_cache(self.cache)
            put_state(self.cache, state(self.cache), record_past=True)
        while not self.finished:
            self._round()
        put_state(self.cache, state(self.cache), record_past=False)

    @property
    def more(self) -> int:
        """New tokens."""
        return self.ids.shape[1] - self.prompt

    def _round(self) -> None:
        """Draft, check, and take what is confirmed, with one token more."""
        room = self.config.max_length - self.ids.shape[1] - 1
        drafted, chances = self._draft(max(0, min(self.length.next(), room)))
        tokens = torch.cat([self.ids, torch.tensor([drafted], dtype=self.ids.dtype)], -1)
        with self.both.low_bit_head(not self.sampled and len(self.processor) == 0):
            logits = self._logits(tokens, len(drafted) + 1)
        counts = self.both.acceptance
        counts.checks += 1
        taken = self._sample(drafted, chances, logits) if self.sampled else self._confirm(drafted, logits)
        counts.drafted += len(drafted)
        counts.accepted += taken
        self.length.note(taken, len(drafted))
        for cache in (self.cache, self.low_cache):
            crop_to(cache, min(cache.get_seq_length(), self.ids.shape[1] + self.before - 1))

    def _draft(self, count: int) -> tuple[list[int], list[Tensor]]:
        """`count` tokens of the low-bit model and, to sample, the probabilities that each was drawn from."""
        tokens, chances, ids = [], [], self.ids
        for _ in range(count):
            new = ids.shape[1] + self.before - self.low_cache.get_seq_length()
            more = ids.shape[1] - self.prompt
            logits = last_logits(self.both.draft.model, self.low_cache, ids, new, self.given, more)[-1:]
            scores = self.processor(ids, logits)
            if self.sampled:
                chances.append(scores[0].softmax(-1))
            token = self._draw(chances[-1]) if self.sampled else int(scores.argmax())
            tokens.append(token)
            ids = torch.cat([ids, torch.tensor([[token]], dtype=ids.dtype)], -1)
        return tokens, chances

    def _confirm(self, drafted: list[int], logits: Tensor) -> int:
        """Take the most probable tokens as long as they are the drafted ones, and the first that isn't."""
        bound = self.both.bound
        for number, row in enumerate(logits):
            scores = self.processor(self.ids, row[None])[0]
            first, second = scores.topk(2).values.tolist()
            if bound is None or not first - second > bound:  # NaN isn't decided either
                self._settle(row)
                return number
            token = int(scores.argmax())
            self._emit(token)
            if number == len(drafted) or token != drafted[number]:
                return number
            if self.finished:
                return number + 1
        return len(drafted)

    def _settle(self, checked: Tensor) -> None:
        """Take the next token as single float32 steps do; `checked` are its logits of a check."""
        put_state(self.cache, self.single_state, record_past=False)
        logits = checked
        while (have := self.cache.get_seq_length() - self.before) < self.ids.shape[1]:
            logits = self._logits(self.ids[:, : have + 1], 1)[0]
            self.both.acceptance.single_steps += 1
        top = checked.topk(2).indices
        self.both.note_difference(checked[top], logits[top])
        self._single(logits)
        self.both.acceptance.settled += 1
        self._note_single_state()
        put_state(self.cache, self.single_state, record_past=True)

    def _sample(self, drafted: list[int], chances: list[Tensor], logits: Tensor) -> int:
        """Accept a token x that was drawn from q with the probability min(1, p(x) / q(x)).

        The first that isn't accepted is drawn from max(0, p - q), normalised, which makes the result's distribution p
        (Leviathan et al., arXiv 2211.17192); after a draft without one, a token more from p.
        """
        for number, (token, q) in enumerate(zip(drafted, chances, strict=True)):
            p = self.processor(self.ids, logits[number : number + 1])[0].softmax(-1)
            chance = float(torch.rand((), generator=self.generator, dtype=torch.float64))
            if not chance * float(q[token]) < float(p[token]):
                rest = (p.double() - q.double()).clamp_min(0)
                self._emit(self._draw(rest if float(rest.sum()) > 0 else p))
                return number
            self._emit(token)
            if self.finished:
                return number + 1
        self._single(logits[-1])
        return len(drafted)

    def _single(self, logits: Tensor) -> None:
        """Take the next token from logits float32 (vocabulary,)."""
        scores = self.processor(self.ids, logits.clone()[None])[0]
        self._emit(self._draw(scores.softmax(-1)) if self.sampled else int(scores.argmax()))

    def _draw(self, chances: Tensor) -> int:
        return int(torch.multinomial(chances, 1, generator=self.generator))

    def _emit(self, token: int) -> None:
        self.ids = torch.cat([self.ids, torch.tensor([[token]], dtype=self.ids.dtype)], -1)
        self.both.acceptance.tokens += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        self.finished = bool(self.stopping(self.ids, None).all())

    def _measure(self) -> None:
        """The first tokens in single steps; then a check of them, which leaves nothing behind."""
        singles: list[Tensor] = []
        while len(singles) < MEASURED and not self.finished:
            singles.append(self._logits(self.ids, 1)[0])
            self.both.acceptance.single_steps += 1
            self._single(singles[-1])
        after = state(self.cache)
        put_state(self.cache, self.single_state, record_past=True)
        start, count = state(self.cache), len(singles)
        for low_bit in (False, True):
            put_state(self.cache, start, record_past=True)
            with self.both.low_bit_head(low_bit):
                checked = self._logits(self.ids[:, :-1], count)
            for row, single in zip(checked, singles, strict=True):
                which = row.topk(2).indices if low_bit else slice(None)
                self.both.note_difference(row[which], single[which])
        put_state(self.cache, after, record_past=False)
        self._note_single_state()

    def _note_single_state(self) -> None:
        """The cache is as single steps leave it."""
        self.single_state = state(self.cache)

    def _logits(self, ids: Tensor, count: int) -> Tensor:
        return last_logits(self.both.model, self.cache, ids, count, self.given, ids.shape[1] - self.prompt)
