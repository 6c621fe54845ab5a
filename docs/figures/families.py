"""docs/families.md: which families of transformers run which sites, tried on small random models.

python docs/figures/families.py            # writes the page, in some minutes
python docs/figures/families.py llama opt  # prints the rows of these families
"""

import copy
import logging
import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import torchlamp
from torchlamp.policy.sites import SITES

PAGE = Path(__file__).parents[1] / "families.md"
#: A number of a configuration -> its value in a small model. What a family doesn't have is left out.
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_embed": 32, "intermediate_size": 48,
    "ffn_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 8, "sliding_window": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.25,
}  # fmt: skip
#: What a small model of one family needs beside that.
MORE: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 1, "linear_head_dim": 8, "linear_num_heads": 4},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 61,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "shared_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {"num_experts_per_token": 1, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 1},
    "plbart": {
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_layers": 2, "decoder_layers": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
#: More parameters than a small model has: something of it stayed at its full size.
MAX_PARAMETERS = 5_000_000


def families() -> list[str]:
    """The model types that transformers has a causal language model for."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES))


def small_model(family: str) -> Any:
    """A random model of a few layers, the same whenever it is made. ValueError if that can't be made here."""
    kind = transformers.CONFIG_MAPPING[family]
    known = kind().to_dict()
    own = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # heads that share a latent vector have keys of their own
        own["num_key_value_heads"] = own["num_attention_heads"]
    if isinstance(known.get("layer_types"), list):  # a layer of each kind
        kinds = list(dict.fromkeys(known["layer_types"]))
        own["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        own["num_hidden_layers"] = len(own["layer_types"])
    config = kind(**own | MORE.get(family, {}))
    model_kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    with torch.device("meta"):
        size = sum(p.numel() for p in model_kind(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its small model has {size / 1e6:.0f} million parameters")
    torch.manual_seed(7)
    return model_kind(config).eval().float()


def runs(model: Any, policy: str, ids: torch.Tensor) -> str:
    """Why the policy doesn't run, in one line; "yes" if it does."""
    try:
        with torchlamp.lookahead(model, policy) as statistics, torch.no_grad():
            model(ids, use_cache=False)
    except Exception as error:
        return one_line(error)
    return "yes" if statistics.eligible else "nothing ran under the policy"


def decodes(model: Any, ids: torch.Tensor) -> set[str] | str:
    """The sites that `prepare` decodes with low bits of its own accord, or why it doesn't."""
    try:
        with torchlamp.prepare(model) as prepared, torch.no_grad():
            model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
            ran = prepared.statistics.rates
            counted = {"scores", "values", "mlp_up", "mlp_down", "lm_head"}
            return {site for site in prepared.policy.sites if site in ran or site not in counted}
    except Exception as error:
        return one_line(error)


def one_line(error: Exception) -> str:
    """An error's first line, without names of classes and hints."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    words = re.sub(r"^\w+(ForCausalLM|LMHeadModel|Model|Decoder)\w*:? ", "", words)
    words = re.sub(r"transformers\.models\.\w+\.\w+\.", "", words)
    words = re.split(
        r"; |, which the look-ahead|, so its attention|, so the site|: leave out|: only torch", words
    )[0]
    return words if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {words}"


def row(family: str) -> tuple[list[str], list[str]]:
    """A family's cells, the family first, and its reasons."""
    model = small_model(family)
    ids = torch.randint(2, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    decoded = decodes(model, ids)
    cells, why = [f"`{family}`"], defaultdict(list)
    for site in SITES:
        found = runs(model, f"{site}=ps4+strict:0.1", ids)
        decodes_it = not isinstance(decoded, str) and site in decoded
        cells.append(("s" if found == "yes" else "") + ("d" if decodes_it else "") or "–")
        if found != "yes":
            why[found].append(site)
    if isinstance(decoded, str):
        why[decoded].append("decoding")
    return cells, [f"{', '.join(sites)}: {reason}" for reason, sites in why.items()]


def main(names: list[str]) -> None:
    """Write the page, or print some rows."""
    logging.getLogger("torchlamp").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows, reasons, missing = [], [], []
    for family in names or families():
        try:
            cells, why = row(family)
        except Exception as error:
            missing.append(f"`{family}` ({one_line(error)[:90]})")
            continue
        rows.append(cells)
        reasons += [f"- `{family}`: {'; '.join(why)}"] if why else []
        print(" | ".join(cells), flush=True)
    if names:
        print("\n".join([*reasons, *missing]))
        return
    head = ["family", *SITES]
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    PAGE.write_text(
        PREFACE.format(version=transformers.__version__, count=len(rows))
        + "\n".join(table)
        + "\n\n## Why not\n\n"
        + "\n".join(reasons)
        + "\n\n## Not tried\n\nNo small model of these could be made from their configuration alone: "
        + ", ".join(missing)
        + ".\n",
        encoding="utf-8",
    )


PREFACE = """# Families of models

Which sites run in which model of transformers {version}: **s** in the simulation (`torchlamp.lookahead`,
`torchlamp evaluate`) under a policy with a look-ahead, **d** in low-bit decoding (`torchlamp.prepare` without a policy
of one's own, which leaves the other sites in full precision and says why). Each of the {count} families was tried with
a small random model; `python docs/figures/families.py` writes this page, and `tests/huggingface/test_families.py` tries
some of its rows again.

"""

if __name__ == "__main__":
    main(sys.argv[1:])
