"""What sharing KV heads costs, and what uptraining wins back, on a small multi-head model.

    python benchmarks/kv_sharing.py WORK [--pooling mean,svd] [--grouping consecutive,similar]

A Llama of 9 heads (4 layers, 1.1 M weights) is trained in WORK on nine tenths of Python's own help
(``pydoc_data.topics``) with a byte-level BPE made from them.  Then its heads are shared, 9 to 3,
and it is trained on 5 % of as many tokens of the same text; the last tenth is measured on.  The KV
bytes are those of the engine's own cache.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pyllmlite import LLM
from pyllmlite.compress.calibration import calibration_tokens
from pyllmlite.compress.learn.settings import TrainSettings
from pyllmlite.compress.learn.share_kv import ShareSettings, share_kv
from pyllmlite.compress.learn.token_windows import BesideTeacher, TokenWindows
from pyllmlite.compress.learn.trainer import Trainer
from pyllmlite.model.source import open_model

VOCAB, LENGTH, HEADS, HEAD_DIM, SHARED = 1024, 64, 9, 16, 3


def texts(work: Path) -> tuple[Path, Path]:
    """Nine tenths of the topics to train on, every tenth to measure on."""
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    train, unseen = work / "train.txt", work / "unseen.txt"
    train.write_text("\n".join(topics[n] for i, n in enumerate(names) if i % 10 != 9))
    unseen.write_text("\n".join(topics[n] for i, n in enumerate(names) if i % 10 == 9))
    return train, unseen


def multi_head_model(work: Path, train: Path, steps: int, batch: int) -> Path:
    """The model, trained once."""
    path = work / "mha"
    if (path / "model.safetensors").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([train.read_text()], bpe)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HEADS * HEAD_DIM, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config)
    module.save_pretrained(path)  # random: so that its tokenizer can be opened
    source = open_model(str(path))
    count = len(source.tokenizer().encode(train.read_text(), add_special_tokens=False)) // LENGTH
    tokens = calibration_tokens(source, str(train), count, LENGTH)
    settings = TrainSettings(
        steps, work / "mha-run", batch, LENGTH, learning_rate=4e-3, weight_decay=0.1, save_every=25
    )
    (path / "model.safetensors").unlink()
    Trainer(module, BesideTeacher(None), TokenWindows(tokens, batch, 0), settings).run()
    module.save_pretrained(path)
    return path


def engine_kv_bytes(path: Path) -> int:
    """Bytes of the engine's cache for a token."""
    llm = LLM(str(path), max_model_len=256, kv_cache_memory="16MB", dtype="bf16")
    cache = llm.built.cache
    return round(cache.nbytes / (cache.num_blocks * cache.block_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--grouping", default="consecutive")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--task-weight", type=float, default=0.0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train, unseen = texts(args.work)
    before = time.process_time()
    path = multi_head_model(args.work, train, args.steps, args.batch)
    print(f"{path}: {time.process_time() - before:.0f} s of CPU time", flush=True)
    trained = args.steps * args.batch * LENGTH
    source = open_model(str(path))
    fits = len(source.tokenizer().encode(unseen.read_text(), add_special_tokens=False)) // LENGTH
    for pooling in args.pooling.split(","):
        for grouping in args.grouping.split(","):
            before = time.process_time()
            settings = ShareSettings(
                SHARED, pooling, grouping, trained_tokens=trained, text=str(train), seq_len=LENGTH,
                batch_size=4, learning_rate=args.learning_rate, task_weight=args.task_weight,
            )  # fmt: skip
            made = share_kv(
                str(path), args.work / f"gqa-{pooling}-{grouping}", settings, force=True,
                restart=True, eval_windows=min(fits, 100), eval_length=LENGTH, eval_text=unseen,
            )  # fmt: skip
            losses = {k: v["cross_entropy"] for k, v in made.facts["losses"].items()}
            kv = {name: engine_kv_bytes(p) for name, p in (("before", path), ("after", made.path))}
            row = {
                "pooling": pooling, "grouping": grouping, "loss": losses,
                "won_back": made.facts["won_back"], "tokens": made.facts["training"]["tokens"],
                "of": trained, "engine_kv_bytes_per_token": kv,
                "cpu_seconds": time.process_time() - before,
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
