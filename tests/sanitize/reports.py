"""What sanitizers say of programs that a test starts: into files, so that no report is lost in a log or with a program that is killed.

A build without sanitizers does not look at these variables.
"""
import os
from pathlib import Path

EXIT_CODE = 99  # none of ours (stage/contract/pod_contract.h)
SANITIZERS = ("ASAN", "LSAN", "TSAN", "UBSAN")


def environment(folder):
    """This one, and where to write to: files of their own in `folder`."""
    added = f"log_path={folder}/sanitizer.log:exitcode={EXIT_CODE}:print_suppressions=0"
    return {**os.environ, **{f"{name}_OPTIONS": ":".join(filter(None, [os.environ.get(f"{name}_OPTIONS"), added])) for name in SANITIZERS}}


def read(folder):
    """The reports in `folder`, as texts."""
    return [file.read_text(errors="replace") for file in sorted(Path(folder).glob("sanitizer.log.*")) if file.stat().st_size]
