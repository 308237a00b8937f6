"""``pyllmlite share-kv``: fewer KV heads, then a short training that wins back what it lost."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite._version import __version__
from pyllmlite.compress.calibration import SELF, calibration_tokens
from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.compress.learn import one_process, require_torch
from pyllmlite.compress.learn.export import name_of
from pyllmlite.compress.learn.kv_sharing import (
    GROUPINGS,
    POOLINGS,
    AttentionWeights,
    check_heads,
    share_heads,
)
from pyllmlite.compress.learn.settings import training_plan
from pyllmlite.compress.place import (
    SHARE_KV_STATE,
    STATE_FOLDER,
    check_place,
    clear,
    content,
    occupy,
    publish,
)
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.compress.texts import read_text, windows_of
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import ModelSource, open_model

if TYPE_CHECKING:
    import torch

    from pyllmlite.compress.texts import Text

log = logging.getLogger(__name__)

FACTS = "share-kv.json"
KV_BYTES = 2  # of an element of the cache, bf16, as it is kept by default
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
Note = Callable[[str], None]


@dataclass
class ShareSettings:
    """What decides the result.

    Attributes:
        kv_heads: That the model will have; they must divide those it has.
        pooling: ``mean`` (Ainslie et al. 2023), or ``svd``, which looks for the best bases first.
        grouping: ``consecutive`` heads share, or ``similar`` ones.
        tokens: To train on afterwards; 0: none. None: ``share`` of ``trained_tokens``.
        share, trained_tokens: A share of the tokens that the model was trained on.
        text: ``self`` (the model writes it), a text file or a data set.
        num_sequences: Windows of text; None: enough that none is seen twice.
        task_weight: Share of the next token's cross entropy in the loss; the rest is the KL
            divergence to the model as it was.
        dtype: Of the result: f32, bf16, f16; None: as the model is stored.
        precision: float32, or bfloat16 matrix products.
    """

    kv_heads: int
    pooling: str = "mean"
    grouping: str = "consecutive"
    tokens: int | None = None
    share: float = 0.05
    trained_tokens: int | None = None
    text: str = SELF
    num_sequences: int | None = None
    seq_len: int = 256
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float = 3e-4
    task_weight: float = 0.0
    seed: int = 0
    dtype: str | None = None
    precision: str = "float32"
    save_every: int = 50
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("pooling", self.pooling, POOLINGS), ("grouping", self.grouping, GROUPINGS),
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.task_weight <= 1:
            raise ConfigError(f"task_weight must be in [0, 1], got {self.task_weight}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}")
        if self.tokens is None and self.trained_tokens is None:
            raise ConfigError(
                "say how long to train: tokens, or trained_tokens (what the model was trained on), "
                f"of which {self.share:.0%} are taken; tokens=0: not at all"
            )
        if self.tokens is not None and self.tokens < 0:
            raise ConfigError(f"tokens must not be negative, got {self.tokens}")
        for name, least in (
            ("seq_len", 2), ("batch_size", 1), ("grad_accumulation", 1), ("num_sequences", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "num_sequences":
                continue
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def budget(self) -> int:
        """Tokens to train on."""
        if self.tokens is not None:
            return self.tokens
        assert self.trained_tokens is not None
        return round(self.share * self.trained_tokens)

    @property
    def steps(self) -> int:
        per_step = self.batch_size * self.grad_accumulation * self.seq_len
        return -(-self.budget // per_step)


@dataclass
class Shared:
    """Where the model lies and what ``share-kv.json`` says."""

    path: Path
    facts: dict[str, Any]
    seconds: float


def share_kv(
    model: str | None,
    out: str | Path,
    settings: ShareSettings,
    force: bool = False,
    restart: bool = False,
    eval_windows: int = 8,
    eval_length: int = 256,
    eval_text: str | Path | None = None,
    note: Note | None = None,
    progress: bool = True,
) -> Shared:
    """A model with fewer KV heads, in a directory of its own.

    Everything of the run stands in ``OUT.partial``; the same call goes on from there.

    Raises:
        ConfigError, ModelError, CapacityError, DivergedError: One line; what was at ``out`` is
            untouched, and checkpoints that were written are kept.
    """
    require_torch()
    one_process("share-kv")
    from pyllmlite.compress.learn.token_windows import check_room

    started = time.perf_counter()
    tell = note or (lambda text: None)
    source = open_model(model)
    check_model(source, settings.kv_heads)
    if settings.steps:
        if settings.seq_len > source.spec.max_position_embeddings:
            raise ConfigError(
                f"seq_len {settings.seq_len} is beyond the model's "
                f"{source.spec.max_position_embeddings} positions"
            )
        check_room(source.spec, 1.0, training_plan(settings, Path(out)))
    out = Path(os.path.abspath(out))
    check_place(out, source.path, force, [settings.text, *([eval_text] if eval_text else [])])
    text = read_text(eval_text) if eval_windows else None
    partial = out.with_name(out.name + ".partial")
    with disk_errors(out, "making the directory"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with occupy(partial, SHARE_KV_STATE, restart):
        deciding = {k: v for k, v in asdict(settings).items() if k not in ("save_every", "device")}
        identity = {**deciding, "model": str(source.path), "version": __version__}
        if not _worth_keeping(partial):
            clear(partial)  # shards of a run that was killed would be published with the new ones
        _same_run(partial / SHARE_KV_STATE, identity)
        try:
            facts = _run(source, settings, partial, text, eval_windows, eval_length, tell, progress)
        except BaseException:
            if not _worth_keeping(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        facts["base_model"] = name_of(model, source)
        write_text(partial / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        write_text(partial / "README.md", card(out.name, facts))
        publish(partial, out)
    return Shared(out, facts, time.perf_counter() - started)


def _run(
    source: ModelSource,
    settings: ShareSettings,
    partial: Path,
    text: Text | None,
    eval_windows: int,
    eval_length: int,
    tell: Note,
    progress: bool,
) -> dict[str, Any]:
    from pyllmlite.compress.learn.export import write_module
    from pyllmlite.compress.learn.token_windows import mean_losses

    scratch, spec = partial / STATE_FOLDER, source.spec
    unseen = None
    if text is not None:
        length = min(eval_length, spec.max_position_embeddings)
        unseen = windows_of(text, source.tokenizer(), eval_windows, length)
    tell("loading")
    teacher = LayeredModel(source).fill()
    tell(f"sharing: {spec.num_kv_heads} KV heads become {settings.kv_heads}")
    student = shared_module(teacher, source, settings)
    losses: dict[str, Any] = {}
    if unseen is not None:
        tell("measuring")
        losses["before"] = mean_losses(teacher, None, unseen)
        losses["pooled"] = mean_losses(student, teacher, unseen)
    trained = None
    if settings.steps:
        tokens = _tokens(scratch, source, settings, tell)
        trained = _uptrain(student, teacher, settings, tokens, scratch / "train", progress)
        if unseen is not None:
            tell("measuring")
            losses["trained"] = mean_losses(student, teacher, unseen)
        for name, kept in (("log.jsonl", "training.jsonl"), ("loss.png", "loss.png")):
            if (scratch / "train" / name).is_file():
                shutil.copyfile(scratch / "train" / name, partial / kept)
    tell("writing")
    write_module(student, source, partial, settings.dtype or _dtype_of(source))
    before = spec.kv_bytes_per_token(KV_BYTES)
    return {
        "made_by": f"pyllmlite {__version__}",
        "settings": asdict(settings),
        "heads": {"query": spec.num_heads, "kv": spec.num_kv_heads, "kv_now": settings.kv_heads},
        "kv_bytes_per_token": {
            "before": before, "after": before * settings.kv_heads / spec.num_kv_heads,
        },
        "text": None if text is None else text.name,
        "windows": eval_windows,
        "losses": losses,
        "won_back": won_back(losses),
        "training": trained,
    }  # fmt: skip


def won_back(losses: dict[str, Any]) -> float | None:
    """Share of the cross entropy that pooling cost and training brought back; None: not known."""
    if "trained" not in losses:
        return None
    before, pooled, trained = (
        losses[name]["cross_entropy"] for name in ("before", "pooled", "trained")
    )
    lost = pooled - before
    return (pooled - trained) / lost if lost > 0 else None


# -- the model ---------------------------------------------------------------------------------
def check_model(source: ModelSource, kv_heads: int) -> None:
    """``ConfigError`` unless the heads of this model can be shared so."""
    spec = source.spec
    check_heads(spec.num_heads, spec.num_kv_heads, kv_heads)
    names = [source.raw(f"layers.0.{part}.weight") for part in ("q", "k", "v", "attn_out")]
    found = [None if raw is None else raw.name for raw in names]
    if None in found or len(set(found)) < 4:
        raise ConfigError(
            f"{source.path}: {spec.architecture} keeps queries, keys and values in one matrix, or "
            "none that is known; KV heads are shared in models with a q_proj, k_proj, v_proj and "
            "o_proj (Llama, Mistral, Qwen, Gemma)"
        )
    if source.quantized:
        log.warning(
            "%s: its weights are quantized already (%s), the result is in floats: share the heads "
            "of the float model if there is one, then quantize",
            source.path,
            source.stored_dtype,
        )


def shared_module(teacher: Any, source: ModelSource, settings: ShareSettings) -> Any:
    """transformers' model with fewer KV heads, float32, all of it to be trained."""
    import torch
    import transformers

    from pyllmlite.compress.learn.token_windows import without_dropout

    config = copy.deepcopy(teacher.config)
    config.num_key_value_heads = settings.kv_heads
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    for index, start in enumerate(_attention_names(module, source)):
        weights = attention_weights(source, index)
        made = share_heads(weights, settings.kv_heads, settings.pooling, settings.grouping)
        for part, name in zip((made.q, made.k, made.v), QKVO, strict=False):
            state[f"{start}.{name}.weight"] = _tensor(part[:, :-1])
            if f"{start}.{name}.bias" in state:
                state[f"{start}.{name}.bias"] = _tensor(part[:, -1])
        state[f"{start}.o_proj.weight"] = _tensor(made.out)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{source.path}: transformers' {type(module).__name__} does not take fewer KV heads "
            f"({str(error).strip().splitlines()[-1].strip()})"
        ) from None
    module.tie_weights()
    return without_dropout(module)


def _attention_names(module: Any, source: ModelSource) -> list[str]:
    """Of every layer's attention, in order."""
    names = [
        name for name, part in module.named_modules()
        if all(hasattr(part, word) for word in QKVO)
    ]  # fmt: skip
    if len(names) != source.spec.num_layers:
        raise ConfigError(
            f"{source.path}: {len(names)} attentions with {', '.join(QKVO)} were found in "
            f"transformers' model of {source.spec.num_layers} layers"
        )
    return names


def attention_weights(source: ModelSource, index: int) -> AttentionWeights:
    """A layer's attention, float64."""
    spec, at = source.spec, f"layers.{index}."

    def with_bias(part: str) -> np.ndarray:
        weight, bias = source.get(f"{at}{part}.weight"), source.get(f"{at}{part}.bias")
        assert weight is not None
        column = np.zeros(len(weight)) if bias is None else bias
        return np.concatenate([weight, column[:, None]], axis=1).astype(np.float64)

    norm, out = source.get(at + "attn_norm.weight"), source.get(at + "attn_out.weight")
    assert out is not None
    sizes = np.ones(spec.hidden_size) if norm is None else np.abs(norm.astype(np.float64))
    rope = spec.layers[index].rope
    return AttentionWeights(
        q=with_bias("q"), k=with_bias("k"), v=with_bias("v"), out=out.astype(np.float64),
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
        inputs=np.append(sizes, 1.0),
        rotated=rope is not None and rope.rotary_dim == spec.head_dim and not spec.qk_norm,
    )  # fmt: skip


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _dtype_of(source: ModelSource) -> str:
    from pyllmlite.compress.hf_view import HFView

    return HFView(source).dtype


# -- training ----------------------------------------------------------------------------------
def _uptrain(
    student: Any,
    teacher: Any,
    settings: ShareSettings,
    tokens: np.ndarray,
    out: Path,
    progress: bool,
) -> dict[str, Any]:
    from pyllmlite.compress.learn.token_windows import BesideTeacher, TokenWindows
    from pyllmlite.compress.learn.trainer import Trainer

    judge = None if settings.task_weight == 1 else teacher
    trainer = Trainer(
        student,
        BesideTeacher(judge, settings.task_weight),
        TokenWindows(tokens, settings.batch_size, settings.seed),
        training_plan(settings, out),
        progress=progress,
    )
    records = [record for record in trainer.run() if "loss" in record]
    return {
        "steps": settings.steps,
        "tokens": int(sum(record["tokens"] for record in records)),
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "seconds": sum(record["seconds"] for record in records),
    }


def _tokens(
    scratch: Path, source: ModelSource, settings: ShareSettings, tell: Note
) -> np.ndarray:
    path = scratch / "tokens.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    tell("text to train on")
    count = settings.num_sequences or max(
        -(-settings.budget // settings.seq_len), settings.batch_size
    )
    tokens = calibration_tokens(
        source, settings.text, count, settings.seq_len, settings.seed,
        lambda done, total: tell(f"text to train on: {done} of {total} sequences"),
    )  # fmt: skip
    partial = path.with_suffix(".part.npy")
    np.save(partial, tokens, allow_pickle=False)
    os.replace(partial, path)
    return tokens


def _worth_keeping(partial: Path) -> bool:
    """Text or a training is there, which a run goes on from; all else is made again anyway."""
    return any(name.startswith(STATE_FOLDER + "/") for name in content(partial, SHARE_KV_STATE))


def _same_run(path: Path, identity: dict[str, Any]) -> None:
    """``ConfigError`` where the folder holds a run with other settings."""
    identity = json.loads(json.dumps(identity))
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        name = next((n for n in identity if found.get(n) != identity[n]), None)
        if name is not None:
            raise ConfigError(
                f"{path.parent.parent} holds an unfinished run with other settings ({name}: "
                f"{found.get(name)}, now {identity[name]}); go on with its settings, or --restart, "
                "which throws it away"
            )
    write_text(path, json.dumps(identity))


# -- the card ----------------------------------------------------------------------------------
def card(name: str, facts: dict[str, Any]) -> str:
    """README.md in the form that model hubs read."""
    heads, kv, losses = facts["heads"], facts["kv_bytes_per_token"], facts["losses"]
    settings = facts["settings"]
    base = str(facts["base_model"])
    lines = ["---", "library_name: transformers", *([f"base_model: {base}"] if "/" in base else [])]
    lines += ["---", "", f"# {name}", ""]
    lines += [
        f"`{base}` with {heads['kv_now']} KV heads in the place of {heads['kv']} "
        f"({heads['query']} query heads), made with {facts['made_by']}.",
        "",
        f"- pooling: {settings['pooling']} of {settings['grouping']} heads",
        f"- KV cache: {kv['after']:.0f} bytes a token (bf16), {kv['before']:.0f} before",
    ]
    if facts["training"]:
        trained = facts["training"]
        lines.append(f"- trained on {trained['tokens']} tokens of text ({settings['text']})")
    if losses:
        lines += ["", f"On {facts['windows']} windows of `{facts['text']}`, nats a token:", ""]
        lines += ["| | cross entropy | KL to the original |", "| --- | --- | --- |"]
        words = {"before": "original", "pooled": "heads pooled", "trained": "and trained"}
        for key, word in words.items():
            if key in losses:
                kl = losses[key].get("kl")
                shown = "0" if kl is None else f"{kl:.4f}"
                lines.append(f"| {word} | {losses[key]['cross_entropy']:.4f} | {shown} |")
    return "\n".join(lines) + "\n"
