"""One model, ready to run: sizes settled, a strategy chosen for every hook, a Program laid out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import CapacityError, ConfigError, PluginError, PyllmliteError
from pyllmlite.hooks.attention import AttentionNeeds
from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.hooks.registry import Registry, Selection
from pyllmlite.hooks.scheduler import SchedulerContext
from pyllmlite.model.builder import ModelBuilder, kv_element_bytes
from pyllmlite.model.draft_runner import open_draft_model
from pyllmlite.model.kv_groups import kv_groups, with_sinks
from pyllmlite.model.options import Options
from pyllmlite.model.preemption import worth_swapping
from pyllmlite.model.source import ModelSource, open_model
from pyllmlite.model.weights import keeps_codes, plan_matrices
from pyllmlite.runtime.native import native
from pyllmlite.runtime.program import ITEM_BYTES, Program, ProgramBuilder

if TYPE_CHECKING:
    from pyllmlite import _native
    from pyllmlite.core.spec import ModelSpec
    from pyllmlite.core.weights import LinearShape
    from pyllmlite.hooks.cache import KVCache
    from pyllmlite.hooks.decoder import Decoder, Proposer
    from pyllmlite.hooks.quantizer import Quantizer
    from pyllmlite.hooks.scheduler import Scheduler

log = logging.getLogger("pyllmlite")

DEFAULT_BATCHED_TOKENS = 512
DEFAULT_KV_BYTES = 4 << 30
DRAFT_ROWS = 8  # logit rows a sequence may use when drafts are verified


@dataclass
class Built:
    """What the engine runs, and what was chosen to get there."""

    config: EngineConfig
    spec: ModelSpec
    program: Program
    batch: _native.Batch
    cache: KVCache
    scheduler: Scheduler
    decoder: Decoder
    proposer: Proposer | None
    constraints: list[Any]
    decoders: Callable[[str], Decoder]
    proposers: Callable[[str], Proposer]
    tokenizer: Any
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logit_rows: int
    weight_bytes: int
    weight_formats: dict[str, int]
    dtype: str
    threads: int
    selections: dict[str, Selection] = field(default_factory=dict)
    load_seconds: float = 0.0
    worth_swapping: Callable[[int, int], bool] | None = None

    def _laid_on(self) -> str:
        """What the configuration asks of the cache beyond the model's own needs."""
        config, text = self.config, ""
        if config.swap_bytes:
            text += f", swap {config.swap_bytes / 1e6:.0f} MB ({config.preemption_mode})"
        if config.sliding_window is not None:
            text += f", window {config.sliding_window}"
        if config.attention_sinks:
            text += f" and {config.attention_sinks} sinks"
        return text

    def explain(self) -> str:
        """What was selected for each hook, why, and why the others were not."""
        formats = [f"{name} {size / 1e6:.0f} MB" for name, size in self.weight_formats.items()]
        lines = [
            f"model       {self.spec.architecture}, {self.spec.num_layers} layers, {self.dtype}, "
            f"weights {self.weight_bytes / 1e6:.0f} MB, {self.threads} threads, "
            f"{native().info()['isa']}",
            f"weights     {'; '.join(formats)}",
            f"lengths     max_model_len {self.max_model_len}, max_num_seqs {self.max_num_seqs}, "
            f"max_num_batched_tokens {self.max_num_batched_tokens}, "
            f"KV {self.cache.nbytes / 1e6:.0f} MB{self._laid_on()}",
        ]
        for hook, chosen in self.selections.items():
            origin = f"{chosen.distribution} {chosen.version}".strip()
            lines.append(f"{hook:<11} {chosen.cls.name} ({origin}): {chosen.why}")
            lines += [f"{'':<11}   not {name}: {reason}" for name, reason in chosen.rejected]
        return "\n".join(lines)


def build(
    model: ModelSource | str | os.PathLike[str] | None,
    config: EngineConfig,
    registry: Registry | None = None,
    progress: Callable[[int, int], None] | None = None,
    pool: Any = None,
) -> Built:
    """Load a model and choose a strategy for every hook.

    Args:
        model: A source, or what :func:`open_model` takes.
        progress: Called with (matrices loaded, matrices in all).
        pool: Threads of another Program, which never runs at the same time; None: its own.
    Raises:
        ModelError, PluginError, ConfigError, CapacityError: One line: the cause and what would
            work.  Everything that can be refused is refused here, before the first token.
    """
    started = time.perf_counter()
    registry = registry or Registry.load()
    source = (
        model
        if isinstance(model, ModelSource)
        else open_model(model, revision=config.revision)
    )
    spec = source.spec
    device = _device(config.device)
    quantizes = config.bits is not None or config.quantizer not in ("auto", "none")
    dtype = _dtype(config.dtype, source.stored_dtype, quantizes or source.quantized)
    spec = with_sinks(spec, config.sliding_window, config.attention_sinks)
    max_model_len = _asked_length(config, spec)
    batched = config.max_num_batched_tokens or max(DEFAULT_BATCHED_TOKENS, config.max_num_seqs)
    if batched < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({batched}) must be at least max_num_seqs "
            f"({config.max_num_seqs}), so that every sequence can take a step"
        )
    if config.max_logprobs > spec.vocab_size:
        raise ConfigError(
            f"max_logprobs {config.max_logprobs} is more than the vocabulary's {spec.vocab_size}"
        )
    selections: dict[str, Selection] = {}
    options = Options(config.extra)

    def select(contract: str, name: str, need: Any, label: str | None = None) -> Any:
        chosen = registry.select(contract, name, need)
        selections[label or contract] = chosen
        return chosen.cls

    # Names first: a typing mistake should not cost the loading of the weights.
    scheduler = _make(select("scheduler", config.scheduler, None))
    scheduler.setup(SchedulerContext(config.max_num_seqs, batched, options))
    decoder_context = DecoderContext(
        spec.vocab_size,
        max_model_len,
        spec.eos_token_ids,
        None if config.skip_tokenizer_init else _tokenizer(source, config),
        config.max_logprobs,
        options,
    )
    decoder_class = select("decoder", config.decoder, None)
    proposer_class = (
        select("decoder", config.proposer, None, "proposer") if config.proposer else None
    )
    _check_role(decoder_class, "selector", "decoder")
    if proposer_class is not None:
        _check_role(proposer_class, "proposer", "proposer")
        if not decoder_class.takes_drafts:
            raise ConfigError(
                f"decoder {decoder_class.name!r} does not work with proposer "
                f"{proposer_class.name!r}; leave one of the two out"
            )
    shapes = tuple(plan.shape for plan in plan_matrices(spec))
    quantizer_needs = QuantizerNeeds(
        device, dtype, shapes, config.bits, config.group_size, config.symmetric, options
    )
    quantizer = _make(select("quantizer", config.quantizer, quantizer_needs), quantizer_needs)
    if quantizes and not keeps_codes(source, quantizer):
        log.warning(
            "%s: its weights are quantized already (%s), and quantizer %r rounds them once more: "
            "the losses add up; without quantizer and bits they run as they are stored",
            source.path,
            source.stored_dtype,
            quantizer.name,
        )

    weight_bytes = _expected_weight_bytes(source, quantizer, shapes)
    available = available_memory()
    if weight_bytes > available:
        raise CapacityError(
            f"the model does not fit: its weights take {weight_bytes / 1e9:.1f} GB with quantizer "
            f"{quantizer.name!r}, {available / 1e9:.1f} GB are free; "
            "use fewer bits (quantizer='rtn', bits=4) or a smaller model"
        )
    if config.swap_bytes > available - weight_bytes:
        raise CapacityError(
            f"swap_space does not fit: {config.swap_bytes / 1e9:.1f} GB beside "
            f"{weight_bytes / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB are free"
        )
    available -= config.swap_bytes
    if (config.kv_cache_bytes or 0) > available - weight_bytes:
        raise CapacityError(
            f"kv_cache_memory does not fit: {(config.kv_cache_bytes or 0) / 1e9:.1f} GB beside "
            f"{weight_bytes / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB are free"
        )
    cache_needs = CacheNeeds(
        device=device,
        dtype=dtype,
        groups=kv_groups(spec),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_model_len=max_model_len,
        max_rows=config.max_num_seqs,
        max_num_batched_tokens=batched,
        max_bytes=config.kv_cache_bytes
        or _kv_bytes(spec, available - weight_bytes, dtype, config, max_model_len),
        kv_dtype=config.kv_cache_dtype,
        block_size=config.block_size,
        prefix_caching=config.enable_prefix_caching,
        swap_bytes=config.swap_bytes,
        extra=options,
    )
    cache = _make(select("cache", config.cache, cache_needs), cache_needs)
    max_model_len = _fit_length(config, cache, max_model_len)
    attention_needs = AttentionNeeds(
        device=device,
        dtype=dtype,
        head_dim=spec.head_dim,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        kv_layout=cache.layout,
        kv_dtype=cache.kv_dtype,
        block_size=cache.block_size,
        window=any(window is not None for window in spec.windows),
        alibi=spec.alibi,
        softcap=spec.attention_softcap > 0,
        sinks=max(group.sinks for group in cache_needs.groups),
    )
    attention = _make(select("attention", config.attention, attention_needs))

    threads = config.threads or len(os.sched_getaffinity(0))
    rows_per_seq = DRAFT_ROWS if proposer_class is not None else 1
    max_logit_rows = min(batched, max(64, config.max_num_seqs * rows_per_seq))
    pool = pool or native().ThreadPool(threads)
    sink = ProgramBuilder(batched, max_logit_rows, pool)
    builder = ModelBuilder(
        source, spec, sink, quantizer, cache, attention, max_model_len, progress
    )
    builder.load_weights()
    builder.add_ops()
    program = sink.finish()
    batch = native().Batch(
        config.max_num_seqs,
        max_model_len,
        batched,
        max_logit_rows,
        spec.vocab_size,
        config.max_logprobs,
        [(cache.block_size, table) for table in cache.block_tables],
    )
    decoder_context = replace(
        decoder_context,
        max_model_len=max_model_len,
        weight_bytes=builder.weight_bytes,
        open_model=lambda name, options: open_draft_model(
            name, options, spec, decoder_context.tokenizer, registry, pool,
            EngineConfig(
                device=config.device, dtype=config.dtype, max_num_seqs=config.max_num_seqs,
                max_model_len=max_model_len, max_num_batched_tokens=batched, threads=threads,
                max_logprobs=0, skip_tokenizer_init=decoder_context.tokenizer is None,
            ),
        ),
    )  # fmt: skip
    made = {
        cls.name: _make(cls, decoder_context) for cls in (decoder_class, proposer_class) if cls
    }

    def decoder_named(name: str, role: str = "selector") -> Any:
        if name not in made or made[name].role != role:
            cls = registry.select("decoder", name, None).cls
            _check_role(cls, role, "proposer" if role == "proposer" else "decoder")
            made[name] = _make(cls, decoder_context)
        return made[name]

    options.check()
    built = Built(
        config=config,
        spec=spec,
        program=program,
        batch=batch,
        cache=cache,
        scheduler=scheduler,
        decoder=made[decoder_class.name],
        proposer=made[proposer_class.name] if proposer_class else None,
        constraints=[
            _make(cls, decoder_context)
            for cls in registry.classes("decoder")
            if getattr(cls, "role", "") == "constraint"
        ],
        decoders=decoder_named,
        proposers=lambda name: decoder_named(name, "proposer"),
        tokenizer=decoder_context.tokenizer,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched,
        max_logit_rows=max_logit_rows,
        weight_bytes=builder.weight_bytes,
        weight_formats=builder.weight_formats(),
        dtype=dtype,
        threads=threads,
        selections=selections,
        load_seconds=time.perf_counter() - started,
        worth_swapping=worth_swapping(config, program, pool),
    )
    log.info("loaded in %.1f s\n%s", built.load_seconds, built.explain())
    return built


def _make(cls: type[Any], *needs: Any) -> Any:
    """A strategy; whatever its constructor raises is one line that names it."""
    try:
        return cls(*needs)
    except PyllmliteError:
        raise
    except Exception as error:
        what = cls.contract if getattr(cls, "role", "selector") == "selector" else cls.role
        text = " ".join(str(error).split())
        raise PluginError(
            f"{what} {cls.name!r} cannot be set up: {type(error).__name__}: {text}"
        ) from error


def _device(asked: str) -> str:
    if asked == "cuda":
        reason = native().cuda_info()["reason"] or "models run on the CPU only so far"
        raise ConfigError(f"device 'cuda' cannot be used: {reason}; use 'cpu'")
    return "cpu"


def _dtype(asked: str, stored: str, quantized: bool) -> str:
    """``auto``: what the checkpoint has; 16-bit floats and quantized blocks run as bf16.  So does
    what is quantized beside f32, or being quantized: KV in f32 would take twice the bytes, and a
    quantized weight is further from its float than bf16 is."""
    if asked != "auto":
        return asked
    return "f32" if stored == "f32" and not quantized else "bf16"


def _asked_length(config: EngineConfig, spec: ModelSpec) -> int:
    """``max_model_len``.  It may be more than the positions that the model knows if no layer sees
    so many, and sinks hold what a window alone would lose."""
    known, asked = spec.max_position_embeddings, config.max_model_len
    if asked is None or asked <= known:
        return asked or known
    why = f"max_model_len {asked} is more than the model's {known} positions"
    if spec.learned_positions:
        raise ConfigError(why)
    if not config.attention_sinks:
        raise ConfigError(f"{why}; with sliding_window and attention_sinks it can go on")
    scalings = [(layer.rope.scaling or {}) for layer in spec.layers if layer.rope is not None]
    if any(scaling.get("rope_type") == "dynamic" for scaling in scalings):
        raise ConfigError(
            f"{why}, and with rope_type 'dynamic' a key's rotation would change with the length: "
            "attention sinks cannot go on there"
        )
    furthest = max((layer.window or asked) + layer.sinks for layer in spec.layers)
    if furthest > known:
        raise ConfigError(
            f"{why}, and a layer sees {furthest}; sliding_window + attention_sinks may be {known}"
        )
    return asked


def _kv_bytes(
    spec: ModelSpec, free: int, dtype: str, config: EngineConfig, max_model_len: int
) -> int:
    """Room for every row at full length, up to 4 GiB and 40 % of what is free beside the
    weights.  Pages are touched when they are first written, so unused room costs nothing."""
    kv_item = kv_element_bytes(config.kv_cache_dtype, spec.head_dim, ITEM_BYTES[dtype])
    per_token = spec.kv_bytes_per_token(kv_item)
    block = config.block_size or 16
    length = -(-max_model_len // block) * block
    everything = int(per_token * length * config.max_num_seqs)
    return max(min(everything, DEFAULT_KV_BYTES, int(0.4 * free)), int(per_token * block))


def _expected_weight_bytes(
    source: ModelSource, quantizer: Quantizer, shapes: tuple[LinearShape, ...]
) -> int:
    bits = sum(s.out_features * s.in_features * quantizer.bits_per_weight(s) for s in shapes)
    return min(int(bits / 8), source.weight_bytes) if source.quantized else int(bits / 8)


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, within its cgroup's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux: all of the machine's memory
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            with open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
                available = min(available, max(0, int(limit.read()) - int(used.read())))
    except (OSError, ValueError):
        pass  # no cgroup v2, or "max": no limit
    return available


def _fit_length(config: EngineConfig, cache: KVCache, max_model_len: int) -> int:
    fits = cache.max_tokens_per_sequence()
    if fits >= max_model_len:
        return max_model_len
    if config.max_model_len is not None:
        raise CapacityError(
            f"max_model_len {config.max_model_len} does not fit: the cache holds {fits} tokens "
            f"in {cache.nbytes / 1e6:.0f} MB; raise kv_cache_memory or lower max_model_len"
        )
    log.warning(
        "max_model_len lowered from %d to %d, which is what the KV cache holds; "
        "raise kv_cache_memory for more",
        max_model_len,
        fits,
    )
    return fits


def _tokenizer(source: ModelSource, config: EngineConfig) -> Any:
    if config.tokenizer is not None:
        from pyllmlite.model.hub import resolve
        from pyllmlite.model.tokenizer import open_tokenizer

        return open_tokenizer(resolve(config.tokenizer))
    return source.tokenizer()


def _check_role(cls: type, role: str, option: str) -> None:
    if getattr(cls, "role", role) != role:
        raise ConfigError(
            f"{option}={cls.name!r} is a {cls.role}, not a {role}; "  # type: ignore[attr-defined]
            f"use it as {'proposer' if cls.role == 'proposer' else 'decoder'}="  # type: ignore[attr-defined]
        )



