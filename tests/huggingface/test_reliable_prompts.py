"""Prompts and steps of several tokens of a prepared model: whatever is done to them, they are its tokens."""

import multiprocessing
import sys

import pytest
import torch
import transformers
from decoding_models import GUARDED, STEADY, decoded, left_padding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchlamp import prepare
from torchlamp.kernels import native

#: A prompt of so many tokens is read in tiles, and lies behind a sliding window.
LENGTH = 40
#: Everything that a look-ahead can read in full, is.
FULL = (
    "scores=int8.center.hadamard+all, values=int8+all, mlp_up=int8+all, mlp_down=int8+all, lm_head=int8+all"
)

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


def read(model, ids, cache, sizes, mask=None):
    """Logits float32 (batch, length, vocabulary) of steps of these sizes, the last one to the end."""
    masks, parts, start = torch.ones_like(ids) if mask is None else mask, [], 0
    for size in (*sizes, ids.shape[1]):
        end = min(start + size, ids.shape[1])
        if end > start:
            words = {"attention_mask": masks[:, :end], "past_key_values": cache}
            parts.append(model(ids[:, start:end], **words).logits)
        start = end
    return torch.cat(parts, 1)


def near(got, want, tolerance=3e-3):
    """Equal but for what rounding does to codes that lie between two integers; a key too many makes more than 0.1."""
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_a_padded_batch_is_its_sequences(build, tokens, name):
    """Each alone, without its padding, gives what it gives in the batch: prompt, two steps of some, one of one."""
    model, ids = build(name), tokens(3, LENGTH + 11)
    mask = torch.ones_like(ids)
    lengths = (LENGTH + 11, 23, 14)
    for row, length in enumerate(lengths):
        mask[row, : -length or None] = 0
    sizes = (LENGTH, 7, 3)
    with prepare(model, STEADY) as prepared:
        together = read(model, ids, prepared.cache(), sizes, mask)
        for row, length in enumerate(lengths):
            own = ids[row : row + 1, -length:]
            near(
                together[row : row + 1, -8:], read(model, own, prepared.cache(), (length - 11, 7, 3))[:, -8:]
            )


@given(
    name=st.sampled_from(["llama", "gemma3", "mistral"]),
    batch=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 45), min_size=1, max_size=6),
    length=st.integers(2, 70),
    padded=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_partition_into_steps(build, tokens, name, batch, sizes, length, padded):
    model, ids = build(name), tokens(batch, length)
    mask = left_padding(batch, length) if padded else None
    with prepare(model, STEADY) as prepared:
        want = decoded(model, ids, prepared.cache(), prompt=1, mask=mask)
        got = read(model, ids, prepared.cache(), sizes, mask)[:, 1:]
    # What padded positions give is nobody's business.
    shown = (torch.ones_like(ids) if mask is None else mask).bool()[:, 1:]
    near(got[shown], want[shown])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams_are_the_models_own(build, tokens, name):
    model, ids = build(name), tokens(2, LENGTH)
    words = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **words)
    with prepare(model, FULL, full="float32"):
        assert torch.equal(model.generate(ids, **words), want)


@pytest.mark.parametrize("policy", [STEADY, GUARDED])
def test_cropping_goes_back(build, tokens, policy):
    """After a prompt and a step that are taken back, the next step is that of the shorter prompt."""
    model, ids = build("llama"), tokens(2, LENGTH)
    other = tokens(2, 9, seed=5)
    with prepare(model, policy) as prepared:
        cache, short = prepared.cache(), prepared.cache()
        read(model, ids, cache, (LENGTH - 5, 5))
        cache.crop(-12)
        assert cache.get_seq_length() == LENGTH - 12
        read(model, ids[:, : LENGTH - 12], short, (LENGTH,))
        # The keys' mean is that of each first call.
        tolerance = 3e-3 if policy == STEADY else 2e-2
        mask = torch.ones(2, LENGTH - 3, dtype=torch.long)
        got, want = (model(other, attention_mask=mask, past_key_values=c).logits for c in (cache, short))
    near(got, want, tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_saved_between_a_prompt_and_a_step(build, tokens, tmp_path, name):
    model, ids, more = build(name), tokens(2, LENGTH), tokens(2, 9, seed=5)
    mask = torch.ones(2, LENGTH + 9, dtype=torch.long)
    with prepare(model, GUARDED) as prepared:
        cache, restored = prepared.cache(), prepared.cache()
        read(model, ids, cache, (LENGTH,))
        cache.save(tmp_path / "cache.safetensors")
        restored.restore(tmp_path / "cache.safetensors")
        want = model(more, attention_mask=mask, past_key_values=cache).logits
        got = model(more, attention_mask=mask, past_key_values=restored).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_threads_do_not_matter(build, tokens, name):
    model, ids = build(name), tokens(2, LENGTH + 11)
    before, found = torch.get_num_threads(), []
    try:
        with prepare(model, GUARDED) as prepared:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(read(model, ids, prepared.cache(), (LENGTH, 7, 3)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        near(other, found[0], 1e-5)


def in_a_fork(run):
    """What `run()` gives in a forked process, a tensor or a text."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def body():
        with torch.inference_mode():
            found = run()
        theirs.send(found.numpy() if isinstance(found, torch.Tensor) else found)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads don't survive a fork
    try:
        child = context.Process(target=body)
        child.start()
        assert ours.poll(60), "the child hangs, or has died"
        found = ours.recv()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_a_forked_process_goes_on(build, tokens):
    """Its parent's cache is there, and stays the parent's."""
    model, ids, more = build("llama"), tokens(2, LENGTH), tokens(2, 9, seed=5)
    words = {"attention_mask": torch.ones(2, LENGTH + 9, dtype=torch.long)}
    with prepare(model, GUARDED) as prepared:
        cache = prepared.cache()
        read(model, ids, cache, (LENGTH,))
        got = in_a_fork(lambda: model(more, past_key_values=cache, **words).logits)
        assert cache.get_seq_length() == LENGTH
        assert torch.equal(torch.from_numpy(got), model(more, past_key_values=cache, **words).logits)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory in Linux's way")
@pytest.mark.skipif(not native.available(), reason="is about the native kernels' memory, too")
def test_a_prompt_without_memory_is_an_error_and_no_more(build, tokens):
    """The model and its other caches go on. The logits are 192 MB, more than lies freed in the process."""
    config = build("llama").config
    config.vocab_size = 16_000
    model = transformers.LlamaForCausalLM(config).eval()
    ids, more, long = tokens(1, LENGTH), tokens(1, 9, seed=5), tokens(1, 3000)
    words = {"attention_mask": torch.ones(1, LENGTH + 9, dtype=torch.long)}
    with prepare(model, GUARDED) as prepared:
        cache, other = prepared.cache(), prepared.cache()
        for own in (cache, other):
            read(model, ids, own, (LENGTH,))
        want = model(more, past_key_values=other, **words).logits

        def limited():
            import resource

            with open("/proc/self/status") as status:
                size = 1024 * int(status.read().split("VmSize:")[1].split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
            try:
                model(long, past_key_values=prepared.cache())
                said = "there was room"
            except (MemoryError, RuntimeError) as error:
                said = str(error).splitlines()[0]
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            same = torch.equal(model(more, past_key_values=cache, **words).logits, want)
            return f"{said}; {same}"

        said = in_a_fork(limited)
    assert "alloc" in said
    assert said.endswith("; True")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", [(LENGTH,), (20, 10, 10)])
def test_what_is_not_finite_stays_where_it_is(build, tokens, bad, sizes):
    """The sequence with it is finite in the steps before it and isn't from it on; the others of the batch don't change.

    Only that a store with such a value reads more of all in full, and so rounds less. Within the step a masked value
    that isn't finite has weight 0, and 0 times it is NaN, as in the model's own attention.
    """
    model, ids, place = build("llama"), tokens(3, LENGTH), 25
    embedded = model.get_input_embeddings()(ids).clone()
    spoilt = embedded.clone()
    spoilt[1, place, 3] = bad

    def run(inputs, cache):
        parts, start = [], 0
        for size in sizes:
            end, mask = start + size, torch.ones(3, start + size, dtype=torch.long)
            words = {"attention_mask": mask, "past_key_values": cache}
            parts.append(model(inputs_embeds=inputs[:, start:end], **words).logits)
            start = end
        return torch.cat(parts, 1)

    with prepare(model, GUARDED) as prepared:
        want, got = run(embedded, prepared.cache()), run(spoilt, prepared.cache())
    assert want.isfinite().all()
    near(got[[0, 2]], want[[0, 2]])
    assert got[1, : 20 if len(sizes) > 1 else 0].isfinite().all()
    assert not got[1, place:].isfinite().any()
