"""Every endpoint and option through the official client; temperature 0 equals LLM.generate."""

import math

import openai
import pytest
import raw

from pyllmlite import SamplingParams

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


def offline(llm, prompt=PROMPT, **params):
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, **params), use_tqdm=False)
    return output.outputs[0]


def test_completion_equals_generate(client, llm):
    expected = offline(llm, max_tokens=40)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == len(PROMPT)  # a token a byte
    assert answer.object == "text_completion" and answer.model == "tiny"


def test_completion_stream_equals_generate(client, llm):
    expected = offline(llm, max_tokens=40)
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 10


def test_prompt_forms(client, llm):
    texts = ["one", "and two"]
    expected = [offline(llm, t, max_tokens=8).text for t in texts]
    ids = [client.post("/../tokenize", body={"prompt": t}, cast_to=object)["tokens"] for t in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=8, temperature=0
        )
        assert [c.text for c in answer.choices] == expected
        assert [c.index for c in answer.choices] == [0, 1]
    answer = client.completions.create(model="tiny", prompt=ids[1], max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected[1]
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=texts, max_tokens=8, temperature=0, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_completion_logprobs(client, llm):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    expected = offline(llm, max_tokens=5, logprobs=3)
    for got, token, entry in zip(
        found.token_logprobs, expected.token_ids, expected.logprobs, strict=True
    ):
        assert math.isclose(got, entry[token].logprob, abs_tol=1e-6)
    assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs) == 5


def test_echo(client, llm):
    expected = offline(llm, max_tokens=4).text
    options = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "echo": True}
    answer = client.completions.create(**options, max_tokens=4)
    assert answer.choices[0].text == PROMPT + expected
    scored = client.completions.create(**options, max_tokens=0, logprobs=1).choices[0]
    assert scored.text == PROMPT
    assert scored.logprobs.tokens == list(PROMPT.replace(" ", " "))
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    assert scored.logprobs.text_offset == list(range(len(PROMPT)))
    chunks = client.completions.create(**options, max_tokens=4, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == PROMPT + expected


def test_chat_equals_chat(client, llm):
    params = SamplingParams(temperature=0, max_tokens=30)
    expected = llm.chat(MESSAGES, params, use_tqdm=False)[0].outputs[0]
    for limit in ({"max_tokens": 30}, {"max_completion_tokens": 30}):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=0, **limit
        )
        choice = answer.choices[0]
        assert choice.message.content == expected.text and choice.message.role == "assistant"
        assert choice.finish_reason == expected.finish_reason
    parts = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=parts, temperature=0, max_tokens=30, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, stream):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True,
        top_logprobs=2, stream=stream,
    )  # fmt: skip
    if stream:
        content = [e for c in answer if c.choices[0].logprobs
                   for e in c.choices[0].logprobs.content]  # fmt: skip
    else:
        content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode() == entry.token


def test_n_and_seed(client):
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 5,
               "temperature": 1.0}  # fmt: skip
    first = client.chat.completions.create(**options)
    texts = [c.message.content for c in first.choices]
    assert len(set(texts)) == 3 and [c.index for c in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens <= 36
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, llm, stream):
    text = offline(llm, max_tokens=60).text
    at = next(i for i in range(5, len(text) - 2) if text[i : i + 2].isascii())
    stop = text[at : at + 2]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, temperature=0, stop=["never seen", stop],
        stream=stream,
    )  # fmt: skip
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    assert "".join(c.text for c in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_sampling_options_reach_the_engine(client):
    def text(**options):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=10, **{"temperature": 0, **options}
        )
        return answer.choices[0].text

    forced = text(logit_bias={"65": 100})  # every token the same
    assert len(set(forced)) == 1
    assert text(logit_bias={"65": 100}, presence_penalty=2, frequency_penalty=2) == forced
    greedy = text()
    assert text(temperature=1, extra_body={"top_k": 1}) == greedy
    assert text(temperature=1, top_p=1e-6) == greedy
    assert text(temperature=1, extra_body={"min_p": 1.0}) == greedy
    assert text(extra_body={"repetition_penalty": 50.0}) != forced
    long = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=400, temperature=1, seed=1,
        extra_body={"ignore_eos": True, "min_tokens": 10},
    )  # fmt: skip
    assert long.usage.completion_tokens == 400


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"


def test_tokenize(server):
    def post(path, **body):
        return raw.post(server, path, body)

    status, found = post("/tokenize", prompt="añ!", return_token_strs=True)
    assert status == 200 and found["count"] == len(found["tokens"]) == 4
    assert len(found["token_strs"]) == 4
    assert post("/detokenize", tokens=found["tokens"]) == (200, {"prompt": "añ!"})
    status, found = post("/tokenize", messages=MESSAGES)
    text = post("/detokenize", tokens=found["tokens"])[1]["prompt"]
    assert text.endswith("<|im_start|>assistant\n") and "Be brief." in text
    assert post("/tokenize")[0] == 400
    assert post("/detokenize", tokens=[-1])[0] == 400
    assert post("/detokenize", tokens=[2**31 - 1]) == (200, {"prompt": ""})


ERRORS = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 1000, "temperature": 1}, 400, "n"),
    ({"n": 2, "temperature": 0}, 400, None),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, 400, None),
    ({"logprobs": True, "top_logprobs": 21}, 400, None),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ({"messages": [{"role": "user", "content": "x" * 40000}]}, 400, "prompt"),
    ({"extra_body": {"chat_template": "{{ 1 }}"}}, 400, "chat_template"),
    ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, 400, None),
    ({"stop": ""}, 400, None),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("options", "status", "param"), ERRORS)
def test_errors(client, options, status, param, stream):
    given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "stream": stream, **options}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**given)
    assert caught.value.status_code == status
    error = caught.value.body
    assert error["message"] and error["type"] == (
        "not_found_error" if status == 404 else "invalid_request_error"
    )
    if param is not None:
        assert param in (error["param"] or "")


def test_metrics(client, server):
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3)
    status, text = server.get("/metrics")
    assert status == 200
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
    ):  # fmt: skip
        assert float(values[f"pyllmlite_{name}"]) >= 0
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert float(values[f"pyllmlite_{name}_seconds_count"]) >= 1
    assert float(values['pyllmlite_request_success_total{finished_reason="length"}']) >= 1


def test_state(server):
    assert server.get("/health") == (200, {"status": "ready"})
    assert server.get("/ready")[0] == 200
    stats = server.stats()
    assert len(stats["cells"]) <= 1024 and set(stats["cells"]) <= set(range(10))
    status, page = server.get("/")
    assert status == 200 and "<!doctype html>" in page.lower()
    status, body = server.get("/nothing")
    assert status == 404 and body["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions")[0] == 405
    assert server.get("/openapi.json")[0] == 200


def test_best_of_counts_as_completions(server):
    body = {"prompt": "hi", "max_tokens": 2, "temperature": 1.0, "seed": 1}
    status, answer = raw.post(server, "/v1/completions", {**body, "best_of": 129})
    assert status == 400 and "at most 128" in answer["error"]["message"]
    status, answer = raw.post(server, "/v1/completions", {**body, "best_of": 3})
    assert status == 200 and len(answer["choices"]) == 1
    server.until_idle()
