"""The tokens of a prompt: of its words alone, or in a model's chat template; and the tokens that end an answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]
#: Stands for an answer, to see what a chat template writes behind one.
_ANSWER = "torchlamp"


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model answers conversations: its tokenizer says how they are written."""
    return bool(tokenizer.chat_template)


def prompt_tokens(tokenizer: Any, prompt: str, *, chat: bool, system: str | None = None) -> Tensor:
    """Tokens, int64 (1, length), of a text to continue or, for a chat, of a first message to answer.

    Raises
    ------
    ValueError
        An empty prompt, a system message without a chat, or a model without a chat template.
    """
    if not chat:
        if system is not None:
            raise ValueError(f"system message {system!r}: only a chat has one, and this prompt is continued")
        ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        if not prompt.strip():
            raise ValueError("the prompt is empty: give at least one word")
        messages = [] if system is None else [{"role": "system", "content": system}]
        ids = torch.tensor([chat_tokens(tokenizer, [*messages, {"role": "user", "content": prompt}])])
    if ids.shape[-1] == 0:
        raise ValueError("the prompt is empty: give at least one word")
    return ids


def chat_tokens(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation, up to where the next answer begins.

    Raises
    ------
    ValueError
        A tokenizer without a chat template, or one that refuses these messages.
    """
    from jinja2 import TemplateError

    if not has_chat_template(tokenizer):
        raise ValueError(
            "the model's tokenizer has no chat template, so it can't chat: `torchlamp generate` continues a text"
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    return ids


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text or an answer, in order.

    Those that the model's generation config and its tokenizer name, and the special token that the chat template writes
    behind an answer: files in the GGUF format name one end of text, which needn't be the end of an answer.
    """
    named = [model.generation_config.eos_token_id, model.config.get_text_config().eos_token_id]
    ends = {tokenizer.eos_token_id, _end_of_answer(tokenizer)}
    for found in named:
        ends |= set(found) if isinstance(found, list | tuple) else {found}
    return sorted(end for end in ends if end is not None)


def _end_of_answer(tokenizer: Any) -> int | None:
    """The special token behind an answer in the chat template, if there is one."""
    from jinja2 import TemplateError

    if not has_chat_template(tokenizer):
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return None
    _, found, behind = text.rpartition(_ANSWER)
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
