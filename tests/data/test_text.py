import pytest
import torch

from tiny import CONTEXT, TEXT
from torchlamp.data.text import Text, check_context, cut_windows, default_text, find_text, read_text


def test_default_text_is_long_and_always_the_same():
    text = default_text()
    assert text.name == "pydoc_data.topics"
    assert len(text.content) > 300_000
    assert text == default_text()


def test_windows_are_consecutive_pieces_of_the_tokens(tiny):
    _, tokenizer = tiny
    ids = tokenizer(TEXT)["input_ids"]
    windows = cut_windows(tokenizer, [Text("a", TEXT)], 3, 10)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [ids[0:10], ids[10:20], ids[20:30]]


def test_each_text_gives_its_own_windows_in_order(tiny):
    _, tokenizer = tiny
    first, second = Text("a", TEXT), Text("b", TEXT[17:])
    together = cut_windows(tokenizer, [first, second], 2, 8)
    apart = [cut_windows(tokenizer, [text], 2, 8) for text in (first, second)]
    assert torch.equal(together, torch.cat(apart))


def test_special_tokens_stand_at_the_start_of_a_text_only(tiny):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny[1].backend_tokenizer).from_str(tiny[1].backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    windows = cut_windows(tokenizer, [Text("a", TEXT), Text("b", TEXT)], 2, 8)
    assert [row[0] == 1 for row in windows.tolist()] == [True, False, True, False]
    assert int((windows == 1).sum()) == 2


def test_short_text_says_how_many_tokens_there_are(tiny):
    _, tokenizer = tiny
    tokens = len(tokenizer("the quick fox")["input_ids"])
    with pytest.raises(ValueError, match=rf"'short' has {tokens} tokens, but 4 windows of 3 need 12"):
        cut_windows(tokenizer, [Text("short", "the quick fox")], 4, 3)
    with pytest.raises(ValueError, match="need 20: give a longer text or shorter windows"):
        cut_windows(tokenizer, [Text("short", "the quick fox")], 1, 20)
    with pytest.raises(ValueError, match=r"has 0 tokens, .*: give a longer text$"):
        cut_windows(tokenizer, [Text("empty", "")], 1, 2)


@pytest.mark.parametrize(
    ("count", "length", "said"), [(0, 8, "0 windows"), (1, 1, "window length 1"), (1, -3, "-3")]
)
def test_sizes_out_of_range(tiny, count, length, said):
    with pytest.raises(ValueError, match=said):
        cut_windows(tiny[1], [Text("a", TEXT)], count, length)


def test_no_text(tiny):
    with pytest.raises(ValueError, match="no text"):
        cut_windows(tiny[1], [], 1, 8)


def test_context(tiny):
    check_context(tiny[0], CONTEXT)
    with pytest.raises(
        ValueError, match=f"window length {CONTEXT + 1} is longer than the model's context of {CONTEXT}"
    ):
        check_context(tiny[0], CONTEXT + 1)


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("naïve\r\nline".encode())
    assert read_text(path) == Text(str(path), "naïve\r\nline")
    path.write_bytes(b"\xef\xbb\xbfwith a mark")
    assert read_text(path).content == "with a mark"


def test_unreadable_text_files(tmp_path):
    with pytest.raises(OSError, match=r"nothing\.txt' can't be read: No such file"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(OSError, match="directory"):
        read_text(tmp_path)
    path = tmp_path / "latin.txt"
    path.write_bytes("abc é".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xe9 at offset 4"):
        read_text(path)


def test_texts_by_name():
    assert find_text("prose") == Text("prose", default_text().content)
    code = find_text("code")
    assert code.name == "code"
    assert code.content.count("\ndef ") > 50
    # 64 windows of 512 tokens, at less than 5 characters a token.
    assert len(code.content) > 64 * 512 * 5


def test_a_file_may_have_the_name_of_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").write_text("mine")
    assert find_text("./code").content == "mine"
    assert len(find_text("code").content) > 1000


def test_the_nearest_text_is_suggested():
    with pytest.raises(FileNotFoundError, match="did you mean 'prose'"):
        find_text("prosa")
