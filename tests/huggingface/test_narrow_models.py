"""bfloat16 and float16 models prepared as they are: the numbers of float32, and no float32 copy of a matrix."""

import copy

import pytest
import torch
from decoding_models import decoded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import torchlamp
from torchlamp.huggingface.prepare import prepare
from torchlamp.kernels import full_rows, native

pytestmark = pytest.mark.usefixtures("no_grad")
FAMILIES = ["llama", "qwen2", "gemma3"]
GUARDED = (
    "scores=int8.center.hadamard+running:0.01, values=int8+topz:0.02, qkv=int12, attention_out=int8, "
    "mlp_up=int8+output:0.005, mlp_down=int8+output:0.002, lm_head=int8+running:0.001"
)
KERNELS = [native.instruction_set(), "torch"] if native.available() else ["torch"]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setenv("TORCHLAMP_KERNELS", request.param)


def narrow_and_wide(build, name, dtype):
    narrow = copy.deepcopy(build(name)).to(dtype)
    return narrow, copy.deepcopy(narrow).float()


class LargestFloat32(TorchDispatchMode):
    """The largest number of elements of a float32 tensor with its own memory that torch made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "policy", [GUARDED, "qkv=int12", "mlp_up=int4+all, mlp_down=int4+all", "lm_head=int4+all"]
)
def test_numbers_are_those_of_the_model_in_float32(build, tokens, name, dtype, policy):
    narrow, wide = narrow_and_wide(build, name, dtype)
    ids = tokens(2, 12)
    with prepare(narrow, policy, full="float32") as few, prepare(wide, policy, full="float32") as many:
        assert narrow.dtype == dtype
        caches = [p.cache() if "scores" in policy else DynamicCache() for p in (few, many)]
        found, expected = (decoded(model, ids, c) for model, c in zip((narrow, wide), caches, strict=True))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert few.statistics.selected_by_site == many.statistics.selected_by_site
        assert few.statistics.eligible_by_site == many.statistics.eligible_by_site


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
def test_the_model_comes_back_as_it_was(build, tokens, name, dtype):
    narrow, _ = narrow_and_wide(build, name, dtype)
    ids = tokens(1, 9)
    before = narrow(ids).logits
    tensors = {name: (t.data_ptr(), t.dtype) for name, t in narrow.state_dict().items()}
    with prepare(narrow, "qkv=int8"):
        assert narrow(ids).logits.dtype == torch.float32
    assert {name: (t.data_ptr(), t.dtype) for name, t in narrow.state_dict().items()} == tensors
    assert not any("forward" in vars(module) for module in narrow.modules())
    assert torch.equal(narrow(ids).logits, before)


def test_a_prompt_equals_that_of_the_float32_model(build, tokens, dtype, monkeypatch):
    narrow, wide = narrow_and_wide(build, "llama", dtype)
    monkeypatch.setattr(full_rows, "SLAB", 1000)  # many slabs a matrix
    ids = tokens(2, 11)
    with prepare(wide, GUARDED) as prepared:
        expected = wide(ids, past_key_values=prepared.cache()).logits
    with prepare(narrow, GUARDED) as prepared:
        torch.testing.assert_close(
            narrow(ids, past_key_values=prepared.cache()).logits, expected, rtol=1e-5, atol=1e-5
        )


def test_simulation_and_kernels_agree(build, tokens, dtype):
    narrow, _ = narrow_and_wide(build, "llama", dtype)
    policy = "mlp_up=int8+output:0.005, mlp_down=int8+output:0.002, lm_head=int8+running:0.001"
    token = tokens(3, 1)
    with torchlamp.lookahead(narrow, policy) as simulated_statistics:
        simulated = narrow(token).logits
    with prepare(narrow, policy) as prepared:
        torch.testing.assert_close(narrow(token).logits, simulated, rtol=1e-4, atol=1e-4)
        assert prepared.statistics.selected_by_site == simulated_statistics.selected_by_site


@pytest.mark.skipif(not native.available(), reason="the reference in torch reads dequantised copies")
@pytest.mark.parametrize("kernels", [native.instruction_set()], indirect=True)
def test_no_matrix_is_copied_to_float32(build, tokens, dtype, monkeypatch):
    """Neither when the copies are made, nor in a prompt or a step."""
    slab = 2048
    monkeypatch.setattr(full_rows, "SLAB", slab)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 640}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64)
    narrow = LlamaForCausalLM(config).to(dtype).eval()
    smallest = min(p.numel() for p in narrow.parameters() if p.ndim > 1)
    ids = tokens(1, 3)
    with LargestFloat32() as made:
        prepared = prepare(narrow, GUARDED)
        cache = prepared.cache()
        narrow(ids, past_key_values=cache, logits_to_keep=1)
        narrow(ids[:, :1], past_key_values=cache)
    prepared.undo()
    assert made.largest < smallest


def test_generate(build, tokens, dtype):
    narrow, wide = narrow_and_wide(build, "llama", dtype)
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with prepare(narrow, full="float32") as few, prepare(wide, full="float32"):
        assert torch.equal(narrow.generate(tokens(2, 7), **told), wide.generate(tokens(2, 7), **told))
        assert few.statistics.recompute_rate > 0


def test_a_copy_of_a_prepared_model(build, tokens, dtype):
    narrow, _ = narrow_and_wide(build, "llama", dtype)
    ids = tokens(2, 1)
    with prepare(narrow, "mlp_up=int8, mlp_down=int8, qkv=int8"):
        expected = narrow(ids).logits
        copied = copy.deepcopy(narrow)
    assert torch.equal(copied(ids).logits, expected)


class Odd(torch.nn.Module):
    """A matrix of a module whose formula nobody knows."""

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(size, size))

    def forward(self, x):
        return x @ self.table


def test_matrices_of_unknown_modules_are_refused(build, dtype):
    narrow, _ = narrow_and_wide(build, "llama", dtype)
    narrow.model.layers[0].mlp.down_proj = Odd(narrow.config.intermediate_size).to(dtype)
    with pytest.raises(TypeError, match=r"Odd has half-precision weights \(table\)"):
        prepare(narrow, "qkv=int8")
    assert not any("forward" in vars(module) for module in narrow.modules())
    assert narrow.model.norm.weight.dtype == dtype


def test_float64_is_refused(build):
    model = copy.deepcopy(build("llama")).double()
    with pytest.raises(TypeError, match=r"is torch.float64: low-bit copies are made of float32, bfloat16"):
        prepare(model, "qkv=int8")
