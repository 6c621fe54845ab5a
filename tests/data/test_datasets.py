import gzip
import importlib.util
import json
from itertools import count
from pathlib import Path

import pandas
import pytest

from tiny import TEXT
from torchlamp.data import datasets as module
from torchlamp.data import source as dataset_source
from torchlamp.data.datasets import dataset_text
from torchlamp.data.source import PRESETS, Source, check_source
from torchlamp.data.text import Text, cut_windows

WORDS = TEXT.split()
#: Four documents whose ends carry no separator, as in the real data sets.
DOCUMENTS = ["the quick brown fox", " jumps over", "the lazy dog\n", "and sleeps"] * 30
WHOLE = "".join(DOCUMENTS)


def write(folder: Path, name: str, column: str = "text", rows: list[str] = DOCUMENTS) -> Path:
    """The documents as a file in the format that the name says, beside a column of numbers."""
    path = folder / name
    records = [{"id": i, column: row} for i, row in enumerate(rows)]
    table = pandas.DataFrame(records)
    match path.suffixes:
        case [".jsonl"]:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
        case [".json"]:
            path.write_text(json.dumps(records))
        case [".parquet"]:
            table.to_parquet(path)
        case [".csv"]:
            table.to_csv(path, index=False)
        case [".txt"]:
            path.write_text("".join(rows))
    return path


def words(tokenizer, spec, tokens=10_000) -> str:
    return dataset_text(spec, tokenizer, tokens).content


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv", "a.txt"])
def test_every_format_gives_the_documents_without_separator(tiny, tmp_path, name):
    path = write(tmp_path, name)
    assert dataset_text(str(path), tiny[1], 10_000) == Text(str(path), WHOLE)


@pytest.mark.parametrize("preset", PRESETS)
def test_columns_of_the_presets(tiny, tmp_path, preset):
    """A local file with the preset's column, as one gets by downloading the data set's parquet file."""
    source = PRESETS[preset]
    path = write(tmp_path, "train.parquet", source.column)
    assert words(tiny[1], f"{path}:column={source.column}") == WHOLE
    assert words(tiny[1], f"{path}:::{source.column}") == WHOLE


def test_only_column_with_text(tiny, tmp_path):
    assert words(tiny[1], str(write(tmp_path, "a.jsonl", "content"))) == WHOLE


def test_wikitext_keeps_its_lines(tiny, tmp_path):
    lines = ["", " = Title = \n", "", " A paragraph . \n"]
    assert words(tiny[1], str(write(tmp_path, "a.jsonl", rows=lines))) == "".join(lines)


def test_missing_cells_are_left_out(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert words(tiny[1], str(path)) == "ab"


def test_a_file_without_rows_has_no_text(tiny, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n")
    assert words(tiny[1], str(path)) == ""


class TestFolders:
    def test_splits_by_the_names_of_the_files(self, tiny, tmp_path):
        write(tmp_path, "train.jsonl")
        write(tmp_path, "test.jsonl", rows=["the end"])
        assert words(tiny[1], str(tmp_path)) == WHOLE
        assert words(tiny[1], f"{tmp_path}::test") == "the end"
        with pytest.raises(ValueError, match=r"no split 'valid'; the splits are 'train', 'test'"):
            words(tiny[1], f"{tmp_path}:split=valid")

    def test_text_files_keep_their_line_ends(self, tiny, tmp_path):
        (tmp_path / "one.txt").write_text("one\ntwo\n")
        assert words(tiny[1], str(tmp_path)) == "one\ntwo\n"

    def test_saved_by_datasets_itself(self, tiny, tmp_path):
        import datasets

        rows = datasets.Dataset.from_dict({"question": DOCUMENTS})
        rows.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
        assert words(tiny[1], str(tmp_path / "one")) == WHOLE
        assert words(tiny[1], str(tmp_path / "splits")) == WHOLE

    def test_no_data_in_it(self, tiny, tmp_path):
        with pytest.raises((OSError, ValueError), match="can't be read") as caught:
            words(tiny[1], str(tmp_path))
        assert "\n" not in str(caught.value)


class TestHowMuchIsRead:
    def test_no_more_than_the_windows_need(self, tiny):
        """An endless data set: only as much of it is drawn as gives the tokens."""
        drawn = []

        def endless():
            for i in count():
                drawn.append(i)
                yield f" document {i}"

        text = module._beginning(endless(), tiny[1], 100)
        assert len(tiny[1](text)["input_ids"]) >= 100 + module._MARGIN
        assert len(drawn) < 400

    def test_windows_do_not_depend_on_how_much_is_read(self, tiny, tmp_path):
        path = write(tmp_path, "a.parquet")
        text = dataset_text(str(path), tiny[1], 48)
        assert len(text.content) < len(WHOLE)
        whole = cut_windows(tiny[1], [Text("whole", WHOLE)], 3, 16)
        assert cut_windows(tiny[1], [text], 3, 16).tolist() == whole.tolist()

    def test_few_characters_per_token(self, tiny):
        """Text of which every character is a token, and one of which no character is."""
        tokenizer = tiny[1]
        assert len(tokenizer(module._beginning(["é"] * 10_000, tokenizer, 64))["input_ids"]) >= 64
        assert module._beginning(["", ""], tokenizer, 64) == ""

    def test_more_characters_per_token_than_first_read(self):
        class Coarse:
            def __call__(self, text):
                return {"input_ids": [0] * (len(text) // 50)}

        text = module._beginning("x" * 100_000, Coarse(), 100)
        assert (100 + module._MARGIN) * 50 <= len(text) < 2 * 164 * 50

    def test_a_short_data_set_is_said_when_windows_are_cut(self, tiny, tmp_path):
        text = dataset_text(str(write(tmp_path, "a.jsonl", rows=["the fox"])), tiny[1], 64)
        with pytest.raises(ValueError, match=r"a\.jsonl' has \d+ tokens, but 4 windows of 16 need 64"):
            cut_windows(tiny[1], [text], 4, 16)


class TestSpelling:
    @pytest.mark.parametrize(
        ("spec", "source"),
        [
            ("openai/gsm8k", Source("openai/gsm8k")),
            ("openai/gsm8k:main:test:question", Source("openai/gsm8k", "main", "test", "question")),
            ("a/b::test", Source("a/b", split="test")),
            ("a/b:column=body:split=test", Source("a/b", split="test", column="body")),
            ("gsm8k", Source("openai/gsm8k", "main", "test", "question")),
            ("gsm8k::train", Source("openai/gsm8k", "main", "train", "question")),
            ("wikitext2:config=x", Source("Salesforce/wikitext", "x", "test", "text")),
        ],
    )  # fmt: skip
    def test_parse_and_print(self, spec, source):
        assert Source.parse(spec) == source
        assert Source.parse(str(source)) == source
        assert Source.parse(source) is source

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("a/b:c:d:e:f", "too many parts: write name:config:split:column"),
            ("a/b:rows=3", "unknown part 'rows'"),
            ("a/b:main:config=x", "part 'config' appears twice"),
            ("a b", "no usable name"),
            ("", "no usable name"),
            ("opnwebtext", "did you mean 'openwebtext'"),
            ("missing.jsonl", "no data set file or folder 'missing.jsonl'"),
            ("./folder", "no data set file or folder './folder'"),
            ("a/b/c", "no data set file or folder 'a/b/c'"),
        ],
    )
    def test_errors(self, spec, said):
        with pytest.raises((ValueError, OSError), match=said) as caught:
            Source.parse(spec)
        assert "\n" not in str(caught.value)

    def test_a_file_with_a_colon_in_its_name(self, tiny, tmp_path):
        path = write(tmp_path, "a.jsonl").rename(tmp_path / "a:b.jsonl")
        assert Source.parse(str(path)) == Source(str(path))


class TestHub:
    """The calls to `datasets`; the hub itself is not there when tests run."""

    @pytest.fixture
    def calls(self, monkeypatch):
        import datasets

        made = []

        def load_dataset(*arguments, **options):
            made.append((*arguments, options))
            if "scripted" in arguments[0] and "revision" not in options:
                raise RuntimeError("Dataset scripts are no longer supported, but found scripted.py")
            if "broken" in arguments[0]:
                raise RuntimeError("something else\nand more")
            return {"train": [{"text": "the fox "}, {"text": "sleeps"}]}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(dataset_source, "hub_answers", lambda: True)
        return made

    def test_streamed(self, calls, tiny):
        assert words(tiny[1], "owner/plain:main") == "the fox sleeps"
        assert calls == [("owner/plain", "main", {"streaming": True})]

    def test_a_data_set_that_is_a_script_comes_from_its_conversion(self, calls, tiny):
        assert words(tiny[1], "owner/scripted:main") == "the fox sleeps"
        parquet = {"data_dir": "main", "revision": "refs/convert/parquet", "streaming": True}
        assert calls[1:] == [("owner/scripted", parquet)]

    def test_other_errors_in_one_line(self, calls, tiny):
        with pytest.raises(ValueError, match=r"'owner/broken' can't be read: something else$"):
            words(tiny[1], "owner/broken")


class TestErrors:
    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("a.jsonl:::body", "no column 'body'; the columns are 'id', 'text'"),
            ("a.jsonl:::id", "column 'id' holds int, not text"),
            ("a.jsonl::test", "no split 'test'; the splits are 'train'"),
            ("two.jsonl", "say which column holds the text"),
            ("broken.jsonl", "can't be read: JSON parse error"),
            ("notes.md", "files must end in .json, .jsonl"),
        ],
    )
    def test_one_line(self, tiny, tmp_path, monkeypatch, spec, said):
        monkeypatch.chdir(tmp_path)
        write(tmp_path, "a.jsonl")
        Path("two.jsonl").write_text('{"title": "a", "body": "b"}\n')
        Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
        Path("notes.md").write_text("notes")
        with pytest.raises(ValueError, match=said) as caught:
            words(tiny[1], spec)
        assert "\n" not in str(caught.value)

    def test_without_network_one_line_at_once(self, monkeypatch):
        monkeypatch.setattr(dataset_source, "hub_answers", lambda: False)
        with pytest.raises(OSError, match=r"'openai/gsm8k:main:test:question' is on the .* can't be reached"):
            check_source("gsm8k")

    def test_without_the_extra(self, monkeypatch, tmp_path):
        path = write(tmp_path, "a.jsonl")
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name)
        )
        with pytest.raises(ValueError, match=r"pip install 'torchlamp\[datasets\]'"):
            check_source(str(path))
