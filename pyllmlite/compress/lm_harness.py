"""Models of ours in EleutherAI's lm-evaluation-harness (Gao et al., ``pip install lm-eval``).

    python -m pyllmlite.compress.lm_harness --model pyllmlite \
        --model_args pretrained=DIR,quantizer=rtn --tasks lambada_openai

takes the arguments of the harness's own command.  From Python: ``simple_evaluate(PyllmliteLM(DIR),
tasks=[...])``; importing this module registers the name ``pyllmlite`` with the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from pyllmlite.core.errors import ConfigError, StepError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.llm import LLM

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(
        f"lm-evaluation-harness is not installed ({error}): pip install lm-eval"
    ) from None

REQUESTS = 128  # in the engine at once, so that their log-probabilities do not pile up
NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("pyllmlite")
class PyllmliteLM(TemplateLM):
    """A model that runs in the engine.

    Args:
        pretrained: Path, alias or hub id, as ``LLM`` takes it; ``model`` is another word for it.
        batch_size: Sequences that run at once; ``auto``: the engine's choice.
        max_length: Tokens of a sequence at most; None: the model's own.
        device: Only the CPU.
        options: Further words of ``LLM``: ``quantizer=rtn``, ``dtype=f32``, ...
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        model: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu", "auto"):
            raise ConfigError(f"device {device!r} cannot be used; models run on the CPU")
        if isinstance(batch_size, int) or (isinstance(batch_size, str) and batch_size.isdigit()):
            options.setdefault("max_num_seqs", int(batch_size))
        elif max_batch_size is not None:
            options.setdefault("max_num_seqs", int(max_batch_size))
        if max_length is not None:
            options.setdefault("max_model_len", int(max_length))
        self.llm = LLM(model=pretrained or model, **options)
        self.tokenizer = self.llm.get_tokenizer()

    # -- what it is ----------------------------------------------------------------------------
    @property
    def max_length(self) -> int:
        return self.llm.built.max_model_len

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return 0 if end is None else end

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.llm.model.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:  # a text that begins with BOS gets no second one
            begin = self.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's records."""
        if chat_template is False or chat_template is None:
            return None
        named = self.tokenizer.chat_templates
        if isinstance(chat_template, str) and chat_template in named:
            return named[chat_template]
        return self.tokenizer.chat_template or ""

    # -- requests ------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether each of its tokens is the
        likeliest.  A sequence that is too long loses the beginning of its context."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        results: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm)
        for part in _parts(requests):
            prompts = [[*context, *rest][-(self.max_length - 1) :] for _, context, rest in part]
            # A prompt of one token has nothing that its log-probability could depend on.
            outputs = self._run([p if len(p) > 1 else [self.prefix_token_id, *p] for p in prompts],
                                params)  # fmt: skip
            for (words, _, continuation), output in zip(part, outputs, strict=True):
                scored = output.prompt_logprobs[-len(continuation) :] if continuation else []
                tokens = output.prompt_token_ids[-len(continuation) :] if continuation else []
                found = [
                    one[token] for one, token in zip(scored, tokens, strict=True) if one is not None
                ]
                answer = (
                    float(sum(one.logprob for one in found)),
                    all(one.rank == 1 for one in found),
                )
                results.append(answer)
                if words is not None:
                    self.cache_hook.add_partial("loglikelihood", words, answer)
            bar.update(len(part))
        bar.close()
        return results

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 2,
                    context_len=1,
                ),
            )
            asked: list[tuple[Any, list[int], list[int]]] = [(None, *pair) for pair in windows]
            scored = self._loglikelihood_tokens(asked, disable_tqdm=True)
            total = sum(value for value, _ in scored)
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        results: list[str] = []
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        for part in _parts(requests):
            prompts, params = [], []
            for request in part:
                context, settings = request.args
                params.append(self._sampling(dict(settings)))
                room = self.max_length - (params[-1].max_tokens or 1)
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks {params[-1].max_tokens} leaves no room for a prompt in "
                        f"{self.max_length} tokens; give a larger max_length"
                    )
                prompts.append(self.tok_encode(context)[-room:] or [self.prefix_token_id])
            for request, output in zip(part, self._run(prompts, params), strict=True):
                text = output.outputs[0].text
                results.append(text)
                self.cache_hook.add_partial("generate_until", request.args, text)
            bar.update(len(part))
        bar.close()
        return results

    # -- inside --------------------------------------------------------------------------------
    def _run(self, prompts: list[list[int]], params: Any) -> list[Any]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        for output in outputs:
            if output.error:
                raise StepError(output.error)
        return outputs

    def _sampling(self, settings: dict[str, Any]) -> SamplingParams:
        """The harness's words: greedy unless ``do_sample`` or a temperature says otherwise."""
        stop = settings.pop("until", None) or []
        stop = [stop] if isinstance(stop, str) else list(stop)
        new = settings.pop("max_gen_toks", None) or settings.pop("max_new_tokens", None)
        sample = settings.pop("do_sample", None)
        chosen = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        if sample is False or (sample is None and "temperature" not in chosen):
            chosen = {"temperature": 0.0}
        return SamplingParams(
            max_tokens=int(new or NEW_TOKENS), stop=[text for text in stop if text], **chosen
        )


def _parts(requests: Sequence[Any]) -> Iterator[list[Any]]:
    left = iter(requests)
    while part := list(islice(left, REQUESTS)):
        yield part


def main() -> None:
    """The harness's command, with ``--model pyllmlite`` known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # Under the name __main__ the class would be another one than what others import.
    from pyllmlite.compress import lm_harness

    lm_harness.main()
