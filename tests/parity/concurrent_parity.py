"""64 requests at once over HTTP, against a pipeline of four stages: each gets exactly the tokens that it gets alone.

Texts of 2 to 62 words, chats, one picture, two, a video file, a list of frames; answers of 16 to 135 tokens; greedy and, for
some, drawn with a seed; a third streamed; every fifth goes away in the middle of its stream. The limits are set so tight
that requests wait for a slot, prompts are prefilled in chunks, and sequences are preempted and computed again. Checked:
  alone         a fresh pipeline answers the same requests one after the other: equal tokens; of a request that went away, the
                tokens that it saw are the first of those
  transformers  of every third greedy one: equal prompt ids and tokens
  again         the same 64 on the warm pipeline, so that prompts come out of the prefix cache: equal tokens
  afterwards    /metrics shows no KV block in use, nothing running, nothing waiting
"""
import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # python_export, when run by hand
from python_export import tiny  # noqa: E402
from python_export.oracle import Golden, Oracle, bf16_ulp  # noqa: E402

import parity_requests as cases  # noqa: E402
from e2e_parity import compare  # noqa: E402
from served import Pipeline, manifest, openai_messages  # noqa: E402

REQUESTS = 64
STAGES = [(0, 3), (3, 5), (5, 6), (6, 8)]
LIMITS = {"maxBatchTokens": 96, "maxSequences": 24, "kvCacheTokens": 768}  # the 64 together are about 9,000 tokens
LENGTH = {"maxModelLen": 512}
WORDS = "river stone green seven cloud paper night horse glass north music field winter table orange letter".split()
QUIET = ("qwen_requests_running", "qwen_requests_waiting", 'qwen_kv_blocks{state="used"}')
QUIET_SECONDS = 20


@dataclass
class Job:
    request: dict            # the oracle's form
    path: str
    body: dict
    leave_after: int = 0     # tokens seen before the client goes away; 0: it stays

    @property
    def greedy(self) -> bool:
        return self.body["temperature"] == 0


def make_jobs(base: Path) -> list:
    pictures = {r["name"]: r for r in cases.vision_requests(base)}
    jobs = []
    for k in range(REQUESTS):
        kind = ("prompt", "chat", "prompt", "image", "prompt", "images", "video", "mixed")[k % 8]
        words = 2 + k % 5 if kind == "prompt" else 3 + k * 7 % 60  # short ones grow long: what preemption is for
        text = " ".join(WORDS[(k * 5 + i * (k + 3)) % len(WORDS)] for i in range(words))
        if kind == "prompt":
            request = {"name": f"{k} prompt", "prompt": text}
        elif kind == "chat":
            request = cases.chat(f"{k} chat", cases.text(text + "?"), system="Answer briefly." if k % 3 else None)
        else:
            parts = pictures[kind]["messages"][0]["content"][:-1]
            request = cases.chat(f"{k} {kind}", *parts, cases.text(text[:40] + "?"))
        body = {"model": "parity", "temperature": 0, "max_tokens": 96 + k % 40 if kind == "prompt" else 24 + k * 29 % 57,
                "ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1.0}
        if k % 16 == 5:
            body |= {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 1000 + k, "max_tokens": 16}
        if k % 3 == 1:
            body["stream"] = True
        job = Job(request, "/v1/completions" if kind == "prompt" else "/v1/chat/completions", body)
        if kind == "prompt":
            body["prompt"] = text
        else:
            body["messages"] = openai_messages(request["messages"], base)
        if k % 5 == 4:
            body |= {"stream": True, "max_tokens": 200}
            job.leave_after = 1 + k % 9
        jobs.append(job)
    return jobs


def streamed(pipeline: Pipeline, job: Job) -> tuple:
    """(prompt ids, tokens) of an event stream; the connection is closed when the client has seen enough."""
    prompt, tokens = [], []
    connection = http.client.HTTPConnection(urlsplit(pipeline.url).netloc, timeout=300)
    try:
        connection.request("POST", job.path, json.dumps(job.body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{job.request['name']}: {response.status} {response.read()[:500]!r}")
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"{job.request['name']}: {event}")
            for choice in event["choices"]:
                prompt = prompt or event.get("prompt_token_ids") or choice.get("prompt_token_ids") or []
                tokens += choice.get("token_ids") or []
            if job.leave_after and len(tokens) >= job.leave_after:
                break
    finally:
        connection.close()
    return prompt, tokens


def ask(pipeline: Pipeline, job: Job) -> tuple:
    if job.body.get("stream"):
        return streamed(pipeline, job)
    answer = pipeline.post(job.path, job.body)
    choice = answer["choices"][0]
    return answer.get("prompt_token_ids") or choice["prompt_token_ids"], choice["token_ids"]


class Watch(threading.Thread):
    """The greatest values of the gauges while requests run: a test of crowding must have been crowded."""

    def __init__(self, pipeline: Pipeline):
        super().__init__()
        self.pipeline, self.most, self.done = pipeline, dict.fromkeys(QUIET, 0.0), threading.Event()

    def run(self):
        while not self.done.wait(0.05):
            now = self.pipeline.metrics()
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()


def at_once(pipeline: Pipeline, jobs: list) -> list:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: ask(pipeline, job), jobs))


def not_quiet(pipeline: Pipeline) -> list:
    """Clients that went away are noticed and cancelled within moments; then nothing may be left."""
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        now = pipeline.metrics()
        left = [f"{name} is {now[name]:g}" for name in QUIET if now[name]]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def different(what: str, jobs: list, expect: list, got: list) -> list:
    failures = []
    for job, (their_prompt, theirs), (prompt, ours) in zip(jobs, expect, got):
        name = f"{what}: {job.request['name']}"
        if prompt != their_prompt:
            failures.append(f"{name}: other prompt ids")
        if job.leave_after:  # how far it got is a matter of timing
            if len(ours) < job.leave_after or theirs[:len(ours)] != ours[:len(theirs)]:
                failures.append(f"{name}, gone after {len(ours)} tokens: {ours}, alone {theirs}")
        elif ours != theirs or len(ours) != job.body["max_tokens"]:
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            failures.append(f"{name}: {len(ours)} of {job.body['max_tokens']} tokens, other than alone from {first} on")
    return failures


def by_transformers(oracle: Oracle, job: Job, base: Path) -> Golden:
    inputs = oracle.prepare(job.request, base)
    tokens, logits = oracle.greedy(inputs, job.body["max_tokens"], mask_padding=True)
    top = logits[:, :oracle.token_limit(True)].topk(2, -1).values
    margin = top[:, 0] - top[:, 1]
    return Golden(job.request["name"], "", [], {"input_ids": inputs["input_ids"][0], "tokens": tokens}, margin.tolist(),
                  (margin / bf16_ulp(top[:, 0])).tolist())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwenctl", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        checkpoint = tiny.write_case(base, "vl-moe-hub", torch.float32)
        jobs = make_jobs(base)
        with Pipeline(args.qwenctl, manifest(checkpoint, stages=STAGES, engine=LIMITS, model=LENGTH)) as pipeline:
            alone = [ask(pipeline, job) for job in jobs]
        with Pipeline(args.qwenctl, manifest(checkpoint, stages=STAGES, engine=LIMITS, model=LENGTH)) as pipeline:
            with Watch(pipeline) as watch:
                crowded = at_once(pipeline, jobs)
            failures += [f"after 64 at once: {left}" for left in not_quiet(pipeline)]
            preempted = pipeline.metrics()["qwen_engine_preemptions_total"]
            again = at_once(pipeline, jobs)
            failures += [f"after 64 more: {left}" for left in not_quiet(pipeline)]
            from_cache = pipeline.metrics()["qwen_prefix_cache_hits_total"]
        failures += different("at once", jobs, alone, crowded) + different("again", jobs, alone, again)
        crowding = watch.most | {"preemptions": preempted, "prompt tokens from the prefix cache": from_cache}
        failures += [f"not crowded enough to show anything: {name} never above 0" for name, most in crowding.items() if not most]
        oracle = Oracle(checkpoint, torch.float32, router_ties="lowest")
        known = [(job, answer) for job, answer in zip(jobs, crowded) if job.greedy and not job.leave_after][::3]
        for job, (prompt, tokens) in known:
            failure, _, _ = compare(by_transformers(oracle, job, base), prompt, tokens, "float32")
            failures += [f"transformers: {failure}"] if failure else []
    gone = sum(bool(job.leave_after) for job in jobs)
    print(f"{'FAIL' if failures else 'ok  '} {len(jobs)} requests at once, {gone} of them gone mid-stream, on {len(STAGES)} "
          f"stages; {len(known)} also against transformers; " + ", ".join(f"{k} {v:g}" for k, v in crowding.items()))
    for failure in failures[:20]:
        print("      ", failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
