"""The training loop under every method that learns.

A method brings a module, an objective and batches; the loop brings the rest: AdamW with warmup
and schedule, gradient accumulation, bf16, clipping, several processes, a log, progress,
checkpoints and exact resume.  Nothing random depends on what ran before: batches are functions of
their index, and torch's random numbers are seeded by (seed, micro-batch) before each one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pyllmlite.compress.learn import checkpoint
from pyllmlite.compress.learn.history import History, Log
from pyllmlite.compress.learn.memory import check_memory
from pyllmlite.compress.learn.plot import draw_loss
from pyllmlite.compress.learn.processes import Processes
from pyllmlite.compress.learn.progress import Progress
from pyllmlite.compress.learn.settings import TrainSettings
from pyllmlite.core.errors import ConfigError, ModelError, PyllmliteError
from pyllmlite.engine.interrupt import DeferredInterrupt

# (module, batch) to (mean loss over the micro-batch's tokens, metrics).  A metric named "tokens"
# is the number that the mean was taken over: micro-batches then count by their tokens.  One named
# "NAME_tokens" is that of the metric NAME, where it is another number.  An objective gives the same
# names for every batch: ranks add their values up by their place.
Objective = Callable[[Any, Any], tuple[Any, dict[str, float]]]


class Batches(Protocol):
    """Where micro-batches come from."""

    def batch(self, index: int) -> Any:
        """Micro-batch ``index`` (from 0, without end): a pure function of it and of the seed that
        this object was made with.  Tensors in dicts, lists and tuples are moved to the device."""
        ...


class DivergedError(PyllmliteError, ArithmeticError):
    """The loss or the gradient is NaN or infinite; the last good checkpoint was kept."""


class Trainer:
    """Trains ``model`` in place.

    Args:
        model: Its parameters with ``requires_grad`` are trained; they must be float32.
        objective: See :data:`Objective`.  It gets ``model`` itself, never a wrapper around it,
            in training mode, under autocast if ``dtype`` is bfloat16.
        batches: See :class:`Batches`.  Step ``s``, accumulation ``a`` of rank ``r`` takes
            micro-batch ``(s * grad_accumulation + a) * processes + r``.
        parameter_groups: Gives AdamW's groups, dicts with ``params`` and, if wanted, ``lr_ratio``
            (times the learning rate) and ``weight_decay``; None: matrices decay, vectors do not.
        evaluate: Called on every rank, in eval mode without gradients, every ``eval_every`` steps,
            before the first and after the last; its values are logged as ``eval_NAME``.
        identity: What else decides the result (a hash of the data, the loss's options), as JSON;
            a run only goes on where it is the same.
        progress: Show it on standard error.
    Raises (by ``run``):
        CapacityError: It will not fit into memory; said before anything is done.
        ConfigError: ``out`` holds a run with other settings; nothing to train.
        DivergedError: NaN or infinity.
        ModelError: A checkpoint cannot be written or read.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        batches: Batches,
        settings: TrainSettings,
        *,
        parameter_groups: Callable[[Any], list[dict[str, Any]]] | None = None,
        evaluate: Callable[[Any], Mapping[str, float]] | None = None,
        identity: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.objective = objective
        self.batches = batches
        self.settings = settings
        self.evaluate = evaluate
        self.out = Path(settings.out)
        self._groups = parameter_groups or decaying_groups
        self._identity = dict(identity or {})
        self._progress = progress

    def run(self) -> History:
        """Train to the end, going on from the checkpoint in ``out`` if there is one."""
        processes = Processes(self.settings.device)
        was_training = self.model.training
        devices = [processes.device] if processes.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # the caller's random numbers stay its own
                return self._run(processes)
        finally:
            self.model.train(was_training)
            processes.close()

    # -- inside --------------------------------------------------------------------------------
    def _run(self, processes: Processes) -> History:
        settings = self.settings
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("there is nothing to train: no parameter requires a gradient")
        odd = next((p.dtype for p in trained if p.dtype != torch.float32), None)
        if odd is not None:
            raise ConfigError(
                f"trained parameters must be float32, got {odd}; dtype='bfloat16' multiplies in "
                "bf16 and keeps float32 weights"
            )
        _check_memory(self.model, trained, settings, processes)
        self.model.to(processes.device)
        processes.broadcast([*self.model.parameters(), *self.model.buffers()])
        optimizer = self._optimizer()
        identity = json.loads(
            json.dumps({**settings.deciding(), **self._identity, "processes": processes.size})
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.out}: cannot be made ({error.strerror})") from None
        step = self._resume(optimizer, identity, processes)
        log = Log(self.out, step, write=processes.first)
        shown = Progress(settings.steps, step, show=self._progress and processes.first)
        saved = step
        try:
            if step == 0 and (before := self._measured()):
                log.add({"step": 0, **before})
            with DeferredInterrupt() as interrupt:
                while step < settings.steps:
                    record, asked = self._step(step, optimizer, trained, processes, interrupt)
                    step += 1
                    every = settings.eval_every or settings.steps
                    if step % every == 0 or step == settings.steps:
                        record |= self._measured()
                    log.add(record)
                    shown.update(step, f"loss {record['loss']:.4f}")
                    due = settings.save_every and step % settings.save_every == 0
                    if due or asked or step == settings.steps:
                        self._save(step, optimizer, identity, processes)
                        saved = step
                    if asked:
                        raise KeyboardInterrupt
        except DivergedError as error:
            raise DivergedError(f"{error}; {self._kept(saved)}") from None
        finally:
            shown.close()
            log.close()
            if processes.first:
                draw_loss(log.history)
        processes.barrier()
        return log.history

    def _optimizer(self) -> Any:
        settings = self.settings
        groups = []
        for group in self._groups(self.model):
            words = {k: v for k, v in group.items() if k != "lr_ratio"}
            words.setdefault("weight_decay", settings.weight_decay)
            groups.append({**words, "lr_ratio": float(group.get("lr_ratio", 1.0))})
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )

    def _resume(self, optimizer: Any, identity: dict[str, Any], processes: Processes) -> int:
        """The step to go on from; model and optimizer are as they were there."""
        if self.settings.restart:
            if processes.first:
                for name in (checkpoint.NAME, "log.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
            processes.barrier()
            return 0
        state = checkpoint.load(self.out, identity)
        if state is None:
            return 0
        try:
            self.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelError(
                f"{self.out / checkpoint.NAME}: is of another model "
                f"({str(error).strip().splitlines()[-1].strip()}); give another --out, or restart"
            ) from None
        return int(state["step"])

    def _save(
        self, step: int, optimizer: Any, identity: dict[str, Any], processes: Processes
    ) -> None:
        if processes.first:
            state = {
                "step": step,
                "identity": identity,
                "model": self.model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            checkpoint.save(self.out, state)

    def _kept(self, saved: int) -> str:
        if (self.out / checkpoint.NAME).exists():
            return f"the checkpoint of step {saved} is kept in {self.out}"
        return "no checkpoint had been written yet (save_every)"

    def _measured(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            found = self.evaluate(self.model)
        return {f"eval_{name}": float(value) for name, value in found.items()}

    def _step(
        self,
        step: int,
        optimizer: Any,
        trained: list[Any],
        processes: Processes,
        interrupt: DeferredInterrupt,
    ) -> tuple[dict[str, Any], bool]:
        """One optimizer step; its record, and whether a Ctrl-C came in any process."""
        settings, device = self.settings, processes.device
        started = time.perf_counter()
        rate = settings.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums: dict[str, float] = {}
        total = weighted = 0.0
        for part in range(settings.grad_accumulation):
            index = (step * settings.grad_accumulation + part) * processes.size + processes.rank
            torch.manual_seed(_mixed(settings.seed, index))
            batch = _on(device, self.batches.batch(index))
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                loss, metrics = self.objective(self.model, batch)
            weight = float(metrics.get("tokens", 1.0))
            (loss * weight).backward()
            total += weight
            weighted += float(loss.detach()) * weight
            for name, value in metrics.items():
                if name != "tokens":
                    count = name.endswith("_tokens")
                    times = 1.0 if count else metrics.get(f"{name}_tokens", weight)
                    sums[name] = sums.get(name, 0.0) + float(value) * times
        asked = interrupt.noted
        names = sorted(sums)
        total, weighted, any_asked, *values = processes.sum(
            [total, weighted, float(asked), *(sums[name] for name in names)]
        )
        if total <= 0:
            raise ConfigError(f"step {step + 1}: its batches have no token to learn from")
        mean = weighted / total
        if not math.isfinite(mean):
            raise DivergedError(_diverged(step, "loss", mean))
        processes.sum_gradients(trained)
        gradients = [p.grad for p in trained if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / total)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm or math.inf))
        if not math.isfinite(norm):
            raise DivergedError(_diverged(step, "gradient", norm))
        optimizer.step()
        record: dict[str, Any] = {
            "step": step + 1,
            "loss": mean,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": total,
            "seconds": time.perf_counter() - started,
            **_means(dict(zip(names, values, strict=True)), total),
        }
        return record, any_asked > 0


def _means(sums: dict[str, float], total: float) -> dict[str, float]:
    """Of the metrics; one that no token of the step had is left out."""
    counts = {n: sums.get(f"{n}_tokens", total) for n in sums if not n.endswith("_tokens")}
    return {name: sums[name] / count for name, count in counts.items() if count > 0}


def decaying_groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _diverged(step: int, what: str, value: float) -> str:
    return (
        f"step {step + 1}: the {what} is {value}; a lower learning_rate, a longer warmup or a "
        "smaller clip_norm would help"
    )


def _check_memory(
    model: Any, trained: list[Any], settings: TrainSettings, processes: Processes
) -> None:
    if processes.device.type == "cuda":
        available, loaded = torch.cuda.mem_get_info(processes.device)[0], False
    else:
        from pyllmlite.model.build import available_memory

        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if processes.size > 1 else 1
        available, loaded = available_memory() // here, True
    check_memory(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trained),
        getattr(model, "config", None),
        settings,
        available,
        loaded=loaded,
    )


def _mixed(seed: int, index: int) -> int:
    """A seed of its own for every micro-batch (Steele et al. 2014, SplitMix64's finalizer)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index + 1) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def _on(device: Any, batch: Any) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _on(device, value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_on(device, value) for value in batch)
    return batch
