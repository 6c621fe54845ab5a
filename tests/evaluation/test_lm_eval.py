"""The harness's model "lamp" on two small local tasks, beside its own model "hf"."""

import json
import logging
from functools import partial
from pathlib import Path

import lm_eval.tasks
import lm_eval.utils
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from torchlamp import extras
from torchlamp.cli import app
from torchlamp.evaluation.lm_eval import LampLM

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "lm_eval_tasks"
QUESTIONS = 20


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The tasks name their data from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def command(monkeypatch):
    """Runs `torchlamp lm-eval`, without the ten seconds in which the harness reads all its tasks."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    yield lambda *arguments: CliRunner().invoke(app, ["lm-eval", *map(str, arguments)])
    logger.setLevel(level)


@pytest.fixture(scope="module")
def evaluate(tiny_folder, manager):
    """Results of the tasks under some arguments, each computed once."""
    known = {}

    def run(arguments: str, model="lamp", batch_size=4, tasks=("lamp_choice", "lamp_text")):
        key = (arguments, model, batch_size, tasks)
        if key not in known:
            known[key] = simple_evaluate(
                model=model, model_args=f"pretrained={tiny_folder},{arguments}", tasks=list(tasks),
                batch_size=batch_size, device="cpu", task_manager=manager, bootstrap_iters=0,
            )  # fmt: skip
        return known[key]

    return run


def loglikelihoods(results) -> torch.Tensor:
    """Of every choice of every question, and of every text."""
    samples = sorted(results["samples"]["lamp_choice"], key=lambda sample: sample["doc_id"])
    choices = [answer[0][0] for sample in samples for answer in sample["resps"]]
    texts = sorted(results["samples"]["lamp_text"], key=lambda sample: sample["doc_id"])
    whole = [sample["resps"][0][0] for sample in texts]
    return torch.tensor(choices + whole, dtype=torch.float64)


def lamp(results) -> dict:
    return results["config"]["lamp"]


@pytest.mark.parametrize(
    "policy", ["accumulate=fp32,rule=all", "accumulate=ps2,rule=all", "accumulate=ps23,rule=none"]
)
def test_full_precision_equals_the_plain_model(evaluate, policy):
    plain, tested = evaluate("dtype=float32", model="hf"), evaluate(policy)
    ours, theirs = loglikelihoods(tested), loglikelihoods(plain)
    assert ours.shape == (4 * QUESTIONS + 4,)
    # The harness sums in float32, and a text's log-likelihood is in the thousands.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    for task, names in {
        "lamp_choice": ["acc", "acc_norm"],
        "lamp_text": ["word_perplexity", "bits_per_byte"],
    }.items():
        for name in names:
            expected = plain["results"][task][f"{name},none"]
            assert tested["results"][task][f"{name},none"] == pytest.approx(expected, rel=1e-4)


def test_a_narrow_accumulator_changes_them_and_recomputation_brings_them_back(evaluate):
    plain = loglikelihoods(evaluate("dtype=float32", model="hf"))
    errors = [
        (loglikelihoods(evaluate(f"accumulate=ps1,rule={rule}")) - plain).square().mean().sqrt()
        for rule in ("none", "strict:0.05", "all")
    ]
    assert errors[0] > 0.1
    assert errors[0] > 2 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("rule", ["strict:0.1", "random:0.3"])
def test_results_do_not_depend_on_the_batch_size(evaluate, rule):
    """Neither do the counts: no padding is computed."""
    one, eight = (evaluate(f"accumulate=ps3,rule={rule}", batch_size=size) for size in (1, 8))
    torch.testing.assert_close(loglikelihoods(one), loglikelihoods(eight), rtol=1e-6, atol=1e-4)
    assert lamp(one)["eligible"] == lamp(eight)["eligible"]
    assert lamp(one)["recompute_rate"] == pytest.approx(lamp(eight)["recompute_rate"], rel=1e-3)


def test_the_recompute_rate_is_in_the_results(evaluate):
    found = lamp(evaluate("accumulate=ps3,rule=strict:0.1", batch_size=1))
    assert found["policy"] == "ps3+strict:0.1"
    assert 0 < found["recompute_rate"] < 1
    assert found["recompute_rate_by_site"] == {"scores": found["recompute_rate"]}
    assert set(found["recompute_rate_by_task"]) == {"lamp_choice", "lamp_text"}
    low, high = sorted(found["recompute_rate_by_task"].values())
    assert low <= found["recompute_rate"] <= high
    assert found["selected"] == round(found["recompute_rate"] * found["eligible"])
    assert json.loads(json.dumps(found)) == found
    assert lamp(evaluate("accumulate=ps2,rule=all"))["recompute_rate"] == 1
    assert lamp(evaluate("accumulate=ps1,rule=none"))["recompute_rate"] == 0


def test_several_sites(evaluate):
    found = lamp(evaluate("policy=scores=ps3+strict:0.1;mlp_up=ps3+condition:4"))
    assert found["policy"] == "scores=ps3+strict:0.1, mlp_up=ps3+condition:4"
    assert found["recompute_rate_by_site"].keys() == {"scores", "mlp_up"}
    low, high = sorted(found["recompute_rate_by_site"].values())
    assert 0 < low < found["recompute_rate"] < high < 1


def test_counts_are_of_the_tokens_that_the_tasks_need(evaluate, tiny):
    """The choice task alone, counted by hand: layers x heads x n (n + 1) / 2 over the different inputs."""
    model, tokenizer = tiny
    inputs = set()
    for line in (TASKS / "lamp_choice.jsonl").read_text().splitlines():
        record = json.loads(line)
        for choice in record["choices"]:
            whole = tokenizer(f"{record['question']} {choice}")["input_ids"]
            inputs.add(tuple(whole[:-1]))
    config = model.config
    triangle = sum(len(tokens) * (len(tokens) + 1) // 2 for tokens in inputs)
    expected = config.num_hidden_layers * config.num_attention_heads * triangle
    results = evaluate("accumulate=ps4,rule=none", tasks=("lamp_choice",))
    # One-token continuations of the same context share a run; others that share an input by chance don't.
    assert lamp(results)["eligible"] == pytest.approx(expected, rel=0.1)


class TestArguments:
    def lm(self, tiny_folder, **arguments):
        return LampLM(str(tiny_folder), **arguments)

    @pytest.mark.parametrize(
        ("arguments", "policy"),
        [
            ({}, "ps4+strict:0.1"),
            ({"accumulate": "e4m3fn"}, "e4m3fn+strict:0.1"),
            ({"accumulate": "ps7/block32", "rule": "none"}, "ps7/block32+none"),
            ({"rule": None}, "ps4+none"),
            ({"policy": "scores=ps3+mass:0.5"}, "ps3+mass:0.5"),
            ({"policy": "scores=ps3+none;values=ps4+none"}, "scores=ps3+none, values=ps4+none"),
        ],
    )
    def test_policies(self, tiny_folder, arguments, policy):
        lm = self.lm(tiny_folder, **arguments)
        assert str(lm.policy) == policy
        assert lm.pretrained == str(tiny_folder)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"rule": "strikt:1"}, "unknown rule 'strikt'"),
            ({"rule": 0.1}, "0.1"),
            ({"policy": "ps4+none", "rule": None}, "leave out accumulate and rule"),
            ({"accumulate": "ps99"}, "ps99"),
            ({"policy": "ps4+none", "rule": "all"}, "leave out accumulate and rule"),
            ({"policy": "heads=ps4+none;scores=ps4+none"}, "unknown site 'heads'"),
            ({"dtype": "bfloat16"}, "dtype 'bfloat16'"),
            ({"parallelize": True}, "unknown model argument 'parallelize'"),
            ({"batch_size": "auto"}, "batch size 'auto'"),
            ({"tokenizer": "gpt2"}, "brings its own"),
        ],
    )
    def test_errors(self, tiny_folder, arguments, said):
        with pytest.raises(ValueError, match=said):
            self.lm(tiny_folder, **arguments)

    def test_a_loaded_model_gets_its_policy_and_gives_it_back(self, tiny):
        model, tokenizer = tiny
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match="needs its tokenizer"):
            LampLM(model)
        lm = LampLM(model, rule="all", tokenizer=tokenizer)
        assert model.config._attn_implementation == "lamp"
        lm.close()
        assert model.config._attn_implementation == before

    def test_generation(self, tiny):
        from lm_eval.api.instance import Instance

        model, tokenizer = tiny
        lm = LampLM(model, accumulate="fp32", rule="none", tokenizer=tokenizer, batch_size=2)
        prompts = ["the quick brown", "the lazy dog and then it"]
        requests = [
            Instance(
                "generate_until",
                {},
                (prompt, {"until": ["\n\n"], "max_gen_toks": 5}),
                place,
                ("gen", place, 1),
            )
            for place, prompt in enumerate(prompts)
        ]
        found = lm.generate_until(requests, disable_tqdm=True)
        assert list(lm.get_model_info()["lamp"]["recompute_rate_by_task"]) == ["gen"]
        lm.close()
        for prompt, text in zip(prompts, found, strict=True):
            tokens = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                continued = model.generate(
                    tokens, attention_mask=tokens > -1, max_new_tokens=5, do_sample=False
                )
            assert text == tokenizer.decode(continued[0, tokens.shape[1] :], skip_special_tokens=True)


class TestCommand:
    """`torchlamp lm-eval ARGUMENTS` is `lm_eval ARGUMENTS` with the model registered."""

    @pytest.mark.parametrize("as_json", [False, True])
    def test_a_run_writes_the_rate_into_its_results_file(self, command, tiny_folder, tmp_path, as_json):
        arguments = {"pretrained": str(tiny_folder), "policy": "scores=ps2+strict:0.05", "seed": 3}
        spelled = json.dumps(arguments) if as_json else ",".join(f"{k}={v}" for k, v in arguments.items())
        result = command(
            "--model", "lamp", "--model_args", spelled, "--tasks", "lamp_choice", "--include_path", TASKS,
            "--batch_size", "4", "--output_path", tmp_path, "--limit", "5",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "|lamp_choice|" in result.stdout
        assert "policy ps2+strict:0.05: recompute rate " in result.stderr
        (file,) = tmp_path.rglob("results_*.json")
        record = json.loads(file.read_text())
        assert record["config"]["model"] == "lamp"
        assert record["config"]["lamp"]["policy"] == "ps2+strict:0.05"
        assert record["config"]["lamp"]["seed"] == 3
        assert 0 < record["config"]["lamp"]["recompute_rate"] < 1

    def test_one_line_for_a_bad_policy(self, command, tiny_folder):
        result = command(
            "--model", "lamp", "--model_args", f"pretrained={tiny_folder},rule=strikt:1",
            "--tasks", "lamp_choice", "--include_path", TASKS,
        )  # fmt: skip
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("torchlamp: error: unknown rule 'strikt'")

    def test_without_the_extra(self, command, monkeypatch):
        found = extras.find_spec
        monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "lm_eval" else found(name))
        result = command("--model", "lamp")
        assert result.exit_code == 2
        assert "pip install 'torchlamp[eval]'" in result.stderr

    def test_help_is_the_harness_s(self, command):
        assert "Language Model Evaluation Harness" in command("--help").stdout
        assert "--model_args" in command("run", "--help").stdout


def test_the_entry_point_leads_here():
    """For releases of the harness that read the group; this is what they load."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lm_eval.models"
    ]
    module, _, name = declared["lamp"].partition(":")
    assert (module, name) == (LampLM.__module__, LampLM.__name__)


@pytest.mark.parametrize("seed", [-1, 1.5, "a", None])
def test_seeds_are_whole_numbers(tiny_folder, seed):
    with pytest.raises(ValueError, match=f"seed={seed!r}: a whole number of 0 or more is expected"):
        LampLM(str(tiny_folder), policy="ps4+random:0.1", seed=seed)
