"""bf16 (or fp32) checkpoint -> block FP8 in the hub's form: about half the bytes, weight ~= fp8 * scale of its 128x128 block.

Quantised: the decoder's attention projections, dense MLPs and experts. Kept: embeddings, lm_head, router gates, norms, the
vision tower. A weight KEY becomes F8_E4M3 and gains KEY_scale_inv, one bf16 scale a block ("inv" is the released name, a
misnomer: it multiplies). The expert layout stays the source's; fused experts get one scale tensor with the experts in front.
Rounding: scale = bf16(amax / 448), rounded up if need be so that nothing exceeds 448; then round to nearest even.
Streams: one matrix is in memory at a time.
"""
import argparse
import copy
import re
import shutil
import sys
from pathlib import Path

import torch

from python_export import checkpoint, export, processor_files, shapes
from python_export.checkpoint import CheckpointError, TensorEntry

FP8_MAX = 448.0  # of e4m3fn
SOURCE_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
QUANTISED = re.compile(
    r"\.layers\.\d+\.(?:self_attn\.[qkvo]_proj\.weight|mlp\.(?:gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(?:gate_up_proj|down_proj)|mlp\.experts\.\d+\.(?:gate|up|down)_proj\.weight)$")


def quantise_matrix(weight: torch.Tensor, rows: int, columns: int, scale_dtype: torch.dtype) -> tuple:
    """(R, C) -> ((R, C) float8_e4m3fn, (ceil(R/rows), ceil(C/columns)) scales)."""
    r, c = weight.shape
    padded = torch.zeros(-(-r // rows) * rows, -(-c // columns) * columns)
    padded[:r, :c] = weight.float()
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    amax = blocks.abs().amax(dim=(1, 3))
    if not torch.isfinite(amax).all():
        raise CheckpointError("holds infinities or NaN")
    scale = torch.where(amax > 0, amax / FP8_MAX, 1.0).to(scale_dtype)
    # bf16 rounds to nearest: where that was down, take the next number up, or the block's largest value would be clipped.
    low = scale.float() * FP8_MAX < amax
    scale = torch.where(low, torch.nextafter(scale, torch.full_like(scale, float("inf"))), scale)
    quantised = (blocks / scale.float()[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantised.view(padded.shape)[:r, :c].contiguous(), scale


def matrices(entry: TensorEntry):
    """The entry's last two axes, one matrix at a time."""
    rows, columns = entry.shape[-2:]
    dtype = SOURCE_DTYPES[entry.dtype]
    for chunk in entry.chunks(rows * columns * dtype.itemsize):
        yield torch.frombuffer(bytearray(chunk), dtype=dtype).view(rows, columns)


class Quantised:
    """The two output tensors of one weight. The weight's chunks must be drawn first: they leave the scales behind."""

    def __init__(self, entry: TensorEntry, block: tuple, scale_dtype: torch.dtype):
        self.entry, self.block, self.scale_dtype, self.scales = entry, block, scale_dtype, []
        *front, rows, columns = entry.shape
        self.scale_shape = (*front, -(-rows // block[0]), -(-columns // block[1]))

    def items(self) -> list:
        elements = self.entry.bytes // checkpoint.DTYPES[self.entry.dtype]
        scale_bytes = self.scale_dtype.itemsize
        for d in self.scale_shape:
            scale_bytes *= d
        name = "BF16" if self.scale_dtype == torch.bfloat16 else "F32"
        return [(self.entry.key, "F8_E4M3", self.entry.shape, elements, self.weight_chunks()),
                (self.entry.key + "_scale_inv", name, self.scale_shape, scale_bytes, self.scale_chunks())]

    def weight_chunks(self):
        for matrix in matrices(self.entry):
            try:
                weight, scale = quantise_matrix(matrix, *self.block, self.scale_dtype)
            except CheckpointError as e:
                raise CheckpointError(f"'{self.entry.key}' {e}") from e
            self.scales.append(scale)
            yield weight.view(torch.uint8).numpy().tobytes()

    def scale_chunks(self):
        for scale in self.scales:
            yield scale.contiguous().view(torch.uint8).numpy().tobytes()


def kept_modules(entries: dict, quantised: set) -> list:
    """Module names for modules_to_not_convert: every linear of the checkpoint that stays as it is."""
    names = {k.removesuffix(".weight") for k, e in entries.items()
             if k not in quantised and k.endswith(".weight") and len(e.shape) == 2 and "embed" not in k}
    return sorted(names)


def quantize(source: Path, out: Path, block: tuple = (128, 128), scale_dtype: torch.dtype = torch.bfloat16,
             bytes_max: int = export.FILE_BYTES_MAX, progress=None) -> None:
    config = copy.deepcopy(checkpoint.load_config(source))
    if config.get("model_type") not in shapes.FAMILIES:
        raise CheckpointError(f"model_type '{config.get('model_type')}' is none of {', '.join(shapes.FAMILIES)}")
    if "quantization_config" in config:
        raise CheckpointError("the source is quantised already")
    entries = checkpoint.open_checkpoint(source)
    chosen = {k for k in entries if QUANTISED.search(k)}
    for key in chosen:
        if entries[key].dtype not in SOURCE_DTYPES:
            raise CheckpointError(f"'{key}' is {entries[key].dtype}; bf16, f16 and f32 can be quantised")
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
        "modules_to_not_convert": kept_modules(entries, chosen)}
    out.mkdir(parents=True, exist_ok=True)
    groups = checkpoint.split_files(list(entries.values()), bytes_max * 2)  # of source bytes: the output is half
    names = checkpoint.file_names(len(groups))
    weight_map, total = {}, 0
    for name, group in zip(names, groups):
        items = []
        for e in group:
            items += Quantised(e, block, scale_dtype).items() if e.key in chosen else [(e.key, e.dtype, e.shape, e.bytes, e.chunks())]
        checkpoint.write_safetensors(out / name, items, progress)
        weight_map |= {item[0]: name for item in items}
        total += sum(item[3] for item in items)
    if len(groups) > 1:
        checkpoint.write_index(out, weight_map, total)
    for name in export.SIDE_FILES:
        if name != "config.json" and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    processor_files.write_json(out / "config.json", config)  # last: a folder with a config is complete


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export quantize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint folder in bf16 or fp32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--block", type=int, nargs=2, default=(128, 128), metavar=("ROWS", "COLUMNS"),
                        help="other than 128 128 is for tests")
    args = parser.parse_args(argv)
    try:
        quantize(args.source, args.out, tuple(args.block), getattr(torch, args.scale_dtype))
    except (CheckpointError, OSError, KeyError) as e:
        print(f"quantize: {e}", file=sys.stderr)
        return 1
    return 0
