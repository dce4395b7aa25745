"""export and validate: what goes in comes out by name and bit, and what is wrong is named.

The oracle of the round trip is the safetensors package (its own reader), never python_export's.
"""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from python_export import checkpoint, export, shapes, tiny, validate

CASES = ["vl-moe-hub", "vl-moe-saved", "vl-dense-tied", "moe-each", "dense-bias"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.write_case(root, name) for name in CASES}


def all_tensors(directory) -> dict:
    """By the safetensors package; a key found twice must hold the same values."""
    out = {}
    for file in sorted(directory.rglob("*.safetensors")):
        for key, value in load_file(file).items():
            assert key not in out or torch.equal(out[key], value), key
            out[key] = value
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_tensor_comes_out_with_the_bits_it_went_in(checkpoints, tmp_path, name, stages):
    layers = shapes.text_config(checkpoint.load_config(checkpoints[name]))["num_hidden_layers"]
    first = min(3, layers - stages + 1)  # what DeepStack asks of stage 0
    export.export(checkpoints[name], tmp_path,
                  ranges=[(0, first)] + [(first + a, first + b) for a, b in export.even_layers(layers - first, stages - 1)]
                  if stages > 1 else [(0, layers)])
    before, after = all_tensors(checkpoints[name]), all_tensors(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    report = validate.validate(tmp_path)
    assert validate.is_ok(report), report


def test_each_stage_holds_only_its_own_layers_and_the_ends_their_extras(checkpoints, tmp_path):
    export.export(checkpoints["vl-moe-hub"], tmp_path, ranges=[(0, 3), (3, 5), (5, 8)])
    keys = []
    for n in range(3):
        with safe_open(tmp_path / f"stage-{n:02}-of-03" / "model.safetensors", "pt") as f:
            keys.append(set(f.keys()))
    layer = "model.language_model.layers.{}.input_layernorm.weight"
    assert [[n for n in range(8) if layer.format(n) in k] for k in keys] == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert "model.language_model.embed_tokens.weight" in keys[0] and "model.visual.pos_embed.weight" in keys[0]
    assert "lm_head.weight" in keys[2] and "model.language_model.norm.weight" in keys[2]
    assert not any("visual" in k or "embed_tokens" in k for k in keys[1] | keys[2])


def test_tied_embeddings_are_copied_to_the_last_stage(checkpoints, tmp_path):
    tensor_map = export.export(checkpoints["vl-dense-tied"], tmp_path, ranges=[(0, 3), (3, 5), (5, 6)])
    key = "model.language_model.embed_tokens.weight"
    assert tensor_map[key] == {"file": "stage-00-of-03/model.safetensors", "stage": 0,
                               "copies": [{"file": "stage-02-of-03/model.safetensors", "stage": 2}]}
    with safe_open(tmp_path / "stage-02-of-03" / "model.safetensors", "pt") as f:
        assert key in f.keys()
    with safe_open(tmp_path / "stage-01-of-03" / "model.safetensors", "pt") as f:
        assert key not in f.keys()


def test_the_tensor_map_names_the_file_that_holds_each_tensor(checkpoints, tmp_path):
    export.export(checkpoints["moe-each"], tmp_path, stages=2, bytes_max=200_000)
    tensor_map = json.loads((tmp_path / "tensor_map.json").read_text())
    assert len({place["file"] for place in tensor_map.values()}) > 4  # the size limit split both stages
    for key, place in tensor_map.items():
        with safe_open(tmp_path / place["file"], "pt") as f:
            assert key in f.keys()
    assert validate.is_ok(validate.validate(tmp_path))


def test_the_manifest_holds_the_digest_of_the_tensor_bytes(checkpoints, tmp_path):
    import hashlib
    export.export(checkpoints["dense-bias"], tmp_path, stages=1)
    manifest = json.loads((tmp_path / "stage-00-of-01" / "weights_manifest.json").read_text())
    for key, value in load_file(tmp_path / "stage-00-of-01" / "model.safetensors").items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        assert manifest[key] == {"shape": list(value.shape), "dtype": "BF16", "bytes": len(raw),
                                 "sha256": hashlib.sha256(raw).hexdigest()}


def test_one_flipped_byte_is_found_and_named(checkpoints, tmp_path):
    export.export(checkpoints["vl-moe-hub"], tmp_path, stages=2)
    file = tmp_path / "stage-01-of-02" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # in the last tensor of the file
    file.write_bytes(data)
    report = validate.validate(tmp_path)
    last = max(checkpoint.read_header(file), key=lambda e: e.offset).key
    assert not validate.is_ok(report)
    assert len(report["corrupt"]) == 1 and last in report["corrupt"][0] and "sha256" in report["corrupt"][0]


def rewrite(directory, change) -> None:
    """Changes the tensors of a one-file checkpoint with the safetensors package."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_mismatched_and_extra_tensors_are_named_with_shapes(checkpoints, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["vl-moe-hub"], broken)

    def change(tensors):
        del tensors["model.language_model.layers.4.self_attn.q_norm.weight"]
        tensors["model.language_model.norm.weight"] = torch.ones(65)
        tensors["model.language_model.layers.8.input_layernorm.weight"] = torch.ones(64)

    rewrite(broken, change)
    report = validate.validate(broken)
    assert report["missing"] == ["model.language_model.layers.4.self_attn.q_norm.weight: missing, expected [32]"]
    assert report["mismatched"] == ["model.language_model.norm.weight: expected [64], found [65] in model.safetensors"]
    assert report["extra"] == ["model.language_model.layers.8.input_layernorm.weight: F32 [64] in model.safetensors"]


def test_a_tied_checkpoint_may_hold_a_head_of_its_own(checkpoints, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(checkpoints["vl-dense-tied"], own)
    rewrite(own, lambda tensors: tensors.update({"lm_head.weight": torch.ones(384, 80)}))
    assert validate.is_ok(validate.validate(own))
    export.export(own, tmp_path / "out", stages=2)
    assert validate.is_ok(validate.validate(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "stage-01-of-02" / "model.safetensors", "pt") as f:
        assert "lm_head.weight" in f.keys()


def test_a_lost_stage_folder_is_missing(checkpoints, tmp_path):
    export.export(checkpoints["dense-bias"], tmp_path, stages=3)
    shutil.rmtree(tmp_path / "stage-01-of-03")
    assert validate.validate(tmp_path)["missing"] == ["stage-01-of-03: folder missing"]


def test_a_truncated_file_is_refused_before_anything_is_read(checkpoints, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["vl-dense-tied"], broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="model.safetensors"):
        validate.validate(broken)


@pytest.mark.parametrize("text,words", [("0:3,4:8", "stage 1"), ("0:3,3:3,3:8", "stage 1"), ("0:3,3:7", "end at 7"),
                                        ("1:8", "stage 0"), ("0-8", "BEGIN:END")])
def test_layer_ranges_with_gaps_are_refused(text, words):
    with pytest.raises(checkpoint.CheckpointError, match=words):
        export.parse_layers(text, 8)


def test_the_even_split_gives_the_first_stages_the_extra_layer():
    # The shard table of the 235B model: 94 layers.
    assert export.even_layers(94, 4) == [(0, 24), (24, 48), (48, 71), (71, 94)]
    assert [b - a for a, b in export.even_layers(94, 8)] == [12] * 6 + [11] * 2


def test_a_split_that_no_pipeline_takes_is_refused():
    config = {"vision_config": {"deepstack_visual_indexes": [8, 16, 24]}}
    export.check_deepstack(config, [(0, 3), (3, 8)])
    export.check_deepstack({}, [(0, 1), (1, 2)])  # text alone: any split
    with pytest.raises(checkpoint.CheckpointError, match="first 3 layers .DeepStack., not 0:2"):
        export.check_deepstack(config, [(0, 2), (2, 8)])


def test_a_key_of_another_family_stops_the_export(checkpoints, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["dense-bias"], broken)
    rewrite(broken, lambda tensors: tensors.update({"model.mtp.proj.weight": torch.ones(2, 2)}))
    with pytest.raises(checkpoint.CheckpointError, match="model.mtp.proj.weight"):
        export.export(broken, tmp_path / "out", stages=2)


def test_weights_pt_holds_the_same_tensors(checkpoints, tmp_path):
    export.export(checkpoints["dense-bias"], tmp_path, stages=2, weights_pt=True)
    for n in range(2):
        folder = tmp_path / f"stage-{n:02}-of-02"
        pickled, stored = torch.load(folder / "weights.pt", weights_only=True), load_file(folder / "model.safetensors")
        assert pickled.keys() == stored.keys() and all(torch.equal(pickled[k], stored[k]) for k in stored)


def test_one_stage_alone_can_be_exported_and_validated(checkpoints, tmp_path):
    export.export(checkpoints["vl-moe-saved"], tmp_path, stages=2, only=1)
    assert not (tmp_path / "stage-00-of-02").exists()
    assert validate.is_ok(validate.validate(tmp_path / "stage-01-of-02"))


def test_the_command_line_reports_failure_in_its_exit_status(checkpoints, tmp_path):
    run = lambda *args: subprocess.run([sys.executable, "-m", "python_export", *map(str, args)], capture_output=True, text=True)
    assert run("export", checkpoints["dense-bias"], "--out", tmp_path, "--layers", "0:2,2:5").returncode == 0
    done = run("validate", tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["loaded"] == len(
        shapes.checkpoint_shapes(checkpoint.load_config(checkpoints["dense-bias"]), "hub"))
    (tmp_path / "stage-00-of-02" / "model.safetensors").unlink()
    assert run("validate", tmp_path).returncode == 1
    assert run("export", checkpoints["dense-bias"], "--out", tmp_path, "--layers", "0:2").returncode == 1
