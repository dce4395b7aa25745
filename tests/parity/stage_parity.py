"""StageModels against transformers, tensor by tensor and token by token.

For every tiny checkpoint named: transformers computes goldens for all requests (python_export/oracle.py); qp_dump_stage gets
the same ids, positions and resized bytes, runs them as one batch and dumps the features of the vision tower, the residual stream
before every layer, the logits and the greedy tokens. Compared with tolerances.json; where the oracle's top two logits tie,
that sequence is compared up to the tie and counted. Runs of each checkpoint:
  one stage            router ties as torch.topk happens to decide them: unmodified transformers
  several stages       the same
  lowest (MoE, bf16)   one stage, our rule for router ties (lowest expert), against transformers with that rule in its router
  exported             one stage, out of the folder that python_export writes for it
  fp8 (with --fp8)     the checkpoint in block FP8 against transformers on the same weights multiplied out
  chunked (fp32)       several stages, prompts in chunks of 7 tokens. Not in bf16: a chunk's GEMMs round otherwise than the
                       whole prompt's, which bf16 shows in the last bit, and then in the router's choice
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # python_export, when run by hand
from python_export import export, quantize, tiny  # noqa: E402
from python_export.oracle import Oracle  # noqa: E402

import parity_requests as cases  # noqa: E402  (this folder's)

STEPS = 64
TOLERANCES = json.loads((Path(__file__).parent / "tolerances.json").read_text())


def write_request(folder: Path, goldens: list) -> Path:
    """qp_dump_stage's form of what the oracle fed its model."""
    prompts = []
    for p, g in enumerate(goldens):
        vision = []
        for j, item in enumerate(g.vision):
            file = f"p{p}.{j}.u8"
            begin, end = item["patches"]
            (folder / file).write_bytes(g.tensors["patches_u8"][begin:end].contiguous().numpy().tobytes())
            vision.append({"grid": item["grid"], "patches": file, "runs": item["runs"]})
        prompts.append({"tokens": g.tensors["input_ids"].tolist(), "positions": g.tensors["position_ids"].T.tolist(),
                        "position_delta": int(g.tensors["rope_delta"][0]), "vision": vision})
    path = folder / "request.json"
    path.write_text(json.dumps({"prompts": prompts}))
    return path


class Comparison:
    """Collects what differs for one checkpoint, dtype and split."""

    def __init__(self, label: str, tolerance: dict):
        self.label, self.tolerance, self.failures = label, tolerance, []
        self.worst = {"vision": 0.0, "hidden": 0.0, "logits": 0.0}
        self.tokens = self.ties = 0

    def close(self, kind: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, relative: bool, limit: float) -> None:
        if ours.shape != theirs.shape:
            self.failures.append(f"{what}: shape {list(ours.shape)}, transformers {list(theirs.shape)}")
            return
        difference = (ours.float() - theirs.float()).abs().max().item()
        if relative:
            difference /= max(theirs.float().abs().max().item(), 1e-6)
        self.worst[kind] = max(self.worst[kind], difference)
        if not difference <= limit:  # also catches NaN
            self.failures.append(f"{what}: differs by {difference:.3g}, allowed {limit:g}")

    def agreed_steps(self, golden, ours: list) -> int:
        """Greedy steps up to which both sides saw the same tokens; a disagreement that is no tie fails."""
        theirs = golden.tensors["tokens"].tolist()
        for step, (a, b) in enumerate(zip(ours, theirs)):
            if a == b:
                continue
            tie = golden.ulps[step] <= self.tolerance["tie_ulps"] if "tie_ulps" in self.tolerance else \
                golden.margins[step] <= self.tolerance["tie_margin"]
            if tie:
                self.ties += 1
            else:
                self.failures.append(f"{golden.name}: token {step} is {a}, transformers {b} "
                                     f"(margin {golden.margins[step]:.4g}, {golden.ulps[step]:.2f} bf16 ulps)")
            return step
        return len(theirs)

    def prompt(self, p: int, golden, dump: dict, layers: int) -> None:
        ours = dump[f"p{p}.tokens"].tolist()
        agreed = self.agreed_steps(golden, ours)
        self.tokens += agreed
        rows = min(agreed + 1, STEPS)  # the logits of the step that went apart are still comparable
        name, t = golden.name, golden.tensors
        self.close("logits", f"{name}: logits", dump[f"p{p}.logits"][:rows], t["step_logits"][:rows], False,
                   self.tolerance["logits_max_abs"])
        known = len(t["input_ids"]) + rows - 1
        for layer in range(layers + 1):
            self.close("hidden", f"{name}: before layer {layer}", dump[f"p{p}.hidden.{layer}"][:known],
                       t[f"hidden.{layer}"][:known], True, self.tolerance["hidden_max_rel"])
        # The oracle joins images, then videos; ours come per input, in prompt order.
        merge = 4
        for j, item in enumerate(golden.vision):
            begin, end = item["patches"][0] // merge, item["patches"][1] // merge
            taps = [t["visual.merged"]] + [t[k] for k in sorted(t) if k.startswith("visual.deepstack.")]
            self.close("vision", f"{name}: features of input {j}", dump[f"p{p}.vision.{j}"],
                       torch.stack([tap[begin:end] for tap in taps]), True, self.tolerance["hidden_max_rel"])


def split_layers(layers: int, vision: bool) -> str:
    """As many stages as DeepStack allows: its three layers stay on stage 0."""
    first = 3 if vision else 1
    return ",".join(f"{a}:{b}" for a, b in [(0, first)] + [(n, min(n + 2, layers)) for n in range(first, layers, 2)])


FP8_BLOCK = (8, 8)  # small, so that tiny matrices have several blocks each way


def multiplied_out(fp8: Path, out: Path) -> Path:
    """The fp8 checkpoint as an fp32 one that transformers loads: weight times its block's scale."""
    tensors = {k: v for file in fp8.glob("*.safetensors") for k, v in load_file(file).items()}
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    for key in [k for k, v in tensors.items() if v.dtype == torch.float8_e4m3fn]:
        wide = tensors.pop(key + "_scale_inv").float()
        for axis, block in ((-2, FP8_BLOCK[0]), (-1, FP8_BLOCK[1])):
            wide = wide.repeat_interleave(block, axis).narrow(axis, 0, tensors[key].shape[axis])
        tensors[key] = tensors[key].float() * wide
    shutil.copytree(fp8, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors")
    return out


def run_case(name: str, dtype: str, dumper: str, folder: Path, fp8: bool = False) -> list:
    checkpoint = tiny.write_case(folder, name, getattr(torch, dtype))
    results = []

    def compare(oracle: Oracle, runs: dict) -> None:
        requests = cases.vision_requests(folder) if oracle.vision else cases.text_requests()
        # Padding ids are fair game here: this compares models, not the sampler's token limit.
        goldens = [oracle.run(r, STEPS, folder, mask_padding=False) for r in requests]
        request = write_request(folder, goldens)
        for label, flags in runs.items():
            comparison = Comparison(f"{name} {dtype} {label}", TOLERANCES[dtype])
            if oracle.ties_decided:
                comparison.label += f" ({oracle.ties_decided} router ties)"
            out = folder / "dump.safetensors"
            command = [dumper, "--request", str(request), "--out", str(out), "--dtype", dtype, "--steps", str(STEPS),
                       "--threads", "1", *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                comparison.failures.append(f"qp_dump_stage exited with {done.returncode}: {done.stderr[-800:]}")
            else:
                dump = load_file(out)
                for p, golden in enumerate(goldens):
                    comparison.prompt(p, golden, dump, len(oracle.decoder.layers))
            results.append(comparison)

    if fp8:
        quantize.quantize(checkpoint, folder / "fp8", FP8_BLOCK)
        compare(Oracle(multiplied_out(folder / "fp8", folder / "wide"), getattr(torch, dtype)),
                {"fp8": ["--checkpoint", str(folder / "fp8"), "--ties", "topk"]})
        return results
    oracle = Oracle(checkpoint, getattr(torch, dtype))
    split = split_layers(len(oracle.decoder.layers), oracle.vision)
    export.export(checkpoint, folder / "export", stages=1)
    source = ["--checkpoint", str(checkpoint)]
    exported = ["--checkpoint", str(folder / "export" / "stage-00-of-01")]
    runs = {"one stage": source + ["--ties", "topk"], f"stages {split}": source + ["--ties", "topk", "--stages", split],
            "exported": exported + ["--ties", "topk"]}
    if dtype == "float32":
        runs["chunked"] = source + ["--ties", "topk", "--stages", split, "--chunk", "7"]
    compare(oracle, runs)
    if dtype == "bfloat16" and hasattr(oracle.model.config.get_text_config(), "num_experts_per_tok"):
        compare(Oracle(checkpoint, getattr(torch, dtype), router_ties="lowest"),
                {"lowest": source + ["--ties", "lowest"]})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qp_dump_stage", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--cases", nargs="+", choices=sorted(tiny.CASES), required=True)
    parser.add_argument("--fp8", action="store_true", help="the checkpoints in block FP8 only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            for c in run_case(name, args.dtype, args.qp_dump_stage, Path(folder), args.fp8):
                worst = ", ".join(f"{k} {v:.2g}" for k, v in c.worst.items())
                print(f"{'FAIL' if c.failures else 'ok  '} {c.label}: {c.tokens} tokens equal, {c.ties} sequences left at a tie; "
                      f"largest differences: {worst}")
                for failure in c.failures[:12]:
                    print(f"       {failure}")
                failed |= bool(c.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
