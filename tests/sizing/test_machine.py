"""Cache sizes as the system lists them, and a measurement of this machine."""

import pytest

from pyllmlite import _native
from pyllmlite.sizing import last_level_cache, measure_machine


def write_cache(root, cpu, index, level, kind, size, shared):
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in {
        "level": level,
        "type": kind,
        "size": size,
        "shared_cpu_list": shared,
    }.items():
        (folder / name).write_text(f"{text}\n")


def test_last_level_caches_are_counted_once_each(tmp_path):
    for cpu in range(4):
        write_cache(tmp_path, cpu, 0, 1, "Data", "32K", cpu)
        write_cache(tmp_path, cpu, 1, 1, "Instruction", "64K", cpu)
        write_cache(tmp_path, cpu, 2, 2, "Unified", "1024K", cpu)
    for cpu in range(3):
        write_cache(tmp_path, cpu, 3, 3, "Unified", "16M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache({0}, tmp_path) == 16 << 20
    assert last_level_cache({0, 1}, tmp_path) == 16 << 20
    assert last_level_cache({1, 2}, tmp_path) == 32 << 20
    assert last_level_cache({3}, tmp_path) == 1 << 20  # its third level is not listed
    assert last_level_cache({9}, tmp_path) == 0
    (tmp_path / "cpu0/cache/index3/size").write_text("a lot\n")
    assert last_level_cache({0}, tmp_path) == 1 << 20


def test_measured_peaks_are_in_order():
    machine = measure_machine(threads=1, seconds=0.02)
    assert machine.threads == 1
    assert machine.isa == _native.info()["isa"]
    assert machine.dram_bandwidth > 0
    assert set(machine.macs) == {"int8", "bf16", "f32"}
    assert all(rate > 0 for rate in machine.macs.values())
    assert f"{machine.isa}, 1 thread: DRAM" in str(machine)
    assert (machine.cache_bandwidth is None) == (machine.cache_bytes == 0)


def test_measure_peak_refuses_in_one_line():
    pool = _native.ThreadPool(1)
    with pytest.raises(ValueError, match="read, int8, bf16 or f32, got 'fp8'"):
        _native.measure_peak("fp8", pool)
    with pytest.raises(ValueError, match="at least 64 bytes, got 0"):
        _native.measure_peak("read", pool)
    with pytest.raises(ValueError, match="seconds"):
        _native.measure_peak("f32", pool, 0.0)
    with pytest.raises(ValueError, match="for reading alone"):
        _native.measure_peak("f32", pool, 0.1, 64)
