"""Traffic to replay: who asks when, with how long a prompt, for how long an answer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from pyllmlite.core.errors import ConfigError


@dataclass(frozen=True)
class Arrival:
    """One request of a trace.

    Attributes:
        time: Seconds after the trace's start.
        prompt: Token ids.
        output: Tokens that it will be given.
    """

    time: float
    prompt: tuple[int, ...]
    output: int
    client: str = ""
    priority: int = 0


Draw = Callable[[random.Random], int]


def lengths(text: str) -> Draw:
    """``128`` or ``fixed:128``, ``uniform:16:256``, ``log-uniform:16:256``: tokens, both ends
    included.  ``ConfigError``: none of these."""
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
    try:
        numbers = [int(part) for part in rest.split(":")]
    except ValueError:
        numbers = []
    if kind == "fixed" and len(numbers) == 1 and numbers[0] >= 1:
        return lambda rng: numbers[0]
    if kind in ("uniform", "log-uniform") and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:
        low, high = numbers
        if kind == "uniform":
            return lambda rng: rng.randint(low, high)
        return lambda rng: min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
    raise ConfigError(
        f"lengths are fixed:N, uniform:LOW:HIGH or log-uniform:LOW:HIGH in tokens, got {text!r}"
    )


def arrival_times(kind: str, count: int, rate: float, rng: random.Random) -> list[float]:
    """Of ``count`` requests, ``rate`` a second on average.

    Args:
        kind: ``all`` (at once), ``poisson``, or ``bursty:N``: N at the same moment, the bursts as a
            Poisson process.
    """
    if kind == "all":
        return [0.0] * count
    word, _, size = kind.partition(":")
    burst = int(size) if size.isdigit() else 1
    if word not in ("poisson", "bursty") or (word == "bursty") != bool(size) or burst < 1:
        raise ConfigError(f"arrivals are all, poisson or bursty:N, got {kind!r}")
    if not 0 < rate < math.inf:
        raise ConfigError(f"a rate of arrivals must be above 0, got {rate!r}")
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        now += rng.expovariate(rate / burst)
        times += [now] * min(burst, count - len(times))
    return times


def make_trace(
    count: int,
    prompt: Draw,
    output: Draw,
    *,
    arrivals: str = "all",
    rate: float = 1.0,
    vocab_size: int = 1000,
    shared_prefix: int = 0,
    prefix_groups: int = 1,
    clients: int = 1,
    seed: int = 0,
) -> list[Arrival]:
    """A trace, the same for a seed whatever the rate: only its times are scaled.

    Args:
        shared_prefix: Tokens that all prompts of a group begin with, before their own.
        clients: The i-th sends in proportion to 1 / i, so that some send more than others.
    """
    rng = random.Random(seed)
    prefixes = [
        tuple(rng.randrange(vocab_size) for _ in range(shared_prefix))
        for _ in range(prefix_groups)
    ]
    times = arrival_times(arrivals, count, rate, random.Random(seed + 1))
    weights = [1 / (i + 1) for i in range(clients)]
    trace = []
    for time in times:
        own = tuple(rng.randrange(vocab_size) for _ in range(prompt(rng)))
        client = rng.choices(range(clients), weights)[0]
        trace.append(
            Arrival(time, rng.choice(prefixes) + own, output(rng), f"client{client}")
        )
    return trace


def at_once(trace: list[Arrival]) -> list[Arrival]:
    """The same requests, all there from the start."""
    return [replace(request, time=0.0) for request in trace]
