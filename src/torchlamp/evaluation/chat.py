"""A conversation with a model; the cache is kept from turn to turn."""

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from torchlamp.evaluation.generation import (
    GREEDY,
    AnyPolicy,
    Sampling,
    acceptance_of,
    check_tokens,
    rates_of,
    running_under,
    stream,
    text_of,
)
from torchlamp.evaluation.prompts import Message, chat_tokens
from torchlamp.huggingface.draft_length import Acceptance


class Chat:
    """Messages and answers under one policy, as a context manager; at its end the model is as it was before.

    Parameters
    ----------
    model, tokenizer
        As `torchlamp.load` gives them; the tokenizer needs a chat template.
    policy : Policy, optional
        As for `generation.generate`; None is `prepare`'s default.
    system : str, optional
        The system message before the first one.
    sampling : Sampling
        How tokens are chosen, the most probable ones by default; the seed grows by 1 with every answer.
    exact : bool
        As for `generation.generate`.

    Raises
    ------
    ValueError
        A tokenizer without a chat template, or one that refuses the system message.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: AnyPolicy = None,
        *,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        exact: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.policy, self.sampling = model, tokenizer, policy, sampling
        self.exact = exact
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        chat_tokens(tokenizer, [*self._opening, {"role": "user", "content": "?"}])
        #: The conversation so far, as chat templates take it.
        self.messages = list(self._opening)
        #: Messages that got an answer.
        self.turns = 0
        #: New tokens of all answers, and the seconds of those behind each first one.
        self.answered = 0
        self._timed, self._seconds = 0, 0.0
        #: What the cache holds.
        self._seen: list[int] = []
        self._cache: Any = None

    def __enter__(self) -> "Chat":
        self._block = running_under(self.model, self.policy, exact=self.exact)
        self._running = self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)

    def say(
        self,
        message: str,
        tokens: int,
        write: Callable[[str], None],
        *,
        stop: Callable[[], bool] | None = None,
    ) -> str:
        """Answer a message with `tokens` at most, handing each finished piece to `write`; returns the answer.

        `stop` is asked after each token whether it was the last one. An answer that it, or a KeyboardInterrupt, cuts
        short stays in the conversation as far as it goes.

        Raises
        ------
        ValueError
            A number of tokens below 1, or a conversation longer than the model's context.
        KeyboardInterrupt
            Interrupted before the first token; the conversation is then as it was.
        """
        from torchlamp.data.text import check_context

        check_tokens(tokens)
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = chat_tokens(self.tokenizer, messages)
        check_context(
            self.model, len(ids) + tokens, f"the conversation and its answer, {len(ids)} + {tokens} ="
        )
        self._forget_all_but(ids[:-1])
        cache, self._cache, seen, self._seen = self._cache, None, self._seen, []
        try:
            done = stream(
                self.model,
                self.tokenizer,
                torch.tensor([ids]),
                tokens,
                write,
                echo=False,
                cache=cache,
                sampling=replace(self.sampling, seed=self.sampling.seed + self.turns),
                stop=stop,
            )
        except ValueError:  # refused before anything was read
            self._cache, self._seen = cache, seen
            raise
        self._cache = done.cache
        self._seen = [] if done.cache is None else [*ids, *done.ids[:-1]]
        self.turns += 1
        self.answered += len(done.ids)
        self._timed, self._seconds = self._timed + len(done.ids) - 1, self._seconds + done.seconds
        answer = text_of(self.tokenizer, done.ids)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def clear(self) -> None:
        """Begin a new conversation: the system message stays, the cache and the rest are forgotten."""
        self.messages, self._seen, self._cache = list(self._opening), [], None

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return len(self._seen)

    def _forget_all_but(self, ids: list[int]) -> None:
        """Keep what the cache holds of the beginning of `ids`; the rest is read again.

        A template may write earlier turns anew, without their reasoning, say, and an answer's tokens needn't be those
        that its text is cut into.
        """
        pairs = zip(self._seen, ids, strict=False)
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self._seen), len(ids)))
        try:
            if self._cache is not None and common < len(self._seen):
                self._cache.crop(common - len(self._seen))
        except RuntimeError:  # a sliding window has let go of what would come back into it
            self._cache, common = None, 0
        self._seen = self._seen[:common]

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, once a message is read."""
        return self._timed / self._seconds if self._seconds > 0 else 0.0

    @property
    def acceptance(self) -> Acceptance | None:
        """What became of drafted tokens over all turns, under `exact`."""
        return acceptance_of(self._running)

    @property
    def rates(self) -> dict[str, float]:
        """Site -> recomputed / eligible over all turns."""
        return rates_of(self._running)
