"""`prepare(model, resident=False)`: full-precision weights stay in their file, and the numbers stay the same."""

import copy
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from decoding_models import GUARDED, decoded, is_untouched
from transformers import DynamicCache

from torchlamp.huggingface import file_weights
from torchlamp.huggingface.file_weights import file_mappings
from torchlamp.huggingface.prepare import DEFAULT, prepare
from torchlamp.kernels import native

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps files in Linux's way"),
]
#: Memory before and after a model of some 27 million weights was loaded, prepared and has read a prompt and decoded.
SCRIPT = """
import sys, torch, transformers
from torchlamp.huggingface.prepare import prepare

def resident():
    return 1024 * int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

def run(folder, policy, prompt, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        prepared = prepare(model, policy, resident=sys.argv[4] == "True")
        ids = torch.arange(1, prompt + 1)[None] % 60
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return model, prepared

torch.set_num_threads(1)
kept = run(sys.argv[1], sys.argv[3], 128, 4)  # what the libraries and one prompt take, whatever the model
before = resident()
model, prepared = run(sys.argv[2], sys.argv[3], 128, 16)
print((resident() - before) / sum(p.numel() for p in model.parameters()))
"""
EIGHT = (
    "scores=int8.center.hadamard+running:0.01, values=int8+topz:0.02, qkv=int8, attention_out=int8, mlp_up=int8, "
    "mlp_down=int8, lm_head=int8+running:0.001"
)


@pytest.fixture
def saved(build, tmp_path):
    """A model read from a file, and the same one in memory."""

    def save(name, dtype):
        built = build(name).to(dtype)
        built.save_pretrained(tmp_path / name)
        read = type(built).from_pretrained(tmp_path / name, dtype="auto", attn_implementation="eager")
        return read.eval(), copy.deepcopy(read).eval()

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_numbers_are_those_of_resident_weights(saved, tokens, monkeypatch, name, dtype):
    monkeypatch.setattr(file_weights, "_LEAST", 1000)  # let go again and again
    (read, model), x, results = saved(name, dtype), tokens(2, 16), []
    for each, resident in ((read, False), (model, True)):
        with prepare(each, GUARDED, resident=resident) as prepared:
            results.append(decoded(each, x, prepared.cache()))
        assert prepared.memory.resident == resident
        assert (" in their file" in str(prepared.memory)) != resident
        assert is_untouched(each)
    assert torch.equal(*results)
    for (key, one), other in zip(read.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_a_copy_of_the_model_has_memory_of_its_own(saved, tokens):
    (read, _), x = saved("llama", torch.bfloat16), tokens(1, 12)
    with prepare(read, GUARDED, resident=False) as prepared:
        want = decoded(read, x, prepared.cache())
        other, cache = copy.deepcopy(read), prepared.cache()
        assert not [m for m in file_mappings() if m.start <= other.lm_head.weight.data_ptr() < m.end]
        other(x[:, :9], past_key_values=cache)
        assert torch.equal(
            decoded(other, x, DynamicCache(config=other.config)).isnan().any(), torch.tensor(False)
        )
        assert torch.equal(decoded(other, x, prepared.cache()), want)


def test_memory_is_given_back_once_a_cache_is_gone(saved, tokens, monkeypatch):
    (read, model), x, freed = saved("llama", torch.float32), tokens(1, 12), []
    with prepare(read, GUARDED, resident=False) as prepared:
        cache = prepared.cache()
        decoded(read, x, cache)
        stores = [weakref.ref(layer.store) for layer in cache.layers]
        monkeypatch.setattr(file_weights, "_trim", lambda: freed.append([store() for store in stores]))
        del cache
        assert freed == [[None] * len(stores)]
    with prepare(model, GUARDED) as prepared:
        prepared.cache()
    assert len(freed) == 1


def test_weights_that_lie_in_no_file_are_refused(build, saved):
    model = build("llama")
    with pytest.raises(ValueError, match=r"resident=False: model\.\S+ lies in no file .*save_pretrained"):
        prepare(model, resident=False)
    assert is_untouched(model)
    read, _ = saved("llama", torch.float32)
    read.lm_head.weight[3, 4] = 1.0
    with pytest.raises(ValueError, match=r"weights were changed since they were read from .*safetensors"):
        prepare(read, resident=False)
    assert is_untouched(read)


@pytest.mark.skipif(not native.available(), reason="the references take memory for the moment, and time")
def test_memory_of_a_process(tmp_path):
    """Bytes a weight, measured: copies of 12 bits alone, and copies of 8 bits beside resident weights of 16."""
    common = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
    }
    large = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    for name, sizes in (("large", large), ("small", large | {"num_hidden_layers": 1})):
        config = transformers.LlamaConfig(**sizes, **common)
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)

    def measured(policy, resident):
        arguments = [str(tmp_path / "small"), str(tmp_path / "large"), policy, str(resident)]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert 1.3 < measured(DEFAULT, False) <= 1.75
    assert measured(EIGHT, True) >= 2.7
