"""What must hold across processes: equal state on all ranks, and compiled code that is there before it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

HISTORY = """
import hashlib, json
import numpy as np
from sglang_relay.index import ContentIndex, DepthMap

rng = np.random.default_rng(3)
index, depths = ContentIndex(base=2**60 + 9, max_bytes=150_000), DepthMap(2**60 + 9, 40)
log, texts = [], []
for step in range(120):
    text = rng.integers(0, 50_000, 500, dtype=np.int32)
    if step % 9 == 0:
        text = np.resize(text[:5], 400)
    if texts:
        text = np.concatenate((text, texts[int(rng.integers(len(texts)))][50:300]))
    texts.append(text)
    tenant = ("salt", f"tenant {step % 3}")
    log.append(index.learn(tenant, f"namespace {step % 2}", text, 20, len(text), step % 4))
    runs = index.match(tenant, text[10:], 5)
    log.append(runs)
    if runs:
        index.touch(runs[-1].donor)
    if step % 13 == 0:
        index.forget_where(lambda donor: donor.depth == 3)
    depths.mark(f"namespace {step % 2}", text, step % 40, 1 + step % 3)
    log.append([depths.depth("namespace 0", old, len(old)) for old in texts[-30:]])
log.append(index.stats())
state = (index._windows.keys, index._windows.values, index._donors.rows, index._blocks.tokens, index._blocks.parents)
digest = hashlib.sha256(b"".join(array.tobytes() for array in state)).hexdigest()
print(json.dumps([hashlib.sha256(json.dumps(log).encode()).hexdigest(), digest, index.stats()]))
"""


def run_python(code: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, check=False, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_calls_same_state_whatever_the_hash_seed() -> None:
    results = [json.loads(run_python(HISTORY, PYTHONHASHSEED=seed)) for seed in ("1", "4242")]
    assert results[0] == results[1]
    stats = results[0][2]
    assert stats["evictions"] > 0 and stats["confirmed"] > 0 and stats["displaced"] + stats["repeats"] > 0


COMPILED = """
import gc
import numpy as np
from numba.core.dispatcher import Dispatcher
from sglang_relay.index import ContentIndex, DepthMap, warm_up

warm_up()
kernels = [thing for thing in gc.get_objects() if isinstance(thing, Dispatcher) and "sglang_relay" in thing.__module__]
before = {id(kernel): len(kernel.signatures) for kernel in kernels}
assert len(kernels) > 15
rng = np.random.default_rng(0)
index, depths = ContentIndex(base=3**30, max_bytes=60_000), DepthMap(3**30, 50)
for seed in range(60):
    text = rng.integers(0, 50_000, 700, dtype=np.int64)
    text = text.astype(np.int32) if seed % 2 else text
    whole = np.int32 if seed % 2 else int
    donor = index.learn(seed % 3, "n", text, whole(100), whole(600), whole(0))
    assert index.match(seed % 3, text, whole(7))[0].donor == donor
    index.path(donor, whole(30))
    index.same_start(donor, max(0, donor - 1), whole(30))
    index.deepen(seed % 3, "n", text, whole(seed + 5), whole(1))
    index.touch(donor)
    depths.mark("n", text, whole(seed), whole(1))
    depths.depth("n", text, whole(700))
index.forget(donor)
index.clear()
new = [kernel.__name__ for kernel in kernels if len(kernel.signatures) != before[id(kernel)]]
assert not new, new
print("cached" if all(kernel._cache.cache_path for kernel in kernels) else "in memory")
"""


def test_warm_up_compiles_all_that_serving_uses() -> None:
    assert run_python(COMPILED).strip() == "cached"


def test_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """Numba refuses `cache=True` at decoration when it finds no writable folder."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from sglang_relay.index import rolling
import numpy as np
assert rolling.multiply(np.uint64(3), np.uint64(5)) == 15
print(type(rolling.multiply._cache).__name__)
"""
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "NullCache"
    assert not list(tmp_path.iterdir())


def test_cache_entries_carry_the_digest_of_all_sources() -> None:
    from sglang_relay.index import _jit, rolling

    folder = Path(_jit.__file__).parent
    digest = _jit._source_digest()
    assert rolling.prefix_hashes.py_func.__qualname__ == f"prefix_hashes_{digest}"
    _jit._source_digest.cache_clear()
    assert _jit._source_digest() == digest and len(list(folder.glob("*.py"))) > 5
