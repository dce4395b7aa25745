#!/usr/bin/env python3
"""The whole product on GPUs, over HTTP: the demo checkpoint's answers, a split against one stage, and a bench of a full-size
shape with generated weights. Used by tests/gpu/run; alone:

usage: tests/gpu/serve.py --bin build/bin [--stages 1,2] [--shape Qwen3-VL-30B-A3B] [--clients 1,8,32] [--out FILE]
Prints JSON rows ({suite, case, unit, ours}); exit code 1 when an answer is wrong.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parity"))
import served  # noqa: E402

# text_config of the released models (their config.json)
SHAPES = {
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
    text.update(SHAPES[name], model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], head_dim=128, vocab_size=151936, num_experts=128,
                num_experts_per_tok=8, max_position_embeddings=40960, norm_topk_prob=True)
    text.pop("rope_scaling", None)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default=ROOT / "build/bin", type=Path)
    parser.add_argument("--stages", default="1")
    parser.add_argument("--device", default="Cuda")
    parser.add_argument("--shape", default="")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    qwenctl = str(args.bin / "qwenctl")
    wrong, alone = [], {}  # alone: stages -> tokens of a few prompts, one at a time

    def row(case, unit, value):
        print(json.dumps({"suite": "serve", "case": case, "unit": unit, "ours": value}), flush=True)

    for stages in map(int, args.stages.split(",")):
        right, asked = digits(qwenctl, stages, {"device": args.device})
        row(f"digits.stages{stages}.right", f"of {asked}", right)
        if right < asked:
            wrong.append(f"{asked - right} digits on {stages} stages")
        if not args.shape:
            continue
        with tempfile.TemporaryDirectory() as folder:
            served.READY_SECONDS = 400
            engine = {"device": args.device, "maxSequences": 256, "maxBatchTokens": 8192, "kvCacheTokens": 262144, "threads": 8}
            spec = served.manifest(shape_folder(args.shape, Path(folder)), stages=stages, dtype="BFloat16", engine=engine, model={"maxModelLen": 4096})
            with served.Pipeline(qwenctl, spec, ["--random-weights", "1"]) as pipeline:
                prompt = [(i * 7919) % 500 for i in range(args.prompt)]

                def generate(seed):
                    body = pipeline.post("/v1/completions", {"model": "parity", "prompt": [seed % 500] + prompt, "max_tokens": args.output,
                                                             "temperature": 0, "ignore_eos": True, "return_token_ids": True})
                    return body["choices"][0]["token_ids"], body["usage"]["completion_tokens"]

                alone[stages] = [generate(seed)[0] for seed in range(4)]
                same = sum(a == b for a, b in zip(alone[stages], next(iter(alone.values()))))
                row(f"{args.shape}.stages{stages}.same_tokens_as_first_split", "of 4", same)
                if same < 4:
                    wrong.append(f"{4 - same} answers on {stages} stages differ")
                for clients in map(int, args.clients.split(",")):
                    with ThreadPoolExecutor(clients) as pool:
                        start = time.monotonic()
                        done = list(pool.map(generate, range(clients * 100, clients * 101)))
                        seconds = time.monotonic() - start
                    tokens = sum(count for _, count in done)
                    row(f"{args.shape}.stages{stages}.http.clients{clients}.in{args.prompt}.out{args.output}", "output tok/s", tokens / seconds)
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
