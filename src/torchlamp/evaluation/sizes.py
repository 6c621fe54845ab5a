"""Sizes of a model that say how long the sums of its sites are."""

from typing import Any


def model_sizes(model: Any) -> dict[str, int]:
    """Length of the vectors that are summed over: ``head``, ``attention`` (all heads'), ``hidden``, ``mlp`` (inside).

    As the config of a transformers model says it, in the names of Llama's or GPT-2's; what it doesn't say is left out.
    """
    config = model.config.get_text_config()
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head = getattr(config, "head_dim", None)
    if head is None and hidden and heads:
        head = hidden // heads
    mlp = getattr(config, "intermediate_size", None)
    if mlp is None and hasattr(config, "n_inner"):
        mlp = config.n_inner or (4 * hidden if hidden else None)
    attention = head * heads if head and heads else None
    sizes = {"head": head, "attention": attention, "hidden": hidden, "mlp": mlp}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}
