"""Opens mutated checkpoints, one after the other, in a process of bounded memory.

Run as ``python fuzz_readers.py SEED COUNT DIRECTORY``; DIRECTORY holds ``base.gguf`` and ``hf/``.
Prints a JSON line.  Any exception but ModelError ends it with the number of the mutation.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

from pyllmlite.core.errors import ModelError
from pyllmlite.model.source import open_checkpoint

MEMORY = 1 << 30
SECONDS_A_FILE = 10
ABSURD = [0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, 1 << 63,
          (1 << 64) - 1]  # fmt: skip


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to four of: bits flipped, a size made absurd, bytes cut out, put in or moved, the end
    cut off.  Mostly in the header, where the sizes are."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        limit = min(header, len(out)) if rng.random() < 0.85 else len(out)
        at = rng.randrange(max(limit, 1))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice(ABSURD))
        elif kind == 2:
            out[at : at + 4] = struct.pack("<I", rng.choice(ABSURD) & 0xFFFFFFFF)
        elif kind == 3:
            del out[at : at + rng.choice([1, 2, 8, 64])]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice([1, 2, 8, 64]))
        elif kind == 5:
            other = rng.randrange(max(limit, 1))
            size = rng.choice([4, 8, 32])
            out[at : at + size] = out[other : other + size]
        else:
            del out[rng.randrange(len(out)) if rng.random() < 0.5 else at :]
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A value somewhere in a JSON object replaced by something of another kind or size."""
    parsed = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        place = parsed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and rng.random() < 0.8:
                place = place[key]
                continue
            choices = [*ABSURD, -1, 1.5, None, True, "x", "llama", [], {}, [1, 2], 1e308, "silu"]
            place[key] = rng.choice(choices)
            if rng.random() < 0.2:
                del place[key]
            break
    return json.dumps(parsed).encode()


def mutated_gguf(base: bytes, header: int, rng: random.Random, folder: Path) -> Path:
    (folder / "x.gguf").write_bytes(mutate(base, rng, header))
    return folder / "x.gguf"


def mutated_directory(base: Path, rng: random.Random, folder: Path) -> Path:
    target = folder / "hf"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(base, target)
    weights = (base / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", weights[:8])[0]
    what = rng.randrange(4)
    if what == 0:
        (target / "model.safetensors").write_bytes(mutate(weights, rng, 8 + length))
    elif what == 1:
        header = mutate_json(weights[8 : 8 + length], rng)
        changed = struct.pack("<Q", len(header)) + header + weights[8 + length :]
        (target / "model.safetensors").write_bytes(changed)
    elif what == 2:
        config = (base / "config.json").read_bytes()
        (target / "config.json").write_bytes(mutate_json(config, rng))
    else:
        name = rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
        (target / name).write_bytes(mutate((base / name).read_bytes(), rng, 1 << 20))
    return target


def read_all(path: Path) -> None:
    """All that a load does: spec, every tensor, rotary tables, tokenizer."""
    from pyllmlite.model.rope import rope_tables

    source = open_checkpoint(path)
    for name in source.names():
        source.get(name)
        tensor = source.raw(name)
        if tensor is not None:
            tensor.codes()
    for layer in source.spec.layers[:2]:
        if layer.rope is not None:
            rope_tables(layer.rope, min(source.spec.max_position_embeddings, 1024))
    tokenizer = source.tokenizer()
    tokenizer.decode(tokenizer.encode("the thing, 12 <s> é"))


def main(seed: int, count: int, folder: Path) -> None:
    base = (folder / "base.gguf").read_bytes()
    work = folder / f"work-{seed}"
    work.mkdir()
    read_all(folder / "base.gguf")
    read_all(folder / "hf")
    # Address space as it is now, everything imported, and what a bad file may cost at most.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results = {"read": 0, "refused": 0}
    slowest = 0.0
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        if number % 2:
            path = mutated_gguf(base, int(len(base) * 0.35), rng, work)
        else:
            path = mutated_directory(folder / "hf", rng, work)
        signal.alarm(SECONDS_A_FILE)
        start = time.monotonic()
        try:
            read_all(path)
            results["read"] += 1
        except ModelError as error:
            results["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                print(json.dumps({"failed": number, "message": str(error)[:2000]}))
                sys.exit(1)
        except BaseException:
            print(json.dumps({"failed": number, "message": traceback.format_exc()}))
            sys.exit(1)
        slowest = max(slowest, time.monotonic() - start)
    signal.alarm(0)
    # Not getrusage's ru_maxrss: that counts what the process was before it was this program.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) << 10
    print(json.dumps({**results, "slowest": slowest, "peak_bytes": peak}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
