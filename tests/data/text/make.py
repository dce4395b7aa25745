"""Makes tokenizer.json and expected.json of this folder: a byte-level BPE of the Qwen2 kind with 420 entries and the 26
released added tokens, and what transformers 5.17.0 does with it. The C++ unit tests read both and need no Python.

usage, from the source root: PYTHONPATH=.:tests/parity $ORACLE_PYTHON tests/data/text/make.py
"""
import json
import random
from pathlib import Path

from text_corpus import conversations, handwritten_texts, random_text
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from python_export.processor_files import CHAT_TEMPLATE, PLAIN_TOKENS, SPECIAL_TOKENS, build_tokenizer

here = Path(__file__).parent
tokenizer = build_tokenizer(420)
(here / "tokenizer.json").write_text(tokenizer.to_str())
hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

rng = random.Random(7)
texts = handwritten_texts(SPECIAL_TOKENS[:4] + PLAIN_TOKENS[:2]) + [random_text(rng, SPECIAL_TOKENS) for _ in range(60)]
encoded = [{"text": text, "ids": hf(text, add_special_tokens=False)["input_ids"]} for text in texts]
decoded = []
for _ in range(200):
    ids = [rng.randrange(rng.choice([256, tokenizer.get_vocab_size()])) for _ in range(rng.randrange(1, 12))]
    skip = rng.random() < 0.5
    decoded.append({"ids": ids, "skip": skip, "text": tokenizer.decode(ids, skip_special_tokens=skip)})
rendered = []
for context in conversations(rng)[::4]:
    arguments = json.loads(json.dumps(context))
    text = render_jinja_template([arguments.pop("messages")], chat_template=CHAT_TEMPLATE, **arguments)[0][0]
    rendered.append({"context": json.dumps(context, ensure_ascii=False), "text": text})
(here / "expected.json").write_text(json.dumps(
    {"template": CHAT_TEMPLATE, "encoded": encoded, "decoded": decoded, "rendered": rendered}, ensure_ascii=True) + "\n")
