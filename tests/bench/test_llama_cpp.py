import sys

import numpy as np
import pytest
import torch
from llama_models import VOCABULARY, gemma, kl, llama, logits, qwen, tokens

from torchlamp.bench import llama_cpp
from torchlamp.bench.gguf_export import write_gguf
from torchlamp.bench.llama_cpp import LlamaCpp, quantise
from torchlamp.bench.off_grid import off_grid

LENGTH, CONTEXT = 200, 150


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert not llama_cpp.available()
    with pytest.raises(ImportError, match=r"pip install 'torchlamp\[bench\]'"):
        LlamaCpp("model.gguf", 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("llama")
    models = {"llama": off_grid(llama(tie_word_embeddings=True)), "gemma": off_grid(gemma()), "qwen": qwen()}
    for name, model in models.items():
        write_gguf(model, folder / f"{name}.gguf")
    return models, folder


@pytest.fixture(params=["llama", "gemma", "qwen"])
def one(files, request):
    """A model and its float32 file."""
    models, folder = files
    return models[request.param], folder / f"{request.param}.gguf"


def steps(decoder, ids):
    decoder.prefill(ids[:CONTEXT])
    return np.stack([decoder.step(token) for token in ids[CONTEXT:].tolist()])


def test_float32_is_the_model(one):
    # Gemma's sliding window is passed twice; its GELU is a table of float16 in llama.cpp.
    model, path = one
    ids = tokens(LENGTH)
    reference = logits(model, ids)
    with LlamaCpp(path, LENGTH, cache_type="f32", threads=1) as decoder:
        assert decoder.vocabulary == VOCABULARY
        assert kl(reference, decoder.logits(ids)) < 1e-6
        assert kl(reference[CONTEXT:], steps(decoder, ids)) < 1e-6


def test_cache_types_differ_in_accuracy(one):
    model, path = one
    ids = tokens(LENGTH)
    reference, found = logits(model, ids), []
    for cache_type in ("f32", "f16", "q8_0"):
        with LlamaCpp(path, LENGTH, cache_type=cache_type, threads=1) as decoder:
            found.append(kl(reference[CONTEXT:], steps(decoder, ids)))
    assert found[0] < found[1] < found[2]


def test_quantised_files(one, tmp_path):
    model, path = one
    ids = tokens(LENGTH)
    reference, found = logits(model, ids), []
    for quantisation in ("Q8_0", "Q4_0"):
        target = tmp_path / f"{quantisation}.gguf"
        quantise(path, target, quantisation, threads=1)
        assert target.stat().st_size < path.stat().st_size
        with LlamaCpp(target, LENGTH, threads=1) as decoder:
            found.append(kl(reference[CONTEXT:], steps(decoder, ids)))
    assert 1e-6 < found[0] < found[1] / 10


def test_prompts_longer_than_a_batch(files):
    models, folder = files
    ids = tokens(700)
    reference = logits(models["llama"], ids)
    with LlamaCpp(folder / "llama.gguf", 700, cache_type="f32", threads=1) as decoder:
        assert kl(reference, decoder.logits(ids)) < 1e-6
        assert kl(reference[-1:], decoder.prefill(ids)[None]) < 1e-6


def test_prefill_starts_anew(one):
    ids = tokens(40)
    with LlamaCpp(one[1], 64, threads=1) as decoder:
        first = decoder.prefill(ids)
        decoder.step(3)
        assert np.array_equal(decoder.prefill(ids.tolist()), first)
        assert decoder.length == 40
        assert decoder.seconds > 0


def test_logits_are_a_copy(one):
    with LlamaCpp(one[1], 64, threads=1) as decoder:
        first = decoder.prefill([1, 2, 3])
        kept = first.copy()
        decoder.step(4)
        assert first.dtype == np.float32
        assert first.shape == (VOCABULARY,)
        assert np.array_equal(first, kept)


def test_wrong_tokens(one):
    with LlamaCpp(one[1], 4, threads=1) as decoder:
        decoder.prefill([1, 2, 3])
        decoder.step(4)
        with pytest.raises(ValueError, match=r"1 tokens after 4: .* room for 0"):
            decoder.step(5)
        with pytest.raises(ValueError, match="token 320: the vocabulary has 0 to 319"):
            decoder.prefill([1, 320])
        with pytest.raises(ValueError, match="0 tokens after 0"):
            decoder.prefill(torch.zeros(0, dtype=torch.int64))


def test_closed(one):
    decoder = LlamaCpp(one[1], 8)
    decoder.close()
    decoder.close()
    with pytest.raises(RuntimeError, match="was closed"):
        decoder.prefill([1])


def test_wrong_settings(one, tmp_path, capfd):
    path = one[1]
    with pytest.raises(ValueError, match="cache type 'q4_0': allowed are f16, q8_0, f32"):
        LlamaCpp(path, 8, cache_type="q4_0")
    with pytest.raises(ValueError, match="0 tokens of context, 2 threads"):
        LlamaCpp(path, 0)
    with pytest.raises(
        ValueError, match="quantisation 'Q5_0': allowed are Q8_0, Q6_K, Q4_K_M, Q4_0, F16, BF16"
    ):
        quantise(path, tmp_path / "out.gguf", "Q5_0")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(OSError, match=r"can't load '.*broken.gguf': .*"):
        LlamaCpp(broken, 8)
    with pytest.raises(OSError, match=r"can't quantise '.*broken.gguf' to Q8_0: .*"):
        quantise(broken, tmp_path / "out.gguf", "Q8_0")
    assert capfd.readouterr() == ("", "")
