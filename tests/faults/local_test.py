#!/usr/bin/env python3
"""Stages of `qwenctl run` killed with SIGKILL while streams are on their way: every stream ends as it does undisturbed, byte for byte, who
asks meanwhile is answered, and the other processes are the ones that they were.

usage: local_test.py QWENCTL
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/parity"), str(ROOT / "tests")]
from digits import DIGITS, Stream, question  # noqa: E402
from served import Pipeline  # noqa: E402

TOKENS, STREAMS = 500, 3


def children(pipeline):
    """{name of the process's place: pid}"""
    found = {}
    for pid in subprocess.run(["ps", "-o", "pid=", "--ppid", str(pipeline.process.pid)], capture_output=True, text=True, check=True).stdout.split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        found["head" if words[0].endswith("qwen-head") else "stage-" + words[words.index("--index") + 1]] = int(pid)
    return found


def main():
    failed = 0

    def check(what, good, details=""):
        nonlocal failed
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}" + ("" if good else f": {details}"), flush=True)

    manifest = yaml.safe_load((ROOT / "docs/examples/digits.yaml").read_text())
    model = manifest["spec"]["model"]
    model["source"]["path"] = str(ROOT / "docs/examples" / model["source"]["path"])
    model["dtype"] = "Float32"  # what a bfloat16 model says when it decides between near-ties depends on the batch
    manifest["spec"]["restart"] = {"backoffSeconds": 1}
    files = sorted(DIGITS.glob("[0-9]*.png"))[:STREAMS]
    with Pipeline(sys.argv[1], manifest) as pipeline:
        undisturbed = [stream.text() for stream in [Stream(pipeline.url, file, TOKENS) for file in files]]
        check(f"{STREAMS} streams of {TOKENS} tokens, undisturbed", all(len(t) > 100 and "broken" not in t for t in undisturbed), undisturbed)
        short = pipeline.post("/v1/chat/completions", question(files[0]))["choices"][0]["message"]["content"]
        for story, lost in (("the first stage", ["stage-0"]), ("the last one", ["stage-3"]), ("two at once", ["stage-1", "stage-2"])):
            before = children(pipeline)
            streams = [Stream(pipeline.url, file, TOKENS) for file in files]
            patience = time.monotonic() + 60
            while min(len(s.pieces) for s in streams) < 20 and time.monotonic() < patience:
                time.sleep(0.01)
            for name in lost:
                os.kill(before[name], signal.SIGKILL)
            far = [len(s.pieces) for s in streams]
            meanwhile = pipeline.post("/v1/chat/completions", question(files[0]), timeout=60)["choices"][0]["message"]["content"]
            check(f"killed: {story}, {far} of {TOKENS} pieces into three streams: each ends as it does undisturbed", [s.text() for s in streams] == undisturbed,
                  [s.text()[-200:] for s in streams])
            check("who asks meanwhile is answered the same", meanwhile == short, (meanwhile, short))
            after = children(pipeline)
            check("nobody else was started again", {n for n in before if before[n] != after.get(n)} == set(lost), (before, after))
    check("it ends with 0", pipeline.process.returncode == 0, pipeline.process.returncode)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
