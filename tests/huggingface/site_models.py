"""Policies at every site, and what tests of them share."""

from torchlamp.policy.sites import SITES

FAMILIES = ("llama", "gemma3", "gpt2", "qwen3", "mistral", "phi3")
ALL_SITES = ", ".join(f"{site}={{}}" for site in SITES)
#: Every site narrow, with a rule that selects some entries of each.
MIXED = (
    "scores=ps4+strict:0.1, values=ps4+running:0.005, qkv=ps5+condition:30, attention_out=ps5+strict:0.1, "
    "mlp_up=ps5+output:0.5, mlp_down=ps5+running:0.002, norm=ps4+strict:0.1, lm_head=ps5+strict:0.3"
)


def everywhere(policy):
    return ALL_SITES.replace("{}", policy)


def state(model):
    return [(name, sorted(vars(module))) for name, module in model.named_modules()]
