import json
import subprocess

import torch

from torchlamp.evaluation import environment as module
from torchlamp.evaluation.environment import cpu_features, cpu_name, environment, git_commit, kernels
from torchlamp.kernels import native


def test_environment_is_ready_for_json():
    record = json.loads(json.dumps(environment()))
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["kernels"] in ("native", "torch twins")
    assert record["cpu"]


def test_kernels_are_explained(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "no compiler")
    assert kernels() == {"native": False, "why_not": "no compiler", "features": {}}
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "features", lambda: {"avx2": "in use"})
    assert kernels() == {"native": True, "why_not": None, "features": {"avx2": "in use"}}


def test_processor_of_an_arm_machine(monkeypatch):
    monkeypatch.setattr(module, "_cpuinfo", lambda: ["processor : 0", "Features : fp asimd sve2 made_up"])
    assert cpu_features() == ["asimd", "sve2"]
    monkeypatch.setattr(module, "_cpuinfo", list)
    assert cpu_features() == []
    assert cpu_name()


def test_without_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert git_commit() is None
