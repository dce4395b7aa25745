"""python_export's commands, as a person calls them, on the demo checkpoint; and pipelines out of what they write.

  every command   --help says what it takes
  export          in the four stages of the manifest: validates, and a pipeline out of the stages' folders gives the recorded
                  answers to held-out digits
  quantize        block FP8: validates, and a pipeline on it reads at least as many digits as LOSSY_MIN
  oracle          the answer to a picture is the recorded one
  tiny            a written case validates
demo's own numbers are checked live by python_export/tests/test_demo.py.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from python_export import demo  # noqa: E402
from python_export.__main__ import COMMANDS  # noqa: E402

from served import Pipeline, data_url, manifest  # noqa: E402

CHECKPOINT, PICTURES = ROOT / "docs/examples/digits-checkpoint", ROOT / "docs/examples/digits"
LAYERS = [(0, 3), (3, 5), (5, 7), (7, 8)]
LOSSY_MIN = 0.9  # of the 20 single pictures; bf16 reads them all


def command(*words) -> str:
    done = subprocess.run([sys.executable, "-m", "python_export", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python -m python_export {' '.join(map(str, words))}: {done.returncode}\n{done.stderr[-1500:]}")
    return done.stdout


def answers(qwenctl: str, checkpoint: Path) -> dict:
    """{index of the picture: what a four-stage pipeline on `checkpoint` says about it}"""
    out = {}
    with Pipeline(qwenctl, manifest(checkpoint, stages=LAYERS, model={"maxModelLen": 1024})) as pipeline:
        for picture in sorted(PICTURES.glob("*-*.png")):
            body = pipeline.post("/v1/chat/completions", {
                "model": "parity", "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": data_url(picture)}},
                    {"type": "text", "text": demo.QUESTIONS[0]}]}]})
            out[int(picture.name[:4])] = body["choices"][0]["message"]["content"]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwenctl", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads((PICTURES / "held_out.json").read_text())
    recorded, labels = dict(zip(known["index"], known["answer"])), dict(zip(known["index"], known["label"]))
    failures = []

    def expect(what: str, condition: bool) -> None:
        print("ok  " if condition else "FAIL", what)
        if not condition:
            failures.append(what)

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        helps = {name: command(name, "--help") for name in COMMANDS}
        expect("every command is listed and has its help",
               all(name in command("--help") and f"python_export {name}" in text for name, text in helps.items()))

        command("export", CHECKPOINT, "--out", base / "export", "--layers", ",".join(f"{a}:{b}" for a, b in LAYERS))
        expect("the export validates", not json.loads(command("validate", base / "export"))["missing"])
        got = answers(args.qwenctl, base / "export")
        expect(f"a pipeline out of the export gives transformers' answers to {len(got)} pictures",
               len(got) == 20 and all(recorded[i] == text for i, text in got.items()))

        command("quantize", CHECKPOINT, "--out", base / "fp8", "--block", 16, 16)
        command("validate", base / "fp8")
        got = answers(args.qwenctl, base / "fp8")
        right = sum(text == demo.answer([labels[i]]) for i, text in got.items())
        expect(f"a pipeline on block FP8 reads {right} of {len(got)} pictures", right >= LOSSY_MIN * len(got) > 0)

        picture = min(PICTURES.glob("*-*.png"))
        shutil.copy(picture, base)
        (base / "requests.json").write_text(json.dumps([{"name": "digit", "messages": [{"role": "user", "content": [
            {"type": "image", "image": picture.name}, {"type": "text", "text": demo.QUESTIONS[0]}]}]}]))
        command("oracle", "--model", CHECKPOINT, "--requests", base / "requests.json", "--out", base / "goldens", "--tokens", 16)
        tokens = json.loads((base / "goldens/goldens.json").read_text())["requests"][0]["tokens"]
        processor, _ = demo.load(CHECKPOINT, torch.bfloat16)
        text = processor.tokenizer.decode(tokens).split("<|im_end|>")[0]
        expect(f"the oracle says '{text}'", text == recorded[int(picture.name[:4])])

        written = command("tiny", "--out", base / "tiny", "--case", "moe-each").strip()
        expect("a tiny checkpoint validates", json.loads(command("validate", written))["loaded"] > 0)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
