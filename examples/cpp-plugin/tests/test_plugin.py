import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pyllmlite_cpp_example import _ops
from pyllmlite_cpp_example.attention import CppAttention

from pyllmlite import Registry, _native
from pyllmlite.testing import AttentionConformance

ROOT = Path(__file__).resolve().parent.parent


class TestCppAttention(AttentionConformance):
    strategy = CppAttention


def test_found_through_its_entry_point():
    entry = Registry.load().entry("attention", "cpp-example")
    assert entry.cls is CppAttention and entry.distribution == "pyllmlite-cpp-example"


def attention():
    return _ops.attention(
        num_heads=2, num_kv_heads=1, head_dim=16, block_size=16, kv_group=0, scale=0.25
    )


def test_a_capsule_is_taken_once():
    capsule = attention()
    op = _native.Op.from_capsule(capsule)
    assert op.name == "cpp_example_attention"
    with pytest.raises(ValueError, match="no Program has taken yet"):
        _native.Op.from_capsule(capsule)
    del capsule, op
    attention()  # never taken: freed by the capsule
    gc.collect()


def test_a_plan_that_fails_names_the_op():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, 64), np.float32), np.zeros((3, 32), np.float32)]
    arrays += [np.zeros((2, 1, 16, 16), np.float32)] * 2
    with pytest.raises(RuntimeError, match="cpp_example_attention.*no such KV group"):
        _native.run_op(_native.Op.from_capsule(attention()), arrays, None)


def test_copy():
    x = np.arange(35, dtype=np.float32).reshape(7, 5)
    out = np.zeros_like(x)
    _native.run_op(_native.Op.from_capsule(_ops.copy()), [x, out], None, 2)
    np.testing.assert_array_equal(out, x)


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
def test_a_gemm_without_python(tmp_path):
    def cmake(*args):
        done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    package = Path(_native.__file__).parent
    prefix = package / "lib" / "cmake" / "pyllmlite"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    cmake("cmake", "-S", str(ROOT), "-B", ".", f"-DCMAKE_PREFIX_PATH={prefix}", *generator)
    cmake("cmake", "--build", ".")
    assert "as expected" in cmake("./gemm")
