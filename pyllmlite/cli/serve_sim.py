"""``pyllmlite bench serve-sim``: one trace through several schedulers, beside each other."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllmlite.cli.options import parse_extra
from pyllmlite.cli.output import print_json, print_table

if TYPE_CHECKING:
    from pyllmlite.engine.simulate import Replay
    from pyllmlite.engine.trace import Arrival

BUILT_IN = ("continuous", "dynamic", "static")


def serve_sim(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Alias, hub id, path or config.json."),
    ] = None,
    scheduler: Annotated[
        list[str] | None,
        typer.Option("--scheduler", "-s", help="By name, beside the built-in ones."),
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="Not beside the built-in ones.")] = False,
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    prompt_lengths: Annotated[
        str, typer.Option(help="fixed:N, uniform:LOW:HIGH or log-uniform:LOW:HIGH.")
    ] = "fixed:64",
    output_lengths: Annotated[str, typer.Option(help="Likewise.")] = "log-uniform:16:256",
    arrivals: Annotated[str, typer.Option(help="all, poisson or bursty:N.")] = "all",
    rate: Annotated[float | None, typer.Option(help="Requests a second.")] = None,
    load: Annotated[
        float | None, typer.Option(help="The rate as a part of what continuous can do.")
    ] = None,
    shared_prefix: Annotated[int, typer.Option(min=0, help="Tokens all prompts begin with.")] = 0,
    prefix_groups: Annotated[int, typer.Option(min=1, help="So many different prefixes.")] = 1,
    clients: Annotated[int, typer.Option(min=1, help="The i-th sends in proportion to 1/i.")] = 1,
    long_prompt: Annotated[
        int | None, typer.Option(min=1, help="One more prompt of so many tokens, on the way.")
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Engines that get the requests in turn.")
    ] = 1,
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, not this machine.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="As plan has them.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 16,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Of one step.")] = 512,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="For keys and values, as 512MB.")
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option("--extra", help="NAME=VALUE for a scheduler; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 0,
    real: Annotated[bool, typer.Option("--real", help="In real time, with the model.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay traffic through schedulers: latency, throughput and fairness beside each other.

    On a simulated clock with the cost model of plan, unless --real.
    """
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.engine.simulate import check_fits
    from pyllmlite.engine.trace import Arrival, at_once, lengths, make_trace

    if (rate is None) == (load is None) and arrivals != "all":
        raise ConfigError(f"--arrivals {arrivals} needs either --rate or --load")
    if arrivals == "all" and (rate is not None or load is not None):
        raise ConfigError("--rate and --load need --arrivals poisson or bursty:N")
    if load is not None and not 0 < load:
        raise ConfigError(f"--load must be above 0, got {load}")
    if real and gpu is not None:
        raise ConfigError("--real is about this machine, not about a GPU; leave out --gpu")
    names = list(dict.fromkeys([*(scheduler or ()), *(() if only else BUILT_IN)]))
    if not names:
        raise ConfigError("--only needs a --scheduler")
    if replicas > 1 and real:
        raise ConfigError("--replicas are simulated; --real has one engine")
    if replicas > requests:
        raise ConfigError(f"there are {replicas} replicas for {requests} requests")
    options = parse_extra(extra)
    sizes: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_batched_tokens, max_num_seqs),
        "kv_cache_memory": kv_cache_memory,
    }
    prompts, outputs = lengths(prompt_lengths), lengths(output_lengths)
    where = _Real(model, format, options, sizes) if real else _Simulated(
        model, format, gpu, options, sizes
    )
    settings: dict[str, Any] = {
        "vocab_size": where.spec.vocab_size,
        "shared_prefix": shared_prefix,
        "prefix_groups": prefix_groups,
        "clients": clients,
        "seed": seed,
    }
    trace = make_trace(requests, prompts, outputs, **settings)
    more = [] if long_prompt is None else [Arrival(0.0, (1,) * long_prompt, 1, "client0")]
    where.max_model_len = max(len(r.prompt) + r.output for r in trace + more) + 1
    check_fits(trace + more, where.spec.max_position_embeddings)
    capacity = None
    if load is not None or long_prompt is not None:
        capacity = _on_replicas(where, "continuous", at_once(trace), replicas)
    if arrivals != "all":
        wanted = rate if load is None or capacity is None else load * capacity.requests_per_second
        trace = make_trace(
            requests, prompts, outputs, arrivals=arrivals, rate=wanted or 0.0, **settings
        )
    if capacity is not None:
        trace += [replace(one, time=capacity.makespan / 4) for one in more]
    started = time.perf_counter()
    rows = [_on_replicas(where, name, trace, replicas) for name in names]
    seconds = time.perf_counter() - started
    unread = [name for name in options if name not in where.read]
    if unread:
        raise ConfigError(f"none of the schedulers reads {unread[0]!r}")
    if json:
        print_json(
            {
                "real": real,
                "machine": where.machine,
                "capacity": None if capacity is None else capacity.requests_per_second,
                "seconds": seconds,
                "results": [row.as_dict() for row in rows],
            }
        )
        return
    _print(rows, where.machine, None if real else requests * len(rows) / seconds)


def _on_replicas(
    where: _Simulated | _Real, name: str, trace: list[Arrival], replicas: int
) -> Replay:
    from pyllmlite.engine.simulate import together

    parts = [where.run(name, trace[i::replicas]) for i in range(replicas)]
    return parts[0] if replicas == 1 else together(parts)


class _Simulated:
    """Schedulers on the clock of a cost model."""

    def __init__(
        self,
        model: str | None,
        format: str | None,
        gpu: str | None,
        options: dict[str, Any],
        sizes: dict[str, Any],
    ) -> None:
        from pyllmlite.cli.plan import describe_machine, formats_of, open_headers
        from pyllmlite.sizing.footprint import planned_ops
        from pyllmlite.sizing.steptime import StepModel

        self.spec, source = open_headers(model)
        weights, _ = formats_of(self.spec, source, format, on_gpu=gpu is not None)
        described = describe_machine(self.spec, weights, gpu)
        self.machine, machine, efficiency, memory = described
        ops = planned_ops(self.spec, weights, "bf16")
        self._model = StepModel(ops, machine, efficiency)
        self._free = max(0.0, memory - weights.nbytes)
        self._options, self._sizes = options, sizes
        self.read: set[str] = set()
        self.max_model_len = 0

    def run(self, name: str, trace: list[Arrival]) -> Replay:
        from pyllmlite.core.config import parse_bytes
        from pyllmlite.engine.simulate import replay, simulated_engine

        sizes, length = self._sizes, self.max_model_len
        # More than every row at full length, twice, is of no use to a short trace.
        most = 4 * self.spec.kv_bytes_per_token(2) * (length + 16) * sizes["max_num_seqs"]
        asked = sizes["kv_cache_memory"]
        engine, clock, options = simulated_engine(
            self.spec,
            name,
            self._model.cost,
            max_num_seqs=sizes["max_num_seqs"],
            max_num_batched_tokens=sizes["max_num_batched_tokens"],
            max_model_len=length,
            kv_bytes=min(most, self._free) if asked is None else parse_bytes(asked),
            extra=self._options,
        )
        self.read |= options.read
        return replay(engine, trace, clock, name)


class _Real:
    """Schedulers around one loaded model, in real time."""

    def __init__(
        self, model: str | None, format: str | None, options: dict[str, Any], sizes: dict[str, Any]
    ) -> None:
        from pyllmlite.core.errors import ConfigError
        from pyllmlite.model.source import open_model
        from pyllmlite.sizing.footprint import FORMATS

        if format not in (None, "stored", *FORMATS):
            raise ConfigError(f"--format is one of stored, {', '.join(FORMATS)}, got {format!r}")
        from pyllmlite.cli.plan import check_runs_in

        self._model = model
        source = open_model(model)
        check_runs_in(source, format)
        self.spec = source.spec
        self._engine = {**FORMATS.get(format or "stored", {}), **sizes}
        self._options = options
        self.machine = "in real time"
        self.max_model_len = 0
        self._llm: Any = None
        self.read: set[str] = set()

    def run(self, name: str, trace: list[Arrival]) -> Replay:
        from pyllmlite.cli.generate import load
        from pyllmlite.engine.engine import Engine
        from pyllmlite.engine.simulate import replay
        from pyllmlite.engine.speed import measure
        from pyllmlite.hooks.registry import Registry
        from pyllmlite.hooks.scheduler import SchedulerContext
        from pyllmlite.model.options import Options

        if self._llm is None:
            length = min(self.max_model_len + 16, self.spec.max_position_embeddings)
            engine = {**self._engine, "max_model_len": length, "skip_tokenizer_init": True}
            self._llm = load(self._model, engine)
            measure(self._llm, min(4, self._engine["max_num_seqs"]), 8, 8)  # first touch
        built = self._llm.built
        options = Options(self._options)
        built.scheduler = Registry.load().select("scheduler", name, None).cls()
        built.scheduler.setup(
            SchedulerContext(built.max_num_seqs, built.max_num_batched_tokens, options)
        )
        self.read |= options.read
        built.cache.reset_prefix_cache()
        return replay(Engine(built), trace, None, name)



def _print(rows: list[Replay], machine: str, speed: float | None) -> None:
    print(machine)
    told = [row.as_dict() for row in rows]

    def ms(value: float | None) -> float | str:
        return "" if value is None else round(1e3 * value, 1)

    print_table(
        ("scheduler", "tok/s", "req/s", "TTFT ms", "p99", "TPOT ms", "p99", "latency ms", "p99",
         "worst gap ms", "usual step ms", "prefill tokens", "preempted", "Jain"),
        [
            (
                row["scheduler"],
                round(row["tokens_per_second"], 1),
                round(row["requests_per_second"], 2),
                *(ms(row[f"{n}_{q}"]) for n in ("ttft", "tpot", "latency") for q in ("p50", "p99")),
                ms(row["gaps_max"]),
                ms(row["usual_step"]),
                row["prefill_tokens"],
                row["preemptions"],
                round(row["jain"], 3),
            )
            for row in told
        ],
    )  # fmt: skip
    if speed is not None:
        print(f"simulated {speed:.0f} requests a second")
