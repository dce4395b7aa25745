"""The files beside the weights: tokenizer, chat template, preprocessor and generation configs, in the hub's form.

The tokenizer is a real byte-level BPE of the Qwen2 kind (NFC, the Qwen2 pre-tokenizer regex, the 26 added tokens in the
released order) with a vocabulary of a few hundred entries, so that everything that reads the released files reads these.
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Order and 'special' flag of the released tokenizers: ids run on from the end of the BPE vocabulary (151643 there).
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>"]
PLAIN_TOKENS = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

PRETOKENIZER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")

# Mixed scripts, code and white space, so that the merges are not all English; training is deterministic.
CORPUS = """
The quick brown fox jumps over the lazy dog. This is the picture of the thing that is in the user's hand.
user assistant system which digit is this? This is a zero one two three four five six seven eight nine.
What number is in the picture? seconds minutes hours. Don't they're we've I'm you'll he'd.
def main(argv):\n    return [int(x) for x in argv]\n\n{"name": "get_weather", "arguments": {"city": "Paris"}}
\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u8fd9\u662f\u4ec0\u4e48\uff1f Gr\u00fc\u00dfe aus K\u00f6ln. \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 \u3053\u3093\u306b\u3061\u306f
1234567890 3.14159 100% #hashtag @name http://example.org/path?query=1&other=2
"""

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()


def build_tokenizer(bpe_size: int = 320, corpus: str = CORPUS) -> Tokenizer:
    """256 bytes + merges up to `bpe_size`, then the 26 added tokens; fewer when the corpus yields fewer merges."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZER), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN_TOKENS])
    return tokenizer


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def image_sizes(shortest_edge: int, longest_edge: int) -> dict:
    """Pixels per image (not edges, whatever the key says)."""
    return {"shortest_edge": shortest_edge, "longest_edge": longest_edge}


def write_processor_files(directory: Path, tokenizer: Tokenizer, *, vision: bool, hub_form: bool, model_max_length: int,
                          image_size: dict, video_size: dict, generation: dict) -> None:
    """`hub_form`: the template inside tokenizer_config.json and chat_template.json, as released; else chat_template.jinja,
    as transformers 5 saves it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    # vocab.json and merges.txt repeat the model part, as the hub ships them.
    model = json.loads(tokenizer.to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"])
    (directory / "merges.txt").write_text("".join(" ".join(m) + "\n" for m in model["merges"]))
    token_id = tokenizer.token_to_id
    added = {
        str(token_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                           "special": t in SPECIAL_TOKENS} for t in SPECIAL_TOKENS + PLAIN_TOKENS}
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL_TOKENS[1:], "bos_token": None, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": model_max_length,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    if hub_form:
        config["chat_template"] = CHAT_TEMPLATE
        if vision:
            write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    else:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", {
        "bos_token_id": token_id("<|endoftext|>"), "pad_token_id": token_id("<|endoftext|>"),
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")], **generation})
    if vision:
        shared = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
                  "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor"}
        write_json(directory / "preprocessor_config.json",
                   {"size": image_size, **shared, "image_processor_type": "Qwen2VLImageProcessorFast"})
        write_json(directory / "video_preprocessor_config.json",
                   {"size": video_size, **shared, "video_processor_type": "Qwen3VLVideoProcessor"})
