#!/usr/bin/env python3
"""The real nodes of tests/cluster themselves, two clusters side by side: names are resolved as they are now, nothing can leave, neither
cluster sees the other, a power cut takes everything with it and comes back, and what is stopped leaves no trace on this machine.
"""
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from world import ROOT, capable_or_exit, kube, real

CLUSTER = str(ROOT / "tests/cluster/cluster.py")
SETTINGS = ["vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops"]
NO_SUCH_NAME = 3
PODS = [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"selector": {"a": "b"}, "ports": [{"port": 1}], **spec}} for name, spec in [
    ("all", {"clusterIP": "None", "publishNotReadyAddresses": True}), ("ready", {"clusterIP": "None"}), ("one", {"clusterIP": "10.96.7.7"})]] + [
    {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "never", "labels": {"a": "b"}}, "spec": {"hostname": "never", "subdomain": "all", "containers": [
        {"name": "c", "image": "localhost/pause:1", "readinessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1}}]}}]


class Checks:
    passed = failed = 0

    def that(self, what, good, details=""):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        print(f"{'ok  ' if good else 'FAIL'} {what}" + ("" if good else f": {details}"), flush=True)

    def within(self, what, limit_s, met, details=lambda: ""):
        start = time.monotonic()
        while not (good := met()) and time.monotonic() - start < limit_s:
            time.sleep(0.1)
        self.that(f"{what} ({time.monotonic() - start:.1f} s)", good, details())


def resolve(name, kind=1, tcp=False):
    """(response code, addresses) of a question to the cluster's DNS; kind 1 is A, 28 AAAA. Written from RFC 1035."""
    name += ".svc.cluster.local"
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0" + struct.pack(">HH", kind, 1)
    query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + question
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.connect((real.DNS, 53))
        s.send(struct.pack(">H", len(query)) + query if tcp else query)
        answer = s.recv(2000)[2 if tcp else 0:]
    _, flags, _, count, _, _ = struct.unpack(">HHHHHH", answer[:12])
    at, addresses = 12 + len(question), []
    for _ in range(count):  # each: a compressed name of 2 bytes, then type, class, TTL, length
        length, = struct.unpack(">H", answer[at + 10:at + 12])
        addresses.append(socket.inet_ntoa(answer[at + 12:at + 12 + length]))
        at += 12 + length
    return flags & 15, addresses


def reaches(address, port=443):
    try:
        socket.create_connection((address, port), timeout=2).close()
        return "yes"
    except OSError as e:
        return e.strerror or str(e)


def settings():
    return {name: Path(f"/proc/sys/{name}").read_text() for name in SETTINGS}


def traces(folder):
    """What on this machine still belongs to the clusters in `folder`."""
    commands = [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and kube.Cluster.birth(p.name) is not None and folder.encode() in (p / "cmdline").read_bytes()]
    return commands + [str(p) for p in Path("/sys/fs/cgroup").glob("*/qwen-*/*") if any(tag in str(p) for tag in TAGS)] + [str(p) for p in Path(folder).glob("*")] + \
        [line for line in Path("/proc/mounts").read_text().splitlines() if folder in line]


TAGS = []


def names(checks, a, kubectl):
    kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, PODS)))
    def running():
        status = json.loads(kubectl("get", "pod", "never", "-o", "json"))["status"]
        return status.get("podIP") if status.get("phase") == "Running" else None
    checks.within("a pod runs on a node", 60, running)
    address = running()
    checks.within("a headless name is its pod's address, ready or not where that is published", 60, lambda: resolve("all.default") == (0, [address]), lambda: resolve("all.default"))
    checks.that("so is the pod's own name under it, over TCP as well", resolve("never.all.default") == (0, [address]) == resolve("never.all.default", tcp=True), resolve("never.all.default"))
    checks.that("where only ready pods count the name exists and has no address", resolve("ready.default") == (0, []), resolve("ready.default"))
    checks.that("another's cluster IP is its address", resolve("one.default") == (0, ["10.96.7.7"]), resolve("one.default"))
    checks.that("there is no IPv6, and that is no error", resolve("all.default", kind=28) == (0, []), resolve("all.default", kind=28))
    absent = [resolve(name) for name in ("nobody.all.default", "all.elsewhere", "never.one.default", "a.b.c.d")]
    checks.that("what does not exist is said not to", absent == [(NO_SUCH_NAME, [])] * 4, absent)
    kubectl("delete", "pod", "never", "--now")
    checks.within("a pod that is gone has no name any more", 60, lambda: resolve("never.all.default") == (NO_SUCH_NAME, []), lambda: resolve("never.all.default"))


def walls(checks, a, b):
    gone = [reaches("192.0.2.1"), a.node("node1").inside(lambda: reaches("192.0.2.1"))]
    checks.that("from neither the control plane nor a node anything outside is reached", gone == ["Network is unreachable"] * 2, gone)
    checks.that("a node reaches the API server through its Service", a.node("node1").inside(lambda: reaches("10.96.0.1")) == "yes")
    b.enter()
    checks.that("another cluster with the same addresses knows nothing of it", resolve("all.default") == (NO_SUCH_NAME, []), resolve("all.default"))
    a.enter()


def power(checks, a, b):
    before = {pid: a.birth(pid) for pid in a.node("node1").processes()}
    a.kill("node1")
    checks.that(f"a power cut ends all {len(before)} processes of the node", not [pid for pid, born in before.items() if a.birth(pid) == born])
    a.wait_for_node("node1", "Unknown", 40)
    b.enter()
    b.wait_for_node("node1", timeout_s=1)
    a.enter()
    a.run("node1")
    a.wait_for_node("node1")
    checks.that("it comes back, and its namesake never went", True)


def main():
    capable_or_exit()
    checks, before = Checks(), settings()
    with tempfile.TemporaryDirectory(prefix="nodes.") as folder:
        a, b = f"{folder}/a", f"{folder}/b"
        try:
            for where in (a, b):
                subprocess.run([sys.executable, CLUSTER, "start", where, "--nodes", "1", "--owner", str(os.getpid())], check=True, capture_output=True, timeout=150)
            a, b = kube.Cluster(a), kube.Cluster(b)
            TAGS.extend(cluster.node("node1").cgroup.split("/")[0] for cluster in (a, b))

            def kubectl(*arguments, stdin=None):
                return subprocess.run([a.binaries / "kubectl", "--kubeconfig", a.dir / "admin.kubeconfig", *arguments], input=stdin, capture_output=True, text=True,
                                      check=True, timeout=60).stdout
            a.enter()
            names(checks, a, kubectl)
            walls(checks, a, b)
            power(checks, a, b)
            checks.that("the kernel's settings of this machine are as they were", settings() == before, settings())
        finally:
            for where in ("a", "b"):
                kube.Cluster(f"{folder}/{where}").stop()
        checks.within("stopped: no process, cgroup, mount or file is left", 60, lambda: not traces(folder), lambda: traces(folder))
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
