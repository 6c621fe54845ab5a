"""A conversation with a model, answered greedily; the cache is kept from turn to turn."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from torchlamp.evaluation.generation import AnyPolicy, rates_of, running_under, stream


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

    Raises
    ------
    ValueError
        A tokenizer without a chat template.
    """

    def __init__(
        self, model: Any, tokenizer: Any, policy: AnyPolicy = None, *, system: str | None = None
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template, so it can't chat: use `torchlamp generate`"
            )
        self.model, self.tokenizer, self.policy = model, tokenizer, policy
        #: The conversation so far, as chat templates take it.
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        #: New tokens of all answers, and the seconds of those behind each first one.
        self.answered = 0
        self._timed, self._seconds = 0, 0.0
        #: What the cache holds.
        self._seen: list[int] = []
        self._cache: Any = None

    def __enter__(self) -> "Chat":
        self._block = running_under(self.model, self.policy)
        self._running = self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)

    def say(self, message: str, tokens: int, write: Callable[[str], None]) -> str:
        """Answer a message with `tokens` at most, handing each finished piece to `write`; returns the answer.

        Raises
        ------
        ValueError
            A number of tokens below 1, or a conversation longer than the model's context.
        """
        from torchlamp.data.text import check_context

        if tokens < 1:
            raise ValueError(f"{tokens} tokens of an answer: give at least 1")
        messages = [*self.messages, {"role": "user", "content": message}]
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        check_context(
            self.model, len(ids) + tokens, f"the conversation and its answer, {len(ids)} + {tokens} ="
        )
        self._forget_all_but(ids[:-1])
        done = stream(
            self.model,
            self.tokenizer,
            torch.tensor([ids]),
            tokens,
            write,
            cache=self._cache,
            skip_prompt=True,
        )
        self._cache, self._seen = done.cache, [*ids, *done.ids[:-1]]
        self.answered += len(done.ids)
        self._timed, self._seconds = self._timed + len(done.ids) - 1, self._seconds + done.seconds
        answer: str = self.tokenizer.decode(done.ids, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

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
    def rates(self) -> dict[str, float]:
        """Site -> recomputed / eligible over all turns."""
        return rates_of(self._running)
