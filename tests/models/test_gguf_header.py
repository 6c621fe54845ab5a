"""Headers of GGUF files against the gguf package's reader, and files that are cut anywhere."""

import socket

import gguf
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tiny import CONTEXT, save_tiny_model
from torchlamp.bench.gguf_export import write_gguf
from torchlamp.models import conversion
from torchlamp.models.gguf_header import check_not_cut, read_header
from torchlamp.models.load import context_length, load
from torchlamp.models.packaged import PACKAGED


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model's file."""
    folder = tmp_path_factory.mktemp("gguf")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model"))
    write_gguf(model, folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture
def small(tmp_path):
    """A file with a setting of every type, and tensors of two."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"test.{name}", 7)
    writer.add_float32("test.float32", 0.5)
    writer.add_float64("test.float64", 0.25)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "naïve")
    writer.add_array("test.words", ["one", "two", ""])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_tensor("a", np.ones((3, 32), dtype=np.float32))
    writer.add_tensor("b", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", list(PACKAGED))
def test_the_contexts_of_the_packaged_models_are_those_of_their_files(name):
    model = PACKAGED[name]
    if model.installed() is None:
        pytest.skip(f"needs {name}: {model.install}")
    with model.gguf() as path:
        assert read_header(path).context_length == model.context_length == context_length(name)


def test_nothing_is_fetched_for_a_context(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", None)
    assert context_length("someone/a-model-that-is-not-here") is None


def test_settings_and_size_are_those_of_the_reader(small, whole):
    for path in (small, whole):
        header, reader = read_header(path), gguf.GGUFReader(path)
        last = max(reader.tensors, key=lambda tensor: tensor.data_offset)
        assert header.size == last.data_offset + last.n_bytes
        scalars = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types and field.types[0] != gguf.GGUFValueType.ARRAY and not name.startswith("GGUF.")
        }
        assert header.settings == scalars
    assert read_header(small).settings["test.string"] == "naïve"
    assert read_header(whole).context_length == context_length(str(whole)) == CONTEXT


def test_a_file_that_is_cut_anywhere_is_called_truncated(small):
    content = small.read_bytes()
    size = read_header(small).size
    check_not_cut(small)
    for length in range(4, size):
        small.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"small\.gguf' is truncated: .*get it again"):
            check_not_cut(small)
    small.write_bytes(content[:size])
    check_not_cut(small)


def test_what_is_no_gguf_file_is_left_to_others(small):
    content = small.read_bytes()
    for other in (b"", b"GGU", b"nonsense" * 10, content[:4] + b"\x00\x00\x00\x03" + content[8:]):
        small.write_bytes(other)
        assert read_header(small) is None
        check_not_cut(small)


def test_load_says_it_before_anything_is_converted(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "convert", lambda path: pytest.fail("converted"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"is truncated: it has {cut.stat().st_size} of the \d+ bytes"):
        load(str(cut))
