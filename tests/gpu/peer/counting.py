"""What is measured, the same for every engine: prompts, lengths, and how tokens a second are counted.

A load is CLIENTS:PROMPT:OUTPUT tokens; all clients ask at once, each with random tokens of its own, so that nothing is found in
a prefix cache and experts are met uniformly (prompts alike but for a few tokens share experts: 8 sequences then decode 14 %
faster). Greedy, exactly OUTPUT tokens. Rows of a load named CASE:
  CASE.prefill   (OUTPUT 1)            prompt tokens a second: the median of three runs after one to warm up
  CASE.decode    (OUTPUT 2 to 256)     tokens after the first, over the time that a run takes longer than one with a single
                                       output token; the shorter of two runs each
  CASE.total                           tokens in and out a second of one run
"""
import itertools
import random
import time

DECODED_MAX = 256 * 200  # tokens of a run beyond which it is measured as a whole only


def tokens(seed: int, count: int, vocab: int) -> list:
    return random.Random(seed).choices(range(vocab), k=count)


def measure(name: str, load: str, number: int, generate, row, vocab: int = 151_000, around_total=lambda run: run()) -> None:
    """`generate(prompts, output)` returns how many tokens each prompt got. `number`: of the load in its list, so that no two
    loads share a prompt. `around_total(run)` calls run() once and may look at the engine before and after."""
    clients, prompt, output = map(int, load.split(":"))
    case, runs = f"{name}.clients{clients}.in{prompt}.out{output}", itertools.count()

    def run(length):
        first = 1000 * (100 * number + next(runs))
        prompts = [tokens(first + client, prompt, vocab) for client in range(clients)]
        start = time.monotonic()
        counts = generate(prompts, length)
        seconds = time.monotonic() - start
        if any(count != length for count in counts) or len(counts) != clients:
            raise RuntimeError(f"{case}: a request ended early: {counts}")
        return seconds

    if output == 1:
        row(case + ".prefill", "tok/s", round(clients * prompt / sorted([run(1) for _ in range(4)][1:])[1], 1))
        return
    if output <= 256 and clients * output <= DECODED_MAX:
        first, rest = min(run(1) for _ in range(2)), min(run(output) for _ in range(2))
        row(case + ".decode", "tok/s", round(clients * (output - 1) / (rest - first), 1))
    seconds = around_total(lambda: run(output))
    row(case + ".total", "tok/s in and out", round(clients * (prompt + output) / seconds, 1))
