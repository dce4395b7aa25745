"""Random checkpoints of every family for tests: small, seeded, and awkward on purpose.

Shapes keep apart what wrong code confuses: hidden != 2 * moe_intermediate and hidden != moe_intermediate (the two expert
layouts are then told apart by shape), head_dim != hidden / heads, vocabulary larger than the tokenizer (padding logits).
A tensor's values depend on (seed, key) alone: the same model in two layouts, dtypes or file splits holds the same numbers.
"""
import argparse
import hashlib
from pathlib import Path

import torch

from python_export import checkpoint, processor_files, shapes

ST_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16"}
MODEL_MAX_LENGTH = 4096
IMAGE_SIZE = processor_files.image_sizes(4096, 262144)    # 64x64 .. 512x512 pixels: both bounds are within a test's reach
VIDEO_SIZE = processor_files.image_sizes(4096, 393216)    # total over frames


def vl_config(model_type: str, text: dict, vision: dict, tie: bool, tokenizer) -> dict:
    arch = {"qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}[model_type]
    token_id = tokenizer.token_to_id
    return {
        "architectures": [arch], "model_type": model_type,
        "image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"), "vision_end_token_id": token_id("<|vision_end|>"),
        "text_config": {"model_type": model_type + "_text", "rope_theta": 5000000, "tie_word_embeddings": tie, **text},
        "vision_config": {
            "model_type": model_type, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
            "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02, "out_hidden_size": text["hidden_size"], **vision},
        "tie_word_embeddings": tie, "transformers_version": "4.57.0.dev0"}


def text_shape(tokenizer, vocab: int, **sizes) -> dict:
    """The keys that all four families share."""
    token_id = tokenizer.token_to_id
    return {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"), "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": MODEL_MAX_LENGTH, "rms_norm_eps": 1e-6, "use_cache": True, "vocab_size": vocab, **sizes}


def mrope(section: list) -> dict:
    return {"rope_scaling": {"mrope_interleaved": True, "mrope_section": section, "rope_type": "default"}}


VISION_4 = {"depth": 4, "hidden_size": 48, "num_heads": 3, "intermediate_size": 80, "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1, 2]}
VISION_5 = {"depth": 5, "hidden_size": 64, "num_heads": 2, "intermediate_size": 112, "num_position_embeddings": 144,
            "deepstack_visual_indexes": [1, 2, 4]}


def _vl_moe(t):
    return vl_config("qwen3_vl_moe", text_shape(
        t, 384, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], **mrope([6, 5, 5])), VISION_4, False, t)


def _vl_moe_odd(t):  # a dense layer among MoE layers, top-3 of 10, 3 KV heads, untypical sizes
    return vl_config("qwen3_vl_moe", text_shape(
        t, 391, hidden_size=96, intermediate_size=112, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3,
        head_dim=24, num_experts=10, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[3], **mrope([4, 4, 4])), VISION_5, False, t)


def _vl_dense(tie, layers=6):
    def build(t):
        return vl_config("qwen3_vl", text_shape(
            t, 384, hidden_size=80, intermediate_size=208, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=1, head_dim=32, **mrope([6, 5, 5])), VISION_4, tie, t)
    return build


def _moe(norm_topk_prob, sparse_step=1):
    def build(t):
        return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **text_shape(
            t, 384, hidden_size=64, intermediate_size=144, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
            head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, norm_topk_prob=norm_topk_prob,
            decoder_sparse_step=sparse_step, mlp_only_layers=[], rope_theta=1000000, rope_scaling=None, sliding_window=None,
            use_sliding_window=False, tie_word_embeddings=False), "transformers_version": "4.57.0.dev0"}
    return build


def _dense(tie, bias):
    def build(t):
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **text_shape(
            t, 377, hidden_size=72, intermediate_size=184, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, rope_theta=1000000, rope_scaling=None, sliding_window=None, use_sliding_window=False,
            max_window_layers=5, tie_word_embeddings=tie) | {"attention_bias": bias}, "transformers_version": "4.57.0.dev0"}
    return build


# name -> (config builder, expert layout, torch dtype, bytes per file; 0: one file)
CASES = {
    "vl-moe-hub": (_vl_moe, "hub", torch.float32, 0),
    "vl-moe-saved": (_vl_moe, "saved", torch.float32, 400_000),
    "vl-moe-odd": (_vl_moe_odd, "hub", torch.bfloat16, 300_000),
    "vl-dense": (_vl_dense(False), "hub", torch.bfloat16, 500_000),
    "vl-dense-tied": (_vl_dense(True), "hub", torch.float32, 0),
    "moe-each": (_moe(True), "each", torch.float32, 300_000),
    "moe-saved": (_moe(True), "saved", torch.float32, 0),
    "moe-unnormed": (_moe(False, sparse_step=2), "each", torch.bfloat16, 0),
    "dense-tied": (_dense(True, False), "hub", torch.float32, 0),
    "dense-bias": (_dense(False, True), "hub", torch.bfloat16, 0),
}


def make_tensor(seed: int, key: str, shape: list, tied: bool) -> torch.Tensor:
    """fp32 values of one tensor in output-major form. Spread so that logits differ clearly: unit-scale activations
    everywhere, logits of standard deviation about 2."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    g = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    x = torch.randn(shape, generator=g)
    if key.endswith("embed_tokens.weight"):
        return x * (0.3 if tied else 1.0)
    if key == "lm_head.weight":
        return x * (2.0 / shape[-1] ** 0.5)
    if key.endswith("pos_embed.weight"):
        return x * 0.5
    if len(shape) == 1:
        is_norm = "norm" in key and key.endswith("weight")
        return 1.0 + 0.1 * x if is_norm else 0.1 * x
    fan_in = shape[-1] if "patch_embed" not in key else x[0].numel()
    gain = 2.0 if key.endswith("mlp.gate.weight") else 1.2  # a wider router makes exact ties in bf16 rare
    return x * (gain / fan_in ** 0.5)


def make_weights(config: dict, layout: str, seed: int) -> dict:
    """{key: fp32 tensor}; fused experts are drawn per expert, so that all three layouts hold one model."""
    tied = shapes.is_tied(config)
    each = {k: make_tensor(seed, k, s, tied) for k, s in shapes.checkpoint_shapes(config, "each").items()}
    if layout == "each":
        return each
    out = {}
    for key in shapes.checkpoint_shapes(config, layout):
        if ".mlp.experts." not in key:
            out[key] = each[key]
            continue
        base, name = key.rsplit(".", 1)
        count = shapes.text_config(config)["num_experts"]
        if name == "gate_up_proj":
            value = torch.stack([torch.cat([each[f"{base}.{e}.gate_proj.weight"], each[f"{base}.{e}.up_proj.weight"]])
                                 for e in range(count)])
        else:
            value = torch.stack([each[f"{base}.{e}.down_proj.weight"] for e in range(count)])
        out[key] = value.transpose(1, 2).contiguous() if layout == "hub" else value
    return out


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write_weights(directory: Path, weights: dict, bytes_max: int) -> None:
    """One file, or several with an index when bytes_max > 0."""
    items = []
    for key, tensor in weights.items():
        entry = checkpoint.TensorEntry(key, ST_DTYPE[tensor.dtype], tuple(tensor.shape), directory, 0, tensor.nbytes)
        items.append(entry)
    groups = checkpoint.split_files(items, bytes_max) if bytes_max else [items]
    names = checkpoint.file_names(len(groups))
    for name, group in zip(names, groups):
        checkpoint.write_safetensors(
            directory / name, [(e.key, e.dtype, e.shape, e.bytes, [tensor_bytes(weights[e.key])]) for e in group])
    if len(groups) > 1:
        checkpoint.write_index(directory, {e.key: n for n, g in zip(names, groups) for e in g}, sum(e.bytes for e in items))


def saved_config_form(config: dict) -> dict:
    """config.json as transformers 5 writes it: rope_theta and rope_scaling joined in rope_parameters, 'dtype' at the top."""
    import copy
    out = copy.deepcopy(config)
    text = shapes.text_config(out)
    text["rope_parameters"] = {"rope_theta": float(text.pop("rope_theta")),
                               **(text.pop("rope_scaling", None) or {"rope_type": "default"})}
    out["transformers_version"] = "5.17.0"
    return out


def write_case(out: Path, name: str, dtype: torch.dtype | None = None, seed: int = 7) -> Path:
    build, layout, case_dtype, bytes_max = CASES[name]
    dtype = dtype or case_dtype
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = processor_files.build_tokenizer()
    config = build(tokenizer)
    dtype_name = str(dtype).removeprefix("torch.")
    hub_form = layout != "saved"
    if hub_form:
        shapes.text_config(config)["dtype" if shapes.is_vision(config) else "torch_dtype"] = dtype_name  # as released
    else:
        config = saved_config_form(config) | {"dtype": dtype_name}
    processor_files.write_json(directory / "config.json", config)
    processor_files.write_processor_files(
        directory, tokenizer, vision=shapes.is_vision(config), hub_form=hub_form, model_max_length=MODEL_MAX_LENGTH,
        image_size=IMAGE_SIZE, video_size=VIDEO_SIZE,
        generation={"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0})
    write_weights(directory, {k: v.to(dtype) for k, v in make_weights(config, layout, seed).items()}, bytes_max)
    return directory


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_export tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="one folder a case is written under it")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the case's own")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    for name in args.case or CASES:
        print(write_case(args.out, name, dtype, args.seed))
    return 0
