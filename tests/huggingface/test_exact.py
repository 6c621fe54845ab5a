"""`prepare(exact=True)`: the text of float32, token for token, and samples of its distribution."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from decoding_models import is_untouched
from transformers.generation.streamers import BaseStreamer

import torchlamp
from torchlamp.huggingface.draft_length import MAX_DRAFT, Acceptance, DraftLength
from torchlamp.huggingface.exact_model import ExactModel
from torchlamp.huggingface.exact_text import ExactText

#: A draft that is often wrong.
COARSE = "qkv=int4, attention_out=int4, mlp_up=int4, mlp_down=int4, lm_head=int8+running:0.001"
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "mistral", "gpt2"]
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9]])


def texts(model, ids=PROMPT, count=60, **options):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_float32s(build, name):
    model = build(name)
    expected = texts(model, do_sample=False)
    policy = "qkv=int4, attention_out=int4" if name == "gpt2" else COARSE
    with torchlamp.prepare(model, policy, exact=True) as prepared:
        for _ in range(2):  # the second text begins with a bound that is known
            torch.testing.assert_close(texts(model, do_sample=False), expected, rtol=0, atol=0)
        assert 0 < prepared.acceptance.accepted <= prepared.acceptance.drafted
        assert prepared.acceptance.tokens == 120
    assert "generate" not in vars(model)
    is_untouched(model)


@pytest.mark.parametrize("policy", [None, COARSE, "default"])
def test_whole_policies_draft(build, policy):
    model = build("gemma3")
    expected = texts(model, do_sample=False)
    with torchlamp.prepare(model, policy, exact=True) as prepared:
        assert torch.equal(texts(model, do_sample=False), expected)
        assert "acceptance" not in str(prepared.policy)
        assert "accepted" in repr(prepared)
        if policy is None:
            assert prepared.acceptance.rate > 0.8


def test_calls_of_the_model_are_float32s(build):
    model = build("llama")
    expected = model(PROMPT).logits
    with torchlamp.prepare(model, exact=True) as prepared:
        assert torch.equal(model(PROMPT).logits, expected)
        assert torchlamp.prepared(model) is prepared
        with pytest.raises(ValueError, match="DynamicCache"):
            prepared.cache()
        with pytest.raises(ValueError, match="prepared for low-bit decoding already"):
            torchlamp.prepare(model)
    with pytest.raises(ValueError, match="isn't prepared"):
        torchlamp.prepared(model)
    prepared.undo()  # a second time
    with pytest.raises(ValueError, match="resident"):
        torchlamp.prepare(model, exact=True, resident=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(build, dtype):
    model = build("llama").to(dtype)
    expected = texts(copy.deepcopy(model).float(), do_sample=False)
    with torchlamp.prepare(model, exact=True):
        assert torch.equal(texts(model, do_sample=False), expected)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_position_settled_by_single_steps(build, name, monkeypatch):
    """With a bound that nothing exceeds, the text consists of single steps from the prompt on, exactly."""
    model = build(name)
    expected = texts(model, do_sample=False)
    monkeypatch.setattr(ExactModel, "bound", 1e9)
    with torchlamp.prepare(model, exact=True) as prepared:
        assert torch.equal(texts(model, do_sample=False), expected)
        assert prepared.acceptance.settled == 59
        assert prepared.acceptance.accepted == 0
        assert prepared.acceptance.single_steps == 59  # none is made twice


def test_equal_logits_are_settled(build):
    """Two rows of the head that are the same: an exact tie at every step where they win, and the first one is taken."""
    model = build("llama")
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        if head is model.get_input_embeddings().weight:
            model.get_output_embeddings().weight = torch.nn.Parameter(head.clone())
            head = model.get_output_embeddings().weight
        head[31:60] = head[1:30]
    expected = texts(model, do_sample=False)
    with torchlamp.prepare(model, COARSE, exact=True) as prepared:
        assert torch.equal(texts(model, do_sample=False), expected)
        assert prepared.acceptance.settled > 10
    assert prepared.acceptance.difference > 0


def test_options_of_generate(build):
    model = build("qwen2")
    options = {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(PROMPT)], 1)
    wanted = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    plain, left = texts(model, **options), model.generate(padded, **wanted)
    stop = int(plain[0, 20])
    ended = texts(model, eos_token_id=stop, **options)
    with torchlamp.prepare(model, COARSE, exact=True):
        assert torch.equal(texts(model, **options), plain)
        assert torch.equal(model.generate(padded, **wanted), left)
        assert torch.equal(texts(model, eos_token_id=stop, **options), ended)
        assert texts(model, count=1, **options).shape[1] == PROMPT.shape[1] + 1
        assert torch.equal(texts(model, count=2, **options), plain[:, : PROMPT.shape[1] + 2])


def test_streams_each_token_and_returns_the_cache(build):
    class Seen(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model = build("mistral")
    first = texts(model, do_sample=False, return_dict_in_generate=True, count=30)
    more = torch.cat([first.sequences, PROMPT], 1)
    second = texts(model, more, do_sample=False, past_key_values=first.past_key_values, count=30)
    with torchlamp.prepare(model, COARSE, exact=True):
        seen = Seen()
        found = texts(model, do_sample=False, return_dict_in_generate=True, count=30, streamer=seen)
        assert seen.ended
        assert seen.tokens == found.sequences[0].tolist() == first.sequences[0].tolist()
        assert found.past_key_values.get_seq_length() == found.sequences.shape[1] - 1
        again = texts(model, more, do_sample=False, past_key_values=found.past_key_values, count=30)
        assert torch.equal(again, second)


def test_what_cannot_be_drafted_is_float32s_own(build, caplog):
    model = build("llama")
    pair = torch.cat([PROMPT, PROMPT + 1])
    asked = [
        (pair, {"do_sample": False}, "2 sequences"),
        (PROMPT, {"num_beams": 3, "do_sample": False}, "beam search"),
        (PROMPT, {"do_sample": False, "use_cache": False}, "the cache"),
        (
            PROMPT,
            {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
            "output_scores",
        ),
    ]
    expected = [texts(model, ids, count=12, **options) for ids, options, _ in asked]
    with torchlamp.prepare(model, exact=True), caplog.at_level(logging.WARNING):
        for (ids, options, words), plain in zip(asked, expected, strict=True):
            caplog.clear()
            found = texts(model, ids, count=12, **options)
            assert words in caplog.text
            one, other = (t if isinstance(t, torch.Tensor) else t.sequences for t in (found, plain))
            assert torch.equal(one, other)


def is_likely(counts, chances):
    """Chi squared of counts over all outcomes, below its 99.9 % quantile (Wilson and Hilferty)."""
    runs, freedom = sum(counts.values()), len(chances) - 1
    assert all(runs * p >= 4 for p in chances.values())
    squares = sum((counts[key] - runs * p) ** 2 / (runs * p) for key, p in chances.items())
    return squares < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_drafts_of_another_distribution_leave_samples_of_the_first():
    """The rejection rule alone: p and q over four tokens, drafts of two; the pair has the probabilities of p."""
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    chances = {(a, b): float(p[0, a] * p[1, b]) for a in range(4) for b in range(4)}
    counts, config = dict.fromkeys(chances, 0), SimpleNamespace(do_sample=True)
    generator, both = torch.Generator().manual_seed(1), SimpleNamespace(acceptance=Acceptance())
    rejected = 0
    for _ in range(4000):
        text = ExactText(
            both, PROMPT, lambda ids, scores: scores, lambda ids, scores: torch.tensor([False]), config,
            {"past_key_values": None}, generator=generator,
        )  # fmt: skip
        drafted = [int(torch.multinomial(row, 1, generator=generator)) for row in q]
        taken = text._sample(drafted, list(q), p.log())
        rejected += taken < 2
        new = text.ids[0, PROMPT.shape[1] :].tolist()
        while len(new) < 2:  # the second token of those whose first was rejected
            new.append(int(torch.multinomial(p[1], 1, generator=generator)))
        counts[tuple(new[:2])] += 1
    assert rejected > 1000
    assert is_likely(counts, chances)


def test_samples_have_float32s_distribution(build):
    """Three tokens of two possible ones each, all outcomes enumerated."""
    model = build("llama")
    chances = {}

    def walk(ids, chance):
        if ids.shape[1] == PROMPT.shape[1] + 3:
            chances[tuple(ids[0, -3:].tolist())] = chance
            return
        with torch.no_grad():
            top = (model(ids).logits[0, -1].double() / 4).topk(2)
        for token, p in zip(top.indices, top.values.softmax(0), strict=True):
            walk(torch.cat([ids, token.view(1, 1)], 1), chance * float(p))

    walk(PROMPT, 1.0)
    assert sum(chances.values()) == pytest.approx(1.0)
    assert len(chances) == 8
    counts = dict.fromkeys(chances, 0)
    generator = torch.Generator().manual_seed(5)
    with torchlamp.prepare(model, COARSE, exact=True) as prepared:
        for _ in range(250):
            new = texts(model, count=3, generator=generator, do_sample=True, top_k=2, temperature=4.0)[0, -3:]
            counts[tuple(new.tolist())] += 1
        assert 0 < prepared.acceptance.accepted < prepared.acceptance.drafted  # some were rejected
    assert is_likely(counts, chances)


def test_seeds_decide_samples(build):
    model = build("llama")
    with torchlamp.prepare(model, COARSE, exact=True):
        first, again, other = (
            texts(model, count=20, do_sample=True, generator=torch.Generator().manual_seed(seed))
            for seed in (3, 3, 4)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.manual_seed(1)
        third = texts(model, count=20, do_sample=True)
        torch.manual_seed(1)
        assert torch.equal(third, texts(model, count=20, do_sample=True))


def test_draft_length_follows_acceptance():
    length = DraftLength()
    begin = length.next()
    for _ in range(40):
        length.note(20, 20)
    assert begin < length.next() == MAX_DRAFT
    for _ in range(40):
        length.note(0, 5)
    assert length.next() == 1


def test_acceptance_counts():
    counts = Acceptance(drafted=10, accepted=9, checks=2, tokens=11)
    assert counts.rate == 0.9
    assert counts.to_dict()["rate"] == 0.9
    assert str(counts) == (
        "9 of 10 drafted tokens accepted (90.00%), 5.5 tokens a check, 0 settled by single steps"
    )
    assert Acceptance().rate == 0.0
