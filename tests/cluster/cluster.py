#!/usr/bin/env python3
"""A real Kubernetes for tests: etcd, kube-apiserver, and on demand the controller manager, the scheduler, fake nodes
(kube/fakelet.go) or real ones (nodes.py). Each is its own process, so a test can kill or freeze one and keep the others.

  cluster.py start DIR [--with NAME,...] [--nodes COUNT [--image TAR]...] [--apiserver-arg ARG]... [--owner PID]
                                      prints the path of a kubeconfig (cluster-admin); stops when the process PID ends
  cluster.py stop DIR                                               ends what was started and removes DIR
  cluster.py kill|freeze|thaw|run DIR NAME                          one component: SIGKILL, SIGSTOP, SIGCONT, start again
  cluster.py cut|join DIR NODE                                      pulls a real node's cable, plugs it in again
  cluster.py nodes DIR COUNT                                        fake nodes of 16 GPUs each, waits until they are Ready
  cluster.py exec DIR [--on NODE] -- COMMAND...                     in the cluster's network, KUBECONFIG set; or on a real node
  cluster.py env DIR                                                KUBECONFIG=..., SERVER=..., PID_NAME=... lines

NAME is etcd, kube-apiserver, kube-controller-manager, kube-scheduler, fakelet, or a real node: node1, node2 (kill is a power cut).
start and run are idempotent: what lives stays, on the same ports. Every wait is bounded. Binaries come from `cmake/deps.sh kube`
($KUBE_BIN, or what deps.sh env says). Without real nodes nothing listens on another address than 127.0.0.1. With them the control
plane runs in a network namespace of its own, with the controller manager, the scheduler and DNS. Nothing is left running after stop.
"""
import argparse
import base64
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import image
import nodes as real

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "fakelet", "clusterdns"]
NETWORK = "network"  # the process that holds the control plane's network namespace
START_TIMEOUT_S = 90  # an idle machine needs 4 s; one that compiles beside it 15 s


def fail(message):
    sys.exit(f"cluster: {message}")


def binaries():
    if os.environ.get("KUBE_BIN"):
        return Path(os.environ["KUBE_BIN"])
    lines = subprocess.run([ROOT / "cmake/deps.sh", "env"], capture_output=True, text=True, check=True).stdout.splitlines()
    return Path(dict(line.split("=", 1) for line in lines)["KUBE_BIN"])


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def openssl(*args, **kwargs):
    done = subprocess.run(["openssl", *args], capture_output=True, text=True, **kwargs)
    if done.returncode:
        fail(f"openssl {' '.join(map(str, args))}: {done.stderr.strip()}")


class Cluster:
    def __init__(self, folder):
        self.dir = Path(folder).resolve()
        self.pki = self.dir / "pki"
        self.state_file = self.dir / "state.json"
        self.state = json.loads(self.state_file.read_text()) if self.state_file.exists() else None
        self.binaries = binaries()

    # -- certificates: one CA, a serving certificate, a client certificate and kubeconfig per user

    def sign(self, name, subject, extension=""):
        key, csr, ext = (self.pki / f"{name}.{suffix}" for suffix in ("key", "csr", "ext"))
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        openssl("req", "-new", "-key", key, "-subj", subject, "-out", csr)
        ext.write_text(f"basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n{extension}\n")
        openssl("x509", "-req", "-in", csr, "-CA", self.pki / "ca.crt", "-CAkey", self.pki / "ca.key", "-CAcreateserial", "-days", "30",
                "-sha256", "-extfile", ext, "-out", self.pki / f"{name}.crt")

    def kubeconfig(self, name):
        def data(file):
            return base64.b64encode((self.pki / file).read_bytes()).decode()
        (self.dir / f"{name}.kubeconfig").write_text(f"""apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "{self.server}", certificate-authority-data: {data('ca.crt')}}}}}]
users: [{{name: {name}, user: {{client-certificate-data: {data(name + '.crt')}, client-key-data: {data(name + '.key')}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {name}, namespace: default}}}}]
current-context: test
""")

    def make_certificates(self):
        self.pki.mkdir(parents=True)
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.pki / "ca.key")
        openssl("req", "-x509", "-new", "-key", self.pki / "ca.key", "-sha256", "-days", "30", "-subj", "/CN=test-ca", "-out", self.pki / "ca.crt",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # basicConstraints CA:TRUE is the default of -x509
        self.sign("apiserver", "/CN=kube-apiserver",
                  f"subjectAltName=DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:{real.CONTROL_PLANE}")
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.pki / "sa.key")
        users = [("admin", "/O=system:masters/CN=admin", ""), ("kube-controller-manager", "/CN=system:kube-controller-manager", ""),
                 ("kube-scheduler", "/CN=system:kube-scheduler", "")]
        if self.state["nodes"]:
            users.append(("kube-proxy", "/CN=system:kube-proxy", ""))
        for node in self.nodes_of():  # the certificate serves too: logs, exec and port-forward come from the API server
            users.append((node.name, f"/O=system:nodes/CN=system:node:{node.name}", f"subjectAltName=DNS:{node.name},IP:{node.ip}"))
        for name, subject, extension in users:
            self.sign(name, subject, extension)
            self.kubeconfig(name)

    # -- processes

    @property
    def address(self):
        return real.CONTROL_PLANE if self.state["nodes"] else "127.0.0.1"

    @property
    def server(self):
        return f"https://{self.address}:{self.state['ports']['kube-apiserver']}"

    def nodes_of(self):
        return [real.Node(self, i + 1) for i in range(self.state["nodes"])]

    def node(self, name):
        """The real node of that name, or None."""
        return next((node for node in self.nodes_of() if node.name == name), None)

    def command(self, name):
        ports, pki = self.state["ports"], self.pki
        etcd = f"http://127.0.0.1:{ports['etcd']}"
        own = str(self.dir / f"{name}.kubeconfig")
        if name == NETWORK:
            return ["unshare", "--net", "sleep", "infinity"]
        by_kubelet = [f"--kubelet-client-certificate={pki}/admin.crt", f"--kubelet-client-key={pki}/admin.key",
                      f"--kubelet-certificate-authority={pki}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
                      "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"]
        # Loopback addresses are refused as endpoints of the Service "kubernetes", which nobody uses where there are no pods.
        without = ["--authorization-mode=RBAC", "--endpoint-reconciler-type=none"]
        # fakelet renews node leases every 15 s. A real kubelet does so every 2 s, and its silence is found after 8 instead of 40 s.
        grace = ["--node-monitor-period=1s", "--node-monitor-grace-period=8s"] if self.state["nodes"] else ["--node-monitor-grace-period=50s"]
        return [str(self.binaries / name)] + {
            "etcd": lambda: [
                "--data-dir", self.dir / "etcd", "--unsafe-no-fsync", "--log-level", "warn", "--listen-client-urls", etcd,
                "--advertise-client-urls", etcd, "--listen-peer-urls", f"http://127.0.0.1:{ports['peer']}"],
            "kube-apiserver": lambda: [
                f"--bind-address={'0.0.0.0' if self.state['nodes'] else '127.0.0.1'}", f"--advertise-address={self.address}",
                f"--secure-port={ports[name]}", f"--etcd-servers={etcd}",
                f"--client-ca-file={pki}/ca.crt", f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
                "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={pki}/sa.key",
                f"--service-account-signing-key-file={pki}/sa.key", "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true",
                "--profiling=false", *(by_kubelet if self.state["nodes"] else without), *self.state["apiserver_args"]],
            "kube-controller-manager": lambda: [
                f"--kubeconfig={own}", f"--authentication-kubeconfig={own}", f"--authorization-kubeconfig={own}",
                f"--service-account-private-key-file={pki}/sa.key", f"--root-ca-file={pki}/ca.crt", "--use-service-account-credentials=true",
                "--leader-elect=false", "--bind-address=127.0.0.1", f"--secure-port={ports[name]}",
                # The defaults of 20/s and 15 s would cost 4 s at start, and a quarter of a minute before a claim is bound.
                *grace, "--kube-api-qps=500", "--kube-api-burst=1000", "--pvclaimbinder-sync-period=1s"],
            "kube-scheduler": lambda: [
                f"--kubeconfig={own}", f"--authentication-kubeconfig={own}", f"--authorization-kubeconfig={own}", "--leader-elect=false",
                "--bind-address=127.0.0.1", f"--secure-port={ports[name]}", "--kube-api-qps=500", "--kube-api-burst=1000"],
            "fakelet": lambda: ["--kubeconfig", self.dir / "admin.kubeconfig"],
            "clusterdns": lambda: ["--kubeconfig", self.dir / "admin.kubeconfig", "--listen", f"{real.DNS}:53"],
        }[name]()

    @staticmethod
    def birth(pid):
        """Start time of a process in ticks, so that a recycled pid is never taken for ours. None: it is not there."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else int(fields[19])

    def pid(self, name):
        try:
            pid, born = map(int, (self.dir / f"{name}.pid").read_text().split())
        except (OSError, ValueError):
            return None
        return pid if self.birth(pid) == born else None

    def run(self, name):
        if self.pid(name):
            return
        if node := self.node(name):
            return node.up()
        self.spawn(name, self.command(name), {**os.environ, "NO_PROXY": "*"})

    def spawn(self, name, command, environment):
        with open(self.dir / f"{name}.log", "ab") as log:
            process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment)
        (self.dir / f"{name}.pid").write_text(f"{process.pid} {self.birth(process.pid)}")
        return process.pid

    def enter(self):
        """Brings this process, and what it starts from now on, into the cluster's network. Without real nodes it is there already."""
        if self.state["nodes"]:
            real.enter_network(self.pid(NETWORK))

    def signal(self, name, number):
        pid = self.pid(name)
        if not pid:
            fail(f"{name} is not running")
        if node := self.node(name):
            return node.signal(number)
        os.kill(pid, number)
        return pid

    def end(self, name):
        pid = self.pid(name)
        if not pid:
            return
        os.kill(pid, signal.SIGKILL)  # nothing is worth saving; SIGTERM makes an API server wait for its watches
        deadline = time.monotonic() + 20
        while self.pid(name):
            if time.monotonic() > deadline:
                fail(f"{name} (pid {pid}) does not end")
            time.sleep(0.02)

    def kill(self, name):
        """Ends a component at once; a real node loses its power."""
        if node := self.node(name):
            node.kill()
        else:
            self.end(name)

    def execute(self, node, command):
        """Becomes `command`, in the cluster's network or on a real node."""
        environment = {**os.environ, "KUBECONFIG": str(self.dir / "admin.kubeconfig"), "PATH": f"{self.binaries}:{os.environ['PATH']}:{real.PATHS}"}
        if node:
            command = ["nsenter", f"--target={self.node(node).processes()[0]}", "--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd", *command]
        os.execvpe(command[0], command, environment)

    # -- the API, only for readiness and fake nodes

    def opener(self):
        context = ssl.create_default_context(cafile=self.pki / "ca.crt")
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))

    def call(self, path, body=None, timeout=10):
        request = urllib.request.Request(self.server + path, data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json"})
        with self.opener().open(request, timeout=timeout) as answer:
            return answer.read().decode()

    def wait(self, what, timeout_s, name, ready):
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if ready():
                    return
                error = "not yet"
            except OSError as e:
                error = str(e)
            if not self.pid(name) or time.monotonic() > deadline:
                log = (self.dir / f"{name}.log").read_text(errors="replace").splitlines()[-15:]
                fail(f"{what}: {error}; end of {name}'s log:\n" + "\n".join(log))
            time.sleep(0.05)

    def ready(self):
        self.wait("API server", START_TIMEOUT_S, "kube-apiserver", lambda: self.call("/readyz") == "ok")

    def start(self, names, apiserver_args, nodes=0, images=(), owner=None):
        """With real nodes the calling process is in the cluster's network afterwards. `images`: archives (image.py) that every node has.
        `owner`: a process with which the cluster ends, even when that is killed while this goes on."""
        if nodes and (missing := real.what_is_missing()):
            fail(f"no real nodes on this machine: {missing}")
        if nodes > real.NODES_MAX:
            fail(f"at most {real.NODES_MAX} real nodes")
        if not self.state:
            self.dir.mkdir(parents=True, exist_ok=True)
            ports = dict(zip(["peer", *ORDER], free_ports(1 + len(ORDER))))
            self.state = {"ports": ports, "apiserver_args": apiserver_args, "nodes": nodes}
            self.make_certificates()
            if nodes:
                self.make_images(images)
            self.state_file.write_text(json.dumps(self.state))
        if owner:
            self.stop_after(owner)
        if self.state["nodes"]:
            self.start_network()
            names = ["kube-controller-manager", "kube-scheduler", "clusterdns", *names]
        self.run("etcd")
        self.run("kube-apiserver")
        for node in self.nodes_of():  # beside the API server: unpacking images takes longer
            self.run(node.name)
        self.ready()
        for name in names:
            self.run(name)
        if "kube-controller-manager" in names:  # its first visible work; pods need it
            self.wait("default ServiceAccount", START_TIMEOUT_S, "kube-controller-manager",
                      lambda: '"name":"default"' in self.call("/api/v1/namespaces/default/serviceaccounts").replace(" ", ""))

        if self.state["nodes"]:
            self.wait_for_nodes()

    # -- what real nodes need

    def make_images(self, images):
        folder = self.dir / "images"
        folder.mkdir()
        for path in images:
            (folder / Path(path).name).symlink_to(Path(path).resolve())
        pause = self.dir / "pause"
        pause.mkdir()
        shutil.copy(self.binaries / "pause", pause)
        image.archive(folder / "pause.tar", ["localhost/pause:1"], pause, user="65535:65535", entrypoint=["/pause"])

    def start_network(self):
        fresh = not self.pid(NETWORK)
        self.run(NETWORK)
        deadline = time.monotonic() + 10
        while os.readlink(f"/proc/{self.pid(NETWORK)}/ns/net") == os.readlink("/proc/self/ns/net") and fresh:
            if time.monotonic() > deadline:
                fail("no network namespace")
            time.sleep(0.01)
        self.enter()
        if fresh:
            real.network_up()

    def wait_for_nodes(self):
        binding = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "node-proxier"},
                   "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
                   "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-proxy"}]}
        try:
            self.call("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
        except urllib.error.HTTPError as e:
            if e.code != 409:
                raise
        for node in self.nodes_of():
            self.wait_for_node(node.name)

    def wait_for_node(self, name, status="True", timeout_s=START_TIMEOUT_S):
        """Until its condition Ready is `status`: True, False or Unknown."""
        def reached():
            conditions = json.loads(self.call(f"/api/v1/nodes/{name}"))["status"].get("conditions", [])
            return any(c["type"] == "Ready" and c["status"] == status for c in conditions)
        self.wait(f"{name} Ready={status}", timeout_s, "kube-apiserver", reached)

    # --

    def stop_after(self, owner):
        """A detached process that waits for `owner` to end: a test that is killed leaves nothing behind."""
        born = self.birth(owner)
        if os.fork():
            return
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        while self.dir.exists():
            if born is None or self.birth(owner) != born:
                self.stop()
            time.sleep(0.5)
        os._exit(0)

    def stop(self):
        for node in self.nodes_of() if self.state else []:
            if self.dir.exists():
                node.kill()
        for name in [*reversed(ORDER), NETWORK]:
            if self.dir.exists():
                self.end(name)
        shutil.rmtree(self.dir, ignore_errors=True)

    def nodes(self, count):
        size = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": "16"}
        for i in range(count):
            self.call("/api/v1/nodes", {
                "apiVersion": "v1", "kind": "Node", "status": {"allocatable": size, "capacity": size},
                "metadata": {"name": f"fake-{i:03d}",
                             "labels": {"fake-node": "true", "kubernetes.io/hostname": f"fake-{i:03d}"}}})

        def all_ready():
            items = json.loads(self.call("/api/v1/nodes"))["items"]
            conditions = [c for node in items for c in node["status"].get("conditions", [])]
            return sum(c["type"] == "Ready" and c["status"] == "True" for c in conditions) >= count
        self.wait(f"{count} nodes", START_TIMEOUT_S, "fakelet", all_ready)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["start", "stop", "kill", "freeze", "thaw", "run", "cut", "join", "nodes", "exec", "env"])
    parser.add_argument("dir")
    parser.add_argument("argument", nargs="*")
    parser.add_argument("--with", dest="extra", default="", help="components beside etcd and kube-apiserver, by commas")
    parser.add_argument("--nodes", type=int, default=0)
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--apiserver-arg", action="append", default=[])
    parser.add_argument("--owner", type=int)
    parser.add_argument("--on", default="")
    own, _, command = "\0".join(sys.argv[1:]).partition("\0--\0")  # the command of exec has options of its own
    args = parser.parse_intermixed_args(own.split("\0"))
    cluster = Cluster(args.dir)
    if args.verb == "stop":
        return cluster.stop()
    if args.verb == "start":
        names = [n for n in args.extra.split(",") if n]
        if not set(names) <= set(ORDER):
            fail(f"unknown component in --with {args.extra}")
        cluster.start(names, args.apiserver_arg, args.nodes, args.image, args.owner)
        print(cluster.dir / "admin.kubeconfig", flush=True)
        return None
    if not cluster.state:
        fail(f"no cluster in {cluster.dir}")
    cluster.enter()
    name = args.argument[0] if args.argument else ""
    if args.verb == "env":
        print(f"KUBECONFIG={cluster.dir}/admin.kubeconfig\nSERVER={cluster.server}")
        for name in [*ORDER, *(node.name for node in cluster.nodes_of())]:
            if cluster.pid(name):
                print(f"PID_{name.replace('-', '_').upper()}={cluster.pid(name)}")
    elif args.verb == "nodes":
        cluster.nodes(int(name))
    elif args.verb == "exec":
        cluster.execute(args.on, command.split("\0"))
    elif name not in ORDER and not cluster.node(name):
        fail(f"{args.verb} what? One of {', '.join(ORDER)}, or a real node")
    elif args.verb == "run":
        cluster.run(name)
        if name in ("etcd", "kube-apiserver"):
            cluster.ready()
        elif cluster.node(name):
            cluster.wait_for_node(name)
    elif args.verb == "kill":
        cluster.kill(name)
    elif args.verb in ("cut", "join"):
        if not cluster.node(name):
            fail(f"{name} has no cable")
        cluster.node(name).cable({"cut": "down", "join": "up"}[args.verb])
    else:
        cluster.signal(name, {"freeze": signal.SIGSTOP, "thaw": signal.SIGCONT}[args.verb])


if __name__ == "__main__":
    main()
