"""A store that the memory has no room for: a clear error, and the store as it was."""

import subprocess
import sys

import pytest

from torchlamp.kernels import native

SCRIPT = """
import resource, torch
from torchlamp.decoding.key_value_store import KeyValueStore, StoreOptions

torch.set_num_threads(2)
k, v, q = torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 64, 1, 64)
more = torch.randn(1, 2, 1, 64).expand(1, 2, 100_000, 64)
thresholds = dict(scaling=0.125, scores_threshold=1e-3, values_threshold=1e-2)
store = KeyValueStore(StoreOptions())
store.append(k, v)
before = store.attend(q, **thresholds).output
size = 1024 * int(open("/proc/self/status").read().split("VmSize:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
for use in (
    lambda: store.append(more, more),
    lambda: store.select(torch.zeros(1000, dtype=torch.long)),
    lambda: store.attend(q.expand(1, 64, 512, 64), **thresholds),
):
    try:
        use()
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        print("there was room")
    assert (store.length, store.capacity) == (512, 512), (store.length, store.capacity)
    assert torch.equal(store.attend(q, **thresholds).output, before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory in Linux's way")
@pytest.mark.skipif(not native.available(), reason="is about the native kernels' memory, too")
def test_errors_are_clear_and_leave_the_store_as_it_was():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == 3
    assert all("alloc" in line for line in printed), printed
