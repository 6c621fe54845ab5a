import pytest
import torch

from chat_folder import save_chat_folder
from torchlamp.evaluation.chat import Chat
from torchlamp.models.load import load
from torchlamp.policy.policy import Policy

LOW_BIT = Policy.parse("scores=int8.center+all, values=int8+all, lm_head=int8")
FLOAT32 = Policy.parse("fp32")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return load(str(save_chat_folder(tmp_path_factory.mktemp("chat"))))


def greedy(model, tokenizer, messages, tokens):
    """The model's own answer to a conversation, all of it read at once."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("policy", [FLOAT32, LOW_BIT])
def test_each_answer_is_the_models_own_to_the_whole_conversation(chatty, policy):
    model, tokenizer = chatty
    pieces = []
    with Chat(model, tokenizer, policy, system="over") as talk:
        answers = [talk.say(message, 5, pieces.append) for message in ("the quick", "brown", "lazy dog")]
        assert talk.answered == 15
        assert talk.tokens_per_second > 0
    assert talk.rates["scores"] == (1.0 if policy == LOW_BIT else 0.0)
    assert "".join("".join(pieces).split()) == "".join("".join(answers).split())
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 3]
    for turn, answer in zip((2, 4, 6), answers, strict=True):
        assert answer == greedy(model, tokenizer, talk.messages[:turn], 5)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("policy", [FLOAT32, LOW_BIT])
def test_only_what_the_cache_does_not_hold_is_read(chatty, policy):
    model, tokenizer = chatty
    read = []

    def first_reading(talk, message):
        read.clear()
        talk.say(message, 3, str)
        assert read[1:] == [1, 1]
        return read[0]

    def prompt(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, x: read.append(x[0].shape[1]))
    with Chat(model, tokenizer, policy, system="over") as talk:
        before = prompt([*talk.messages, {"role": "user", "content": "the quick"}])
        assert first_reading(talk, "the quick") == len(before)
        # The template writes the answer behind other words than those that asked for it.
        after = prompt([*talk.messages, {"role": "user", "content": "brown"}])
        common = next(n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        assert first_reading(talk, "brown") == len(after) - common
        # What an earlier turn said has changed: all from there on is read again, and answered as it is now.
        talk.messages[1] = {"role": "user", "content": "lazy"}
        changed = prompt([*talk.messages, {"role": "user", "content": "dog"}])
        common = next(n for n, (a, b) in enumerate(zip(after, changed, strict=False)) if a != b)
        assert first_reading(talk, "dog") == len(changed) - common
    hook.remove()
    assert talk.messages[-1]["content"] == greedy(model, tokenizer, talk.messages[:-1], 3)


def test_a_cache_that_can_not_go_back_is_read_anew(chatty, monkeypatch):
    model, tokenizer = chatty
    with Chat(model, tokenizer, FLOAT32) as talk:
        talk.say("the quick", 3, str)

        def crop(count):
            raise RuntimeError("the window has moved on")

        monkeypatch.setattr(talk._cache, "crop", crop)
        answer = talk.say("brown", 3, str)
    assert answer == greedy(model, tokenizer, talk.messages[:-1], 3)


def test_a_chat_refuses_what_can_not_be(chatty, tiny):
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(*tiny)
    with Chat(*chatty, FLOAT32) as talk:
        with pytest.raises(ValueError, match="0 tokens to generate"):
            talk.say("the", 0, str)
        with pytest.raises(ValueError, match="longer than the model's context of 128 tokens"):
            talk.say("the", 128, str)
        assert talk.messages == []
    assert torch.is_grad_enabled()
