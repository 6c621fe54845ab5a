"""A checkpoint whose weights aren't all there, or aren't those of its model, is refused by name."""

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import save_tiny_model
from torchlamp.bench.gguf_export import write_gguf
from torchlamp.models import conversion
from torchlamp.models.load import load

DOWN = "model.layers.0.mlp.down_proj.weight"


def deleted(weights):
    del weights[DOWN]


def renamed(weights):
    weights["model.layers.0.mlp.descent.weight"] = weights.pop(DOWN)


def added(weights):
    weights["model.layers.7.mlp.down_proj.weight"] = weights[DOWN].clone()


def misshapen(weights):
    weights[DOWN] = weights[DOWN][:3].contiguous()


def many(weights):
    for name in list(weights):
        if "layernorm" in name:
            del weights[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (deleted, f"{DOWN} missing;"),
        (renamed, f"{DOWN} missing; model.layers.0.mlp.descent.weight unexpected;"),
        (added, "model.layers.7.mlp.down_proj.weight unexpected;"),
        (misshapen, rf"{DOWN} of shape \(3, 48\) instead of \(32, 48\);"),
        (many, "and 1 more missing"),
    ],
)
def test_a_folder(tmp_path, change, words):
    save_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"isn't whole: .*{words}") as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_folder_whose_head_is_tied_is_whole(tmp_path):
    save_tiny_model(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


@pytest.fixture(params=[True])
def gguf_file(tmp_path, request):
    """A Llama in a GGUF file, tied unless the parameter is False."""
    tokens = tmp_path / "tokenizer.gguf"
    writer = gguf.GGUFWriter(tokens, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(320)])
    writer.add_token_scores([-1.0 * number for number in range(320)])
    writer.add_token_types([1] * 320)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=request.param,
    )  # fmt: skip
    path = tmp_path / "model.gguf"
    write_gguf(LlamaForCausalLM(config).eval(), path, tokens)
    return path


def rename(path, old: bytes, new: bytes):
    """Give a tensor of a GGUF file another name of the same length."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_a_gguf_file_with_a_renamed_tensor(gguf_file):
    rename(gguf_file, b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight")
    words = "model.layers.1.mlp.down_proj.weight missing; blk.1.ffn_dawn.weight unexpected;"
    with pytest.raises(ValueError, match=f"isn't whole: {words}"):
        conversion.convert(gguf_file)


def cut_count(path):
    """Lower the tensor count of a GGUF file by one."""
    content = bytearray(path.read_bytes())
    count = int.from_bytes(content[8:16], "little")  # after magic and version
    content[8:16] = (count - 1).to_bytes(8, "little")
    path.write_bytes(content)


def test_a_gguf_file_with_a_cut_tensor_count(gguf_file):
    cut_count(gguf_file)
    with pytest.raises(ValueError, match=r"isn't whole: .* missing|can't be loaded"):
        conversion.convert(gguf_file)


@pytest.mark.parametrize("gguf_file", [False], indirect=True)
def test_a_gguf_file_whose_head_falls_off_the_count(gguf_file):
    assert gguf.GGUFReader(gguf_file).tensors[-1].name == "output.weight"
    cut_count(gguf_file)  # transformers takes what is left for a tied model, its weights from wrong bytes
    with pytest.raises(ValueError, match=r"isn't whole: \d+ bytes behind output_norm.weight") as raised:
        conversion.convert(gguf_file)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("gguf_file", [False, True], indirect=True)
@pytest.mark.parametrize("padding", [0, 31])
def test_a_gguf_file_that_is_whole(gguf_file, padding):
    with gguf_file.open("ab") as file:
        file.write(bytes(padding))
    model, _ = conversion.convert(gguf_file)
    assert model.config.tie_word_embeddings == (
        "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(gguf_file).tensors}
    )


def test_a_cached_copy_that_lacks_a_weight_is_not_trusted(tmp_path, tiny):
    conversion.save(*tiny, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    deleted(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"isn't whole: {DOWN} missing"):
        conversion.read(tmp_path)
