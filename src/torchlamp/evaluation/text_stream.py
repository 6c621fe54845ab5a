"""New tokens as text, handed on as soon as no later token can change it; a streamer of transformers' `generate`."""

import time
from collections.abc import Callable
from typing import Any

#: Bytes of a character that may lack its last one: UTF-8 has 4 at most. Decoders write each, or all, as U+FFFD.
_MAX_HELD = 3
_REPLACEMENT = "\ufffd"
#: Tokens decoded together, and those kept of them as context when they grow too many: a token's blanks and bytes
#: depend on its neighbours.
_MAX_WINDOW, _CONTEXT = 64, 8


class TextStream:
    """Decodes tokens as they come; the pieces joined are the decoded text of all of them.

    transformers' own `TextStreamer` waits for a space, so that text without spaces comes only at the end. Here a piece
    is held back only while its last character may lack bytes.

    Parameters
    ----------
    tokenizer
        Special tokens are left out of the text.
    write : callable
        Is handed each piece.
    echo : bool
        Write the prompt, too, and decode what follows as its continuation.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], *, echo: bool) -> None:
        self._tokenizer, self._write, self._echo = tokenizer, write, echo
        #: The new tokens so far.
        self.ids: list[int] = []
        #: `time.perf_counter` when the prompt was handed over, and after each new token.
        self.times: list[float] = []
        self._window: list[int] = []
        self._shown = ""

    def put(self, value: Any) -> None:
        """Take the prompt, int64 (1, length), at the first call, then a new token, int64 (1,), at each."""
        self.times.append(time.perf_counter())
        tokens: list[int] = value.reshape(-1).tolist()
        if len(self.times) > 1:
            self.ids += tokens
        elif not self._echo:
            return
        # One by one: a character that isn't whole at the end of a prompt mustn't take those before it along.
        for token in tokens:
            self._window.append(token)
            self._show(held=_MAX_HELD)

    def end(self) -> None:
        """Hand on what was held back; a second call does nothing."""
        self._show(held=0)

    def _show(self, held: int) -> None:
        text = self._decoded()
        unsure = min(held, len(text) - len(text.rstrip(_REPLACEMENT)))
        safe = text[: len(text) - unsure]
        # Where bytes stand for themselves, one that belongs to no character can take those before it along.
        if held and not safe.startswith(self._shown):
            return
        if len(safe) > len(self._shown):
            self._write(safe[len(self._shown) :])
            self._shown = safe
        if not unsure and len(self._window) > _MAX_WINDOW:
            self._shorten()

    def _shorten(self) -> None:
        """Keep the last few tokens, from where they are decoded by themselves as they are here."""
        for first in range(len(self._window) - _CONTEXT, len(self._window) - _MAX_WINDOW // 2, -1):
            text = self._decoded(first)
            if self._shown.endswith(text):
                self._window, self._shown = self._window[first:], text
                return

    def _decoded(self, first: int = 0) -> str:
        text: str = self._tokenizer.decode(
            self._window[first:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
