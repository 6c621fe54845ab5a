import pytest

from chat_folder import TEMPLATE, save_chat_folder
from torchlamp.evaluation.prompts import chat_tokens, end_tokens, has_chat_template, prompt_tokens
from torchlamp.models.load import load


@pytest.fixture
def chatty(tmp_path):
    return load(str(save_chat_folder(tmp_path)))


def test_a_message_is_put_into_the_template(chatty, tiny):
    _, tokenizer = chatty
    assert has_chat_template(tokenizer)
    assert not has_chat_template(tiny[1])

    def words(**more):
        return tokenizer.decode(prompt_tokens(tokenizer, "the quick", **more)[0])

    assert words(chat=False) == "the quick"
    assert words(chat=True) == "<s>user the quick</s><s>fox "
    assert words(chat=True, system="over") == "<s>system over</s><s>user the quick</s><s>fox "


def test_what_can_not_be_a_prompt(chatty, tiny):
    _, tokenizer = chatty
    for chat in (True, False):
        with pytest.raises(ValueError, match="the prompt is empty"):
            prompt_tokens(tokenizer, "", chat=chat)
    with pytest.raises(ValueError, match="only a chat has one"):
        prompt_tokens(tokenizer, "the", chat=False, system="over")
    with pytest.raises(ValueError, match="no chat template"):
        prompt_tokens(tiny[1], "the", chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        chat_tokens(tokenizer, [{"role": "user", "content": "the"}])


def test_ends_are_those_of_model_tokenizer_and_template(chatty, tiny):
    model, tokenizer = chatty
    assert end_tokens(*tiny) == [2]
    assert end_tokens(model, tokenizer) == [2]
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<unk>\n")
    assert end_tokens(model, tokenizer) == [0, 2]
    model.generation_config.eos_token_id = [2, 7]
    assert end_tokens(model, tokenizer) == [0, 2, 7]
    # An ordinary word behind an answer ends nothing, and a template that refuses answers says nothing.
    for template in (TEMPLATE.replace("</s>", "fox"), "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert end_tokens(model, tokenizer) == [2, 7]
