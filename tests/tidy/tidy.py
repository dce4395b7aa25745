"""A test that lints the repository: allowed includes, dead files, links in documents, words that must not be there.

usage: tidy.py [ROOT]     prints one line per finding; exit status 1 when there is any
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
SOURCE = (".cc", ".h", ".cu", ".cuh", ".proto")
LINES_MAX = {".cu": 900, ".cuh": 900}  # a kernel's body may be long; everything else has a seam well before this
LINES_MAX_DEFAULT = 800

# Where a library's headers may be met (docs/style.md "Where each library lives"). Prefix of the include -> folders.
LIBRARIES = {
    "torch/torch.h": [],
    "ATen/": ["stage/weights/loader.h", "stage/weights/loader.cc", "stage/weights/stream_loader.cc", "stage/weights/fp8.h", "stage/weights/fp8.cc", "stage/ops", "stage/model", "stage/fused",
             "stage/vision", "stage/sampling", "stage/worker", "stage/main.cc", "tests"],
    "c10/": ["stage/weights/loader.h", "stage/weights/guarded.h", "stage/weights/loader.cc", "stage/weights/stream_loader.cc", "stage/ops", "stage/model", "stage/fused",
             "stage/vision", "stage/sampling", "stage/worker", "stage/main.cc", "tests"],
    "torch/": ["stage/ops", "stage/model", "stage/vision", "stage/sampling", "stage/worker", "tests"],
    "nccl.h": ["stage/transport/nccl_edge.cc", "tests"],
    "cuda": ["stage/kernels", "stage/fused", "stage/transport/nccl_edge.cc", "stage/worker", "tests"],
    "cpprest/": ["controller/kube/transport.cc"],
    "spdlog/": ["stage/base/log.cc"],
    "yaml-cpp/": ["controller/ctl", "controller/kube/kubeconfig.cc", "tests"],
    "CLI/": ["stage/main.cc", "stage/head_main.cc", "controller/main.cc", "controller/ctl", "tests"],
    "liburing.h": ["stage/weights/read_queue.cc"],
    "libav": ["stage/vision/preprocess", "tests"],
}


def tracked():
    out = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True)
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).is_file()]


def arrows():
    """{folder: [folders it may include]} out of arrows.txt."""
    allowed = {}
    for line in (ROOT / "tests/tidy/arrows.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            left, right = line.split("->")
            allowed[left.strip()] = right.split()
    return allowed


def room_of(path, rooms):
    """The longest room that is `path` or a folder above it."""
    best = ""
    for room in rooms:
        if (path == room or path.startswith(room + "/")) and len(room) > len(best):
            best = room
    return best


def check_includes(files):
    allowed = arrows()
    for file in files:
        relative = file.relative_to(ROOT).as_posix()
        if file.suffix not in SOURCE or not relative.startswith(("stage/", "controller/", "tests/")):
            continue
        room = room_of(relative, allowed)
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            match = re.match(r'\s*#include\s+(["<])([^">]+)[">]', line)
            if not match:
                continue
            kind, target = match.groups()
            where = f"{relative}:{number}"
            for prefix, folders in LIBRARIES.items():
                if target.startswith(prefix) and kind == "<":
                    # the most specific rule decides: torch/torch.h before torch/
                    if any(target.startswith(p) and len(p) > len(prefix) for p in LIBRARIES):
                        continue
                    if not any(relative == f or relative.startswith(f + "/") for f in folders):
                        yield f"{where}: <{target}> is not met in this room"
            if kind == '"' and target.startswith(("stage/", "controller/", "tests/")):
                to = room_of(target, allowed)
                if "*" in allowed.get(room, []) or to == room:
                    continue
                if to not in allowed.get(room, []):
                    yield f"{where}: {room or 'no room'} may not include {to or target}"


def check_sizes(files):
    for file in files:
        if file.suffix in (".cc", ".h", ".cu", ".cuh", ".py", ".rs"):
            lines = len(file.read_text(errors="replace").splitlines())
            limit = LINES_MAX.get(file.suffix, LINES_MAX_DEFAULT)
            if lines > limit:
                yield f"{file.relative_to(ROOT)}: {lines} lines, more than {limit}: where is the seam?"


def check_dead(files):
    """Every source file is named by some CMakeLists.txt (or globbed: tests), every header is included somewhere."""
    texts = {f: f.read_text(errors="replace") for f in files if f.suffix in SOURCE or f.name == "CMakeLists.txt" or f.suffix == ".cmake"}
    cmake = "\n".join(t for f, t in texts.items() if f.name == "CMakeLists.txt" or f.suffix == ".cmake")
    includes = "\n".join(t for f, t in texts.items() if f.suffix in SOURCE)
    for file in texts:
        relative = file.relative_to(ROOT).as_posix()
        if not relative.startswith(("stage/", "controller/")):
            continue
        if file.suffix in (".cc", ".cu") and not re.search(r"(?<![\w])" + re.escape(file.name), cmake):
            yield f"{relative}: in no CMakeLists.txt"
        if file.suffix in (".h", ".cuh") and f'"{relative}"' not in includes and f'"{file.name}"' not in includes:
            yield f"{relative}: included by nobody"


def check_links(files):
    for file in files:
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(errors="replace")):
            if "://" in target or target.startswith("mailto:"):
                continue
            if not (file.parent / target).exists():
                yield f"{file.relative_to(ROOT)}: link to {target}, which is not there"


def check_words(files):
    """Machine paths, merge markers, and promises in place of code."""
    here = re.escape(f"{ROOT}/")  # whatever machine this is: where its checkout lies is nobody else's business
    patterns = [(re.compile(rf"(?<![\w.]){here}|/root/\."), "a machine's path"),
                (re.compile(r"^(<<<<<<<|>>>>>>>) "), "a merge marker"),
                (re.compile(r"\b(TODO|FIXME|XXX)\b(?!\()"), "a promise in place of code")]
    for file in files:
        relative = file.relative_to(ROOT).as_posix()
        if file.suffix not in SOURCE + (".py", ".sh", ".md", ".yaml", ".cmake", ".rs", ".txt") or relative.startswith("tests/tidy/"):
            continue
        if file.suffix == ".txt" and file.name != "CMakeLists.txt":
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            for pattern, what in patterns:
                if pattern.search(line):
                    yield f"{relative}:{number}: {what}"


def main():
    files = tracked()
    findings = [f for check in (check_includes, check_sizes, check_dead, check_links, check_words) for f in check(files)]
    for finding in findings:
        print(finding)
    print(f"tidy: {len(files)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
