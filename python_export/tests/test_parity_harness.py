"""The parity harness must be able to fail: dumps with one thing wrong in them are refused, and the message names it."""
import copy
import sys
from pathlib import Path

import pytest
import torch

from python_export.oracle import Golden, bf16_ulp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "parity"))
import concurrent_parity  # noqa: E402
import e2e_parity  # noqa: E402
import split_parity  # noqa: E402
import stage_parity  # noqa: E402

STEPS, PROMPT, LAYERS, VOCAB, HIDDEN = stage_parity.STEPS, 9, 2, 20, 6


@pytest.fixture
def golden():
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(STEPS, VOCAB, generator=g) * 4
    tensors = {"input_ids": torch.arange(PROMPT), "tokens": logits.argmax(-1), "step_logits": logits}
    for layer in range(LAYERS + 1):
        tensors[f"hidden.{layer}"] = torch.randn(PROMPT + STEPS - 1, HIDDEN, generator=g)
    top = logits.topk(2, -1).values
    return Golden("one", "", [], tensors, (top[:, 0] - top[:, 1]).tolist(),
                  ((top[:, 0] - top[:, 1]) / bf16_ulp(top[:, 0])).tolist())


def dump_of(golden) -> dict:
    """What a dumper writes that agrees with the oracle in everything."""
    t = golden.tensors
    return {"p0.tokens": t["tokens"].clone(), "p0.logits": t["step_logits"].clone(),
            **{f"p0.hidden.{n}": t[f"hidden.{n}"].clone() for n in range(LAYERS + 1)}}


def judge(golden, dump, dtype="float32"):
    comparison = stage_parity.Comparison("test", stage_parity.TOLERANCES[dtype])
    comparison.prompt(0, golden, dump, LAYERS)
    return comparison


def test_an_equal_dump_passes(golden):
    for dtype in ("float32", "bfloat16"):
        assert not judge(golden, dump_of(golden), dtype).failures
    assert judge(golden, dump_of(golden)).tokens == STEPS


@pytest.mark.parametrize("key,amount,word", [("p0.logits", 2e-4, "logits"), ("p0.hidden.1", 1e-3, "before layer 1"),
                                             ("p0.logits", float("nan"), "logits")])
def test_one_value_off_fails(golden, key, amount, word):
    dump = dump_of(golden)
    dump[key][3, 2] += amount
    failures = judge(golden, dump).failures
    assert len(failures) == 1 and word in failures[0]


def test_one_bit_fails_in_bfloat16(golden):
    dump = dump_of(golden)
    dump["p0.hidden.2"][0, 0] *= 1 + 2 ** -8
    assert judge(golden, dump, "bfloat16").failures and not judge(golden, dump_of(golden), "bfloat16").failures


def test_another_token_fails_unless_the_oracle_ties_there(golden):
    step = 30
    dump = dump_of(golden)
    dump["p0.tokens"][step] = (dump["p0.tokens"][step] + 1) % VOCAB
    assert "token 30" in judge(golden, dump).failures[0]
    tied = copy.deepcopy(golden)
    tied.margins[step] = 1e-5
    comparison = judge(tied, dump)
    assert not comparison.failures and comparison.ties == 1 and comparison.tokens == step


def test_a_missing_row_fails(golden):
    dump = dump_of(golden)
    dump["p0.hidden.0"] = dump["p0.hidden.0"][:PROMPT]
    assert "shape" in judge(golden, dump).failures[0]


def test_served_answers_are_held_to_prompt_ids_length_and_tokens(golden):
    prompt, tokens = golden.tensors["input_ids"].tolist(), golden.tensors["tokens"].tolist()
    assert e2e_parity.compare(golden, prompt, tokens, "float32") == (None, STEPS, False)
    assert "prompt ids" in e2e_parity.compare(golden, prompt[:-1], tokens, "float32")[0]
    assert "tokens, asked for" in e2e_parity.compare(golden, prompt, tokens[:-1], "float32")[0]
    wrong = tokens[:5] + [(tokens[5] + 1) % VOCAB] + tokens[6:]
    golden.margins[5] = golden.ulps[5] = 3.0
    assert "token 5" in e2e_parity.compare(golden, prompt, wrong, "bfloat16")[0]
    golden.ulps[5] = 0.5
    assert e2e_parity.compare(golden, prompt, wrong, "bfloat16") == (None, 5, True)


def test_every_split_is_every_composition_of_the_layers():
    assert sorted(split_parity.every_split(3)) == ["0:1,1:2,2:3", "0:1,1:3", "0:2,2:3", "0:3"]
    assert len(set(split_parity.every_split(8))) == 2 ** 7 and len(set(split_parity.every_split(8, 3))) == 2 ** 5
    assert list(split_parity.even_splits(3)) == ["0:3", "0:1,1:3", "0:1,1:2,2:3"]


def test_one_bit_or_a_missing_tensor_shows_between_splits(golden):
    dump = dump_of(golden)
    assert split_parity.different_bits(dump, dump_of(golden)) == []
    other = dump_of(golden)
    other["p0.logits"][2, 3] = torch.nextafter(other["p0.logits"][2, 3], torch.tensor(torch.inf))
    assert len(found := split_parity.different_bits(dump, other)) == 1 and "p0.logits" in found[0]
    del other["p0.hidden.1"]
    assert "other tensors" in split_parity.different_bits(dump, other)[0]


def test_another_token_or_a_far_logit_shows_between_chunks(golden):
    dump, other = dump_of(golden), dump_of(golden)
    other["p0.logits"][2, 3] += 5e-5
    assert split_parity.different_answers(dump, other, 1, 1e-4) == []
    assert "logits" in split_parity.different_answers(dump, other, 1, 1e-5)[0]
    other["p0.tokens"][9] += 1
    assert "tokens" in split_parity.different_answers(dump, other, 1, 1e-4)[0]


def test_served_answers_alone_and_in_a_crowd_must_be_the_same():
    body = {"temperature": 0, "max_tokens": 3}
    stays = concurrent_parity.Job({"name": "stays"}, "", body)
    leaves = concurrent_parity.Job({"name": "leaves"}, "", body, leave_after=2)
    differences = lambda job, alone, crowd: concurrent_parity.different("", [job], [([1], alone)], [([1], crowd)])
    assert not differences(stays, [7, 8, 9], [7, 8, 9])
    assert differences(stays, [7, 8, 9], [7, 8, 5]) and differences(stays, [7, 8], [7, 8])  # another token; one too few
    assert not differences(leaves, [7, 8, 9], [7, 8]) and not differences(leaves, [7, 8], [7, 8, 9])
    assert differences(leaves, [7, 8, 9], [7, 5]) and differences(leaves, [7, 8, 9], [7])  # another token; gone too early
    assert concurrent_parity.different("", [stays], [([1], [7, 8, 9])], [([2], [7, 8, 9])])  # another prompt
