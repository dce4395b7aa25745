"""python -m python_export COMMAND ...: one module a command; each is imported only when asked for (torch costs seconds)."""
import importlib
import sys

COMMANDS = {
    "tiny": "random checkpoints of every family, in both expert layouts, for tests",
    "export": "checkpoint -> per-stage safetensors shards with a manifest",
    "quantize": "bf16 -> block FP8, 128x128, in the hub's form",
    "validate": "an exported or an original directory against its config.json",
    "oracle": "what transformers 5.17.0 computes for a checkpoint and some requests",
    "demo": "train the handwritten-digits checkpoint",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = sys.argv[1:] in (["-h"], ["--help"])
        out = sys.stdout if asked else sys.stderr
        print("usage: python -m python_export COMMAND [options]\n", file=out)
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}", file=out)
        return 0 if asked else 2
    return importlib.import_module(f"python_export.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
