"""What the chart's tests share: the tools, a rendered chart, a list of checks. Needs PyYAML and `cmake/deps.sh helm`."""
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/qwen-pipeline"
CRD = ROOT / "crds/qwenpipeline.yaml"
MONITORING = "monitoring.coreos.com/v1"


def tool(name):
    """helm or promtool: in $HELM_BIN, or where deps.sh puts them."""
    folder = os.environ.get("HELM_BIN")
    if not folder:
        lines = subprocess.run([ROOT / "cmake/deps.sh", "env"], capture_output=True, text=True, check=True).stdout.splitlines()
        folder = dict(line.split("=", 1) for line in lines)["HELM_BIN"]
    return str(Path(folder) / name)


def run(*command, **options):
    """(exit status, stdout, stderr)"""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **options)
    return done.returncode, done.stdout, done.stderr


def helm(*arguments, values=None, home=None):
    """Runs helm with nothing of this machine's configuration; `values` as a file, as people do."""
    with tempfile.TemporaryDirectory(prefix="helm.") as folder:
        more = []
        if values is not None:
            (Path(folder) / "values.yaml").write_text(yaml.safe_dump(values))
            more = ["--values", f"{folder}/values.yaml"]
        home = home or folder
        environment = {"PATH": os.environ["PATH"], "HOME": home, "HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home, "HELM_DATA_HOME": home,
                       "TMPDIR": folder}
        return run(tool("helm"), *arguments, *more, env=environment)


def template(values=None, *, release="demo", namespace="operators", apis=()):
    """(exit status, text or complaint)"""
    flags = [flag for api in apis for flag in ("--api-versions", api)]
    status, out, err = helm("template", release, CHART, "--namespace", namespace, *flags, values=values or {})
    return status, out if status == 0 else err


def documents(text):
    return [d for d in yaml.safe_load_all(text) if d]


class Checks:
    """Says each check on a line, so that a failed run reads as a list of what is wrong."""

    def __init__(self):
        self.passed = self.failed = 0

    def that(self, what, ok, detail=""):
        self.passed, self.failed = self.passed + bool(ok), self.failed + (not ok)
        print(("ok     " if ok else "FAILED ") + what + ("" if ok else f": {str(detail)[:2000]}"), flush=True)
        return bool(ok)

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        return 1 if self.failed or not self.passed else 0
