"""The teacher writes what the student will learn from, through the engine, many at a time.

Prompts come from a file, or from the teacher: a chat model is given its template up to where the
user's words would stand and writes these too (Xu et al. 2024, Magpie); any other begins with a
token drawn from the vocabulary (Liu et al. 2023, LLM-QAT, section 3.1).  Every record has a seed of
its own, so that its tokens depend on nothing that was written before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.calibration import TEXT_FIELDS
from pyllmlite.compress.learn.filters import Filters, confidence, repetition
from pyllmlite.compress.learn.records import Record, RecordFile
from pyllmlite.core.errors import ConfigError, RequestError
from pyllmlite.core.sampling import SamplingParams

if TYPE_CHECKING:
    from pyllmlite.engine.llm import LLM

SELF = "self"
DEFAULT_SEQUENCES = 1000
WAVES = 4  # sequences handed to the engine at once, as a multiple of those that run at once
_USER_TOKENS = 96  # of a user's turn that the teacher writes
_MARK = "\u2063pyllmlite\u2063"


@dataclass(frozen=True)
class TextSettings:
    """What decides the text.

    Attributes:
        prompts: ``self``, or a file: a prompt a line (.txt), or JSONL records with ``prompt``,
            ``text`` or ``messages``.
        num_sequences: Records to write; None: as many as there are prompts, or
            :data:`DEFAULT_SEQUENCES`.  More than there are prompts: each is answered again, with
            another seed.
        max_tokens: Of an answer at most.
        temperature, top_p: Of the sampling; 0 is greedy.
        chat: Prompts go through the chat template, if the teacher has one.
        seed: Of everything random.
        filters: What is kept.
    """

    prompts: str = SELF
    num_sequences: int | None = None
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    chat: bool = True
    seed: int = 0
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        for name, least in (("num_sequences", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if name == "num_sequences" and value is None:
                continue
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        try:
            SamplingParams(temperature=self.temperature, top_p=self.top_p)
        except RequestError as error:
            raise ConfigError(str(error)) from None


@dataclass
class TextStats:
    """Counts of what was written: records, tokens that are kept, and records dropped by filter."""

    records: int
    kept: int
    tokens: int
    dropped: dict[str, int]

    @classmethod
    def of(cls, records: list[Record]) -> TextStats:
        dropped: dict[str, int] = {}
        for record in records:
            if record.dropped:
                dropped[record.dropped] = dropped.get(record.dropped, 0) + 1
        kept = [r for r in records if not r.dropped]
        return cls(len(records), len(kept), sum(len(r.token_ids) for r in kept), dropped)

    def __str__(self) -> str:
        text = f"{self.records} answers, {self.kept} kept, {self.tokens} tokens"
        if self.dropped:
            listed = ", ".join(f"{count} {name}" for name, count in sorted(self.dropped.items()))
            text += f" (dropped: {listed})"
        return text


def read_prompts(path: str | Path) -> list[Any]:
    """Prompts of a file: texts, or lists of messages.

    Raises:
        ConfigError: It cannot be read, is empty, or a line is no prompt.
    """
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    # Not splitlines(): it would cut at U+2028 and the like, which stand inside prompts.
    lines = content.replace("\r\n", "\n").split("\n")
    prompts: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            prompts.append(line)
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise ConfigError(f"{path}: line {number} is no JSON, or is cut off") from None
        prompts.append(_prompt_of(value, f"{path}: line {number}"))
    if not prompts:
        raise ConfigError(f"{path}: is empty, there is no prompt in it")
    return prompts


def _prompt_of(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for name in ("messages", "conversations", "prompt", *TEXT_FIELDS):
            found = value.get(name)
            if isinstance(found, str) and found:
                return found
            if isinstance(found, list) and found:
                return found
    raise ConfigError(f"{where} has no prompt; looked for prompt, messages, {TEXT_FIELDS[0]}")


class Prompts:
    """Prompts by their number, as (source, text, token ids); texts that no prompt came of have no
    ids."""

    def __init__(self, llm: LLM, settings: TextSettings) -> None:
        self.llm, self.settings = llm, settings
        self.tokenizer = llm.get_tokenizer()
        self.chat = settings.chat and llm.has_chat_template
        self.given = given_prompts(settings)
        if self.given is not None and not self.chat:
            lists = [p for p in self.given if not isinstance(p, str)]
            if lists:
                raise ConfigError(
                    f"{settings.prompts}: has messages, and the teacher has no chat template; give "
                    "prompts as text"
                )
        self._plain: np.ndarray | None = None

    def make(self, first: int, last: int) -> list[tuple[int, str, list[int]]]:
        """Prompts ``first`` to ``last - 1``."""
        if self.given is not None:
            numbers = [i % len(self.given) for i in range(first, last)]
            return [(n, *self._rendered(self.given[n])) for n in numbers]
        if self.chat:
            turns = self._users(first, last)
            return [(-1, *self._rendered(turn)) if turn else (-1, "", []) for turn in turns]
        if self._plain is None:
            special = set(self.tokenizer.all_special_ids)
            self._plain = np.array([i for i in range(len(self.tokenizer)) if i not in special])
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        made = []
        for i in range(first, last):
            token = int(np.random.default_rng((self.settings.seed, i)).choice(self._plain))
            ids = [*bos, token]
            made.append((-1, self.tokenizer.decode(ids, skip_special_tokens=False), ids))
        return made

    def _rendered(self, prompt: Any) -> tuple[str, list[int]]:
        if self.chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [
                {"role": _role(m), "content": m.get("content", m.get("value"))} for m in messages
            ]
            if messages[-1]["role"] == "assistant":  # the answer is the teacher's to write
                messages.pop()
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            return text, self.tokenizer.encode(text, add_special_tokens=False)
        return prompt, self.tokenizer.encode(prompt, add_special_tokens=True)

    def _users(self, first: int, last: int) -> list[str]:
        """Users' turns in the teacher's words; empty where it came to no end."""
        marked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], add_generation_prompt=False
        )
        before, found, _ = marked.partition(_MARK)
        if not found:
            raise ConfigError("the chat template drops the user's words; give a file of prompts")
        ids = self.tokenizer.encode(before, add_special_tokens=False)
        params = [
            SamplingParams(
                temperature=1.0, max_tokens=_USER_TOKENS, seed=_seed(self.settings.seed, i, 1)
            )
            for i in range(first, last)
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids}] * (last - first), params, use_tqdm=False
        )
        turns = [output.outputs[0] for output in outputs]
        return [turn.text.strip() if turn.finish_reason == "stop" else "" for turn in turns]


def given_prompts(settings: TextSettings) -> list[Any] | None:
    """Prompts of the file; None: the teacher writes them."""
    return None if settings.prompts == SELF else read_prompts(settings.prompts)


def write_teacher_text(
    open_teacher: Callable[[], LLM],
    teacher: str,
    path: Path,
    settings: TextSettings,
    options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Write a file of records, or what it lacks.

    Args:
        open_teacher: Gives the engine; not called where the file is complete.
        teacher, options: What the header calls it, and how it was loaded.
        progress: Called with records written and records in all.
    Raises:
        ConfigError: Prompts that cannot be read; a file of other settings; nothing was kept.
    """
    given = given_prompts(settings)
    count = settings.num_sequences or (DEFAULT_SEQUENCES if given is None else len(given))
    deciding = {"teacher": teacher, "teacher_options": options or {}, **asdict(settings)}
    if given is not None:
        text = json.dumps(given, ensure_ascii=True).encode()
        deciding["prompts_sha256"] = hashlib.sha256(text).hexdigest()
    file = RecordFile(path, deciding, count)
    try:
        if not file.complete:
            llm = open_teacher()
            prompts = Prompts(llm, settings)
            wave = WAVES * llm.built.max_num_seqs
        while not file.complete:
            first = len(file.records)
            if progress is not None:
                progress(first, count)
            file.add(_answers(llm, prompts, first, min(first + wave, count), settings))
        if progress is not None:
            progress(count, count)
    finally:
        file.close()
    if not any(not record.dropped for record in file.records):
        raise ConfigError(
            f"{path}: no answer was kept ({TextStats.of(file.records)}); loosen the filters"
        )
    return file.records


def _answers(
    llm: LLM, prompts: Prompts, first: int, last: int, settings: TextSettings
) -> list[Record]:
    made = prompts.make(first, last)
    longest = llm.built.max_model_len
    asked = [
        i for i, (_, _, ids) in enumerate(made) if ids and len(ids) + settings.max_tokens <= longest
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": made[i][2]} for i in asked],
        [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                seed=_seed(settings.seed, first + i, 0),
                logprobs=0,
            )
            for i in asked
        ],
        use_tqdm=False,
    )
    found = dict(zip(asked, outputs, strict=True))
    records = []
    for i, (source, text, ids) in enumerate(made):
        if i not in found or found[i].error is not None:
            reason = "prompt" if i not in found else "error"
            records.append(Record(first + i, text, ids, "", [], reason, 0.0, 0.0, source, reason))
            continue
        answer = found[i].outputs[0]
        tokens = list(answer.token_ids)
        chosen = [at[t].logprob for at, t in zip(answer.logprobs or [], tokens, strict=True)]
        repeated, sure = repetition(tokens), confidence(chosen)
        dropped = settings.filters.refusal(tokens, repeated, sure)
        records.append(
            Record(
                first + i, text, ids, answer.text, tokens, str(answer.finish_reason),
                round(sure, 4), round(repeated, 4), source, dropped,
            )
        )  # fmt: skip
    return records


def _role(message: Any) -> str:
    role = message.get("role", message.get("from", "user"))
    return {"human": "user", "gpt": "assistant"}.get(role, role)


def _seed(seed: int, index: int, part: int) -> int:
    return (seed * 1_000_003 + index) * 2 + part
