"""A model larger than its device: layers that accelerate keeps elsewhere give the same bits and the same counts."""

import pytest
import torch
import transformers

import torchlamp

EVERYWHERE = (
    "ps4.center.sort+running-residual:0.01, values=ps4+running:0.01, qkv=ps5+running:0.01, "
    "attention_out=ps4+running:0.01, "
    "mlp_up=ps5+running:0.01, mlp_down=ps5+running:0.01, norm=ps3+strict:0.1, lm_head=ps7+running:0.0001"
)
STORED = (
    "qkv=int8+running:0.01, mlp_up=int4+running:0.01, mlp_down=int4+running:0.01, lm_head=int8+running:0.001"
)
TOKENS = torch.arange(3, 20)[None]


@pytest.fixture(params=["disk", "cpu"])
def offloaded(request, tiny_folder, tmp_path):
    """All layers but the first, and the LM head, are elsewhere: on the disk, or kept by the processor."""
    if request.param == "disk":
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head")
        places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
        return transformers.AutoModelForCausalLM.from_pretrained(
            tiny_folder, device_map=places, offload_folder=tmp_path, dtype=torch.float32
        )
    accelerate = pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("policy", ["ps4+strict:0.05", EVERYWHERE, STORED])
@torch.no_grad()
def test_the_same_logits_and_counts(tiny, offloaded, policy):
    model, _ = tiny
    elsewhere = [name for name, parameter in offloaded.named_parameters() if parameter.is_meta]
    assert elsewhere
    with torchlamp.lookahead(model, policy) as expected:
        wanted = model(TOKENS).logits
    with torchlamp.lookahead(offloaded, policy) as statistics:
        assert torch.equal(offloaded(TOKENS).logits, wanted)
        assert elsewhere == [name for name, p in offloaded.named_parameters() if p.is_meta]
        assert statistics.by_layer == expected.by_layer
        # Weights left after the call, and come back for the next one.
        assert torch.equal(offloaded(TOKENS).logits, wanted)
    assert torch.equal(offloaded(TOKENS).logits, model(TOKENS).logits)


def test_half_precision_elsewhere_is_refused(tiny_folder, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model = accelerate.cpu_offload(model, torch.device("cpu"))
    with (
        pytest.raises(ValueError, match="offloaded and can't be widened in place"),
        torchlamp.lookahead(model, "ps4+strict:0.1"),
    ):
        pass


def test_weights_that_nothing_brings_are_refused(tiny):
    model, _ = tiny
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    with (
        pytest.raises(ValueError, match="on the meta device, and no hook of accelerate brings them"),
        torchlamp.lookahead(empty, "ps4+none, mlp_up=ps4+running:0.01"),
    ):
        pass
