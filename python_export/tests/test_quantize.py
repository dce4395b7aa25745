"""Block FP8: what is stored multiplies out to the source within half a step, block by block. Oracle: plain loops over blocks."""
import json

import pytest
import torch
from safetensors.torch import load_file

from python_export import quantize, tiny, validate

BLOCK = (8, 8)


def multiply_out(weight: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The definition, with loops."""
    out = torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            out[part] = weight[part].float() * scale[i, j].float()
    return out


def tensors(directory) -> dict:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["vl-moe-hub", "vl-moe-odd", "moe-each", "vl-dense-tied"])
def test_every_block_multiplies_out_to_the_source(tmp_path, name):
    source = tiny.write_case(tmp_path, name)
    quantize.quantize(source, tmp_path / "fp8", BLOCK)
    before, after = tensors(source), tensors(tmp_path / "fp8")
    assert validate.is_ok(validate.validate(tmp_path / "fp8"))
    changed = {k for k in before if after[k].dtype == torch.float8_e4m3fn}
    assert changed and {k + "_scale_inv" for k in changed} == after.keys() - before.keys()
    for key, value in before.items():
        if key not in changed:
            assert torch.equal(after[key], value), key
            continue
        scale = after[key + "_scale_inv"]
        assert scale.dtype == torch.bfloat16
        flat, quantised = value.float().flatten(0, -3) if value.dim() > 2 else value.float()[None], after[key]
        quantised = quantised if value.dim() > 2 else quantised[None]
        scale = scale if value.dim() > 2 else scale[None]
        for e in range(flat.shape[0]):
            back = multiply_out(quantised[e], scale[e], *BLOCK)
            wide = scale[e].float().repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:flat.shape[1], :flat.shape[2]]
            # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, and 2^-10 scales below the smallest normal number.
            allowed = flat[e].abs() / 16 + wide * 2 ** -10
            assert ((back - flat[e]).abs() <= allowed * 1.0001).all(), key
            assert quantised[e].float().abs().max() <= 448 and torch.isfinite(back).all()


def test_router_norms_embeddings_head_and_vision_stay(tmp_path):
    quantize.quantize(tiny.write_case(tmp_path, "vl-moe-odd"), tmp_path / "fp8", BLOCK)
    for key, value in tensors(tmp_path / "fp8").items():
        kept = any(s in key for s in ("norm", "embed", "lm_head", "visual", "mlp.gate.", "_scale_inv"))
        assert kept == (value.dtype != torch.float8_e4m3fn), key
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == list(BLOCK)
    assert "lm_head" in config["modules_to_not_convert"]
    assert "model.language_model.layers.0.mlp.gate" in config["modules_to_not_convert"]


def test_a_block_of_zeros_and_the_largest_value_survive():
    weight = torch.zeros(16, 16)
    weight[9, 9] = -3.3
    quantised, scale = quantize.quantise_matrix(weight, 8, 8, torch.bfloat16)
    assert scale[0, 0] == 1.0 and torch.equal(quantised.float()[:8], torch.zeros(8, 16))
    assert abs(quantised.float()[9, 9] * scale[1, 1].float() + 3.3) <= 3.3 / 16


def test_the_scale_shape_is_one_entry_a_block_rounded_up(tmp_path):
    quantize.quantize(tiny.write_case(tmp_path, "vl-dense"), tmp_path / "fp8")  # hidden 80, intermediate 208: blocks of 128
    found = tensors(tmp_path / "fp8")
    assert found["model.language_model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 1)
    assert found["model.language_model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (1, 2)


def test_infinities_are_refused_by_name(tmp_path):
    from python_export.checkpoint import CheckpointError
    from safetensors.torch import save_file
    source = tiny.write_case(tmp_path, "dense-bias")
    broken = load_file(source / "model.safetensors")
    broken["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(broken, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.layers.2.mlp.up_proj.weight"):
        quantize.quantize(source, tmp_path / "fp8")


def test_a_weight_without_its_scale_is_missing_and_exports_keep_pairs_together(tmp_path):
    from safetensors.torch import save_file
    from python_export import export
    quantize.quantize(tiny.write_case(tmp_path, "vl-moe-hub"), tmp_path / "fp8", BLOCK)
    export.export(tmp_path / "fp8", tmp_path / "out", stages=3)
    assert validate.is_ok(validate.validate(tmp_path / "out"))
    broken = load_file(tmp_path / "fp8" / "model.safetensors")
    scale = broken.pop("model.language_model.layers.1.mlp.experts.down_proj_scale_inv")
    assert scale.shape == (8, 6, 8)
    save_file(broken, tmp_path / "fp8" / "model.safetensors")
    assert validate.validate(tmp_path / "fp8")["missing"] == [
        "model.language_model.layers.1.mlp.experts.down_proj_scale_inv: missing, expected [8, 6, 8]"]
