"""What docs/numerics.md section 4 promises, bit by bit: a sequence's numbers do not depend on how the work is cut up.

The measure is one stage that takes every prompt whole, all prompts in one batch (stage_parity.py holds that against
transformers). Against it, for every tiny checkpoint named:
  splits      every way to cut its L layers into stages that a pipeline accepts (stage 0 holds the DeepStack layers), and an
              even split for each number of stages from 1 to L, where DeepStack's features may have to travel: equal bits in
              every row of the residual stream and of the logits. In bfloat16 the even ones
  company     every prompt alone, all in reverse order, KV blocks of 5 and of 64 tokens: equal bits
  chunks      prompts in chunks of 1, 2, 3, 5, 7, 13 and 29 tokens, on one stage and on as many as there are layers; and all
              prompts as one group of rows: equal greedy tokens (float32), logits within the tolerance
"""
import argparse
import itertools
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # python_export, when run by hand
from python_export import tiny  # noqa: E402
from python_export.oracle import Oracle  # noqa: E402

import parity_requests as cases  # noqa: E402
from stage_parity import TOLERANCES, write_request  # noqa: E402

STEPS, CHUNK_STEPS = 12, 64
DEEPSTACK_LAYERS = 3
CHUNKS = (1, 2, 3, 5, 7, 13, 29)


def every_split(layers: int, first: int = 1):
    """All ascending ranges that cover [0, layers): a boundary, or none, at each place from `first` on."""
    for cuts in range(layers - first + 1):
        for places in itertools.combinations(range(first, layers), cuts):
            yield as_ranges([0, *places, layers])


def as_ranges(edges: list) -> str:
    return ",".join(f"{a}:{b}" for a, b in zip(edges, edges[1:]))


def even_splits(layers: int):
    for stages in range(1, layers + 1):
        yield as_ranges([layers * s // stages for s in range(stages + 1)])


class Runs:
    """Runs of qp_dump_stage on one checkpoint; each gives {tensor name: tensor}."""

    def __init__(self, dumper: str, checkpoint: Path, dtype: str, folder: Path):
        self.command = [dumper, "--checkpoint", str(checkpoint), "--dtype", dtype, "--threads", "1"]
        self.folder, self.number = folder, itertools.count()

    def __call__(self, request: Path, *flags, steps: int = STEPS) -> dict:
        out = self.folder / f"dump{next(self.number)}"
        done = subprocess.run([*self.command, "--request", str(request), "--out", str(out), "--steps", str(steps), *flags],
                              capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"qp_dump_stage {' '.join(flags)} exited with {done.returncode}: {done.stderr[-800:]}")
        dump = load_file(out)
        out.unlink()
        return dump


def different_bits(expect: dict, got: dict) -> list:
    if expect.keys() != got.keys():
        return [f"other tensors: {sorted(expect.keys() ^ got.keys())[:4]}"]
    return [f"{k} differs by up to {(expect[k].double() - got[k].double()).abs().max():.3g}"
            for k in sorted(expect) if not torch.equal(expect[k], got[k])]


def of_prompt(dump: dict, p: int) -> dict:
    """One prompt's tensors under the names that they have when it is alone."""
    return {"p0" + k.removeprefix(f"p{p}"): v for k, v in dump.items() if k.startswith(f"p{p}.")}


def different_answers(expect: dict, got: dict, prompts: int, limit: float) -> list:
    failures = []
    for p in range(prompts):
        if expect[f"p{p}.tokens"].tolist() != got[f"p{p}.tokens"].tolist():
            failures.append(f"prompt {p}: other greedy tokens")
        elif not (worst := (expect[f"p{p}.logits"] - got[f"p{p}.logits"]).abs().max().item()) <= limit:
            failures.append(f"prompt {p}: logits differ by {worst:.3g}, allowed {limit:g}")
    return failures


def run_case(name: str, dtype: str, dumper: str, folder: Path) -> bool:
    checkpoint = tiny.write_case(folder, name, getattr(torch, dtype))
    oracle = Oracle(checkpoint, getattr(torch, dtype))  # only for what goes in: ids, positions, pixels
    requests = cases.vision_requests(folder) if oracle.vision else cases.text_requests()
    goldens = [oracle.run(r, 1, folder) for r in requests]
    layers = len(oracle.decoder.layers)
    together = write_request(folder, goldens)
    run = Runs(dumper, checkpoint, dtype, folder)
    measure = run(together)
    checks = []  # (what, a function that returns failures)

    def same_bits(expect: dict, request: Path, *flags):
        return lambda: different_bits(expect, run(request, *flags))

    splits = dict.fromkeys(even_splits(layers))
    if dtype == "float32":
        splits |= dict.fromkeys(every_split(layers, DEEPSTACK_LAYERS if oracle.vision else 1))
    for ranges in splits:
        checks.append((f"split {ranges}", same_bits(measure, together, "--stages", ranges)))
    for p, golden in enumerate(goldens):
        alone = folder / f"alone{p}"
        alone.mkdir()
        checks.append((f"{golden.name} alone", same_bits(of_prompt(measure, p), write_request(alone, [golden]))))
    backwards = folder / "backwards"
    backwards.mkdir()
    count = len(goldens)
    turned = {f"p{count - 1 - p}" + k.removeprefix("p0"): v for p in range(count) for k, v in of_prompt(measure, p).items()}
    checks.append(("reverse order", same_bits(turned, write_request(backwards, goldens[::-1]))))
    for tokens in ("5", "64"):
        checks.append((f"blocks of {tokens}", same_bits(measure, together, "--block-tokens", tokens)))
    if dtype == "float32":
        whole = run(together, steps=CHUNK_STEPS)
        limit = TOLERANCES[dtype]["logits_max_abs"]
        ways = [("--chunk", str(chunk), "--stages", ranges) for chunk in CHUNKS
                for ranges in (f"0:{layers}", as_ranges(list(range(layers + 1))))]
        for way in [*ways, ("--grouping", "batch"), ("--grouping", "batch", "--chunk", "7")]:
            checks.append((" ".join(way), lambda way=way: different_answers(
                whole, run(together, *way, steps=CHUNK_STEPS), count, limit)))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda check: (check[0], check[1]()), checks))
    failures = [f"{what}: {failure}" for what, found in results for failure in found]
    print(f"{'FAIL' if failures else 'ok  '} {name} {dtype}: {len(checks)} ways to cut up {count} prompts on {layers} layers")
    for failure in failures[:20]:
        print("      ", failure)
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qp_dump_stage", required=True)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", choices=sorted(tiny.CASES), required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    right = True
    for name in args.cases:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                right &= run_case(name, dtype, args.qp_dump_stage, Path(folder))
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
