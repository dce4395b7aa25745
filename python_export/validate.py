"""Does a checkpoint folder hold exactly the tensors that its config.json calls for?

Takes an original checkpoint, an export (stage-KK-of-SS folders) or one stage's folder, and reports
{"loaded", "missing", "mismatched", "extra", "corrupt"} as JSON; exit status 0 only when all but "loaded" are empty. For
exports every tensor's bytes are compared with the sha256 of its manifest. Headers alone are read otherwise.
"""
import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from python_export import checkpoint, shapes
from python_export.checkpoint import CheckpointError
from python_export.export import stage_folder, stages_of

STAGE_FOLDER = re.compile(r"^stage-(\d{2,})-of-(\d{2,})$")


def detect_layout(config: dict, entries: dict) -> str:
    """The expert layout, by the first fused tensor's shape (docs/weights.md); 'each' when experts are separate."""
    text = shapes.text_config(config)
    for key, entry in entries.items():
        if key.endswith("mlp.experts.gate_up_proj"):
            hub = (text["num_experts"], text["hidden_size"], 2 * text["moe_intermediate_size"])
            return "hub" if entry.shape == hub else "saved"
        if ".mlp.experts.0." in key:
            return "each"
    return "hub"


def empty_report() -> dict:
    return {"loaded": 0, "bytes": 0, "missing": [], "mismatched": [], "extra": [], "corrupt": []}


def is_ok(report: dict) -> bool:
    return not (report["missing"] or report["mismatched"] or report["extra"] or report["corrupt"])


def add_scales(expected: dict, entries: dict, config: dict) -> dict:
    """{key: shape} with a scale for every weight that is stored in FP8."""
    quantization = config.get("quantization_config") or shapes.text_config(config).get("quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    out = dict(expected)
    for key, (*front, r, c) in ((k, s) for k, s in expected.items() if len(s) > 1):
        if key in entries and entries[key].dtype == "F8_E4M3":
            out[key + "_scale_inv"] = [*front, -(-r // rows), -(-c // columns)]
    return out


def add_own_head(expected: dict, entries: dict, config: dict) -> dict:
    """Some tied checkpoints hold a head all the same; transformers and the stages load it."""
    if shapes.is_tied(config) and "lm_head.weight" in entries:
        text = shapes.text_config(config)
        return expected | {"lm_head.weight": [text["vocab_size"], text["hidden_size"]]}
    return expected


def compare(expected: dict, entries: dict, report: dict, where: str, config: dict) -> None:
    """Adds what differs between {key: shape} and the files' headers to the report."""
    expected = add_scales(add_own_head(expected, entries, config), entries, config)
    for key, shape in expected.items():
        entry = entries.get(key)
        if entry is None:
            report["missing"].append(f"{where}{key}: missing, expected {shape}")
        elif list(entry.shape) != shape:
            report["mismatched"].append(f"{where}{key}: expected {shape}, found {list(entry.shape)} in {entry.file.name}")
        else:
            report["loaded"] += 1
            report["bytes"] += entry.bytes
    for key, entry in entries.items():
        if key not in expected:
            report["extra"].append(f"{where}{key}: {entry.dtype} {list(entry.shape)} in {entry.file.name}")


def check_digests(directory: Path, entries: dict, report: dict, where: str) -> None:
    manifest = json.loads((directory / "weights_manifest.json").read_text())
    for key in manifest.keys() - entries.keys():
        report["missing"].append(f"{where}{key}: in the manifest, in no file")
    for key, entry in entries.items():
        want = manifest.get(key)
        if want is None:
            report["corrupt"].append(f"{where}{key}: not in the manifest")
            continue
        found = {"shape": list(entry.shape), "dtype": entry.dtype, "bytes": entry.bytes}
        digest = hashlib.sha256()
        for chunk in entry.chunks():
            digest.update(chunk)
        found["sha256"] = digest.hexdigest()
        for field, value in found.items():
            if want.get(field) != value:
                report["corrupt"].append(f"{where}{key}: {field} is {value}, the manifest says {want.get(field)}")


def validate_stage(directory: Path, report: dict, where: str = "") -> None:
    """One stage's folder against hf_config.json and stage.json."""
    config = checkpoint.load_config(directory)
    place = json.loads((directory / "stage.json").read_text())
    begin, end = place["layers"]
    layers = shapes.text_config(config)["num_hidden_layers"]
    # Only this stage's range matters for who loads a tensor: what comes before is stage 0's, what comes after the last's.
    ranges = [r for r in ((0, begin), (begin, end), (end, layers)) if r[0] < r[1]]
    mine = ranges.index((begin, end))
    entries = checkpoint.open_checkpoint(directory)
    everything = shapes.checkpoint_shapes(config, detect_layout(config, entries))
    expected = {k: s for k, s in everything.items() if mine in stages_of(k, ranges, shapes.is_tied(config))}
    compare(expected, entries, report, where, config)
    check_digests(directory, entries, report, where)


def validate(directory: Path) -> dict:
    report = empty_report()
    folders = sorted((int(m[1]), int(m[2]), p) for p in directory.iterdir() if (m := STAGE_FOLDER.match(p.name)))
    if (directory / "weights_manifest.json").is_file():
        validate_stage(directory, report)
    elif folders:
        stages = folders[0][1]
        present = {(n, s) for n, s, _ in folders}
        for n in range(stages):
            if (n, stages) not in present:
                report["missing"].append(f"{stage_folder(n, stages)}: folder missing")
        for n, s, path in folders:
            if s != stages or n >= stages:
                report["extra"].append(f"{path.name}: not part of an export to {stages} stages")
                continue
            validate_stage(path, report, path.name + "/")
    else:
        config = checkpoint.load_config(directory)
        if config.get("model_type") not in shapes.FAMILIES:
            raise CheckpointError(f"model_type '{config.get('model_type')}' is none of {', '.join(shapes.FAMILIES)}")
        entries = checkpoint.open_checkpoint(directory)
        compare(shapes.checkpoint_shapes(config, detect_layout(config, entries)), entries, report, "", config)
    return report


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export validate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args(argv)
    try:
        report = validate(args.directory)
    except (CheckpointError, OSError, KeyError, ValueError) as e:
        print(json.dumps({"error": str(e)}, indent=1))
        print(f"validate: {e}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1))
    return 0 if is_ok(report) else 1
