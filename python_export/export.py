"""Checkpoint -> per-stage shards, so that a stage's volume holds only what that stage loads.

  OUT/config.json, tokenizer and processor files      what the head reads
  OUT/tensor_map.json      {"key": {"file": "stage-00-of-04/model.safetensors", "stage": 0}, ...}
  OUT/stage-00-of-04/model.safetensors                or model-NNNNN-of-NNNNN.safetensors + index above 5 GB
  OUT/stage-00-of-04/hf_config.json                   the checkpoint's config.json, unchanged
  OUT/stage-00-of-04/weights_manifest.json            {"key": {"shape", "dtype", "bytes", "sha256"}}
  OUT/stage-00-of-04/stage.json                       {"stage": 0, "stages": 4, "layers": [0, 24]}

Bytes are copied, never interpreted: keys, dtypes and expert layout stay those of the source, and memory holds 16 MiB at a
time whatever the checkpoint's size. Stage 0 gets the vision tower and embed_tokens, the last one norm and lm_head (or, when
tied, a copy of embed_tokens). A tensor that belongs to no stage is an error: nothing is dropped silently.
"""
import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from python_export import checkpoint, shapes
from python_export.checkpoint import CheckpointError

FILE_BYTES_MAX = 5_000_000_000  # the hub's own shard size

# What a head needs beside the weights; copied when present.
SIDE_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
              "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
              "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"]

# Spellings met in exports of other tools: the decoder with or without "model.", lm_head inside the language model.
KEY = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:(?P<layer>layers\.(?P<number>\d+)\.)|(?P<embed>embed_tokens\.)"
                 r"|(?P<norm>norm\.)|(?P<head>lm_head\.)|(?P<visual>visual\.))")


def even_layers(layers: int, stages: int) -> list[tuple[int, int]]:
    """The first layers % stages stages get one more."""
    if not 1 <= stages <= layers:
        raise CheckpointError(f"{stages} stages do not fit {layers} layers")
    out, begin = [], 0
    for n in range(stages):
        end = begin + layers // stages + (n < layers % stages)
        out.append((begin, end))
        begin = end
    return out


def check_deepstack(config: dict, ranges: list) -> None:
    """The features of the vision tower are added after the first layers and do not travel: no pipeline takes another split."""
    first = len(config.get("vision_config", {}).get("deepstack_visual_indexes", []))
    if ranges[0][1] < first:
        raise CheckpointError(f"stage 0 must hold the first {first} layers (DeepStack), not {ranges[0][0]}:{ranges[0][1]}; "
                              "give --layers, or fewer --stages")


def parse_layers(text: str, layers: int) -> list[tuple[int, int]]:
    """"0:24,24:48": contiguous, ascending, covering all layers, none empty."""
    ranges, expect = [], 0
    for n, part in enumerate(text.split(",")):
        match = re.fullmatch(r"(\d+):(\d+)", part.strip())
        if not match:
            raise CheckpointError(f"stage {n}: '{part}' is not BEGIN:END")
        begin, end = int(match[1]), int(match[2])
        if begin != expect or end <= begin:
            raise CheckpointError(f"stage {n}: {part} must begin at {expect} and hold at least one layer")
        ranges.append((begin, end))
        expect = end
    if expect != layers:
        raise CheckpointError(f"the ranges end at {expect}, the model has {layers} layers")
    return ranges


def stages_of(key: str, ranges: list, tied: bool) -> list[int]:
    """The stages that load this tensor; two for tied embeddings on more than one stage."""
    match = KEY.match(key)
    last = len(ranges) - 1
    if match is None:
        raise CheckpointError(f"'{key}' is not part of this model family")
    if match["layer"]:
        for n, (begin, end) in enumerate(ranges):
            if begin <= int(match["number"]) < end:
                return [n]
        raise CheckpointError(f"'{key}': the model has {ranges[-1][1]} layers")
    if match["embed"]:
        return [0, last] if tied and last else [0]
    return [0] if match["visual"] else [last]


def stage_folder(stage: int, stages: int) -> str:
    return f"stage-{stage:02}-of-{stages:02}"


def write_stage(directory: Path, entries: list, config: dict, stage: int, ranges: list, bytes_max: int, progress) -> dict:
    """Returns {key: file name}."""
    directory.mkdir(parents=True, exist_ok=True)
    groups = checkpoint.split_files(entries, bytes_max)
    names = checkpoint.file_names(len(groups))
    manifest, where = {}, {}
    for name, group in zip(names, groups):
        digests = checkpoint.write_safetensors(
            directory / name, [(e.key, e.dtype, e.shape, e.bytes, e.chunks()) for e in group], progress)
        for e in group:
            manifest[e.key] = {"shape": list(e.shape), "dtype": e.dtype, "bytes": e.bytes, "sha256": digests[e.key]}
            where[e.key] = name
    if len(groups) > 1:
        checkpoint.write_index(directory, where, sum(e.bytes for e in entries))
    write_json(directory / "hf_config.json", config)
    write_json(directory / "stage.json", {"stage": stage, "stages": len(ranges), "layers": list(ranges[stage])})
    write_json(directory / "weights_manifest.json", manifest)  # last: a folder with a manifest is complete
    return where


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_weights_pt(directory: Path) -> None:
    """The same tensors as one torch pickle of {key: tensor}, for tools that read only those. Holds a whole stage in memory."""
    import torch
    from safetensors.torch import load_file
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    torch.save(tensors, directory / "weights.pt")


def export(source: Path, out: Path, ranges: list | None = None, stages: int | None = None, *, only: int | None = None,
           weights_pt: bool = False, bytes_max: int = FILE_BYTES_MAX, progress=None) -> dict:
    """Writes OUT; returns the tensor map. `only`: that stage's folder alone (one claim a stage), no tensor_map.json."""
    config = checkpoint.load_config(source)
    if config.get("model_type") not in shapes.FAMILIES:
        raise CheckpointError(f"model_type '{config.get('model_type')}' is none of {', '.join(shapes.FAMILIES)}")
    layers = shapes.text_config(config)["num_hidden_layers"]
    ranges = ranges or even_layers(layers, stages or 1)
    check_deepstack(config, ranges)
    tied = shapes.is_tied(config)
    entries = checkpoint.open_checkpoint(source)
    per_stage = [[] for _ in ranges]
    for entry in entries.values():
        for stage in stages_of(entry.key, ranges, tied):
            per_stage[stage].append(entry)
    out.mkdir(parents=True, exist_ok=True)
    tensor_map = {}
    for stage, mine in enumerate(per_stage):
        if only is not None and stage != only:
            continue
        folder = stage_folder(stage, len(ranges))
        for key, file in write_stage(out / folder, mine, config, stage, ranges, bytes_max, progress).items():
            place = {"file": f"{folder}/{file}", "stage": stage}
            if key in tensor_map:
                tensor_map[key].setdefault("copies", []).append(place)
            else:
                tensor_map[key] = place
        if weights_pt:
            write_weights_pt(out / folder)
    for name in SIDE_FILES:
        if (source / name).is_file() and (source / name).resolve() != (out / name).resolve():
            shutil.copyfile(source / name, out / name)
    if only is None:
        write_json(out / "tensor_map.json", tensor_map)
    return tensor_map


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint folder (config.json + safetensors)")
    parser.add_argument("--out", type=Path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--stages", type=int, help="even split: the first layers %% stages stages get one more "
                                               "(balance: EvenLayers of a manifest)")
    which.add_argument("--layers", help="explicit ranges, e.g. 0:24,24:48,48:71,71:94 ('qwenctl plan' prints balanced ones)")
    parser.add_argument("--stage", type=int, help="write only this stage's folder")
    parser.add_argument("--weights-pt", action="store_true", help="also weights.pt in every stage's folder")
    args = parser.parse_args(argv)
    done = [0, 0]

    def progress(key: str, count: int) -> None:
        done[0] += 1
        done[1] += count
        if sys.stderr.isatty() or done[0] % 200 == 0:
            print(f"\r{done[0]} tensors, {done[1] / 1e9:.2f} GB  {key[-60:]:60}", end="", file=sys.stderr, flush=True)

    try:
        ranges = None
        if args.layers:
            layers = shapes.text_config(checkpoint.load_config(args.source))["num_hidden_layers"]
            ranges = parse_layers(args.layers, layers)
        count = len(ranges) if ranges else args.stages
        if args.stage is not None and not 0 <= args.stage < count:
            raise CheckpointError(f"--stage {args.stage}: there are {count} stages")
        export(args.source, args.out, ranges, args.stages, only=args.stage, weights_pt=args.weights_pt, progress=progress)
    except (CheckpointError, OSError, KeyError) as e:
        print(f"export: {e}", file=sys.stderr)
        return 1
    print(f"\nwrote {done[0]} tensors, {done[1]} bytes to {args.out}", file=sys.stderr)
    return 0
