"""Tiny checkpoints as transformers sees them: it must load every tensor of every case and find none strange."""
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from python_export import processor_files, shapes, tiny


def load(directory, **kwargs):
    config = json.loads((directory / "config.json").read_text())
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    return auto.from_pretrained(directory, output_loading_info=True, **kwargs)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_transformers_loads_every_tensor_in_the_dtype_of_the_config(root, name):
    directory = tiny.write_case(root, name)
    model, info = load(directory)
    assert not any(info.values()), info
    assert model.dtype == tiny.CASES[name][2]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) < model.config.get_text_config().vocab_size  # padding rows exist
    assert tokenizer.convert_ids_to_tokens(len(tokenizer) - 1) == "</think>"


@pytest.mark.parametrize("pair", [("vl-moe-hub", "vl-moe-saved"), ("moe-each", "moe-saved")])
def test_all_expert_layouts_hold_one_model(root, pair):
    a, b = (load(tiny.write_case(root, name))[0].state_dict() for name in pair)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["vl-moe-hub", "vl-moe-odd", "moe-each"])
def test_sizes_keep_apart_what_wrong_code_confuses(root, name):
    text = shapes.text_config(tiny.CASES[name][0](processor_files.build_tokenizer()))
    hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
    assert hidden != 2 * inner and hidden != inner and text["head_dim"] != hidden // text["num_attention_heads"]


def test_tied_checkpoints_have_no_head_of_their_own(root):
    directory = tiny.write_case(root, "vl-dense-tied")
    from safetensors import safe_open
    with safe_open(directory / "model.safetensors", "pt") as f:
        assert "lm_head.weight" not in f.keys()
    model, _ = load(directory)
    assert model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    files = [(tiny.write_case(tmp_path / n, "dense-tied") / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert files[0] == files[1]
    other = tiny.write_case(tmp_path / "c", "dense-tied", seed=8) / "model.safetensors"
    assert other.read_bytes() != files[0]


def test_the_tokenizer_is_of_the_released_kind(root):
    directory = tiny.write_case(root, "vl-moe-hub")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in processor_files.SPECIAL_TOKENS + processor_files.PLAIN_TOKENS]
    assert ids == list(range(ids[0], ids[0] + 26)) and tokenizer.eos_token == "<|im_end|>"
    for text in ["Hello world", "don't  stop\n\n 12345", "\u4f60\u597d Gr\u00fc\u00dfe \u041c\u0438\u0440 \U0001f600", "  tabs\tand\r\nlines "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12345")["input_ids"]) == 5  # one token a digit
    assert tokenizer.decode(tokenizer("e\u0301")["input_ids"]) == "\u00e9"  # NFC


def test_the_processor_expands_an_image_to_its_merged_patches(root):
    import numpy as np
    from PIL import Image
    processor = AutoProcessor.from_pretrained(tiny.write_case(root, "vl-moe-hub"))
    image = Image.fromarray(np.zeros((96, 160, 3), np.uint8))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 10]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 15
    assert processor.tokenizer.decode(inputs["input_ids"][0]).endswith("<|vision_end|>?<|im_end|>\n<|im_start|>assistant\n")
