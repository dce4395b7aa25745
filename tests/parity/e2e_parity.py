"""A whole pipeline over HTTP against transformers: head and stage processes, started by `qwenctl run` from a manifest.

For a tiny checkpoint on S stages every request (text, chat, one image, several, video) is sent at once, greedy, and must come
back with the prompt ids that transformers' processor makes and the tokens that its generate makes. The requests run beside
each other in one batch; transformers runs them one by one.
"""
import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # python_export, when run by hand
from python_export import tiny  # noqa: E402
from python_export.oracle import Oracle  # noqa: E402

import parity_requests as cases  # noqa: E402
from served import Pipeline, manifest, openai_messages  # noqa: E402

TOKENS = 64
TOLERANCES = json.loads((Path(__file__).parent / "tolerances.json").read_text())


def ask(pipeline: Pipeline, request: dict, base: Path) -> tuple:
    """(prompt ids, generated ids) as the server reports them."""
    greedy = {"model": "parity", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True,
              "repetition_penalty": 1.0}
    if "prompt" in request:
        body = pipeline.post("/v1/completions", greedy | {"prompt": request["prompt"]})
        return body["choices"][0]["prompt_token_ids"], body["choices"][0]["token_ids"]
    body = pipeline.post("/v1/chat/completions", greedy | {"messages": openai_messages(request["messages"], base)})
    return body["prompt_token_ids"], body["choices"][0]["token_ids"]


def compare(golden, prompt: list, tokens: list, dtype: str) -> tuple:
    """(failure or None, tokens equal, left at a tie)."""
    if prompt != golden.tensors["input_ids"].tolist():
        return f"{golden.name}: prompt ids {prompt[:40]}..., transformers {golden.tensors['input_ids'].tolist()[:40]}...", 0, False
    theirs = golden.tensors["tokens"].tolist()
    if len(tokens) != len(theirs):
        return f"{golden.name}: {len(tokens)} tokens, asked for {len(theirs)}", 0, False
    for step, (a, b) in enumerate(zip(tokens, theirs)):
        if a != b:
            tie = golden.margins[step] <= TOLERANCES["float32"]["tie_margin"] if dtype == "float32" else \
                golden.ulps[step] <= TOLERANCES["served"]["tie_ulps"]
            if tie:
                return None, step, True
            return (f"{golden.name}: token {step} is {a}, transformers {b} (margin {golden.margins[step]:.4g}, "
                    f"{golden.ulps[step]:.2f} bf16 ulps)"), step, False
    return None, len(theirs), False


def run_case(name: str, dtype: str, stages, qwenctl: str, engine: dict) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        checkpoint = tiny.write_case(base, name, getattr(torch, dtype))
        oracle = Oracle(checkpoint, getattr(torch, dtype), router_ties="lowest")  # the engine's rule
        requests = cases.vision_requests(base) if oracle.vision else cases.text_requests()
        goldens = [oracle.run(r, TOKENS, base) for r in requests]
        with Pipeline(qwenctl, manifest(checkpoint, stages=stages, engine=engine)) as pipeline:
            with ThreadPoolExecutor(len(requests)) as pool:
                answers = list(pool.map(lambda r: ask(pipeline, r, base), requests))
    equal = ties = 0
    failures = []
    for golden, (prompt, tokens) in zip(goldens, answers):
        failure, count, tie = compare(golden, prompt, tokens, dtype)
        equal += count
        ties += tie
        if failure:
            failures.append(failure)
    print(f"{'FAIL' if failures else 'ok  '} {name} {dtype} stages={stages} {engine or ''}: {len(requests)} requests at once, "
          f"{equal} tokens equal, {ties} left at a tie")
    for failure in failures:
        print("      ", failure)
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwenctl", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--cases", nargs="+", choices=sorted(tiny.CASES), required=True)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--layers", help="explicit ranges instead, 0:3,3:8")
    parser.add_argument("--batch-tokens", type=int, help="of one step; small values chunk the prompts (float32 only)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = [tuple(map(int, part.split(":"))) for part in args.layers.split(",")] if args.layers else args.stages
    engine = {"maxBatchTokens": args.batch_tokens, "maxSequences": 16} if args.batch_tokens else {}
    return int(not all([run_case(name, args.dtype, stages, args.qwenctl, engine) for name in args.cases]))


if __name__ == "__main__":
    sys.exit(main())
