"""The adapter, driven by the harness's own instances; figures beside transformers."""

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from pyllmlite.compress.lm_harness import PyllmliteLM  # noqa: E402
from pyllmlite.core.errors import ConfigError  # noqa: E402


def asked(kind, *arguments):
    return [Instance(kind, {}, one, idx) for idx, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm(model):
    return PyllmliteLM(str(model), max_length=48, threads=1, dtype="f32", kv_cache_dtype="f32")


@pytest.fixture(scope="module")
def logprobs(model):
    """Log-probabilities of the token behind every token of a list, by transformers."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def of(tokens):
        with torch.no_grad():
            return torch.log_softmax(reference(torch.tensor([tokens])).logits[0], -1).numpy()

    return of


def test_loglikelihood(lm, logprobs):
    pairs = [("Hello wor", "ld"), ("a ", "b"), ("", "xy"), ("x" * 100, "tail")]
    for (context, rest), (value, greedy) in zip(
        pairs, lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        tokens = lm.tok_encode(context + rest) if context else [
            lm.prefix_token_id, *lm.tok_encode(rest)
        ]  # fmt: skip
        count = len(lm.tok_encode(context + rest)) - len(lm.tok_encode(context.rstrip()))
        tokens = tokens[-47:]
        table = logprobs(tokens)[-count - 1 : -1]
        want = table[np.arange(count), tokens[-count:]].sum()
        assert value == pytest.approx(want, abs=1e-3)
        assert greedy == bool((table.argmax(-1) == tokens[-count:]).all())


def test_greedy_is_seen(lm):
    (text,) = lm.generate_until(asked("generate_until", ("Hello", {"max_gen_toks": 1})), True)
    tokens = lm.llm.generate("Hello", lm._sampling({"max_gen_toks": 1}), use_tqdm=False)[0]
    pair = (None, lm.tok_encode("Hello"), tokens.outputs[0].token_ids)
    assert lm._loglikelihood_tokens([pair], disable_tqdm=True)[0][1] is True


def test_rolling_reads_every_token_once(lm, logprobs):
    text = "The quick brown fox jumps over the lazy dog, again and again and again."
    tokens = lm.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > 46
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    head, tail = tokens[:46], tokens[46:]
    want = 0.0
    for context, part in (([lm.prefix_token_id], head), (tokens[len(tokens) - 47 : 46], tail)):
        table = logprobs([*context, *part])[len(context) - 1 :]
        want += table[np.arange(len(part)), part].sum()
    assert found == pytest.approx(want, rel=1e-4)


def test_generate_until(lm):
    whole, stopped = lm.generate_until(
        asked("generate_until", ("Hello", {"max_gen_toks": 12, "do_sample": False}),
              ("Hello", {"max_gen_toks": 12, "until": ["\n", ""]})), disable_tqdm=True,
    )  # fmt: skip
    assert whole and stopped == whole.split("\n")[0]
    with pytest.raises(ConfigError, match="max_gen_toks"):
        lm.generate_until(asked("generate_until", ("x", {"max_gen_toks": 48})), disable_tqdm=True)


def test_the_harness_knows_it(lm, model):
    assert get_model("pyllmlite") is PyllmliteLM
    made = PyllmliteLM.create_from_arg_string(
        f"pretrained={model},quantizer=rtn,bits=8", {"batch_size": 2, "max_batch_size": None}
    )
    assert made.llm.built.max_num_seqs == 2 and made.llm.built.config.quantizer == "rtn"
    prompt = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>assistant\n") and "im_start" in lm.chat_template(True)
    with pytest.raises(ConfigError, match="cuda"):
        PyllmliteLM(str(model), device="cuda:0")
