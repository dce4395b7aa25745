#!/usr/bin/env python3
"""The images, without a container engine: what the Dockerfiles say, and the root file systems that dockerfiles/rootfs.sh makes out of
this build, with the programs running in them as the user of the image, from a directory tree that is not theirs to write.

  images_test.py HEAD STAGE TORCH_SITE [CONTROLLER]
"""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from helm_chart import ROOT, Checks, run, tool

DOCKERFILES = sorted((ROOT / "dockerfiles").glob("*.Dockerfile"))
MIB_MAX = {"qwen-controller": 60, "qwen-head": 250, "qwen-stage": 800}  # unpacked
EMPTY = {"controller", "head", "stage"}  # images that begin empty


def instructions(path):
    """[(instruction, rest)], lines joined, comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]


def check_dockerfile(checks, path, tracked):
    name, lines = path.name.split(".")[0], instructions(path)
    froms = [rest.split() for what, rest in lines if what == "FROM"]
    bases = {rest.split("=", 1)[1] for what, rest in lines if what == "ARG" and rest.startswith("BASE=")}
    checks.that(f"{name}: its base is pinned by digest", len(bases) == 1 and re.fullmatch(r"[\w./:-]+@sha256:[0-9a-f]{64}", next(iter(bases)))
                and {f[0] for f in froms} <= {"${BASE}", "scratch"}, froms)
    checks.that(f"{name}: what is shipped begins empty", froms[-1][0] == ("scratch" if name in EMPTY else "${BASE}"), froms)
    after = lines[max(n for n, (what, _) in enumerate(lines) if what == "FROM"):]
    users = [rest for what, rest in after if what == "USER"]
    checks.that(f"{name}: runs as a numbered user that is not root", users == ["65532:65532"], users)
    entry = [json.loads(rest) for what, rest in after if what == "ENTRYPOINT"]
    checks.that(f"{name}: starts its program without a shell", len(entry) == 1 and entry[0][0].startswith("/"), entry)
    stages = {f[2] for f in froms if len(f) == 3}
    for what, rest in lines:
        if what != "COPY":
            continue
        if rest.startswith("--from="):
            checks.that(f"{name}: COPY {rest} names a stage", rest.split()[0].removeprefix("--from=") in stages)
            continue
        for source in rest.split()[:-1]:
            here = source.rstrip("/")
            checks.that(f"{name}: COPY {source} is in the repository", here in tracked or any(t.startswith(here + "/") for t in tracked))
    scripts = {s for what, rest in lines if what == "RUN" for s in re.findall(r"(?<![\w/])((?:cmake|dockerfiles)/[\w.]+\.sh)", rest)}
    for script in scripts:
        checks.that(f"{name}: {script} may be run", os.access(ROOT / script, os.X_OK))
    cmake = "\n".join(f.read_text() for f in [*ROOT.glob("stage/**/CMakeLists.txt"), *ROOT.glob("controller/**/CMakeLists.txt")])
    for target in {t for what, rest in lines if what == "RUN" for t in re.findall(r"--target (\S+?);?(?=\s|$)", rest)}:
        known = (ROOT / target.removesuffix("/all") / "CMakeLists.txt").exists() if target.endswith("/all") else f"add_executable({target} " in cmake
        checks.that(f"{name}: {target} is a target", known)


def inside(root, *command, **options):
    """A process that sees nothing but `root`, as the user of the images (as an ordinary user: as the nearest thing to it)."""
    enter = ["chroot", "--userspec=65532:65532", str(root)] if os.getuid() == 0 else ["unshare", "--map-root-user", f"--root={root}"]
    return subprocess.Popen([*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", "LD_BIND_NOW": "1"}, **options)


def make(checks, folder, program, *command):
    """The root file system of `program`, looked through."""
    root = folder / program
    status, out, err = run(*command)
    if not checks.that(f"{program}: its root file system is made", status == 0, out + err):
        return root
    files = [f for f in root.rglob("*") if f.is_file() and not f.is_symlink()]
    size = sum(f.stat().st_size for f in files) / 2**20
    checks.that(f"{program}: {size:.0f} MiB, at most {MIB_MAX[program]}", size <= MIB_MAX[program])
    executables = {f.relative_to(root).as_posix() for f in files if os.access(f, os.X_OK) and ".so" not in f.name}
    checks.that(f"{program}: nothing can be started but itself", executables == {f"usr/local/bin/{program}"}, executables)
    checks.that(f"{program}: nothing in it belongs to its user, nothing is setuid", not any(f.stat().st_uid == 65532 or f.stat().st_mode & 0o6000 for f in files))
    process = inside(root, f"/usr/local/bin/{program}", "--help")
    out, _ = process.communicate(timeout=60)
    checks.that(f"{program}: every symbol of every library is found in it", process.returncode == 0 and "--log-level" in out, out)
    return root


def check_serving(checks, head_root, stage_root):
    """The digits pipeline, head and stage each in its own image."""
    for root in (head_root, stage_root):
        shutil.copytree(ROOT / "docs/examples/digits-checkpoint", root / "model")
        run("chmod", "-R", "a+rX", root)
    head = inside(head_root, "/usr/local/bin/qwen-head", "--model", "/model", "--stages", "1", "--listen", "127.0.0.1:0", "--control-listen",
                  "127.0.0.1:0", "--print-ports", "--log-level", "error")
    stage = None
    try:
        ports = json.loads(head.stdout.readline())
        stage = inside(stage_root, "/usr/local/bin/qwen-stage", "--model", "/model", "--index", "0", "--stages", "1", "--head", f"127.0.0.1:{ports['control']}",
                       "--data-listen", "127.0.0.1:0", "--metrics-port", "0", "--device", "cpu", "--threads", "1", "--insecure-loopback", "--max-model-len", "2048",
                       "--kv-blocks", "256", "--log-level", "error")
        url, ready = f"http://127.0.0.1:{ports['http']}", False
        for _ in range(300):
            if head.poll() is not None or stage.poll() is not None:
                break
            try:
                ready = urllib.request.urlopen(url + "/ready", timeout=5).status == 200
                break
            except OSError:
                time.sleep(0.2)
        if not checks.that("head and stage find each other out of their images", ready):
            return
        image = "data:image/png;base64," + base64.b64encode((ROOT / "docs/examples/digits/0006-six.png").read_bytes()).decode()
        body = {"max_tokens": 8, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}},
                                                                           {"type": "text", "text": "Which digit is this?"}]}]}
        models = json.loads(urllib.request.urlopen(url + "/v1/models", timeout=10).read())
        body["model"] = models["data"][0]["id"]
        request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]["message"]["content"]
        checks.that("and read a handwritten six", "six" in answer.lower() or "6" in answer, answer)
    finally:
        for name, process in (("stage", stage), ("head", head)):
            if process is not None:
                if process.poll() is None:
                    process.terminate()
                try:
                    out, _ = process.communicate(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    out, _ = process.communicate()
                if process.returncode not in (0, -15):
                    print(f"       {name} ended with {process.returncode}: {out[-1000:]}")


def check_export(checks, folder):
    """The files that export.Dockerfile takes, under a Python that has nothing but its standard library."""
    at = folder / "export"
    (at / "python_export").mkdir(parents=True)
    copied, = [rest.split()[:-1] for what, rest in instructions(ROOT / "dockerfiles/export.Dockerfile") if what == "COPY"]
    for source in copied:
        shutil.copy(ROOT / source, at / "python_export")
    python = ["/usr/bin/python3", "-S", "-m", "python_export"]
    environment = {"PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1"}
    status, out, err = run(*python, "export", ROOT / "docs/examples/digits-checkpoint", "--out", at / "weights", "--stages", "2", env=environment)
    checks.that("the export image splits a checkpoint with the files it has", status == 0 and len(list((at / "weights").glob("stage-*-of-02"))) == 2, out + err)
    status, out, err = run(*python, "validate", at / "weights", env=environment)
    checks.that("and finds it whole", status == 0, out + err)


def main():
    head, stage, torch_site, *controller = sys.argv[1:]
    checks = Checks()
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True).stdout.split("\n")
    checks.that("four images", [p.name.split(".")[0] for p in DOCKERFILES] == ["controller", "export", "head", "stage"], DOCKERFILES)
    for path in DOCKERFILES:
        check_dockerfile(checks, path, set(listed))
    status, out, err = run(tool("hadolint"), "--no-color", *DOCKERFILES)
    checks.that("hadolint has nothing to say", status == 0, out + err)

    with tempfile.TemporaryDirectory(prefix="images.") as name:
        folder = Path(name)
        folder.chmod(0o755)
        rootfs = ROOT / "dockerfiles/rootfs.sh"
        head_root = make(checks, folder, "qwen-head", rootfs, folder / "qwen-head", head)
        stage_root = make(checks, folder, "qwen-stage", ROOT / "dockerfiles/stage_rootfs.sh", "cpu", folder / "qwen-stage", Path(stage).parents[1], torch_site)
        for program in controller:
            make(checks, folder, "qwen-controller", rootfs, folder / "qwen-controller", program)
        check_serving(checks, head_root, stage_root)
        check_export(checks, folder)
        status, _, err = run(rootfs, folder / "none", folder / "no-such-program")
        checks.that("a program that is not there is an error", status == 66 and "no-such-program is not there" in err, err)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
