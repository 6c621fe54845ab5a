import gguf
import pytest
import torch
from llama_models import VOCABULARY, gemma, llama, qwen
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from torchlamp.bench.gguf_export import write_gguf
from torchlamp.bench.off_grid import off_grid

MODELS = {
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, rotated": lambda: off_grid(llama(tie_word_embeddings=True)),
    "qwen": lambda: qwen(tie_word_embeddings=True),
    "gemma": gemma,
    "gemma, off the grid": lambda: off_grid(gemma()),
}


def read(path):
    reader = gguf.GGUFReader(path)
    settings = {key: field.contents() for key, field in reader.fields.items()}
    return settings, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture
def tokenizer_file(tmp_path):
    """A GGUF file with a tokenizer and nothing else."""
    path = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    writer.add_token_scores([-1.0 * number for number in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_weights(name, tmp_path):
    # Weights only: the rest of Gemma 3's settings it doesn't read from the file. The tests of llama.cpp do.
    model = MODELS[name]()
    write_gguf(model, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.allclose(value, model.state_dict()[key], rtol=0, atol=1e-6), key


def test_settings(tmp_path):
    write_gguf(gemma(), tmp_path / "model.gguf")
    settings, _ = read(tmp_path / "model.gguf")
    assert settings["general.architecture"] == "gemma3"
    assert settings["tokenizer.ggml.model"] == "none"
    found = {key[len("gemma3.") :]: value for key, value in settings.items() if key.startswith("gemma3.")}
    assert found == {
        "vocab_size": VOCABULARY,
        "context_length": 1024,
        "embedding_length": 64,
        "block_count": 7,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 64,
        "rope.dimension_count": 32,
        "rope.freq_base": 5000.0,
        "rope.freq_base_swa": 10000.0,
    }


def test_head_is_written_where_it_is_untied(tmp_path):
    model = llama(tie_word_embeddings=True)
    write_gguf(model, tmp_path / "tied.gguf")
    write_gguf(off_grid(model), tmp_path / "untied.gguf")
    assert "output.weight" not in read(tmp_path / "tied.gguf")[1]
    head = read(tmp_path / "untied.gguf")[1]["output.weight"]
    assert torch.equal(torch.from_numpy(head.data.copy()), model.lm_head.weight)


def test_all_tensors_are_float32(tmp_path):
    write_gguf(llama(attention_bias=True), tmp_path / "model.gguf")
    tensors = read(tmp_path / "model.gguf")[1]
    assert {tensor.tensor_type for tensor in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert "blk.1.attn_q.bias" in tensors


def test_tokenizer_is_copied(tmp_path, tokenizer_file):
    write_gguf(llama(), tmp_path / "model.gguf", tokenizer_file)
    source, written = read(tokenizer_file)[0], read(tmp_path / "model.gguf")[0]
    assert {k: v for k, v in written.items() if k.startswith("tokenizer.")} == {
        k: v for k, v in source.items() if k.startswith("tokenizer.")
    }
    assert written["tokenizer.ggml.tokens"][7] == "t7"


def test_tokenizer_of_another_model_is_refused(tmp_path, tokenizer_file):
    model = llama()
    model.resize_token_embeddings(128)
    with pytest.raises(ValueError, match=r"'tokenizer.gguf' has 320 tokens, the model 128"):
        write_gguf(model, tmp_path / "model.gguf", tokenizer_file)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)),
            "model type 'gpt2'",
        ),
        (lambda: llama(hidden_act="gelu"), "activation 'gelu': llama.cpp's llama computes with 'silu'"),
        (lambda: gemma(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
        (lambda: gemma(query_pre_attn_scalar=16), "query_pre_attn_scalar 16"),
        (lambda: gemma(2, layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_gguf(make(), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
