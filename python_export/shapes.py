"""Every tensor key of a checkpoint and its shape, from its config.json alone (docs/weights.md is this table in prose).

Families: qwen3_vl_moe, qwen3_vl, qwen3_moe, qwen3. Expert layouts:
  hub     gate_up_proj [E,H,2I], down_proj [E,I,H]: the released Qwen3-VL-MoE files (input-major)
  saved   gate_up_proj [E,2I,H], down_proj [E,H,I]: what transformers 5 writes (output-major)
  each    experts.N.{gate,up,down}_proj.weight: the released Qwen3-MoE files
"""
FAMILIES = ("qwen3_vl_moe", "qwen3_vl", "qwen3_moe", "qwen3")
LAYOUTS = ("hub", "saved", "each")


def is_vision(config: dict) -> bool:
    return config["model_type"] in ("qwen3_vl_moe", "qwen3_vl")


def text_config(config: dict) -> dict:
    return config["text_config"] if is_vision(config) else config


def is_tied(config: dict) -> bool:
    """The top-level key decides; the text sub-config's is ignored for the vision families (its class default is wrong)."""
    return bool(config.get("tie_word_embeddings", False))


def is_moe_layer(config: dict, layer: int) -> bool:
    if not config["model_type"].endswith("_moe"):
        return False
    text = text_config(config)
    return (layer not in (text.get("mlp_only_layers") or []) and text["num_experts"] > 0
            and (layer + 1) % (text.get("decoder_sparse_step") or 1) == 0)


def text_prefix(config: dict) -> str:
    return "model.language_model." if is_vision(config) else "model."


def _mlp(prefix: str, hidden: int, intermediate: int) -> dict:
    return {prefix + "gate_proj.weight": [intermediate, hidden], prefix + "up_proj.weight": [intermediate, hidden],
            prefix + "down_proj.weight": [hidden, intermediate]}


def layer_shapes(config: dict, layer: int, layout: str) -> dict:
    text = text_config(config)
    hidden, heads, kv_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    p = f"{text_prefix(config)}layers.{layer}."
    out = {p + "input_layernorm.weight": [hidden]}
    for name, rows, columns in (("q", heads * head_dim, hidden), ("k", kv_heads * head_dim, hidden),
                                ("v", kv_heads * head_dim, hidden), ("o", hidden, heads * head_dim)):
        out[f"{p}self_attn.{name}_proj.weight"] = [rows, columns]
        if text.get("attention_bias"):
            out[f"{p}self_attn.{name}_proj.bias"] = [rows]
    out[p + "self_attn.q_norm.weight"] = [head_dim]
    out[p + "self_attn.k_norm.weight"] = [head_dim]
    out[p + "post_attention_layernorm.weight"] = [hidden]
    if not is_moe_layer(config, layer):
        return out | _mlp(p + "mlp.", hidden, text["intermediate_size"])
    experts, inner = text["num_experts"], text["moe_intermediate_size"]
    out[p + "mlp.gate.weight"] = [experts, hidden]
    if layout == "each":
        for e in range(experts):
            out |= _mlp(f"{p}mlp.experts.{e}.", hidden, inner)
    else:
        hub = layout == "hub"
        out[p + "mlp.experts.gate_up_proj"] = [experts, hidden, 2 * inner] if hub else [experts, 2 * inner, hidden]
        out[p + "mlp.experts.down_proj"] = [experts, inner, hidden] if hub else [experts, hidden, inner]
    return out


def _linear(prefix: str, rows: int, columns: int) -> dict:
    return {prefix + "weight": [rows, columns], prefix + "bias": [rows]}


def _norm(prefix: str, size: int) -> dict:
    return {prefix + "weight": [size], prefix + "bias": [size]}


def vision_shapes(config: dict) -> dict:
    v = config["vision_config"]
    hidden, inner = v["hidden_size"], v["intermediate_size"]
    merged = hidden * v["spatial_merge_size"] ** 2
    p = "model.visual."
    out = {p + "patch_embed.proj.weight": [hidden, v["in_channels"], v["temporal_patch_size"], v["patch_size"], v["patch_size"]],
           p + "patch_embed.proj.bias": [hidden], p + "pos_embed.weight": [v["num_position_embeddings"], hidden]}
    for n in range(v["depth"]):
        b = f"{p}blocks.{n}."
        out |= _norm(b + "norm1.", hidden) | _norm(b + "norm2.", hidden)
        out |= _linear(b + "attn.qkv.", 3 * hidden, hidden) | _linear(b + "attn.proj.", hidden, hidden)
        out |= _linear(b + "mlp.linear_fc1.", inner, hidden) | _linear(b + "mlp.linear_fc2.", hidden, inner)
    mergers = [(p + "merger.", hidden)]  # normalises each patch, then joins four; the DeepStack mergers join first
    mergers += [(f"{p}deepstack_merger_list.{n}.", merged) for n in range(len(v["deepstack_visual_indexes"]))]
    for m, norm_size in mergers:
        out |= _norm(m + "norm.", norm_size) | _linear(m + "linear_fc1.", merged, merged)
        out |= _linear(m + "linear_fc2.", v["out_hidden_size"], merged)
    return out


def checkpoint_shapes(config: dict, layout: str) -> dict:
    """{key: shape} of everything that the checkpoint must hold, in file order."""
    text = text_config(config)
    vocab, hidden = text["vocab_size"], text["hidden_size"]
    out = {text_prefix(config) + "embed_tokens.weight": [vocab, hidden]}
    for layer in range(text["num_hidden_layers"]):
        out |= layer_shapes(config, layer, layout)
    out[text_prefix(config) + "norm.weight"] = [hidden]
    if is_vision(config):
        out |= vision_shapes(config)
    if not is_tied(config):
        out["lm_head.weight"] = [vocab, hidden]
    return out
