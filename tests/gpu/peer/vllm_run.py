#!/usr/bin/env python3
"""vLLM on a checkpoint of make_checkpoint.py, counted by counting.py: to be started by a Python that has vLLM.

usage: vllm_run.py CHECKPOINT [--name Qwen3-VL-30B-A3B.stages1] [--tp 1] [--pp 1] [--load 1:2048:129,...]
Limits are those that our own server is measured with. Prints JSON rows ({suite, case, unit, peer, peer_name}).
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import counting  # noqa: E402


def main(argv: list) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--name", default="peer")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--load", default="1:2048:129,8:2048:129,32:1024:129,256:512:129,1:2048:1,8:2048:1,256:1024:256")
    parser.add_argument("--vocab", type=int, default=151_000, help="prompts hold token ids below it")
    args = parser.parse_args(argv)
    import vllm
    # Prompts are token ids and nothing is detokenised; no prefix cache, as no prompt comes twice.
    llm = vllm.LLM(model=args.checkpoint, tensor_parallel_size=args.tp, pipeline_parallel_size=args.pp, dtype="bfloat16", skip_tokenizer_init=True,
                   max_model_len=10240, gpu_memory_utilization=0.92, enable_prefix_caching=False, max_num_seqs=256, max_num_batched_tokens=8192,
                   seed=0, disable_custom_all_reduce=True)

    def generate(prompts, output):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(request.outputs[0].token_ids) for request in done]

    def row(case, unit, value):
        print(json.dumps({"suite": "peer", "case": case, "unit": unit, "peer": value, "peer_name": f"vLLM {vllm.__version__}"}), flush=True)

    for clients in (1, 8):  # graphs and compilation
        generate([counting.tokens(10**9 + client, 128, args.vocab) for client in range(clients)], 8)
    for number, load in enumerate(args.load.split(",")):
        counting.measure(args.name + ".http", load, number, generate, row, args.vocab)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
