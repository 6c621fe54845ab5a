"""The look-ahead cache as a transformers cache: whatever is done to it, with everything recomputed it is exact."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from torchlamp.huggingface.decode_attention import decode_attention
from torchlamp.huggingface.lookahead_cache import NAME, LookaheadCache
from torchlamp.huggingface.prepare import prepare

EXACT = {"scores": "int8+all", "values": "int8+all", "full": "float32"}
POLICY = "scores=int8.center.hadamard+all, values=int8+all"
pytestmark = pytest.mark.usefixtures("no_grad")


def steps(model, cache, tokens, prefill, mask=None):
    """Logits of a prefill and then of single tokens."""
    grown = [] if mask is None else [mask]
    logits = []
    parts = [tokens[:, :prefill], *tokens[:, prefill:].split(1, dim=1)]
    for part in parts:
        more = {}
        if mask is not None:
            if logits:
                grown.append(torch.ones(len(tokens), part.shape[1], dtype=mask.dtype))
            more = {"attention_mask": torch.cat(grown, 1)}
        output = model(part, past_key_values=cache, use_cache=True, **more)
        logits.append(output.logits)
    return torch.cat(logits, 1)


def expected(model, tokens, prefill, mask=None):
    return steps(model, DynamicCache(config=model.config), tokens, prefill, mask)


@pytest.mark.parametrize("prefill", [1, 4, 20])
def test_decoding_equals_the_models_own(model, tokens, prefill):
    ids = tokens(2, 40)
    reference = expected(model, ids, prefill)
    with prepare(model, POLICY, full="float32") as prepared:
        found = steps(model, prepared.cache(), ids, prefill)
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    assert prepared.statistics.recompute_rates["scores"] == 1.0


def test_padding(model, padded, tokens):
    ids, mask = padded["left"]["input_ids"], padded["left"]["attention_mask"]
    ids = torch.cat([ids, tokens(3, 12, seed=1)], 1)
    reference = expected(model, ids, 17, mask)[:, 17:]
    with prepare(model, POLICY, full="float32") as prepared:
        found = steps(model, prepared.cache(), ids, 17, mask)[:, 17:]
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


def test_default_thresholds_are_close(llama, tokens):
    ids = tokens(1, 60)
    reference = expected(llama, ids, 30)
    errors = []
    for policy in (
        "scores=int8.center.hadamard, values=int8",
        "scores=int8.center.hadamard+running:0.001, values=int8+topz:0.003",
    ):
        with prepare(llama, policy) as prepared:
            errors.append((steps(llama, prepared.cache(), ids, 30) - reference).norm())
    assert errors[1] < errors[0] / 3


def test_an_ordinary_cache_under_other_attention(model, tokens):
    ids = tokens(2, 30)
    reference = expected(model, ids, 11)
    found = steps(model, LookaheadCache(model.config, **EXACT), ids, 11)
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate(model, tokens, how):
    ids = tokens(2, 9)
    settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids), **how}
    reference = model.generate(ids, **settings)
    with prepare(model, POLICY, full="float32"):
        assert torch.equal(model.generate(ids, **settings), reference)
    assert torch.equal(model.generate(ids, **settings), reference)


def test_assisted_generation_crops(llama, build, tokens):
    ids = tokens(1, 9)
    assistant = build("llama")
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.1)
    settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    reference = llama.generate(ids, **settings)
    with prepare(llama, POLICY, full="float32"):
        assert torch.equal(llama.generate(ids, assistant_model=assistant, **settings), reference)


def decoded(model, cache, tokens):
    with prepare(model, POLICY, full="float32"):
        return steps(model, cache, tokens, 1)


def test_crop_repeat_select_and_reorder(llama, tokens):
    ids = tokens(2, 20)
    with prepare(llama, POLICY, full="float32") as prepared:
        cache = prepared.cache()
        steps(llama, cache, ids, 12)
    cache.crop(-5)
    assert cache.get_seq_length() == 15
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    more = tokens(2, 4, seed=2)
    whole = torch.cat([ids[[1, 0], :15], more], 1)
    reference = expected(llama, whole, 15)[:, 15:]
    torch.testing.assert_close(decoded(llama, cache, more), reference, rtol=1e-3, atol=1e-4)


def test_a_sliding_window_moves_on(build, tokens):
    model = build("gemma3")
    ids = tokens(1, 200)
    reference = expected(model, ids, 3)
    with prepare(model, POLICY, full="float32") as prepared:
        cache = prepared.cache()
        for layer in cache.layers:
            layer.slack = 8
        found = steps(model, cache, ids, 3)
    torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    sliding = next(layer for layer in cache.layers if layer.is_sliding)
    assert sliding.store.length < 40
    assert sliding.get_seq_length() == 200
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-60)
    with pytest.raises(ValueError, match=r"crop\(3\)"):
        sliding.crop(3)


def test_save_restore_copy_and_pickle(llama, tokens, tmp_path):
    ids, more = tokens(1, 30), tokens(1, 5, seed=3)
    with prepare(llama, POLICY, full="float32") as prepared:
        cache = prepared.cache()
        steps(llama, cache, ids, 20)
    cache.save(tmp_path / "cache.safetensors")
    restored = LookaheadCache(llama.config, **EXACT)
    restored.restore(tmp_path / "cache.safetensors")
    copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    reference = decoded(llama, cache, more)
    assert torch.equal(decoded(llama, copied, more), reference)
    assert torch.equal(decoded(llama, restored, more), reference)
    # Its config is a copy, which says that the ordinary attention runs.
    torch.testing.assert_close(decoded(llama, pickled, more), reference, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory == (0, 0)


def test_restore_refuses(llama, tmp_path):
    cache = LookaheadCache(llama.config)
    (tmp_path / "none").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="no saved cache"):
        cache.restore(tmp_path / "none")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"scores": "int4+all"}, "key_bits=8 in layer 0, this cache has key_bits=4"),
        ({"values": "int4+all"}, "value_bits=8 in layer 0, this cache has value_bits=4"),
        ({"full": "float16"}, "full=float32 in layer 0, this cache has full=float16"),
        ({"center": False}, "center=True in layer 0, this cache has center=False"),
        ({"hadamard": False}, "hadamard=True in layer 0, this cache has hadamard=False"),
    ],
)
def test_restore_refuses_other_options(llama, tokens, tmp_path, other, said):
    """They say what the numbers mean: restored under others, the cache would give wrong results."""
    cache = LookaheadCache(llama.config, **EXACT)
    steps(llama, cache, tokens(1, 20), 19)
    cache.save(tmp_path / "cache")
    different = LookaheadCache(llama.config, **(EXACT | other))
    with pytest.raises(ValueError, match=f"saved with {said}: make the cache with the same options"):
        different.restore(tmp_path / "cache")
    assert different.get_seq_length() == 0


def test_restore_refuses_other_windows_and_files_without_options(build, llama, tmp_path):
    LookaheadCache(build("mistral").config).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="sliding_window=6 in layer 0, this cache has sliding_window=None"):
        LookaheadCache(llama.config).restore(tmp_path / "cache")
    save_file({"0.seen": torch.tensor([0, 0])}, tmp_path / "older")
    with pytest.raises(ValueError, match="doesn't say with which options it was saved"):
        LookaheadCache(llama.config).restore(tmp_path / "older")


def test_thresholds_may_differ(llama, tokens, tmp_path):
    cache = LookaheadCache(llama.config, **EXACT)
    steps(llama, cache, tokens(1, 20), 19)
    cache.save(tmp_path / "cache")
    other = LookaheadCache(llama.config, scores="int8+running:0.1", values="int8", full="float32")
    other.restore(tmp_path / "cache")
    assert other.get_seq_length() == 20


def test_memory(llama, tokens):
    cache = LookaheadCache(llama.config)
    llama(tokens(1, 64), past_key_values=cache, use_cache=True)
    low, full = cache.memory
    # Two layers, keys and values, two heads of 8 (a group of 32), 64 places.
    assert full == 2 * 2 * 2 * 64 * 8 * 2
    assert low == 2 * 2 * 64 * (2 * (32 + 2) + 4)


def test_refuses(llama, tokens):
    with pytest.raises(ValueError, match="full='int8'"):
        LookaheadCache(llama.config, full="int8")
    with pytest.raises(ValueError, match="'int12'"):
        LookaheadCache(llama.config, scores="int12")
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    attention = llama.model.layers[0].self_attn
    with pytest.raises(ValueError, match="position_bias"):
        decode_attention(attention, q, k, k, None, position_bias=q)
    with pytest.raises(ValueError, match="dropout"):
        decode_attention(attention, q, k, k, None, dropout=0.1)
    assert NAME == "lamp-decode"


@pytest.mark.parametrize(
    ("scores", "keywords", "center", "hadamard"),
    [
        ("int8+running:0.001", {}, True, True),
        ("int8", {"center": False}, False, True),
        ("int8", {"hadamard": False}, True, False),
        ("int8.center", {}, True, False),
        ("int8.hadamard", {}, False, True),
        ("int8.hadamard", {"hadamard": False, "center": True}, True, False),
    ],
)
def test_transforms_of_the_cache(model, scores, keywords, center, hadamard):
    options = LookaheadCache(model.config, scores=scores, **keywords).layers[0].store.options
    assert (options.center, options.hadamard) == (center, hadamard)
