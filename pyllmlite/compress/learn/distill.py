"""One command's work: the teacher writes, the student learns, a directory comes out.

Everything lies in ``OUT.partial/distill`` until the student is whole: ``data.jsonl`` (what the
teacher wrote), ``logits/`` (its distributions), ``train/`` (checkpoint, log).  The same command
goes on wherever it was cut off.  Then the directory gets its name, in one rename; text, log and the
picture of the loss stay in ``OUT/distill``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pyllmlite._version import __version__
from pyllmlite.compress.learn import require_torch
from pyllmlite.compress.learn.distill_settings import DistillSettings
from pyllmlite.compress.learn.draft import needed_acceptance
from pyllmlite.compress.learn.export import name_of
from pyllmlite.compress.learn.memory import check_memory
from pyllmlite.compress.learn.progress import Progress
from pyllmlite.compress.learn.records import Record, read_records, sha256_of
from pyllmlite.compress.learn.student import (
    Cut,
    check_student,
    check_vocabularies,
    freeze_embeddings,
    load_module,
    make_student,
    num_weights,
    parse_cut,
)
from pyllmlite.compress.learn.teacher_text import TextStats, write_teacher_text
from pyllmlite.compress.place import DISTILL_STATE, check_place, content, occupy, publish
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import ModelSource, open_model

if TYPE_CHECKING:
    from pyllmlite.compress.learn.processes import Processes

WORK = "distill"
DATA = "data.jsonl"
_NARROW_TEXTS = 64  # records whose activations say what is used


@dataclass
class Result:
    """Where it lies and what ``distill.json`` says (``text``: of the text alone).

    Attributes:
        first: In this process, of several: the one that speaks.
    """

    path: Path
    facts: dict[str, Any]
    first: bool = True


def distill(
    teacher: str | None,
    student: str | None,
    out: str | Path,
    settings: DistillSettings,
    force: bool = False,
    restart: bool = False,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Result:
    """Distill a teacher into a student.

    Args:
        student: A model of the same vocabulary, or a cut (:func:`parse_cut`); None for mode text.
        force: Replace ``out`` when the new directory is complete.
        restart: Throw away what an interrupted run left.
        threads: Of the CPU; None: all that this process may use.
        say: Told what was found on the way, a line at a time.
    Raises:
        ConfigError, ModelError, CapacityError, DivergedError: One line; what was at ``out`` is
            untouched, and the last good checkpoint is kept in ``OUT.partial``.
    """
    require_torch()
    import torch

    from pyllmlite.compress.learn.processes import Processes

    if threads is not None:
        torch.set_num_threads(threads)
    source = open_model(teacher)
    work = _Work(Path(os.path.abspath(out)), source, settings)
    given: ModelSource | Cut | None = None
    if settings.mode != "text":
        if student is None:
            raise ConfigError("say who learns: --student MODEL, or --student layers=N")
        given = parse_cut(student)
        if given is None:
            given = open_model(student)
            check_vocabularies(source, given)
            check_place(work.out, given.path, force)
        else:
            given = given.completed(source.spec)
        if settings.mode == "logits" and settings.top_k > source.spec.vocab_size:
            raise ConfigError(
                f"top_k is {settings.top_k}, the vocabulary has {source.spec.vocab_size} tokens"
            )
        _check_size(source, given, settings)
        check_student(source, given)
        seq_len, positions = settings.train_settings("", 1).seq_len, _positions(source, given)
        if seq_len > positions:
            raise ConfigError(f"seq_len {seq_len} is more than the models' {positions} positions")
    processes = Processes(settings.train.get("device") or "auto")
    try:
        speaks = say if say is not None and processes.first else _silent
        run = _Run(source, name_of(teacher, source), student, settings, work, threads, speaks)
        run.shown = progress and processes.first
        return run.all(given, processes, force, restart)
    finally:
        work.close()
        processes.close()


class _Work:
    """``OUT.partial`` and what lies in it."""

    def __init__(self, out: Path, source: ModelSource, settings: DistillSettings) -> None:
        self.out = out
        self.source = source
        self.settings = settings
        self.partial = out.with_name(out.name + ".partial")
        self.folder = self.partial / WORK
        self._lock: Any = None

    def open(self, identity: dict[str, Any], force: bool, restart: bool) -> None:
        data = self.settings.data
        reads = [self.settings.text.prompts, *([data] if data else [])]
        check_place(self.out, self.source.path, force, reads)
        with disk_errors(self.out, "making the directory"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = occupy(self.partial, DISTILL_STATE, restart)
        with disk_errors(self.out, "making the directory"):
            self.folder.mkdir(exist_ok=True)
        state = self.partial / DISTILL_STATE
        wanted = json.loads(json.dumps(identity))
        if not state.exists():
            write_text(state, json.dumps(wanted, indent=2) + "\n")
            return
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{state}: cannot be read ({error}); --restart begins anew") from None
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                raise ConfigError(
                    f"{self.partial} holds an unfinished run with other settings ({name}: "
                    f"{_short(found.get(name))}, now {_short(wanted.get(name))}); go on with its "
                    "settings, or --restart, which throws it away"
                )

    def close(self) -> None:
        """End the work; where nothing was made yet, nothing stays."""
        if self._lock is None:
            return
        if not content(self.partial, DISTILL_STATE):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def publish(self) -> None:
        """Give the complete directory its name, and end the work."""
        publish(self.partial, self.out)
        self._lock.close()
        self._lock = None


class _Run:
    def __init__(
        self,
        source: ModelSource,
        teacher: str,
        student: str | None,
        settings: DistillSettings,
        work: _Work,
        threads: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.teacher, self.student = source, teacher, student
        self.settings, self.work = settings, work
        self.threads, self.say = threads, say
        self.shown = False
        self.seq_len = settings.train_settings("", 1).seq_len

    def all(
        self, given: ModelSource | Cut | None, processes: Processes, force: bool, restart: bool
    ) -> Result:
        if processes.first:
            identity = {
                **self.settings.deciding(), "student": self.student,
                "teacher": str(self.source.path), "teacher_bytes": self.source.weight_bytes,
                "version": __version__,
            }  # fmt: skip
            self.work.open(identity, force, restart)
            data = self._write_text()
        processes.barrier()
        data = self._data_path()
        header, records = read_records(data, self.source.spec.vocab_size)
        text = asdict(TextStats.of(records))
        wrote = header["settings"].get("teacher")
        if self.settings.data and wrote != self.teacher:
            self.say(f"{data} was written by {wrote}")
        if self.settings.mode == "text":
            return self._finish_text(text, processes)
        return self._learn(given, records, sha256_of(data), text, processes)

    # -- the teacher's text --------------------------------------------------------------------
    def _data_path(self) -> Path:
        return Path(self.settings.data) if self.settings.data else self.work.folder / DATA

    def _write_text(self) -> Path:
        path = self._data_path()
        if self.settings.data:
            return path
        from pyllmlite.engine.llm import LLM

        text = self.settings.text
        options = {"max_model_len": self._room(), "threads": self.threads}

        def open_teacher() -> LLM:
            self.say(f"the teacher writes: {path}")
            return LLM(str(self.source.path), **{**options, **self.settings.teacher_options})

        bar: list[Progress] = []

        def count(done: int, total: int) -> None:
            if not bar:
                bar.append(Progress(total, done, "answer", self.shown))
            bar[0].update(done)

        try:
            records = write_teacher_text(
                open_teacher, self.teacher, path, text, self.settings.teacher_options, count
            )
        finally:
            for one in bar:
                one.close()
        self.say(str(TextStats.of(records)))
        return path

    def _room(self) -> int:
        """``max_model_len`` of the teacher while it writes: prompts that training would look at, of
        1,024 tokens where there is no training."""
        prompt = 1024 if self.settings.mode == "text" else max(1024, self.seq_len)
        return min(self.source.spec.max_position_embeddings, prompt + self.settings.text.max_tokens)

    def _finish_text(self, text: dict[str, Any], processes: Processes) -> Result:
        if processes.first:
            self.work.publish()  # first: where it fails, the text lies where it is looked for
            os.replace(self.work.out / WORK / DATA, self.work.out / DATA)
            shutil.rmtree(self.work.out / WORK, ignore_errors=True)
        return Result(self.work.out, {"text": text}, processes.first)

    # -- the student ---------------------------------------------------------------------------
    def _learn(
        self,
        given: ModelSource | Cut | None,
        records: list[Record],
        sha256: str,
        text: dict[str, Any],
        processes: Processes,
    ) -> Result:
        from pyllmlite.compress.learn.batches import TextBatches, split_records
        from pyllmlite.compress.learn.objectives import check_head
        from pyllmlite.compress.learn.trainer import Trainer

        settings = self.settings
        seen, unseen = split_records(records, settings.held_out, self.seq_len)
        topk, stored = self._logits(records, sha256, processes)
        module = self._student(given, records, seen)
        check_head(module)
        if settings.freeze_embeddings:
            freeze_embeddings(module)
        sizes = settings.train_settings("", 1)
        batches = TextBatches(records, seen, sizes.batch_size, self.seq_len, sizes.seed, topk)
        per_step = sizes.grad_accumulation * processes.size
        steps = max(1, math.ceil(settings.epochs * batches.per_epoch / per_step))
        train = settings.train_settings(self.work.folder / "train", steps)
        held_out = [records[i] for i in unseen]

        def evaluate(module: Any) -> dict[str, float]:
            return self._measure(module, held_out) if processes.first else {}

        trainer = Trainer(
            module, self._objective(processes), batches, train, evaluate=evaluate,
            identity={"mode": settings.mode, "data": sha256, "student": self.student or "",
                      "direction": settings.chosen_direction, "temperature": settings.temperature,
                      "task_weight": settings.task_weight, "share": settings.share,
                      "top_k": settings.top_k, "freeze_embeddings": settings.freeze_embeddings},
            progress=self.shown,
        )  # fmt: skip
        weights = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.say(
            f"the student: {weights / 1e6:.1f} M weights, {trained / 1e6:.1f} M trained; "
            f"{train.steps} steps of {train.batch_size * per_step} sequences"
        )
        history = trainer.run()
        facts = {
            "made_by": f"pyllmlite {__version__}",
            "teacher": self.teacher,
            "student": self.student,
            "mode": settings.mode,
            "divergence": self._divergence(),
            "stored": stored,
            "text": {**text, "sha256": sha256, "trained_on": len(seen), "held_out": len(unseen)},
            "weights": weights,
            "trained": trained,
            "training": {
                **{k: v for k, v in asdict(train).items() if k not in ("out", "restart")},
                "sequences_per_step": train.batch_size * per_step,
                "tokens": int(sum(r.get("tokens", 0) for r in history)),
                "seconds": round(sum(r.get("seconds", 0.0) for r in history), 1),
            },
            "before": _score(history.records[0]),
            "after": _score(history.records[-1]),
        }
        if processes.first:
            self._publish(module, given, facts)
        processes.barrier()
        return Result(self.work.out, facts, processes.first)

    def _logits(self, records: list[Record], sha256: str, processes: Processes) -> tuple[Any, Any]:
        if self.settings.mode != "logits":
            return None, None
        from pyllmlite.compress.learn.teacher_logits import TopKLogits

        settings = self.settings
        topk = TopKLogits(
            self.work.folder / "logits", records, settings.top_k, settings.temperature,
            self.seq_len, {"data": sha256, "dtype": settings.scorer_dtype},
        )  # fmt: skip
        if processes.first:
            self.say("the teacher's distributions are read")
            bar = Progress(len(records), 0, "answer", self.shown)
            try:
                stats = topk.write(self._scorer, lambda done, total: bar.update(done))
            finally:
                bar.close()
            self.say(str(stats))
        processes.barrier()
        return topk, str(topk.stats())

    def _scorer(self) -> Any:
        from pyllmlite.compress.learn.teacher_logits import open_scorer

        return open_scorer(
            self.source, self.seq_len, dtype=self.settings.scorer_dtype, threads=self.threads
        )

    def _student(
        self, given: ModelSource | Cut | None, records: list[Record], seen: list[int]
    ) -> Any:
        assert given is not None
        if isinstance(given, ModelSource):
            return load_module(given).requires_grad_(True)
        from pyllmlite.compress.learn.teacher_logits import predicted_tokens

        texts = [predicted_tokens(records[i], self.seq_len)[0] for i in seen[:_NARROW_TEXTS]]
        return make_student(self.source, given, texts)

    def _objective(self, processes: Processes) -> Any:
        from pyllmlite.compress.learn import objectives

        settings = self.settings
        words: dict[str, Any] = {
            "temperature": settings.temperature,
            "direction": settings.chosen_direction,
            "task_weight": settings.task_weight,
        }
        if settings.mode == "sequence":
            return objectives.SequenceLevel()
        if settings.mode == "logits":
            return objectives.LogitDistillation(**words)
        teacher = load_module(self.source).to(processes.device).eval()
        return objectives.OnPolicy(
            teacher, **words, share=settings.share,
            max_tokens=settings.text.max_tokens,
            seq_len=self.seq_len,
            sampling_temperature=settings.text.temperature, eos=self.source.spec.eos_token_ids,
            seed=settings.train_settings("", 1).seed,
        )  # fmt: skip

    def _measure(self, module: Any, held_out: list[Record]) -> dict[str, float]:
        from pyllmlite.compress.learn.measure import compare_with_teacher, module_predictions

        score = compare_with_teacher(
            self._scorer(), module_predictions(module), held_out, self.seq_len
        )
        return {
            "kl": score.mean_kl, "kl_error": score.kl_error, "agreement": score.agreement,
            "answers": float(len(held_out)), "positions": float(score.tokens),
        }  # fmt: skip

    def _divergence(self) -> str | None:
        settings = self.settings
        if settings.mode == "sequence":
            return None
        direction = settings.chosen_direction
        words = f"{direction} KL" if isinstance(direction, str) else f"KL, {direction:g} reverse"
        words += f" at temperature {settings.temperature:g}"
        if settings.task_weight:
            words += f", {settings.task_weight:g} of the loss the cross entropy"
        return words

    def _publish(self, module: Any, given: Any, facts: dict[str, Any]) -> None:
        from pyllmlite.compress.hf_view import HFView
        from pyllmlite.compress.learn.export import write_card, write_module

        source = given if isinstance(given, ModelSource) else self.source
        dtype = self.settings.dtype or HFView(source).dtype
        partial = self.work.partial
        write_module(module, source, partial, dtype)
        made = open_model(str(partial))
        cost = num_weights(made.spec) / num_weights(self.source.spec)
        facts["draft"] = {"cost": round(cost, 4), "needed_acceptance": needed_acceptance(cost)}
        write_card(partial, self.work.out.name, facts)
        self.work.publish()
        folder = self.work.out / WORK
        for name in ("log.jsonl", "loss.png"):
            if (folder / "train" / name).exists():
                os.replace(folder / "train" / name, folder / name)
        for name in ("train", "logits"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _check_size(source: ModelSource, given: ModelSource | Cut, settings: DistillSettings) -> None:
    """``CapacityError`` before anything is written, if the student cannot be trained here."""
    import torch

    from pyllmlite.model.build import available_memory

    device = settings.train.get("device") or "auto"
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return  # the trainer asks the card itself
    spec = source.spec
    if isinstance(given, ModelSource):
        sizes = {
            "hidden_size": given.spec.hidden_size, "num_hidden_layers": given.spec.num_layers,
            "intermediate_size": given.spec.intermediate_size,
        }  # fmt: skip
        weights = num_weights(given.spec)
        embeddings = given.spec.vocab_size * given.spec.hidden_size
    else:
        sizes = {
            "hidden_size": given.hidden or spec.hidden_size,
            "num_hidden_layers": given.layers or spec.num_layers,
            "intermediate_size": given.mlp or spec.intermediate_size,
        }
        width = sizes["hidden_size"] / spec.hidden_size
        embeddings = spec.vocab_size * sizes["hidden_size"]
        inside = num_weights(spec) - (2 - spec.tie_embeddings) * spec.vocab_size * spec.hidden_size
        weights = int(inside * sizes["num_hidden_layers"] / spec.num_layers * width) + embeddings
    trained = weights - (embeddings if settings.freeze_embeddings else 0)
    # The teacher's floats stand beside the student: while it is cut out of them, while the student
    # is measured, and on-policy all the time.
    check_memory(
        weights, trained, SimpleNamespace(**sizes, vocab_size=spec.vocab_size),
        settings.train_settings("", 1), available_memory(), loaded=False,
        others=4 * num_weights(spec),
    )  # fmt: skip


def _positions(source: ModelSource, given: ModelSource | Cut) -> int:
    both = [source, given] if isinstance(given, ModelSource) else [source]
    return min(one.spec.max_position_embeddings for one in both)


def _silent(text: str) -> None:
    pass


def _score(record: dict[str, Any]) -> dict[str, Any] | None:
    found = {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}
    if not found:
        return None
    found["tokens"] = int(found.pop("positions"))
    return {**found, "answers": int(found["answers"])}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
