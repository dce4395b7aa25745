"""OpenAI's own Python client against the demo pipeline (docs/examples/digits.yaml), unchanged but for base_url and key.

The client validates every body into its typed models; beyond that, each check below compares with what is known: the
demo's right answers, the same answer streamed and whole, docs/api.md for refusals.
"""
import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import openai
import pydantic
import yaml

from served import Pipeline, data_url

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/examples"
QUESTION = "Which digit is this?"
KEY = "sesame"


def picture(name: str, question: str = QUESTION) -> list:
    url = data_url(next((EXAMPLES / "digits").glob(f"*-{name}.png")))
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
                                         {"type": "text", "text": question}]}]


TEXT = [{"role": "system", "content": "You read digits."}, {"role": "user", "content": QUESTION}]


def equal(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"


def refused(kind: type, call: Callable, *, param: str | None = None, code: str | None = None, says: str = ""):
    try:
        call()
    except kind as error:
        equal(type(error), kind)
        equal((error.param, error.code), (param, code))
        assert says in error.message, error.message
        assert error.request_id, "every answer carries x-request-id"
        return
    raise AssertionError(f"no {kind.__name__}")


def models(client: openai.OpenAI, model: str):
    listed = client.models.list()
    equal([m.id for m in listed.data], [model])
    equal(client.models.retrieve(model).id, model)


def chat(client: openai.OpenAI, model: str):
    for name in ("seven", "six", "zero"):
        answer = client.chat.completions.create(model=model, messages=picture(name), temperature=0, max_completion_tokens=16)
        equal(answer.choices[0].message.content, f"This is a {name}.")
        equal((answer.object, answer.model, answer.choices[0].message.role), ("chat.completion", model, "assistant"))
        equal(answer.choices[0].finish_reason, "stop")
        equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
    short = client.chat.completions.create(model=model, messages=picture("six"), temperature=0, max_tokens=2)
    equal((short.choices[0].finish_reason, short.usage.completion_tokens), ("length", 2))
    stopped = client.chat.completions.create(model=model, messages=picture("six"), temperature=0, stop=[" a"])
    equal((stopped.choices[0].message.content, stopped.choices[0].finish_reason), ("This is", "stop"))


def streaming(client: openai.OpenAI, model: str):
    question = {"model": model, "messages": picture("three"), "temperature": 0}
    whole = client.chat.completions.create(**question)
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    equal("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), whole.choices[0].message.content)
    equal(chunks[0].choices[0].delta.role, "assistant")
    equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], ["stop"])
    equal((chunks[-1].choices, [c.usage for c in chunks[:-1]]), ([], [None] * (len(chunks) - 1)))
    equal((chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens),
          (whole.usage.prompt_tokens, whole.usage.completion_tokens))
    plain = list(client.chat.completions.create(**question, stream=True))
    assert all(c.choices and c.usage is None for c in plain), "no usage unless asked for"
    with client.chat.completions.stream(**question) as events:  # the client's own accumulator
        equal(events.get_final_completion().choices[0].message.content, whole.choices[0].message.content)


def logprobs(client: openai.OpenAI, model: str):
    answer = client.chat.completions.create(model=model, messages=picture("two"), temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    text = "".join(e.token for e in entries).removesuffix("<|im_end|>")
    equal(text, answer.choices[0].message.content)
    for entry in entries:
        equal(len(entry.top_logprobs), 3)
        equal(entry.token, entry.top_logprobs[0].token)  # greedy
        values = [t.logprob for t in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and values[0] <= 0, values


def choices(client: openai.OpenAI, model: str):
    def ask(seed: int) -> list[str]:
        answer = client.chat.completions.create(model=model, messages=TEXT, n=4, seed=seed, temperature=2, top_p=1, max_tokens=24,
                                                extra_body={"top_k": -1, "ignore_eos": True})
        equal([c.index for c in answer.choices], [0, 1, 2, 3])
        return [c.message.content for c in answer.choices]
    first = ask(7)
    equal(len(set(first)), 4)
    equal(ask(7), first)
    assert ask(8) != first


def tools(client: openai.OpenAI, model: str):
    name = "report"
    tool = {"type": "function", "function": {"name": name, "description": "reports a digit", "parameters": {
        "type": "object", "properties": {"digit": {"enum": ["zero", "one", "two"]}}, "required": ["digit"],
        "additionalProperties": False}}}
    question = {"model": model, "messages": TEXT, "tools": [tool], "temperature": 0, "max_tokens": 900}
    for choice in ("required", {"type": "function", "function": {"name": name}}):
        answer = client.chat.completions.create(**question, tool_choice=choice)
        call = answer.choices[0].message.tool_calls[0]
        equal((call.type, call.function.name), ("function", name))
        assert json.loads(call.function.arguments)["digit"] in ("zero", "one", "two"), call
        equal(answer.choices[0].finish_reason, "tool_calls")
        chunks = client.chat.completions.create(**question, tool_choice=choice, stream=True)
        deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
        equal("".join(d.function.arguments or "" for d in deltas if d.index == 0), call.function.arguments)
    silent = client.chat.completions.create(model=model, messages=TEXT, tools=[tool], tool_choice="none", max_tokens=8)
    equal(silent.choices[0].message.tool_calls, None)
    refused(openai.BadRequestError, lambda: client.chat.completions.create(
        model=model, messages=TEXT, tools=[tool], tool_choice={"type": "function", "function": {"name": "other"}}),
        param="tool_choice.function.name")


def structured(client: openai.OpenAI, model: str):
    class Digit(str, Enum):
        six, seven = "six", "seven"

    class Answer(pydantic.BaseModel):
        digit: Digit

    parsed = client.chat.completions.parse(model=model, messages=picture("six"), response_format=Answer, temperature=0,
                                           max_tokens=300)
    assert isinstance(parsed.choices[0].message.parsed, Answer), parsed


def completions(client: openai.OpenAI, model: str):
    question = {"model": model, "prompt": ["This is", "That is a"], "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(**question, logprobs=2, n=2, extra_body={"ignore_eos": True, "return_token_ids": True})
    equal([c.index for c in whole.choices], [0, 1, 2, 3])
    for choice in whole.choices:
        equal((choice.finish_reason, len(choice.logprobs.tokens)), ("length", 5))
        equal(len(choice.model_extra["token_ids"]), 5)
    equal(whole.choices[0].text, whole.choices[1].text)  # greedy
    streamed = ["", ""]
    for chunk in client.completions.create(**question, stream=True, extra_body={"ignore_eos": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    equal(streamed, [whole.choices[0].text, whole.choices[2].text])


def errors(client: openai.OpenAI, model: str):
    create = client.chat.completions.create
    refused(openai.NotFoundError, lambda: create(model="gpt-x", messages=TEXT), param="model", code="model_not_found")
    refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-x"), param="model", code="model_not_found")
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=model, input="x"), code="not_found")
    refused(openai.BadRequestError, lambda: create(model=model, messages=TEXT, temperature=3), param="temperature")
    refused(openai.BadRequestError, lambda: create(model=model, messages=[]), param="messages")
    refused(openai.BadRequestError, lambda: create(model=model, messages=TEXT, max_tokens=2048), param="max_tokens",
            code="context_length_exceeded", says="maximum context length is 2048 tokens")
    remote = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]
    refused(openai.BadRequestError, lambda: create(model=model, messages=remote), param="messages[0].content[0].image_url")
    stranger = client.with_options(api_key="tahini")
    refused(openai.AuthenticationError, lambda: stranger.models.list(), code="invalid_api_key")
    refused(openai.AuthenticationError, lambda: stranger.chat.completions.create(model=model, messages=TEXT),
            code="invalid_api_key")


def concurrent(client: openai.OpenAI, model: str):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0) as many:
            answers = await asyncio.gather(*(many.chat.completions.create(model=model, messages=picture(name), temperature=0)
                                             for name in ("six", "seven") * 8))
            return [a.choices[0].message.content for a in answers]
    equal(asyncio.run(run()), ["This is a six.", "This is a seven."] * 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwenctl", required=True)
    args = parser.parse_args()
    failed = 0
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(KEY + "\n")
        keys.flush()
        manifest = yaml.safe_load((EXAMPLES / "digits.yaml").read_text())
        manifest["spec"]["model"]["source"]["path"] = str(EXAMPLES / manifest["spec"]["model"]["source"]["path"])
        manifest["spec"]["server"]["apiKeys"] = {"file": keys.name}
        with Pipeline(args.qwenctl, manifest) as pipeline:
            client = openai.OpenAI(base_url=pipeline.url + "/v1", api_key=KEY, max_retries=0, timeout=120)
            for check in (models, chat, streaming, logprobs, choices, tools, structured, completions, errors, concurrent):
                try:
                    check(client, manifest["spec"]["model"]["id"])
                    print(f"ok    {check.__name__}")
                except Exception as error:  # whatever one check meets, the others are worth running
                    failed += 1
                    print(f"WRONG {check.__name__}: {type(error).__name__}: {error}")
    print(f"openai {openai.__version__}: {failed} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
