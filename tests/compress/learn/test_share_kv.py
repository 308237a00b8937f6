"""Sharing KV heads of models on disk: what comes out loads here and in transformers."""

import json

import numpy as np
import pytest
import torch
from text_model import write_text_model
from tiny_models import TINY, reference

from pyllmlite.compress.learn.share_kv import ShareSettings, card, share_kv, won_back
from pyllmlite.compress.learn.token_windows import BesideTeacher, TokenWindows, mean_losses
from pyllmlite.compress.place import DISTILL_STATE, occupy
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import open_model

QUICK = {"tokens": 96, "seq_len": 24, "batch_size": 2, "save_every": 0}
TOKENS = list(range(5, 45))


def engine_logits(path):
    from pyllmlite.compress.compare import read_chunk
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.model.build import build

    config = EngineConfig.from_kwargs(
        skip_tokenizer_init=True, dtype="f32", kv_cache_dtype="f32", max_num_seqs=1,
        max_model_len=64, max_num_batched_tokens=64, enable_prefix_caching=False, threads=1,
    )  # fmt: skip
    built = build(open_model(str(path)), config)
    built.cache.acquire(1, 0, TOKENS)
    built.batch.token_table[0, : len(TOKENS)] = TOKENS
    built.batch.set_sampling(0, temperature=0.0)
    return read_chunk(built, TOKENS, 0)


def transformers_logits(path):
    with torch.no_grad():
        return reference(path)(torch.tensor([TOKENS])).logits[0].numpy()


FAMILIES = [
    ("llama-mha", 6, 2), ("llama-mha", 6, 1), ("llama", 2, 1), ("qwen2", 2, 1), ("qwen3", 2, 1),
    ("gemma2", 2, 1), ("mistral", 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "svd"])
@pytest.mark.parametrize(("family", "had", "wanted"), FAMILIES)
def test_it_loads_here_and_in_transformers(tmp_path, family, had, wanted, pooling):
    path = TINY[family](tmp_path / "float")
    settings = ShareSettings(wanted, pooling, "similar", tokens=0)
    made = share_kv(str(path), tmp_path / "out", settings, eval_windows=0, progress=False)
    config = json.loads((made.path / "config.json").read_text())
    assert config["num_key_value_heads"] == wanted
    spec = open_model(str(made.path)).spec
    assert spec.num_kv_heads == wanted and spec.num_heads == 6
    kv = made.facts["kv_bytes_per_token"]
    assert kv["after"] == spec.kv_bytes_per_token(2)
    assert kv["before"] == had / wanted * kv["after"]
    here, there = engine_logits(made.path), transformers_logits(made.path)
    assert np.isfinite(here).all() and np.abs(here - there).max() < 2e-4 * np.abs(there).max()
    assert not np.allclose(there, transformers_logits(path), atol=1e-2)  # something was lost


def test_heads_that_are_one_lose_nothing(tmp_path):
    """Heads of a group made equal: what comes out computes the same."""
    path = TINY["llama-bias"](tmp_path / "float")
    from safetensors.torch import load_file, save_file

    state = load_file(path / "model.safetensors")
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            value[12:] = value[:12]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    for pooling in ("mean", "svd"):
        settings = ShareSettings(1, pooling, tokens=0)
        made = share_kv(str(path), tmp_path / pooling, settings, eval_windows=0, progress=False)
        assert np.allclose(transformers_logits(made.path), transformers_logits(path), atol=2e-4)


def test_training_wins_back_what_pooling_lost(tmp_path):
    path = write_text_model(tmp_path / "float", seed=1)
    settings = ShareSettings(1, **{**QUICK, "tokens": 2400, "learning_rate": 1e-3})
    made = share_kv(
        str(path), tmp_path / "out", settings, eval_windows=4, eval_length=32, progress=False
    )
    losses = made.facts["losses"]
    assert losses["trained"]["kl"] < losses["pooled"]["kl"]
    assert made.facts["training"]["tokens"] == 2400 and (made.path / "loss.png").is_file()
    text = (made.path / "README.md").read_text()
    assert "1 KV heads in the place of 2" in text and f"{losses['trained']['kl']:.4f}" in text
    with torch.no_grad():
        ids = torch.tensor([TOKENS])
        assert reference(made.path)(ids).logits.isfinite().all()
    assert not (tmp_path / "out.partial").exists()


def test_what_was_won_back():
    losses = {
        "before": {"cross_entropy": 2.0}, "pooled": {"cross_entropy": 4.0},
        "trained": {"cross_entropy": 2.5},
    }  # fmt: skip
    assert won_back(losses) == pytest.approx(0.75)
    del losses["trained"]
    assert won_back(losses) is None


def test_a_share_of_the_tokens():
    settings = ShareSettings(1, trained_tokens=100_000, seq_len=100, batch_size=4)
    assert settings.budget == 5000 and settings.steps == 13
    assert ShareSettings(1, tokens=0).steps == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, svd"),
        ({"grouping": "random"}, "grouping must be one of"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"tokens": None}, "say how long to train"),
        ({"tokens": -1}, "must not be negative"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"grad_accumulation": 0}, "grad_accumulation must be an integer of at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be an integer of at least 2, got 0"),
        ({"num_sequences": 0}, "num_sequences must be an integer of at least 1, got 0"),
        ({"seq_len": 100000}, "seq_len 100000 is beyond the model's"),
        ({"kv_heads": 5}, "6 KV heads do not part into 5 groups of one size; possible are 1, 2, 3"),
        ({"kv_heads": 6}, "6 KV heads for 6 query heads already"),
        ({"kv_heads": 9}, "already"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, words):
    path = TINY["llama-mha"](tmp_path / "float")
    with pytest.raises(ConfigError, match=words):
        settings = ShareSettings(**{"kv_heads": 2, **QUICK, **changes})
        share_kv(str(path), tmp_path / "out", settings, eval_windows=0, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["phi3", "gpt2", "bloom"])
def test_fused_attentions_are_refused(tmp_path, family):
    path = TINY[family](tmp_path / "float")
    kv = open_model(str(path)).spec.num_kv_heads
    with pytest.raises(ConfigError, match="in one matrix"):
        settings = ShareSettings(1, **QUICK)
        share_kv(str(path), tmp_path / "out", settings, eval_windows=0, progress=False)
    assert kv > 1


def test_other_settings_do_not_go_on(tmp_path, monkeypatch):
    path = write_text_model(tmp_path / "float", seed=1)

    def run(restart=False, **changes):
        settings = ShareSettings(**{"kv_heads": 1, **QUICK, **changes})
        return share_kv(str(path), tmp_path / "out", settings, False, restart, eval_windows=0,
                        progress=False)  # fmt: skip

    def fails(*args):
        raise RuntimeError("power failure")

    with monkeypatch.context() as patch:  # behind the text, before the training
        patch.setattr("pyllmlite.compress.learn.share_kv._uptrain", fails)
        with pytest.raises(RuntimeError):
            run()
        with pytest.raises(ConfigError, match="unfinished run with other settings .seed: 0, now 1"):
            run(seed=1)
        with pytest.raises(RuntimeError):  # these decide nothing
            run(save_every=7, device="cpu")
        assert (tmp_path / "out.partial" / ".pyllmlite" / "tokens.npy").is_file()
    made = run(restart=True, seed=1)
    assert made.facts["settings"]["seed"] == 1


def test_a_run_that_did_nothing_blocks_nothing(tmp_path):
    path = TINY["llama-mha"](tmp_path / "float")  # has no tokenizer: the text cannot be written
    with pytest.raises(Exception, match="tokenizer"):
        share_kv(str(path), tmp_path / "out", ShareSettings(2, **QUICK), eval_windows=0)
    assert [p.name for p in tmp_path.iterdir()] == ["float"]
    partial = tmp_path / "out.partial"  # and one that was killed while it wrote
    (partial / ".pyllmlite").mkdir(parents=True)
    (partial / ".pyllmlite" / "settings.json").write_text('{"kv_heads": 2}')
    (partial / "model-00007-of-00009.safetensors").write_text("x")
    settings = ShareSettings(3, tokens=0)
    made = share_kv(str(path), tmp_path / "out", settings, eval_windows=0)
    assert made.facts["heads"]["kv_now"] == 3
    assert not (made.path / "model-00007-of-00009.safetensors").exists()


def test_what_another_command_left_is_not_published(tmp_path):
    """A quantization that was killed left shards and an index."""
    path, partial = TINY["llama-mha"](tmp_path / "float"), tmp_path / "out.partial"
    (partial / ".pyllmlite").mkdir(parents=True)
    names = ("model-00001-of-00003.safetensors", ".pyllmlite/state.json")
    for name in names:
        (partial / name).write_text("{}")
    settings = ShareSettings(3, tokens=0)
    with pytest.raises(ConfigError, match="unfinished run of quantize"):
        share_kv(str(path), tmp_path / "out", settings, eval_windows=0)
    assert all((partial / name).read_text() == "{}" for name in names)
    made = share_kv(str(path), tmp_path / "out", settings, restart=True, eval_windows=0)
    assert not {p.name for p in made.path.iterdir()} & {".pyllmlite", names[0]}
    with locked_by_another(partial), pytest.raises(ModelError, match="another run is writing"):
        share_kv(str(path), tmp_path / "out", settings, True, restart=True, eval_windows=0)
    assert (partial / "distill" / "data.jsonl").is_file()


def locked_by_another(partial):
    """A running distill."""
    lock = occupy(partial, DISTILL_STATE, restart=False)
    (partial / "distill").mkdir()
    (partial / "distill" / "data.jsonl").touch()
    return lock


def test_windows_are_functions_of_their_index():
    tokens = np.arange(60).reshape(10, 6)
    windows = TokenWindows(tokens, 3, 7)
    seen = [windows.batch(i) for i in range(6)]
    for index in (4, 0):
        again = TokenWindows(tokens, 3, 7).batch(index)["input_ids"]
        assert torch.equal(again, seen[index]["input_ids"])
    firsts = [row for batch in seen[:3] for row in batch["input_ids"][:, 0].tolist()]
    assert len(set(firsts)) == 9  # an epoch sees nothing twice
    batch = seen[0]
    assert torch.equal(batch["targets"][:, :-1], batch["input_ids"][:, 1:])
    assert (batch["targets"][:, -1] == -100).all()
    with pytest.raises(ConfigError, match="window of two tokens"):
        TokenWindows(np.zeros((3, 1)), 1, 0)


def test_the_loss_beside_plain_formulas(tmp_path):
    """KL and cross entropy over the whole vocabulary, and their mix's gradient, in float64."""
    student = reference(TINY["llama-mha"](tmp_path / "s")).double().requires_grad_(True)
    torch.manual_seed(0)
    teacher = reference(TINY["llama-mha"](tmp_path / "s")).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = TokenWindows(np.arange(5, 65).reshape(2, 30), 2, 0).batch(0)
    total, metrics = BesideTeacher(teacher, 0.25)(student, batch)
    total.backward()
    ours = student.model.layers[0].self_attn.k_proj.weight.grad.clone()
    student.zero_grad()
    q = student(batch["input_ids"]).logits.log_softmax(-1)
    with torch.no_grad():
        p = teacher(batch["input_ids"]).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    entropy = -q[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).mean()
    expected = 0.75 * kl + 0.25 * entropy
    expected.backward()
    assert float(total) == pytest.approx(float(expected), rel=1e-9)
    assert metrics["kl"] == pytest.approx(float(kl), rel=1e-9)
    assert metrics["cross_entropy"] == pytest.approx(float(entropy), rel=1e-9)
    grad = student.model.layers[0].self_attn.k_proj.weight.grad
    assert torch.allclose(ours, grad, rtol=1e-6, atol=1e-12)
    alone = mean_losses(student.float(), None, batch["input_ids"].numpy())
    assert set(alone) == {"cross_entropy"}


def test_the_card_without_losses():
    facts = {
        "base_model": "org/m", "made_by": "x", "heads": {"kv_now": 1, "kv": 2, "query": 4},
        "kv_bytes_per_token": {"before": 8.0, "after": 4.0}, "losses": {}, "training": None,
        "settings": {"pooling": "mean", "grouping": "consecutive"},
    }  # fmt: skip
    text = card("n", facts)
    assert "base_model: org/m" in text and "4 bytes a token (bf16), 8" in text
