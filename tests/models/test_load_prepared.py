"""`load(name, precision=...)`: prepared, weights in their file, low-bit copies from the cache on the disk."""

import json
import logging
import os
import shutil
import sys

import pytest
import torch

import torchlamp
from torchlamp.huggingface.prepare import FAST, prepare
from torchlamp.kernels.low_bit_matrix import LowBitMatrix
from torchlamp.models import cache, kept_copies
from torchlamp.models.load import cache_entry, load

IDS = torch.arange(3, 23)[None]
LINUX = sys.platform.startswith("linux")


@pytest.fixture
def folder(tiny_folder, tmp_path, monkeypatch):
    """A model's folder that may be changed, and an empty cache."""
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


@pytest.fixture
def packed(monkeypatch):
    """Counts the matrices that are packed."""
    count, pack = [], LowBitMatrix.pack

    def counted(weight, bits):
        count.append(bits)
        return pack(weight, bits)

    monkeypatch.setattr(LowBitMatrix, "pack", staticmethod(counted))
    return count


def logits(model):
    with torch.no_grad():
        output = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=5,
            eos_token_id=[],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(output.logits)


def entry():
    (found,) = (e for e in cache.entries() if e.kind == "low-bit copies")
    return found.path


@pytest.mark.parametrize("policy", ["default", "fast", FAST, "qkv=int8, lm_head=int4"])
def test_loaded_twice_it_is_the_prepared_model(folder, packed, policy):
    model, tokenizer = load(str(folder))
    with prepare(model, policy):
        want = logits(model)
    packed.clear()
    for again in (False, True):
        model, tokenizer = load(str(folder), precision=policy)
        assert bool(packed) is not again
        packed.clear()
        assert tokenizer("the quick").input_ids
        own = torchlamp.prepared(model)
        assert own.memory.resident is not LINUX
        assert torch.equal(logits(model), want)
        assert own.statistics.rates["lm_head"] > 0
    own.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.name_or_path == str(folder)
    assert cache.find_problem(entry()) is None


def test_half_precision_stays_as_it_is(folder, packed):
    model, _ = load(str(folder))
    model.to(torch.bfloat16).save_pretrained(folder)
    wide, _ = load(str(folder))
    with prepare(wide):
        want = logits(wide)
    for _ in range(2):
        packed.clear()
        model, _ = load(str(folder), precision="default")
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(logits(model), want)
    assert not packed


@pytest.mark.parametrize("harm", ["flip", "cut", "index", "manifest", "fit"])
def test_damaged_copies_are_made_again(folder, packed, caplog, harm):
    model, _ = load(str(folder), precision="default")
    want, data = logits(model), entry() / "copies.bin"
    content = bytearray(data.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    # Whoever has mapped the old file keeps it.
    data.unlink()
    data.write_bytes(content[:-1] if harm == "cut" else content)
    if harm == "index":
        (entry() / "copies.json").write_text("{")
    if harm == "manifest":
        (entry() / cache.MANIFEST).unlink()
    if harm == "fit":  # whole, and not what the model needs
        index = json.loads((entry() / "copies.json").read_text())
        for place in index["tensors"].values():
            place[1] = [size // 2 for size in place[1]]

        def fill(new):
            (new / "copies.bin").write_bytes(content)
            (new / "copies.json").write_text(json.dumps(index))

        cache.store(entry(), fill)
    packed.clear()
    model, _ = load(str(folder), precision="default")
    assert packed
    assert f"the low-bit copies in {entry()} {'dont fit' if harm == 'fit' else 'are damaged'} (".replace(
        "dont", "don't"
    ) in (caplog.text)
    assert torch.equal(logits(model), want)
    packed.clear()
    load(str(folder), precision="default")
    assert not packed


def test_they_are_made_anew_for_other_weights_policies_and_formats(folder, packed, monkeypatch):
    def made(policy="default"):
        packed.clear()
        model, _ = load(str(folder), precision=policy)
        return bool(packed), model

    assert made()[0]
    assert not made()[0]
    model, _ = load(str(folder))
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.25)
    model.save_pretrained(folder)
    with prepare(model):
        want = logits(model)
    again, model = made()
    assert again
    assert torch.equal(logits(model), want)
    assert not made()[0]
    path = entry()
    assert made("fast")[0]
    assert not made()[0]
    assert len(cache.entries()) == 2
    monkeypatch.setattr(kept_copies, "FORMAT", kept_copies.FORMAT + 1)
    assert made()[0]
    assert not made()[0]
    shutil.rmtree(path)
    assert made()[0]


@pytest.mark.parametrize("trouble", ["full", "unwritable"])
def test_a_disk_that_takes_nothing_is_a_warning(folder, packed, caplog, monkeypatch, tmp_path, trouble):
    if trouble == "full":

        def full(self, file, *rest):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept_copies.KeptCopies, "_fill", full)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        packed.clear()
        model, _ = load(str(folder), precision="default")
        assert packed
        assert "the low-bit copies can't be kept in" in caplog.text
        assert logits(model).isfinite().all()
    assert not cache.entries()


def test_a_converted_model_is_hashed_where_copies_are_made_of_it(converted, packed, monkeypatch):
    source, calls = converted
    hashed, pieces = [], cache._pieces
    monkeypatch.setattr(cache, "_pieces", lambda path: hashed.append(path.name) or pieces(path))
    want = logits(load(str(source), precision="default")[0])
    hashed.clear()
    assert torch.equal(logits(load(str(source), precision="default")[0]), want)
    assert "copies.bin" in hashed
    assert "model.safetensors" not in hashed
    assert len(calls) == 1
    # Bad copies, and a bit of the weights that the sampled first and last MiB don't show.
    data = entry() / "copies.bin"
    flipped = bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:]
    data.unlink()
    data.write_bytes(flipped)
    hashed.clear()
    assert torch.equal(logits(load(str(source), precision="default")[0]), want)
    assert "model.safetensors" in hashed
    assert len(calls) == 1
    weights = cache_entry(str(source)) / "model.safetensors"
    status = weights.stat()
    os.utime(weights, (status.st_atime, status.st_mtime + 5))
    packed.clear()
    load(str(source), precision="default")
    assert packed


def test_weights_that_lie_in_no_file_stay_in_memory(folder, caplog, monkeypatch):
    from torchlamp.huggingface import file_weights

    monkeypatch.setattr(file_weights, "file_mappings", list)
    model, _ = load(str(folder), precision="default")
    assert torchlamp.prepared(model).memory.resident
    assert "full-precision weights stay in memory: " in caplog.text


def test_what_is_refused(folder):
    with pytest.raises(ValueError, match="qvk"):
        load(str(folder), precision="qvk=int8")
    with pytest.raises(ValueError, match="has no decoding kernel"):
        load(str(folder), precision="qkv=ps4")
    with pytest.raises(FileNotFoundError, match=r"no file 'none\.gguf'"):
        load("none.gguf", precision="default")
    assert not cache.entries()


def test_generate_and_chat_take_kept_copies(folder, packed, caplog):
    from torchlamp.evaluation.generation import generate, load_for_generation

    caplog.set_level(logging.INFO)
    ids = []
    for policy in (None, None, "ps4+strict:0.1"):
        packed.clear()
        parsed = None if policy is None else torchlamp.Policy.parse(policy)
        model, tokenizer = load_for_generation(str(folder), parsed)
        for _ in range(2):
            done = generate(model, tokenizer, "the quick brown", parsed, 4, str)
            ids.append(done.ids)
    assert not packed
    assert ids[0] == ids[1] == ids[2] == ids[3]
    model, tokenizer = load_for_generation(str(folder))
    with pytest.raises(ValueError, match=r"prepared\(model\)\.undo\(\)"):
        generate(model, tokenizer, "the quick", None, 4, str, full_precision=True)
    with pytest.raises(ValueError, match=r"prepared"):
        generate(model, tokenizer, "the quick", torchlamp.Policy.parse("qkv=int8"), 4, str)
