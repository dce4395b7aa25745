#!/usr/bin/env python3
"""Half an hour of random faults, after which the operator must be as it was: memory, threads, sockets and its queue are flat.

A real API server with fake kubelets; two namespaces, each behind a misbehaving proxy (proxy.py) of its own. One belongs to an operator that
is never ended and whose curve counts; in the other two of them compete for a lease, are killed, frozen, and lose it. Burst after burst
pods, nodes, the API server and watches are broken and pipelines made, changed and deleted. After each one everything must come to stand as
it was asked for, without an orphan, and come to rest; at no time two groups of one epoch (world.Invariants).

  soak.py QWEN_CONTROLLER [--minutes 30] [--seed N] [--out docs/benchmarks]     with --out writes operator_soak.json and operator_soak.md
"""
import argparse
import datetime
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from proxy import Faults, Proxy
from storms_test import ROOT, STORMS, Operator, Storms, reports
from world import PIPELINES, SLOWNESS, World

MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
STEADY, ELECTED = "steady", "elected"
PIPELINES_MAX = 5  # in a namespace
BURST_S = 8
CONVERGED_S = 120
SILENT_S = 200  # after half-open watches: 80 s until they are given up, then as above
LEASE_AGE_S = 20  # of a fake node's lease, which is renewed every 15 s
SAMPLE_S = 5
WARM_UP = 0.2  # of all the samples at rest, left out: what is allocated once
LOOKS_MIN = 15  # samples at rest, below which no thirds are compared
# What the last third may be above the first. Memory is that of a malloc which keeps some of what it once needed; a connection more or
# less depends on how many requests happened to be under way together.
RSS_GROWTH_MIB, THREADS_GROWTH, SOCKETS_GROWTH = 2.0, 0, 4
RSS_MAX_MIB = 48  # at any time; the operator's goal is 40 with 1,000 pods
SOCKETS_MAX = 80


class Realm(Storms):
    """A namespace, its proxy and who operates behind it. What is wished goes past the proxy."""

    def __init__(self, world, name, program, seed):
        proxy = Proxy(world.cluster, seed)
        super().__init__(world, proxy, [], seed, namespace=name)
        self.reborn, self.budget = [], 100  # (name, what was wanted) of pipelines that come again when they are gone
        names, more = (["one", "two"], []) if name == ELECTED else ([STEADY], ["--leader-election", "false"])
        self.operators = [Operator(program, proxy.kubeconfig, world.folder / f"{n}.log", n, "--namespace", name, "--lease-namespace", name, *more) for n in names]

    def path(self, name=""):
        return f"{PIPELINES}/namespaces/{self.namespace}/qwenpipelines/{name}".rstrip("/")

    def spec(self, name, **changes):
        self.world.call(self.path(name), "PATCH", {"spec": changes}, MERGE)

    def make(self, name, want):
        body = self.world.manifest(self.namespace, name, want["stages"], replicas=want["replicas"], restart={"budget": 100, "backoffSeconds": 1}, server={"drainTimeoutSeconds": 2, "preStopSeconds": 0})
        self.world.call(self.path(), "POST", body)
        self.wanted[name] = want

    # -- acts; each on one pipeline

    def create(self, _=None):
        if len(self.wanted) + len(self.reborn) < PIPELINES_MAX:
            self.made += 1
            self.make(f"p{self.made}", {"stages": self.random.randint(1, 4), "replicas": 1})

    def whole(self, name):
        """Its pods, if none is missing: one that still grows may get the missing pod again under its name."""
        pods, want = self.world.pods(self.namespace, name), self.wanted[name]
        good = len(pods) == (want["stages"] + 1) * want["replicas"] and want["replicas"] and self.world.ready(self.namespace, name)
        return sorted(pods) if good else []

    def hit(self, name, blow):
        if pods := self.whole(name):
            blow(f"/api/v1/namespaces/{self.namespace}/pods/{self.random.choice(pods)}")

    def kill_pod(self, name):
        self.hit(name, lambda pod: self.world.call(pod, "DELETE", {"gracePeriodSeconds": 0}))

    def delete_pod(self, name):
        self.hit(name, lambda pod: self.world.call(pod, "DELETE", {}))

    def evict_pod(self, name):
        self.hit(name, lambda pod: self.world.call(pod + "/eviction", "POST", {
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod.rsplit("/", 1)[1], "namespace": self.namespace}}))

    def crash_pod(self, name):
        code = str(self.random.choice([1, 67, 70, 71, 137]))
        self.hit(name, lambda pod: self.world.call(pod, "PATCH", {"metadata": {"annotations": {"fake-node/exit": code}}}, MERGE))

    def scale(self, name):
        replicas = self.wanted[name]["replicas"] = self.wanted[name]["replicas"] % 2 + 1
        self.spec(name, replicas=replicas, suspend=False)

    def suspend(self, name):
        self.wanted[name]["replicas"] = 0
        self.spec(name, suspend=True)

    def change(self, name):
        stages = self.wanted[name]["stages"] = self.wanted[name]["stages"] % 4 + 1
        self.spec(name, stages={"count": stages})

    def spoil(self, name):
        """Somebody deletes what the operator made."""
        kind = self.random.choice(["/api/v1/namespaces/{}/services/", "/apis/policy/v1/namespaces/{}/poddisruptionbudgets/", "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies/"])
        self.world.call(kind.format(self.namespace) + name, "DELETE", {})

    def look(self, name):
        """Something to look at and nothing to do."""
        self.world.call(self.path(name), "PATCH", {"metadata": {"labels": {"seen": str(self.random.randint(0, 999))}}}, MERGE)

    def delete(self, name):
        if len(self.wanted) > 2:
            self.world.call(self.path(name), "DELETE", {})
            del self.wanted[name]

    def recreate(self, name):
        self.world.call(self.path(name), "DELETE", {})
        self.reborn.append((name, self.wanted.pop(name)))

    def kill_operator(self, _):
        if self.namespace == ELECTED:
            self.random.choice(self.operators).process.kill()

    def freeze_operator(self, _):
        """For longer than its lease; if it led it must end itself when it wakes."""
        if self.namespace == ELECTED:
            process = self.random.choice(self.operators).process
            process.send_signal(signal.SIGSTOP)
            threading.Timer(8, lambda: process.poll() is None and process.send_signal(signal.SIGCONT)).start()

    def act(self):
        acts = [self.create] * 2 + [self.kill_pod] * 3 + [self.delete_pod, self.evict_pod, self.crash_pod] * 2 + [self.scale, self.suspend, self.change, self.spoil, self.look,
                                                                                                                self.delete, self.recreate, self.kill_operator, self.freeze_operator]
        act = self.random.choice(acts) if self.wanted else self.create
        try:
            act(self.random.choice(sorted(self.wanted)) if self.wanted else None)
            return act.__name__
        except (OSError, KeyError):
            return "nothing"  # refused, as an eviction may be, or gone a moment before

    # -- afterwards

    def gone(self, name):
        try:
            self.world.pipeline(self.namespace, name)
            return False
        except HTTPError as e:
            return e.code == 404

    def settle(self, what, limit_s):
        """Fair weather; what is to come again comes; then everything must be as it was asked for, and at rest."""
        self.proxy.faults = Faults()
        for name, want in self.reborn:
            self.world.within(f"{what}: {name} is gone", limit_s, lambda name=name: self.gone(name), lambda name=name: self.world.condition(self.namespace, name), patience_s=limit_s)
            self.make(name, want)
        self.reborn = []
        for name, want in self.wanted.items():  # a change of the spec forgets the failures so far: growing back-off is no subject here
            self.budget += 1
            want["replicas"] = want["replicas"] or 1
            self.spec(name, suspend=False, replicas=want["replicas"], restart={"budget": self.budget})
        self.quiet(what, limit_s)


class Sampler:
    """What the operators hold, every SAMPLE_S from a thread of its own and whenever asked."""

    def __init__(self, operators):
        self.operators, self.started, self.all, self.rest = operators, time.monotonic(), [], []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.ended.wait(SAMPLE_S):
            for operator in self.operators:
                if sample := self.take(operator):
                    self.all.append(sample)

    def at_rest(self, operator):
        if sample := self.take(operator):
            self.rest.append(sample)
        return sample

    def take(self, operator):
        """None: it is not there, or has just begun."""
        pid = operator.process.pid
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
            port = re.findall(r"metrics_port=(\d+)", operator.log.read_text())[-1]
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/metrics", timeout=3) as answer:
                metrics = answer.read().decode()
            value = lambda name: sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name + "{"))  # noqa: E731
            return {"s": round(time.monotonic() - self.started, 1), "operator": operator.log.stem, "pid": pid, "rss_mib": round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 2),
                    "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]), "files": len(files), "sockets": sum(f.startswith("socket:") for f in files),
                    "queue": int(value("workqueue_depth")), "working": int(value("controller_runtime_active_workers")),
                    "series": sum(not line.startswith("#") for line in metrics.splitlines()), "requests": int(value("rest_client_requests_total"))}
        except (OSError, IndexError, TypeError, ValueError):
            return None

    def stop(self):
        self.ended.set()
        self.thread.join()


class Soak:
    def __init__(self, world, program, seed):
        self.world, self.random = world, random.Random(seed)
        for name in (STEADY, ELECTED):
            world.namespace(name)
            world.claim(name, "digits", ROOT / "docs/examples/digits-checkpoint")
        self.realms = [Realm(world, name, program, seed + i) for i, name in enumerate((STEADY, ELECTED))]
        self.steady = self.realms[0].operators[0]
        self.operators = [operator for realm in self.realms for operator in realm.operators]
        self.sampler = Sampler(self.operators)
        self.bursts, self.acts, self.took, self.refused = 0, {}, [], 0

    # -- what happens to both

    def restart_api_server(self):
        self.world.cluster.kill("kube-apiserver")
        time.sleep(self.random.uniform(0.5, 4))
        self.world.cluster.run("kube-apiserver")
        self.world.cluster.ready()

    def lose_a_node(self):
        """Without power, then declared out of service, then back."""
        node = f"fake-{self.random.randint(0, 3):03d}"
        path, now = f"/api/v1/nodes/{node}", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        patch = lambda body, kind=MERGE, part="": self.world.call(path + part, "PATCH", body, kind)  # noqa: E731
        patch({"metadata": {"annotations": {"fake-node/silent": "true"}}})
        patch({"status": {"conditions": [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "lastHeartbeatTime": now, "lastTransitionTime": now}]}}, STRATEGIC, "/status")
        time.sleep(self.random.uniform(1, 5))
        patch({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]}})
        for realm in self.realms:
            realm.proxy.faults = Faults()
        def ending():
            return [p["metadata"] for p in self.world.call(f"/api/v1/pods?fieldSelector=spec.nodeName%3D{node}")["items"] if "deletionTimestamp" in p["metadata"]]
        self.world.within(f"{node} is out of service: what stood there is gone", CONVERGED_S, lambda: not ending(), ending)
        patch({"spec": {"taints": []}, "metadata": {"annotations": {"fake-node/silent": None}}})
        self.world.within(f"{node} is back", CONVERGED_S, lambda: any(c["type"] == "Ready" and c["status"] == "True" for c in self.world.call(path)["status"]["conditions"]))
        for meta in ending():  # deleted in between: a kubelet that comes back would look, a fake one must be told of a change
            try:
                self.world.call(f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", "PATCH", {"metadata": {"annotations": {"look": "again"}}}, MERGE)
            except HTTPError:
                pass  # gone a moment before

    def nodes_heard_of(self):
        """All Ready and with a fresh lease: after a restart of the API server some may be about to count as lost, which is no fault of ours."""
        leases = self.world.call("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")["items"]
        ages = [time.time() - datetime.datetime.fromisoformat(lease["spec"]["renewTime"]).timestamp() for lease in leases]
        ready = [any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"]) for node in self.world.call("/api/v1/nodes")["items"]]
        return all(ready) and len(ages) == len(ready) and max(ages) < LEASE_AGE_S

    def disaster(self):
        """(what, the time that it may take to recover); most bursts have none."""
        kind = self.random.choice(["none"] * 6 + ["API server restarted"] * 2 + ["a node lost"] * 2 + ["watches half-open"])
        if kind == "API server restarted":
            self.restart_api_server()
        elif kind == "a node lost":
            self.lose_a_node()
        elif kind == "watches half-open":
            for realm in self.realms:
                realm.proxy.freeze_watches()
            return kind, SILENT_S
        return kind, CONVERGED_S

    def burst(self):
        self.bursts += 1
        weather, faults = self.random.choice([*STORMS.items(), ("fair weather", Faults())])
        for realm in self.realms:
            realm.proxy.faults, realm.proxy.done = faults, {}
        until = time.monotonic() + BURST_S
        while time.monotonic() < until:
            done = self.random.choice(self.realms).act()
            self.acts[done] = self.acts.get(done, 0) + 1
            if 410 in faults.codes and self.random.random() < 0.3:
                realm = self.random.choice(self.realms)
                self.random.choice([realm.proxy.expire_watches, realm.proxy.tear_watches])()
            time.sleep(0.4)
        disaster, limit_s = self.disaster()
        self.acts[disaster] = self.acts.get(disaster, 0) + 1
        self.world.within(f"{self.bursts} {weather}, {disaster}: every node is heard of", CONVERGED_S, self.nodes_heard_of)
        since = time.monotonic()
        for realm in self.realms:
            self.refused += sum(count for fault, count in realm.proxy.done.items() if fault)
            realm.settle(f"{self.bursts} {weather}, {disaster}, {realm.namespace}", limit_s)
        self.took.append(time.monotonic() - since)
        for operator in self.operators:
            sample = self.sampler.at_rest(operator)
            if operator is self.steady:
                print(f"       {sample}", flush=True)

    def run(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.world.failed:
            self.burst()

    # -- what it has come to

    def thirds(self):
        rest = [s for s in self.sampler.rest if s["operator"] == STEADY]
        warm = rest[int(len(rest) * WARM_UP):]
        return rest, warm[:len(warm) // 3], warm[-(len(warm) // 3):]

    def judge(self):
        world, rest = self.world, self.thirds()[0]
        ends = [code for operator in self.realms[1].operators for code in operator.ends]
        world.check(f"operators of {ELECTED} ended {len(ends)} times: killed, or because they lost their lease", set(ends) <= {1, -signal.SIGKILL}, ends)
        world.check(f"that of {STEADY} never ended", not self.steady.ends, self.steady.ends)
        for name, limit in (("rss_mib", RSS_MAX_MIB), ("sockets", SOCKETS_MAX)):
            worst = max(s[name] for s in self.sampler.all + rest)
            if name == "rss_mib" and SLOWNESS > 1:
                continue  # the sanitizer's memory
            world.check(f"{name} of any of them at any time: {worst}, limit {limit}", worst <= limit)
        world.check("at rest nothing waits and nothing is worked on", not any(s["queue"] or s["working"] for s in rest), rest)
        said = reports.read(world.folder)
        world.check("no sanitizer said anything", not said, "\n".join(said))
        if len(rest) < LOOKS_MIN:
            return
        _, first, last = self.thirds()
        for name, growth in (("rss_mib", RSS_GROWTH_MIB), ("threads", THREADS_GROWTH), ("sockets", SOCKETS_GROWTH), ("files", SOCKETS_GROWTH)):
            before, after = (statistics.median(s[name] for s in part) for part in (first, last))
            world.check(f"{name} is flat: {before:g} in the first third, {after:g} in the last", after - before <= growth, f"it may grow by {growth}")
        if world.failed:
            print("---- samples at rest", *rest, sep="\n")

    def rows(self, minutes):
        rest, first, last = self.thirds()
        median = lambda part, name: statistics.median(s[name] for s in part) if part else None  # noqa: E731
        row = lambda case, unit, ours, target=None: {"suite": "operator", "case": f"soak.{case}", "unit": unit, "ours": ours, "peer": None, "peer_name": None,  # noqa: E731
                                                     "bound": None, "target": target}
        made = [row("minutes", "min", round(minutes, 1)), row("bursts", "1", self.bursts), row("requests_refused_cut_or_lost", "1", self.refused),
                row("acts", "1", sum(n for act, n in self.acts.items() if act not in ("nothing", "none"))),
                row("operators_ended", "1", sum(len(o.ends) for o in self.operators)),
                row("converged.median", "s", round(statistics.median(self.took), 1)), row("converged.worst", "s", round(max(self.took), 1), SILENT_S)]
        for name, unit, growth in (("rss_mib", "MiB", RSS_GROWTH_MIB), ("threads", "1", THREADS_GROWTH), ("sockets", "1", SOCKETS_GROWTH), ("files", "1", SOCKETS_GROWTH), ("series", "1", None)):
            case = name.removesuffix("_mib")
            made += [row(f"{case}.first_third", unit, median(first, name)),
                     row(f"{case}.last_third", unit, median(last, name), median(first, name) + growth if first and growth is not None else None),
                     row(f"{case}.worst", unit, max(s[name] for s in self.sampler.all + rest if s["operator"] == STEADY))]
        return made + [row("queue_at_rest.worst", "1", max(s["queue"] for s in rest), 0)]


def write(out, rows, seed):
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()).group(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine, date = f"{os.cpu_count()} cores, {cpu}; load average at the end {os.getloadavg()[0]:.1f}", datetime.date.today().isoformat()
    for row in rows:
        row.update(machine=machine, commit=commit, date=date, command="make soak", seed=seed)
    text = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    lines = ["# The operator after half an hour of faults", "", f"Written by `make soak` ([source](../../tests/faults/soak.py)); figures with their command in [operator_soak.json](operator_soak.json). "
             f"{machine}, {date}, commit {commit}, seed {seed}. Of the one operator that was never ended, at rest after each burst; a fifth of the samples is warm-up and left out; medians.", "",
             "| case | unit | ours | at most |", "|---|---|---|---|"]
    lines += [f"| {r['case']} | {r['unit']} | {text(r['ours'])} | {text(r['target'])} |" for r in rows]
    out.mkdir(parents=True, exist_ok=True)
    (out / "operator_soak.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    (out / "operator_soak.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randint(1, 10**6))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"seed {args.seed}, {args.minutes:g} minutes", flush=True)
    with World(nodes=0, look_s=1, forming_repeats=True) as world:
        world.define()
        soak = Soak(world, args.program, args.seed)
        try:
            soak.run(args.minutes * 60)
            soak.sampler.stop()
            print(f"{soak.bursts} bursts, {soak.refused} requests refused, cut or lost, acts: {soak.acts}", flush=True)
            soak.judge()
            for realm in soak.realms:
                for name in list(realm.wanted):
                    world.call(realm.path(name), "DELETE", {})
            world.within("deleted: nothing is left", CONVERGED_S, lambda: not world.call("/api/v1/pods?labelSelector=qwenpipeline.dev/pipeline")["items"])
            world.invariants.end()
        finally:
            for operator in soak.operators:
                operator.stop()
                if world.failed or sys.exc_info()[0]:
                    print(f"---- {operator.log.name}\n" + operator.log.read_text()[-20000:])
        if args.out and not world.failed:
            write(args.out, soak.rows((time.monotonic() - world.started) / 60), args.seed)
    return 1 if world.failed else 0


if __name__ == "__main__":
    sys.exit(main())
