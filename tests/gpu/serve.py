#!/usr/bin/env python3
"""The whole product on GPUs, over HTTP: the demo checkpoint's answers, a split against one stage, and a bench of a full-size
shape with generated weights. Used by tests/gpu/run; alone:

usage: tests/gpu/serve.py --bin build/bin [--stages 1,2] [--shape Qwen3-VL-30B-A3B] [--load 1:1024:128,...] [--soak SECONDS]
  --load   clients:prompt tokens:output tokens; every client sends one request, all at once. Rows `.prefill`, `.decode` and `.total`,
           counted as peer/counting.py says, and time to first token and between tokens as the head's metrics have them
  --checkpoint DIR  its weights (peer/make_checkpoint.py) in place of noise; --shape then only names the rows
  --shape  a name that ends in -FP8 is that shape as a block-FP8 checkpoint; --fp8 expand multiplies such weights out
  --soak   then keeps 64 clients busy for so long (random lengths, a tenth of them hang up) and says whether memory stayed flat
Prints JSON rows ({suite, case, unit, ours}); exit code 1 when an answer is wrong.
"""
import argparse
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/parity"), str(ROOT / "tests/gpu/peer")]
import counting  # noqa: E402
import served  # noqa: E402

# text_config of the released models (their config.json), and one so small that a CPU serves it: to test this script
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, moe_intermediate_size=128),
    "Qwen3-VL-30B-A3B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
                             moe_intermediate_size=768),
    "Qwen3-VL-235B-A22B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4,
                               moe_intermediate_size=1536),
}


def shape_folder(name: str, folder: Path) -> Path:
    """A checkpoint folder without weights: the shape's config with the demo's tokenizer, as a text model."""
    demo = ROOT / "docs/examples/digits-checkpoint"
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / file, folder)
    text = json.loads((demo / "config.json").read_text())["text_config"]
    text.update(SHAPES[name.removesuffix("-FP8")], model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], head_dim=128, vocab_size=151936, num_experts=128,
                num_experts_per_tok=8, max_position_embeddings=40960, norm_topk_prob=True)
    text.pop("rope_scaling", None)
    if name.endswith("-FP8"):
        text["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def digits(qwenctl: str, stages: int, extra: dict) -> tuple[int, int]:
    """(right answers, pictures): each of the 20 committed pictures asked about."""
    pictures = sorted((ROOT / "docs/examples/digits").glob("*-*.png"))

    def ask(pipeline, path):
        body = pipeline.post("/v1/chat/completions", {"model": "parity", "temperature": 0, "max_tokens": 16, "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": served.data_url(path)}},
                                         {"type": "text", "text": "Which digit is this?"}]}]})
        return body["choices"][0]["message"]["content"]

    spec = served.manifest(ROOT / "docs/examples/digits-checkpoint", stages=stages, engine=extra)
    with served.Pipeline(qwenctl, spec) as pipeline, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: ask(pipeline, p), pictures))
    return sum(path.stem.split("-")[1] in answer for path, answer in zip(pictures, answers)), len(pictures)


def resident_mib(pid: int) -> float:
    """RSS of a process and its children."""
    total = 0
    for entry in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        status = Path(f"/proc/{entry}/status").read_text()
        total += int(re.search(r"VmRSS:\s+(\d+)", status).group(1))
    return total / 1024


def gpu_mib() -> float:
    """What is used of the GPUs that the stages may use, by whomever."""
    if shutil.which("nvidia-smi") is None:
        return 0
    mine = ["-i", os.environ["CUDA_VISIBLE_DEVICES"]] if os.environ.get("CUDA_VISIBLE_DEVICES") else []
    lines = subprocess.run(["nvidia-smi", *mine, "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True).stdout
    return sum(map(float, lines.split()))


def soak(pipeline, seconds: float, row, name: str) -> list[str]:
    """64 clients for so long; memory of the second half against the first quarter's end."""
    until, samples, finished, failed = time.monotonic() + seconds, [], [0], []

    def client(seed):
        chance = random.Random(seed)
        while time.monotonic() < until:
            prompt, output = [chance.randrange(500) for _ in range(chance.randrange(8, 2048))], chance.randrange(4, 256)
            body = {"model": "parity", "prompt": prompt, "max_tokens": output, "temperature": 0.8, "seed": seed, "ignore_eos": True}
            try:
                if chance.random() < 0.1:  # asks and hangs up
                    host, port = pipeline.url.removeprefix("http://").split(":")
                    data = json.dumps(body | {"stream": True}).encode()
                    with socket.create_connection((host, int(port)), 30) as connection:
                        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
                        connection.recv(1000)
                else:
                    got = pipeline.post("/v1/completions", body)["usage"]["completion_tokens"]
                    if got != output:
                        failed.append(f"{got} tokens of {output}")
                    finished[0] += 1
            except Exception as error:  # noqa: BLE001 - every failed request counts
                failed.append(str(error)[:200])

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(64)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        time.sleep(min(5.0, seconds / 20))
        samples.append((resident_mib(pipeline.process.pid), gpu_mib()))
    for thread in threads:
        thread.join()
    quarter, half = samples[:len(samples) // 4 + 1], samples[len(samples) // 2:]
    row(f"{name}.soak.requests", "finished", finished[0])
    for index, what in enumerate(("host", "gpu")):
        row(f"{name}.soak.{what}_memory.after_a_quarter", "MiB", round(quarter[-1][index]))
        row(f"{name}.soak.{what}_memory.most_in_second_half", "MiB", round(max(sample[index] for sample in half)))
    wrong = [f"soak: {len(failed)} requests failed, the first: {failed[0]}"] if failed else []
    time.sleep(1)
    for gauge in ("qwen_requests_running", "qwen_requests_waiting"):
        if pipeline.metrics()[gauge] != 0:
            wrong.append(f"soak: {gauge} did not return to 0")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default=ROOT / "build/bin", type=Path)
    parser.add_argument("--stages", default="1")
    parser.add_argument("--device", default="Cuda")
    parser.add_argument("--shape", default="")
    parser.add_argument("--fp8", choices=("auto", "expand", "keep"), default="auto")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--vocab", type=int, default=151_000, help="prompts hold token ids below it")
    parser.add_argument("--load", default="1:2048:129,8:2048:129,32:1024:129,256:512:129,256:1024:256")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of one plan (the peer's figures were taken with 8,192)")
    parser.add_argument("--kv-tokens", type=int, default=335872, help="tokens of the KV cache")
    parser.add_argument("--soak", type=float, default=0)
    parser.add_argument("--skip-digits", action="store_true")
    args = parser.parse_args()
    qwenctl = str(args.bin / "qwenctl")
    os.environ["QWEN_FP8"] = args.fp8  # of every qwen-stage
    wrong, alone = [], {}  # alone: stages -> tokens of a few prompts, one at a time

    def row(case, unit, value):
        print(json.dumps({"suite": "serve", "case": case, "unit": unit, "ours": value}), flush=True)

    for stages in map(int, args.stages.split(",")):
        if not args.skip_digits:
            right, asked = digits(qwenctl, stages, {"device": args.device})
            row(f"digits.stages{stages}.right", f"of {asked}", right)
            if right < asked:
                wrong.append(f"{asked - right} digits on {stages} stages")
        if not args.shape:
            continue
        with tempfile.TemporaryDirectory() as folder:
            served.READY_SECONDS = 400
            engine = {"device": args.device, "maxSequences": 256, "maxBatchTokens": args.batch_tokens, "kvCacheTokens": args.kv_tokens, "threads": 8}
            source, noise = (args.checkpoint, []) if args.checkpoint else (shape_folder(args.shape, Path(folder)), ["--random-weights", "1"])
            spec = served.manifest(source, stages=stages, dtype="BFloat16", engine=engine, model={"maxModelLen": 10240})
            started = time.monotonic()
            with served.Pipeline(qwenctl, spec, noise) as pipeline:
                def generate(tokens, output):
                    body = pipeline.post("/v1/completions", {"model": "parity", "prompt": tokens, "max_tokens": output, "temperature": 0,
                                                             "ignore_eos": True, "return_token_ids": True})
                    return body["choices"][0]["token_ids"], body["usage"]["completion_tokens"]

                generate(counting.tokens(10**9, 8, args.vocab), 1)
                row(f"{args.shape}.stages{stages}.start_to_first_token", "s", round(time.monotonic() - started, 2))  # of all processes
                alone[stages] = [generate(counting.tokens(seed, 1024, args.vocab), 128)[0] for seed in range(4)]
                if len(alone) > 1:
                    same = sum(a == b for a, b in zip(alone[stages], next(iter(alone.values()))))
                    row(f"{args.shape}.stages{stages}.same_tokens_as_first_split", "of 4", same)
                    if same < 4:
                        wrong.append(f"{4 - same} answers on {stages} stages differ")
                for number, load in enumerate(args.load.split(",")):
                    clients, prompt, output = map(int, load.split(":"))
                    name = f"{args.shape}.stages{stages}.http"

                    def all_at_once(prompts, length):
                        with ThreadPoolExecutor(len(prompts)) as pool:
                            return [count for _, count in pool.map(lambda tokens: generate(tokens, length), prompts)]

                    def with_latencies(run):
                        series = {what: f"qwen_{what}_seconds" for what in ("time_to_first_token", "inter_token_latency")}
                        before = pipeline.metrics()
                        seconds, after = run(), pipeline.metrics()
                        for what, s in series.items():
                            total, count = (after[s + end] - before[s + end] for end in ("_sum", "_count"))
                            row(f"{name}.clients{clients}.in{prompt}.out{output}.{what}", "ms", round(total / max(count, 1) * 1e3, 3))
                        return seconds

                    counting.measure(name, load, number, all_at_once, row, args.vocab, with_latencies)
                if args.soak > 0:
                    wrong += soak(pipeline, args.soak, row, f"{args.shape}.stages{stages}")
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
