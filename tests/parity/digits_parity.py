"""The demo checkpoint on four stages, over HTTP: right answers to pictures that it was never trained on.

Every held-out digit of docs/examples/digits is asked about; the answer must be transformers' (held_out.json, and live for
every tenth picture), and the share of right ones must be at least 97 %.
"""
import argparse
import io
import json
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from python_export import demo  # noqa: E402

from served import Pipeline, manifest  # noqa: E402

ACCURACY_MIN = 0.97


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwenctl", required=True)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, pictures = ROOT / "docs/examples/digits-checkpoint", ROOT / "docs/examples/digits"
    known = json.loads((pictures / "held_out.json").read_text())
    sprite, edge = Image.open(pictures / "held_out.png"), known["picture_edge"]
    sprite.load()  # PIL decodes at the first crop, which the threads below would do all at once

    def cut(n: int) -> Image.Image:
        x, y = n % known["columns"] * edge, n // known["columns"] * edge
        return sprite.crop((x, y, x + edge, y + edge)).convert("RGB")

    def ask(pipeline: Pipeline, n: int) -> str:
        png = io.BytesIO()
        cut(n).save(png, "PNG")
        body = pipeline.post("/v1/chat/completions", {
            "model": "parity", "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64encode(png.getvalue()).decode()}},
                {"type": "text", "text": known["question"]}]}]})
        return body["choices"][0]["message"]["content"]

    with Pipeline(args.qwenctl, manifest(checkpoint, stages=args.stages)) as pipeline:
        with ThreadPoolExecutor(args.concurrency) as pool:
            answers = list(pool.map(lambda n: ask(pipeline, n), range(len(known["index"]))))

    processor, model = demo.load(checkpoint, torch.bfloat16)
    live = {n: demo.generate(processor, model, known["question"], [cut(n)]) for n in range(0, len(answers), 10)}
    failures = [f"picture {known['index'][n]}: '{answers[n]}', transformers '{text}'" for n, text in live.items()
                if answers[n] != text]
    failures += [f"picture {known['index'][n]}: '{a}', recorded '{b}'" for n, (a, b) in
                 enumerate(zip(answers, known["answer"])) if a != b]
    right = sum(a == demo.answer([label]) for a, label in zip(answers, known["label"]))
    share = right / len(answers)
    print(f"{right} of {len(answers)} held-out pictures right ({share:.1%}); {len(failures)} answers differ from transformers'")
    for failure in failures[:20]:
        print("      ", failure)
    return int(bool(failures) or share < ACCURACY_MIN)


if __name__ == "__main__":
    sys.exit(main())
