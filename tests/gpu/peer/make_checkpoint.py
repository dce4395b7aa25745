#!/usr/bin/env python3
"""A random checkpoint of a released shape that every engine loads: the same numbers for vLLM, transformers and ours.

usage: make_checkpoint.py --out DIR [--shape tiny|30b|235b] [--family vl|text] [--layers N] [--format bf16|fp8] [--seed N] [--jobs N]
  vl     Qwen3-VL-MoE as on the hub: experts fused and transposed ([E, H, 2I], [E, I, H]), with a vision tower
  text   Qwen3-MoE as on the hub: three matrices an expert, no vision tower
  fp8    block FP8 (128 x 128) of what is quantised in the releases; embeddings, head, router, norms and vision stay bf16
Streams: a worker holds some 16 MiB of a tensor at a time (0.7 GB with torch itself). 30b is 61 GB in bf16 (7 CPU minutes) and 31 in fp8 (10), 235b 471 and 238.

What matters for an honest comparison is that tokens meet all experts about equally often, as in a trained and balanced model:
dummy weights of some engines send them to a few, which then stay in caches, and decode looks faster than it is. So
- a router's rows are orthogonal and of one length: experts differ in direction, not in size;
- embeddings are of variance 1 and the attention's output is damped, so what tokens of a text share stays small;
- every other matrix has variance 1 / inputs, so activations keep their size: they grow as the square root of the depth.
expert_loads() counts it in transformers; tests/gpu/peer/peer_test.py holds a tiny shape to it.
"""
import argparse
import hashlib
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from python_export import checkpoint, processor_files, quantize, shapes  # noqa: E402

DEMO = ROOT / "docs/examples/digits-checkpoint"  # its tokenizer serves: prompts are token ids
CHUNK_ELEMENTS = 4 << 20
BLOCK = (128, 128)
DAMPED = 0.5  # of the attention's output
SHAPES = {  # text_config of the releases, and one for tests: hidden differs from once and twice the experts' width
    "tiny": dict(hidden_size=384, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
                 moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, vocab_size=640),
    "30b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936),
    "235b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
                 moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8, vocab_size=151936),
}
VISION = {
    "tiny": dict(depth=4, hidden_size=48, num_heads=3, intermediate_size=80, num_position_embeddings=256, deepstack_visual_indexes=[0, 1, 2]),
    "30b": dict(depth=27, hidden_size=1152, num_heads=16, intermediate_size=4304, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24]),
}


def make_config(shape: str, family: str, layers: int | None, fp8: bool) -> dict:
    demo = json.loads((DEMO / "config.json").read_text())
    text = SHAPES[shape] | dict(
        attention_bias=False, attention_dropout=0.0, bos_token_id=None, eos_token_id=demo["text_config"]["eos_token_id"], hidden_act="silu",
        initializer_range=0.02, max_position_embeddings=262144, rms_norm_eps=1e-6, use_cache=True, rope_theta=5000000, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[])
    if layers:
        text["num_hidden_layers"] = layers
    if family == "text":
        config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **text, "rope_scaling": None, "sliding_window": None,
                  "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    else:
        section = [24, 20, 20] if text["head_dim"] == 128 else [12, 10, 10]
        vision = VISION.get(shape, VISION["30b"]) | dict(
            model_type="qwen3_vl_moe", in_channels=3, patch_size=16, temporal_patch_size=2, spatial_merge_size=2, hidden_act="gelu_pytorch_tanh",
            initializer_range=0.02, out_hidden_size=text["hidden_size"])
        config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
                  **{key: demo[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")},
                  "text_config": text | {"model_type": "qwen3_vl_moe_text", "dtype": "bfloat16", "tie_word_embeddings": False,
                                         "rope_scaling": {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default"}},
                  "vision_config": vision, "tie_word_embeddings": False}
        if text["num_hidden_layers"] < len(vision["deepstack_visual_indexes"]):
            raise SystemExit(f"make_checkpoint: DeepStack needs {len(vision['deepstack_visual_indexes'])} layers")
    config["transformers_version"] = "4.57.0.dev0"
    if fp8:
        keys = [k for k in checkpoint_shapes(config) if not quantize.QUANTISED.search(k)]
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
            "modules_to_not_convert": sorted(k.removesuffix(".weight") for k in keys if k.endswith(".weight") and "norm" not in k and "embed" not in k)}
    return config


def checkpoint_shapes(config: dict) -> dict:
    return shapes.checkpoint_shapes(config, "hub" if shapes.is_vision(config) else "each")


def generator(seed: int, key: str, part: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}:{part}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def deviation(key: str, shape: list, config: dict) -> float:
    """Of a matrix's entries."""
    if key.endswith(("embed_tokens.weight", "pos_embed.weight")):
        return 1.0
    fan_in = shape[1] if key.endswith(("experts.gate_up_proj", "experts.down_proj")) else torch.Size(shape[1:]).numel()
    gain = {"lm_head.weight": 2.0}.get(key, DAMPED if key.endswith("o_proj.weight") else 1.0)
    return gain / fan_in ** 0.5


def router(seed: int, key: str, experts: int, hidden: int) -> torch.Tensor:
    """(experts, hidden), orthogonal rows of length 2: logits of deviation 2 on normalised activations."""
    rows, _ = torch.linalg.qr(torch.randn(hidden, experts, generator=generator(seed, key, 0), dtype=torch.float64))
    return (2.0 * rows.T).contiguous()


def pieces(seed: int, key: str, shape: list, config: dict):
    """fp32 values of a tensor in its stored order, at most CHUNK_ELEMENTS or one row of blocks at a time: (rows, columns) each."""
    if key.endswith("mlp.gate.weight"):
        yield router(seed, key, *shape).float()
        return
    if len(shape) == 1:
        yield torch.full((1, shape[0]), 0.0 if key.endswith(".bias") else 1.0)
        return
    columns = shape[-1]
    rows = torch.Size(shape[:-1]).numel()
    # A chunk ends at a block's row within its matrix: chunks of whole blocks can be quantised one by one.
    per_matrix = shape[-2]
    limit = max(1, CHUNK_ELEMENTS // columns // BLOCK[0]) * BLOCK[0]
    bound, part = deviation(key, shape, config) * 3 ** 0.5, 0
    for matrix in range(rows // per_matrix):
        for row in range(0, per_matrix, limit):
            size = (min(limit, per_matrix - row), columns)
            yield torch.empty(size).uniform_(-bound, bound, generator=generator(seed, key, part))
            part += 1


def tensor_items(seed: int, key: str, shape: list, config: dict, fp8: bool) -> list:
    """For checkpoint.write_safetensors: the tensor, or its FP8 form and the scales, which are known when that has been drawn."""
    count = torch.Size(shape).numel()
    raw = lambda t: t.contiguous().view(torch.uint8).numpy().tobytes()  # noqa: E731
    if not (fp8 and quantize.QUANTISED.search(key)):
        return [(key, "BF16", shape, 2 * count, (raw(p.to(torch.bfloat16)) for p in pieces(seed, key, shape, config)))]
    scales = []

    def weights():
        for piece in pieces(seed, key, shape, config):
            # What a bf16 checkpoint of the same seed holds, quantised.
            weight, scale = quantize.quantise_matrix(piece.to(torch.bfloat16), *BLOCK, torch.bfloat16)
            scales.append(raw(scale))
            yield raw(weight)

    scale_shape = [*shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1])]
    return [(key, "F8_E4M3", shape, count, weights()),
            (key + "_scale_inv", "BF16", scale_shape, 2 * torch.Size(scale_shape).numel(), (s for s in scales))]


def write_file(out: Path, name: str, keys: list, config: dict, seed: int) -> dict:
    """One shard; returns {key: bytes} of what it holds."""
    torch.set_num_threads(1)
    wanted = checkpoint_shapes(config)
    items = [item for key in keys for item in tensor_items(seed, key, wanted[key], config, "quantization_config" in config)]
    checkpoint.write_safetensors(out / name, items)
    return {item[0]: item[3] for item in items}


def make(out: Path, shape: str = "tiny", family: str = "text", layers: int | None = None, fp8: bool = False, seed: int = 1, jobs: int = 1,
         bytes_max: int = 4 << 30) -> Path:
    config = make_config(shape, family, layers, fp8)
    out.mkdir(parents=True, exist_ok=True)
    entries = [checkpoint.TensorEntry(key, "BF16", tuple(size), out, 0, 2 * torch.Size(size).numel()) for key, size in checkpoint_shapes(config).items()]
    groups = [[entry.key for entry in group] for group in checkpoint.split_files(entries, bytes_max)]
    names = checkpoint.file_names(len(groups))
    arguments = [(out, name, keys, config, seed) for name, keys in zip(names, groups)]
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            held = list(pool.map(write_file, *zip(*arguments)))
    else:
        held = [write_file(*each) for each in arguments]
    if len(groups) > 1:
        checkpoint.write_index(out, {key: name for name, keys in zip(names, held) for key in keys}, sum(sum(keys.values()) for keys in held))
    for name in DEMO.iterdir():
        if name.suffix == ".json" and name.name not in ("config.json", "report.json") and (family == "vl" or "processor" not in name.name):
            shutil.copy(name, out)
    processor_files.write_json(out / "config.json", config)  # last: a folder with a config is complete
    return out


def expert_loads(model, tokens: torch.Tensor) -> torch.Tensor:
    """(MoE layers, experts): how often each expert was chosen for `tokens` (sequences, length), in transformers' `model`."""
    counts, hooks = [], []

    def count(_module, _inputs, output):
        chosen = output[2]
        counts.append(torch.bincount(chosen.flatten(), minlength=model.config.get_text_config().num_experts))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="30b")
    parser.add_argument("--family", choices=["text", "vl"], default="text")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes, a shard of 4 GB of bf16 each")
    args = parser.parse_args()
    make(args.out, args.shape, args.family, args.layers, args.format == "fp8", args.seed, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
