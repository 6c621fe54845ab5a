"""What a model will need is told before it is loaded, from headers alone, and too large a model is refused."""

import json

import pytest
import torch
import transformers

from torchlamp.bench.gguf_export import write_gguf
from torchlamp.huggingface.copies import Copies
from torchlamp.huggingface.prepare import DEFAULT, FAST, prepare_from
from torchlamp.models import memory
from torchlamp.models import need as needs
from torchlamp.models.load import load, memory_need


@pytest.fixture
def unloadable(monkeypatch):
    """Nothing may be read but headers and configurations."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)


@pytest.mark.parametrize("policy", [DEFAULT, FAST, "default", "qkv=int4, lm_head=int8"])
def test_it_is_what_prepare_makes(tiny_folder, policy):
    told = memory_need(str(tiny_folder), precision=policy, context=128)
    model, _ = load(str(tiny_folder))
    copies = Copies()
    with torch.no_grad(), prepare_from(copies, model, policy) as prepared:
        assert told.weights == sum(p.numel() for p in model.parameters())
        assert told.full == prepared.memory.full == 4 * told.weights
        kinds = ("codes", "scales", "errors", "down_full")
        made = {n: t for n, t in copies.tensors.items() if n.rpartition("/")[2].split(".")[-1] in kinds}
        assert told.copies == sum(tensor.nbytes for tensor in made.values())
        if "scores" in prepared.settings:
            cache = prepared.cache()
            model(torch.arange(128)[None], past_key_values=cache)
            held = sum(t.nbytes for layer in cache.layers for t in layer.store._tensors().values())
            assert told.cache == held
        else:
            assert (
                told.cache == 2 * 2 * 128 * 2 * 8 * 4
            )  # keys and values, layers, tokens, heads, size, float32
    assert told.in_file
    assert told.total == told.copies + told.cache


def test_a_sliding_window_holds_no_more_than_it_needs():
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 32, "num_attention_heads": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, **sizes, **kinds
    )
    short, long = (needs.need("tiny", lambda: config, (0, 0), DEFAULT, n).cache for n in (64, 4096))
    assert short * (4096 + 64 + 256) == long * 2 * 64


def test_plain_loads_and_half_precision(tiny_folder, tmp_path):
    model, tokenizer = load(str(tiny_folder))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wide, kept = (memory_need(str(tmp_path), dtype=dtype) for dtype in ("float32", "auto"))
    assert (wide.total, kept.total) == (4 * wide.weights, 2 * wide.weights)
    assert memory_need(str(tmp_path), precision="fast").full == kept.full


def test_a_model_that_does_not_fit_is_refused(tiny_folder, monkeypatch, unloadable):
    monkeypatch.setattr(needs, "machine_memory", lambda: 20_000)
    with pytest.raises(MemoryError) as refused:
        load(str(tiny_folder))
    assert "needs 0 MB (0 MB of weights), and this machine has 0 MB: take a smaller model, or leave" in str(
        refused.value
    )
    with pytest.raises(
        MemoryError, match=r"\(.* of low-bit copies\), .*: take a smaller model, or fewer bits"
    ):
        load(str(tiny_folder), precision="default")
    monkeypatch.setattr(needs, "machine_memory", lambda: 10**9)
    with pytest.raises(Exception, match="can't be loaded"):
        load(str(tiny_folder))


def test_gguf_files_are_told_by_their_header(tiny_folder, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    write_gguf(model, tmp_path / "tiny.gguf")
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        told = memory_need(str(tmp_path / "tiny.gguf"), context=64)
        patch.setattr(needs, "machine_memory", lambda: 20_000)
        with pytest.raises(MemoryError, match="of weights"):
            load(str(tmp_path / "tiny.gguf"), precision="fast")
    assert told.weights == sum(p.numel() for p in model.parameters())
    assert (told.full, told.in_file) == (4 * told.weights, False)
    assert told.cache > 0


def test_what_has_no_headers(tmp_path):
    with pytest.raises(OSError, match="no safetensors files on this machine"):
        memory_need("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="no safetensors files on this machine"):
        memory_need(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ValueError, match="is no safetensors file"):
        memory_need(str(tmp_path))


def test_control_groups_count(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN", tmp_path / "own")
    installed = memory.machine_memory()
    (tmp_path / "own").write_text("4:cpu,memory:/docker/7\n0::/a/b\n")
    for group, limit in (("a/b", "max"), ("a", "3000"), ("memory/docker/7", "9223372036854771712")):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        name = "memory.limit_in_bytes" if group.startswith("memory") else "memory.max"
        (tmp_path / group / name).write_text(limit + "\n")
    assert memory.machine_memory() == 3000
    (tmp_path / "a" / "memory.max").write_text("max\n")
    assert memory.machine_memory() == installed
    (tmp_path / "memory" / "docker" / "7" / "memory.limit_in_bytes").write_text("5000\n")
    assert memory.machine_memory() == 5000
    assert json.dumps(installed).isdigit()
