"""What make_checkpoint.py writes, at a tiny shape: transformers loads it whole, its activations stay finite, tokens meet all
experts about equally often, our stage gives the same greedy tokens; and that engines are asked and counted as counting.py says."""
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests/parity")]
import counting  # noqa: E402
import make_checkpoint  # noqa: E402
import stage_parity  # noqa: E402
import vllm_run  # noqa: E402
from python_export import quantize, validate  # noqa: E402

DUMPER = os.environ.get("QP_DUMP_STAGE", str(ROOT / "build/bin/qp_dump_stage"))
STEPS = 24
torch.set_num_threads(1)


def tensors(folder: Path) -> dict:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def load(folder: Path):
    """In float32, so that greedy tokens compare; every tensor of the files must find its place, and every parameter a tensor."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    vision = "vision_config" in json.loads((folder / "config.json").read_text())
    model, info = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not {what: names for what, names in info.items() if names}
    return model.eval()


def prompts(count: int, length: int) -> torch.Tensor:
    return torch.tensor([counting.tokens(seed, length, 512) for seed in range(count)])


def greedy(model, ids: torch.Tensor) -> list:
    """Not generate(): that would keep the tokenizer's end tokens out until the last step."""
    out, cache, step = [], None, ids
    with torch.no_grad():
        for _ in range(STEPS):
            done = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = done.past_key_values, done.logits[:, -1].argmax(-1, keepdim=True)
            out.append(step)
    return torch.cat(out, 1).tolist()


def our_tokens(checkpoint: Path, ids: torch.Tensor, folder: Path) -> list:
    request, out = folder / "request.json", folder / "dump.safetensors"
    request.write_text(json.dumps({"prompts": [{"tokens": row} for row in ids.tolist()]}))
    subprocess.run([DUMPER, "--checkpoint", checkpoint, "--request", request, "--out", out, "--dtype", "float32", "--steps", str(STEPS), "--threads", "1"],
                   check=True, capture_output=True)
    dump = load_file(out)
    return [dump[f"p{p}.tokens"].tolist() for p in range(len(ids))]


def uneven(loads: torch.Tensor) -> float:
    """The busiest expert of any layer against the mean."""
    return float((loads.amax(1) / loads.float().mean(1)).max())


@pytest.mark.parametrize("family", ["text", "vl"])
def test_transformers_and_our_stage_load_it_and_say_the_same(tmp_path, family):
    checkpoint = make_checkpoint.make(tmp_path / "c", "tiny", family)
    assert validate.is_ok(validate.validate(checkpoint))
    model, ids = load(checkpoint), prompts(3, 40)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.isfinite(logits).all() and 1.0 < logits.std() < 4.0
    assert our_tokens(checkpoint, ids, tmp_path) == greedy(model, ids)


def test_tokens_meet_all_experts_about_equally_often(tmp_path):
    model = load(make_checkpoint.make(tmp_path / "c", "tiny", "text", layers=6))
    ids = prompts(8, 512)  # 4,096 tokens of 4 experts out of 16 each: 1,024 an expert, by chance alone give or take 28
    loads = make_checkpoint.expert_loads(model, ids)
    assert loads.shape == (6, 16) and (loads.sum(1) == ids.numel() * 4).all()
    assert uneven(loads) < 1.25, loads
    # The bound can fail: one router's rows of unequal length are enough.
    with torch.no_grad():
        model.model.layers[3].mlp.gate.weight *= torch.linspace(0.3, 1.5, 16)[:, None]
    assert uneven(make_checkpoint.expert_loads(model, ids)) > 1.25


def test_activations_keep_their_size_through_the_depth_of_the_largest_model(tmp_path):
    model = load(make_checkpoint.make(tmp_path / "c", "tiny", "text", layers=94))
    with torch.no_grad():
        hidden = model(input_ids=prompts(1, 48), output_hidden_states=True).hidden_states
    sizes = [float(h.float().pow(2).mean().sqrt()) for h in hidden[:-1]]  # the last one is normalised
    assert sizes[-1] < 10 * sizes[0] and all(b < 1.2 * a for a, b in zip(sizes[10:], sizes[11:])), sizes


@pytest.mark.parametrize("family", ["text", "vl"])
def test_fp8_is_the_bf16_checkpoint_quantised_and_our_stage_reads_it(tmp_path, family, monkeypatch):
    wide = make_checkpoint.make(tmp_path / "wide", "tiny", family)
    fp8 = make_checkpoint.make(tmp_path / "fp8", "tiny", family, fp8=True)
    quantize.quantize(wide, tmp_path / "expected", make_checkpoint.BLOCK)
    expected, written = tensors(tmp_path / "expected"), tensors(fp8)
    assert expected.keys() == written.keys()
    for key, value in expected.items():
        assert written[key].dtype == value.dtype and torch.equal(written[key].view(torch.uint8), value.view(torch.uint8)), key
    kept = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (fp8, tmp_path / "expected")]
    assert kept[0] == kept[1]
    monkeypatch.setattr(stage_parity, "FP8_BLOCK", make_checkpoint.BLOCK)
    model, ids = load(stage_parity.multiplied_out(fp8, tmp_path / "out")), prompts(2, 30)
    assert our_tokens(fp8, ids, tmp_path) == greedy(model, ids)


def test_shards_and_processes_change_nothing_and_another_seed_everything(tmp_path):
    one = tensors(make_checkpoint.make(tmp_path / "one", "tiny"))
    make_checkpoint.make(tmp_path / "many", "tiny", jobs=2, bytes_max=3 << 20)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    many, other = tensors(tmp_path / "many"), tensors(make_checkpoint.make(tmp_path / "other", "tiny", seed=2))
    assert one.keys() == many.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, many[key]), key
        assert torch.equal(value, other[key]) == (value.dim() == 1), key


@pytest.mark.parametrize("shape", ["30b", "235b"])
def test_large_tensors_come_in_pieces_of_16_mib_of_whole_blocks(shape):
    for family in ("text", "vl"):
        config = make_checkpoint.make_config(shape, family, None, True)
        seen = set()
        for key, size in make_checkpoint.checkpoint_shapes(config).items():
            if tuple(size) in seen or key.endswith("mlp.gate.weight"):
                continue
            seen.add(tuple(size))
            first = next(make_checkpoint.pieces(1, key, size, config))
            assert first.numel() <= max(make_checkpoint.CHUNK_ELEMENTS, 128 * first.shape[1]), key
            if len(size) > 1 and quantize.QUANTISED.search(key):
                assert first.shape[0] % 128 == 0, key


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


def test_vllm_is_asked_for_the_same_and_counted_the_same(monkeypatch, capsys):
    clock, asked = FakeClock(), []
    monkeypatch.setattr(counting, "time", clock)

    class LLM:
        def __init__(self, **arguments):
            asked.append(arguments)

        def generate(self, inputs, params, use_tqdm):
            lengths = [len(request["prompt_token_ids"]) for request in inputs]
            asked.append((tuple(lengths), params.max_tokens, params.temperature, params.ignore_eos, inputs[0]["prompt_token_ids"][:8]))
            clock.now += 0.001 * sum(lengths) + 0.01 * (params.max_tokens - 1)  # 1,000 tok/s in, 10 ms a step
            done = [types.SimpleNamespace(token_ids=[1] * params.max_tokens) for _ in inputs]
            return [types.SimpleNamespace(outputs=[one]) for one in done]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **k: types.SimpleNamespace(**k), __version__="0.0"))
    assert vllm_run.main(["DIR", "--name", "x", "--pp", "2", "--load", "4:100:11,2:50:1", "--vocab", "500"]) == 0
    rows = {row["case"]: row["peer"] for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows == {"x.http.clients4.in100.out11.decode": 400.0,  # 4 clients a step of 10 ms
                    "x.http.clients4.in100.out11.total": round(4 * 111 / 0.5, 1), "x.http.clients2.in50.out1.prefill": 1000.0}
    assert asked[0]["model"] == "DIR" and asked[0]["pipeline_parallel_size"] == 2 and asked[0]["enable_prefix_caching"] is False
    runs = asked[3:]  # after two to warm up
    assert [run[:4] for run in runs] == [((100,) * 4, n, 0.0, True) for n in (1, 1, 11, 11, 11)] + [((50,) * 2, 1, 0.0, True)] * 4
    assert len({tuple(run[4]) for run in runs}) == len(runs)  # no prompt comes twice


def test_an_engine_that_ends_early_is_no_figure():
    with pytest.raises(RuntimeError, match="ended early"):
        counting.measure("x", "2:8:4", 0, lambda prompts, output: [output, output - 1], lambda *row: None, 500)
