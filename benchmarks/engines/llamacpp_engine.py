"""llama.cpp through llama-cpp-python's low-level interface: all sequences in one batch a step."""

import ctypes
import time

import llama_cpp
import numpy as np

BATCH_TOKENS = 2048
SLOTS = 32


def version() -> str:
    return f"llama-cpp-python {llama_cpp.__version__}"


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the library
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = SLOTS * 704
        params.n_batch, params.n_ubatch = BATCH_TOKENS, 512
        params.n_seq_max = SLOTS
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def _add(self, token: int, position: int, slot: int, wants_logits: bool) -> int:
        batch, at = self.batch, self.batch.n_tokens
        batch.token[at], batch.pos[at] = token, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, slot
        batch.logits[at] = wants_logits
        batch.n_tokens = at + 1
        return at

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        waiting, free = list(reversed(prompts)), list(range(SLOTS))
        running: dict[int, tuple[int, int, int]] = {}  # slot: next token, its position, tokens left
        start = time.perf_counter()
        while waiting or running:
            self.batch.n_tokens = 0
            wanted = []  # slot, row, next position, tokens left
            for slot, (token, position, left) in running.items():
                wanted.append((slot, self._add(token, position, slot, True), position + 1, left))
            while waiting and free and self.batch.n_tokens + len(waiting[-1]) <= BATCH_TOKENS:
                prompt, slot = waiting.pop(), free.pop()
                last = len(prompt) - 1
                rows = [self._add(t, i, slot, i == last) for i, t in enumerate(prompt)]
                wanted.append((slot, rows[-1], len(prompt), new_tokens))
            if llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            for slot, row, position, left in wanted:
                token = self._best(row)
                if left > 1:
                    running[slot] = (token, position, left - 1)
                    continue
                running.pop(slot, None)
                llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                free.append(slot)
        return time.perf_counter() - start
