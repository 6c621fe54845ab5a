"""Generation, streamed as it comes: under a simulated policy, with low-bit decoding, or in float32."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchlamp.evaluation.prompts import end_tokens, has_chat_template, prompt_tokens
from torchlamp.evaluation.text_stream import TextStream
from torchlamp.huggingface.draft_length import Acceptance
from torchlamp.models.quiet import quiet_transformers
from torchlamp.policy.decodable import settings
from torchlamp.policy.policy import Policy

AnyPolicy = Policy | None
#: Why a text ends: an end token, the number of tokens that was asked for, or Ctrl-C.
Finish = Literal["end", "length", "interrupted"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most probable one at temperature 0, else drawn from softmax(logits / T).

    Raises
    ------
    ValueError
        A temperature below 0, a `top_p` that is no share, or a seed below 0.
    """

    temperature: float = 0.0
    #: Only the most probable tokens that together reach this share are drawn.
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature}: give 0 (the most probable token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p {self.top_p}: give more than 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: give 0 or more, and less than 2^63")
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"top-p {self.top_p} at temperature 0, where nothing is drawn: give a temperature"
            )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`; what a model's own config says of sampling doesn't count."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    """New tokens and their text, seconds until the first and from there to the last, recompute rates, memory."""

    ids: list[int]
    text: str
    finish: Finish
    prompt_tokens: int
    #: Whether the prompt was put into the chat template.
    chat: bool
    prompt_seconds: float
    seconds: float
    #: Site -> recomputed / eligible.
    rates: dict[str, float]
    #: In words; empty where nothing was copied.
    memory: str = ""
    #: What became of drafted tokens, under `exact`.
    acceptance: Acceptance | None = None

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second once the prompt is read, which also gives the first token."""
        return (self.tokens - 1) / self.seconds if self.seconds > 0 and self.tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers, for JSON."""
        return {
            "text": self.text,
            "token_ids": self.ids,
            "finish": self.finish,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": self.prompt_seconds,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "recompute_rate_by_site": self.rates,
            "memory": self.memory or None,
            **({} if self.acceptance is None else {"acceptance": self.acceptance.to_dict()}),
        }


def read_any_policy(text: str | None) -> AnyPolicy:
    """A policy with stored operands, for the decoding kernels, or one that is simulated; None stays None, the default.

    Raises
    ------
    ValueError
        A policy that can't be read, or a stored operand in one that the kernels don't run.
    """
    if text is None:
        return None
    policy = Policy.parse(text)
    if policy.has_stored:
        settings(policy)
    return policy


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    policy: str | Policy | None,
    tokens: int,
    write: Callable[[str], None],
    *,
    full_precision: bool = False,
    chat: bool | None = None,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    exact: bool = False,
) -> Generated:
    """Answer a message or continue a text, handing each finished piece to `write`.

    Parameters
    ----------
    model, tokenizer
        As `torchlamp.load` gives them.
    prompt : str
        A message, which the model's chat template makes a prompt of, or a text to continue, which is written, too.
    policy : str or Policy, optional
        One with stored operands runs on the decoding kernels, any other is simulated; None is `prepare`'s default.
    tokens : int
        New tokens at most.
    write : callable
        Is handed each piece of text.
    full_precision : bool
        Run the model as it is, in float32, whatever the policy.
    chat : bool, optional
        Whether the prompt is a message; None: where the tokenizer has a chat template.
    system : str, optional
        What the model is told before the message.
    sampling : Sampling
        How tokens are chosen; the most probable ones by default.
    exact : bool
        The policy only drafts, and float32 confirms: ``prepare(exact=True)``.

    Returns
    -------
    Generated
        After a KeyboardInterrupt that came behind the first new token, those made until then.

    Raises
    ------
    ValueError
        An empty prompt, a number of tokens below 1, or more than the model's context holds; a chat without a template.
    """
    from torchlamp.data.text import check_context

    check_tokens(tokens)
    chatting = has_chat_template(tokenizer) if chat is None else chat
    ids = prompt_tokens(tokenizer, prompt, chat=chatting, system=system)
    length = ids.shape[-1]
    check_context(model, length + tokens, f"prompt tokens and new ones, {length} + {tokens} =")
    chosen = read_any_policy(policy) if isinstance(policy, str) else policy
    with (
        quiet_transformers(),
        torch.inference_mode(),
        running_under(model, chosen, full_precision, exact) as running,
    ):
        done = stream(model, tokenizer, ids, tokens, write, echo=not chatting, sampling=sampling)
    return Generated(
        done.ids,
        text_of(tokenizer, done.ids),
        done.finish,
        length,
        chatting,
        done.prompt_seconds,
        done.seconds,
        rates_of(running),
        _memory(running),
        acceptance_of(running),
    )


def load_for_generation(
    name: str, policy: AnyPolicy = None, *, full_precision: bool = False, exact: bool = False
) -> tuple[Any, Any]:
    """A model and its tokenizer as `torchlamp.load` gives them, for `generate` under the same policy.

    A policy of the decoding kernels prepares the model as it is loaded (`precision`). Under another one, or where
    float32 runs, too (`full_precision`, `exact`), it isn't prepared, and in half precision where the checkpoint is; a
    model with half-precision matrices of modules that can't be run in float32 as they are is widened.
    """
    from torchlamp.huggingface.wide_forwards import narrow_modules
    from torchlamp.models.load import load

    if not full_precision and not exact and (policy is None or policy.has_stored):
        return load(name, precision="default" if policy is None else policy)
    model, tokenizer = load(name, dtype="auto")
    try:
        narrow_modules(model)
    except TypeError:
        model = model.float()
    return model, tokenizer


def check_tokens(tokens: int) -> None:
    """ValueError for a number of new tokens below 1."""
    if tokens < 1:
        raise ValueError(f"{tokens} tokens to generate: give at least 1")


@dataclass(frozen=True)
class Streamed:
    """New tokens, seconds until the first and from there to the last, and the cache that holds all but the last.

    An interrupted step leaves a cache that holds it in some layers: then there is none.
    """

    ids: list[int]
    finish: Finish
    prompt_seconds: float
    seconds: float
    cache: Any


def stream(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    tokens: int,
    write: Callable[[str], None],
    *,
    echo: bool,
    cache: Any = None,
    sampling: Sampling = GREEDY,
    stop: Callable[[], bool] | None = None,
) -> Streamed:
    """Up to `tokens` behind `ids`, int64 (1, length), whose first ones a cache may hold already.

    `echo` writes the prompt, too. `stop` is asked after each new token whether it was the last; a KeyboardInterrupt
    ends the text at once, and is raised only if there is no new token yet.
    """
    ends = end_tokens(model, tokenizer)
    streamer = TextStream(tokenizer, write, echo=echo)
    stopped = False

    def stopping(sequences: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal stopped
        stopped = stop is not None and stop()
        return torch.full((len(sequences),), stopped, device=sequences.device)

    pad = tokenizer.pad_token_id
    with quiet_transformers(), torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed)
        try:
            output = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=tokens,
                return_dict_in_generate=True,
                streamer=streamer,
                stopping_criteria=[stopping],
                eos_token_id=ends or None,
                pad_token_id=tokenizer.eos_token_id if pad is None else pad,
                **sampling.options(),
                **({} if cache is None else {"past_key_values": cache}),
            )
            kept = output.past_key_values
        except KeyboardInterrupt:
            if not streamer.ids:
                raise
            streamer.end()
            stopped, kept = True, None
    # The streamer is handed the prompt first, then token after token.
    new, times = streamer.ids, streamer.times
    finish: Finish = "end" if new[-1] in ends else "interrupted" if stopped else "length"
    return Streamed(new, finish, times[1] - times[0], times[-1] - times[1], kept)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """The text of new tokens, special ones left out: the pieces of a `TextStream` joined."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def running_under(
    model: Any, policy: AnyPolicy, full_precision: bool = False, exact: bool = False
) -> AbstractContextManager[Any]:
    """A block in which the model runs under a policy: prepared, simulated, or as it is in float32.

    `exact` has the policy draft what float32 confirms.

    A model that is prepared already, under this policy, stays so, and its statistics go on counting.
    """
    from torchlamp.huggingface.interface import check_not_prepared
    from torchlamp.huggingface.prepare import prepare, prepared_or_none

    if full_precision:
        from torchlamp.huggingface.widening import widened

        check_not_prepared(model)
        return widened(model)
    if exact:
        return prepare(model, policy, exact=True)
    found = prepared_or_none(model)
    if found is not None and policy in (None, found.policy, found.asked):
        return nullcontext(found)
    if policy is not None and not policy.has_stored:
        from torchlamp.huggingface.lookahead import lookahead

        return lookahead(model, policy)
    return prepare(model, policy)


def rates_of(running: Any) -> dict[str, float]:
    """Site -> recomputed / eligible of what `running_under` gave."""
    if running is None:
        return {}
    return dict(getattr(running, "statistics", running).rates)


def acceptance_of(running: Any) -> Acceptance | None:
    """What became of drafted tokens under `exact`; None elsewhere."""
    return getattr(running, "acceptance", None)


def _memory(running: Any) -> str:
    memory = getattr(running, "memory", None)
    return "" if memory is None else str(memory)
