from commands import error_line, run


def test_generate(tiny_folder):
    result = run("generate", tiny_folder, "the quick brown", "--tokens", "5", "--policy", "ps4+strict:0.1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the quick brown")
    assert "5 tokens under ps4+strict:0.1: " in result.stdout
    assert "in full precision: scores " in result.stdout


def test_generate_low_bit_and_compare(tiny_folder):
    result = run("generate", tiny_folder, "the quick brown", "--tokens", "5", "--compare")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the quick brown") == 2
    assert "5 tokens float32: " in result.stdout
    assert "5 tokens under look-ahead: " in result.stdout
    for said in ("scores ", "lm_head ", "memory: weights ", "times the tokens per second of float32", "same"):
        assert said in result.stdout
    alone = run("generate", tiny_folder, "the quick brown", "--tokens", "3", "--policy", "lm_head=int8")
    assert "3 tokens under lm_head=int8" in alone.stdout
    assert "'qvk'" in error_line(run("generate", tiny_folder, "the", "--policy", "qvk=int8"))


def test_generate_shows_no_special_tokens(tiny_folder):
    result = run("generate", tiny_folder, "<s>the quick</s> brown", "--tokens", "2")
    assert result.stdout.startswith("the quick brown")


def test_generate_refuses(tiny_folder):
    assert "the prompt is empty" in error_line(run("generate", tiny_folder, ""))
    assert "0 tokens" in error_line(run("generate", tiny_folder, "the", "--tokens", "0"))
    long = error_line(run("generate", tiny_folder, "the", "--tokens", "1000"))
    assert "1 + 1000 = 1001 is longer than the model's context of 128 tokens" in long
    assert "pss" in error_line(run("generate", tiny_folder, "the", "--policy", "pss+none"))
