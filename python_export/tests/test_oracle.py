"""The oracle must be what it says: its taps, positions and inputs agree with each other and with transformers' own outputs."""
import sys
from pathlib import Path

import pytest
import torch

from python_export import tiny
from python_export.oracle import Oracle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "parity"))
import parity_requests  # noqa: E402


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    oracle = Oracle(tiny.write_case(folder, "vl-moe-odd", torch.float32))
    return oracle, {r["name"]: oracle.run(r, 8, folder) for r in parity_requests.vision_requests(folder)}, folder


def test_the_last_hidden_state_gives_the_logits(vision):
    oracle, goldens, _ = vision
    for golden in goldens.values():
        t = golden.tensors
        head = oracle.model.lm_head(oracle.decoder.norm(t[f"hidden.{len(oracle.decoder.layers)}"]))
        n = len(t["input_ids"])
        assert torch.allclose(head[:n], t["logits"], atol=1e-5)          # one pass
        assert torch.allclose(head[n - 1:], t["step_logits"], atol=1e-5)  # pass with a cache, then token by token


def test_hidden_rows_are_the_hidden_states_that_transformers_reports(vision):
    oracle, goldens, folder = vision
    request = next(r for r in parity_requests.vision_requests(folder) if r["name"] == "mixed")
    with torch.no_grad():
        out = oracle.model(**oracle.prepare(request, folder), output_hidden_states=True, use_cache=False)
    t = goldens["mixed"].tensors
    n = len(t["input_ids"])
    visual = (t["input_ids"] == oracle.model.config.image_token_id) | (t["input_ids"] == oracle.model.config.video_token_id)
    for layer in range(len(oracle.decoder.layers)):
        expect = out.hidden_states[layer][0].clone()
        if 1 <= layer <= 3:  # transformers reports a layer's own output: DeepStack is added after it, at visual positions
            expect[visual] += t[f"visual.deepstack.{layer - 1}"]
        assert torch.allclose(t[f"hidden.{layer}"][:n], expect, atol=1e-4), layer


def test_greedy_tokens_are_the_argmax_of_a_pass_over_everything(vision):
    oracle, goldens, _ = vision
    t = goldens["text"].tensors
    ids = torch.cat([t["input_ids"], t["tokens"]])
    with torch.no_grad():
        logits = oracle.model(input_ids=ids[None], use_cache=False).logits[0]
    n = len(t["input_ids"])
    assert logits[n - 1:-1, :len(oracle.tokenizer)].argmax(-1).tolist() == t["tokens"].tolist()


def test_patches_are_the_normalised_pixels_before_normalisation(vision):
    _, goldens, _ = vision
    for name in ("image", "images", "video", "mixed"):
        t = goldens[name].tensors
        assert torch.equal((t["patches_u8"].float() - 127.5) / 127.5, t["pixel_values"]), name


def test_vision_items_cover_every_placeholder_and_patch_once(vision):
    oracle, goldens, _ = vision
    config = oracle.model.config
    for golden in goldens.values():
        ids = golden.tensors["input_ids"].tolist()
        covered = [i for item in golden.vision for first, count in item["runs"] for i in range(first, first + count)]
        assert covered == [i for i, x in enumerate(ids) if x in (config.image_token_id, config.video_token_id)]
        spans = sorted(tuple(item["patches"]) for item in golden.vision)
        assert [a for a, _ in spans] == [0, *[b for _, b in spans]][:len(spans)]
    assert [len(i["runs"]) for i in goldens["mixed"].vision] == [1, 3]  # the image; five frames, all shown
    assert len(goldens["video"].vision[0]["runs"]) == 2  # four sampled frames of nine


def test_positions_follow_the_grid_and_the_delta_continues_them(vision):
    _, goldens, _ = vision
    t = goldens["image"].tensors
    item = goldens["image"].vision[0]
    first, count = item["runs"][0]
    _, h, w = item["grid"]
    expect = torch.stack([torch.full((count,), first), first + torch.arange(h // 2).repeat_interleave(w // 2),
                          first + torch.arange(w // 2).repeat(h // 2)])
    assert torch.equal(t["position_ids"][:, first:first + count], expect)
    after = first + max(h, w) // 2
    assert t["position_ids"][:, first + count].tolist() == [after] * 3
    assert t["position_ids"].max() + 1 == len(t["input_ids"]) + t["rope_delta"][0]


def test_padding_ids_are_never_chosen(vision):
    oracle, goldens, _ = vision
    assert all((g.tensors["tokens"] < len(oracle.tokenizer)).all() for g in goldens.values())
