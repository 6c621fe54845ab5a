"""Streamed text: the pieces are those of the whole text, and come as early as they are sure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torchlamp.evaluation.text_stream import TextStream

SAMPLE = "naïve 中文没有空格 🙂🙃 e\u0301 and, then: it's\n\n  done."


def byte_level():
    """GPT-2's way: every byte is a letter of its own, and a token may end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback():
    """SentencePiece's way: a blank belongs to the next word, the first one is dropped, rare characters are bytes."""
    words = ["▁", "▁and", ",", "▁then", ":", "n", "a", "v", "e", "i", "t", "s", "'", ".", "d", "o", "文"]
    vocabulary = {word: n for n, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def streamed(tokenizer, prompt, ids, *, echo=False):
    """The pieces written after the prompt and after each token, and at the end."""
    pieces = [""]
    stream = TextStream(tokenizer, lambda piece: pieces.__setitem__(-1, pieces[-1] + piece), echo=echo)
    stream.put(torch.tensor([prompt]))
    for token in ids:
        pieces.append("")
        stream.put(torch.tensor([token]))
    pieces.append("")
    stream.end()
    assert stream.ids == list(ids)
    assert len(stream.times) == len(ids) + 1
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=150))
def test_the_pieces_are_the_text(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(streamed(tokenizer, [0], ids)) == whole
    prompt, new = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    assert "".join(streamed(tokenizer, prompt, new, echo=True)) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_comes_with_its_last_byte(name):
    """Not at the next blank, as transformers' own streamer has it, and never as half a character."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(SAMPLE)["input_ids"]
    pieces = streamed(tokenizer, [0], ids)
    assert "\ufffd" not in "".join(pieces)
    so_far = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
    for number in range(1, len(ids) + 1):
        whole_characters = [text for text in so_far[: number + 1] if "\ufffd" not in text]
        assert "".join(pieces[: number + 1]) == whole_characters[-1]
    assert pieces[-1] == ""


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 255), min_size=1, max_size=200))
def test_bytes_that_are_no_text_come_too(ids):
    """A model may write anything: what no later token can mend isn't waited for."""
    tokenizer = TOKENIZERS["byte-level"]
    pieces = streamed(tokenizer, [0], ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    shown = ""
    for number, piece in enumerate(pieces[1:-1], start=1):
        shown += piece
        assert len(tokenizer.decode(ids[:number])) - len(shown) <= 3


@pytest.mark.parametrize("text", ["word " * 400, "没有空格" * 100])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_nothing_is_decoded_over_and_over(monkeypatch, name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text)["input_ids"]
    lengths = []
    original = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda x, **more: (lengths.append(len(x)), original(x, **more))[1]
    )
    assert "".join(streamed(tokenizer, [0], ids)) == original(ids)
    assert max(lengths) < 80
