"""The tiny model with a chat template."""

from pathlib import Path

from tiny import save_tiny_model

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>fox {% endif %}"
)


def save_chat_folder(folder: Path) -> Path:
    from transformers import AutoTokenizer

    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
