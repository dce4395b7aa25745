"""Real nodes for cluster.py: each is a "machine" of its own namespaces (network, mounts, processes, host name) in which containerd,
kube-proxy and a kubelet run, joined to the control plane's network by one cable. Its pid 1 ends with SIGKILL as a machine does when
its power is cut: everything in it is gone at once and nobody is told.

Nothing can leave: the control plane's network is a namespace too, and none has a link or a route to the outside. All of it is
per cluster, so several run side by side with the same addresses. Needs root, cgroups, and what `cmake/deps.sh kube` installs.
"""
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

CONTROL_PLANE = "10.200.0.1"
SERVICES, PODS, DNS = "10.96.0.0/16", "10.244.0.0/16", CONTROL_PLANE
NODES_MAX = 4
CLONE_NEWNET = 0x40000000
NEEDED = ["containerd", "ctr", "runc", "nft", "ip", "unshare", "nsenter", "mount"]
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a kubelet writes into the kernel of the whole machine: its nodes see files of their own in place of these.
KERNEL = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"]

CONTAINERD = """version = 2
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
                    "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""

# pid 1 of a node, in two steps. First: a root that is a mount point, as pivot_root of every container wants it, also where this
# machine's own root is a chroot; and the files that are the node's.
BOOT = """set -eu
mount --make-rprivate / 2>/dev/null || true  # in a chroot / is no mount point; unshare has done it then
mount --rbind / {d}/root
mount -t proc proc {d}/root/proc
exec chroot {d}/root /bin/bash {d}/init.sh
"""
INIT = """set -eu
hostname {name}
mount --make-rshared /
own() {{ mkdir -p "$1" "{d}/disk$1"; mount --bind "{d}/disk$1" "$1"; }}
for path in /var/lib/kubelet /var/lib/containerd /var/lib/cni /var/log/pods /etc/cni; do own $path; done
mount --make-shared /var/lib/kubelet
case $(stat -f -c %T {d}) in overlay*) mount -t tmpfs tmpfs /var/lib/containerd ;; esac  # an overlay cannot lie on another; images come anew then
mkdir -p /etc/cni/net.d; cp {d}/cni.conflist /etc/cni/net.d/10-test.conflist
for path in /run/containerd /run/netns /var/log/containers; do mkdir -p $path; mount -t tmpfs tmpfs $path; done
for file in {kernel}; do
  if [ -e /proc/sys/$file ]; then
    mkdir -p {d}/kernel/$(dirname $file); cat /proc/sys/$file >{d}/kernel/$file
    mount --bind {d}/kernel/$file /proc/sys/$file
  fi
done
until ip -4 address show eth0 2>/dev/null | grep -q inet; do sleep 0.02; done
containerd -c {d}/containerd.toml >>{d}/containerd.log 2>&1 &
for try in $(seq 300); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done
for image in {images}/*.tar; do
  grep -qxF "$image" /var/lib/containerd/imported 2>/dev/null && continue
  ctr -n k8s.io images import --no-unpack=false "$image" >>{d}/import.log 2>&1 || ctr -n k8s.io images import "$image" >>{d}/import.log 2>&1
  echo "$image" >>/var/lib/containerd/imported
done
{bin}/kube-proxy --kubeconfig={kubeconfigs}/kube-proxy.kubeconfig --hostname-override={name} --proxy-mode=nftables --cluster-cidr={pods} \\
  --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0 >>{d}/kube-proxy.log 2>&1 &
while :; do
  {bin}/kubelet --config={d}/kubelet.yaml --kubeconfig={kubeconfigs}/{name}.kubeconfig --hostname-override={name} --node-ip={ip} >>{d}/kubelet.log 2>&1 || true
  sleep 1
done
"""


def what_is_missing():
    """Why this machine cannot run nodes; empty: it can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [name for name in NEEDED if not shutil.which(name, path=PATHS)]
    if missing:
        return f"not installed: {' '.join(missing)} (cmake/deps.sh kube)"
    done = subprocess.run(["unshare", "--net", "--mount", "--propagation=unchanged", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                           "ip", "link", "add", "probe", "type", "bridge"], capture_output=True, text=True)
    if done.returncode:
        return f"no namespaces: {done.stderr.strip()}"
    probe = Path("/sys/fs/cgroup") / ("memory" if Path("/sys/fs/cgroup/memory").is_dir() else "") / f"qwen-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as e:
        return f"no cgroups: {e}"
    return ""


def enter_network(pid):
    """Moves the calling thread, and what it starts from now on, into the network of process `pid`."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def network_up():
    """In the control plane's fresh network: the switch that all cables lead to, and the router between the nodes' pods."""
    run("sh", "-ec", f"""ip link set lo up; ip link add nodes type bridge; ip address add {CONTROL_PLANE}/24 dev nodes; ip link set nodes up
        ip route add {SERVICES} dev nodes; echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/nodes/send_redirects""")


class Node:
    def __init__(self, cluster, index):
        self.cluster, self.index = cluster, index
        self.name, self.ip, self.subnet = f"node{index}", f"10.200.0.{10 + index}", f"10.244.{index}.0/24"
        self.dir = cluster.dir / self.name
        tag = hashlib.sha256(f"{cluster.dir} {os.stat('/').st_ino}".encode()).hexdigest()[:8]
        self.cgroup = f"qwen-{tag}/{self.name}"

    # -- cgroups: a folder of its own in every hierarchy, because the kubelets must not see each other's pods

    def cgroups(self):
        top = Path("/sys/fs/cgroup")
        return [top] if (top / "cgroup.controllers").exists() else [p for p in top.iterdir() if p.is_dir() and not p.is_symlink() and p.name != "unified"]

    def make_cgroups(self):
        for top in self.cgroups():
            (top / self.cgroup).mkdir(parents=True, exist_ok=True)
            for folder in (top, (top / self.cgroup).parent):
                if (top / "cgroup.controllers").exists():
                    for controller in (folder / "cgroup.controllers").read_text().split():
                        try:
                            (folder / "cgroup.subtree_control").write_text("+" + controller)
                        except OSError:
                            pass  # a controller that cannot be handed on; the kubelet names the one it misses
            for file in ("cpuset.cpus", "cpuset.mems"):  # version 1 makes them empty, and nothing can run in an empty one
                if top.name == "cpuset":
                    for folder in ((top / self.cgroup).parent, top / self.cgroup):
                        (folder / file).write_text((top / file).read_text())

    def remove_cgroups(self):
        unified = Path("/sys/fs/cgroup/unified")  # runc mirrors every container there
        for top in [*self.cgroups(), *([unified] if unified.is_dir() else [])]:
            for _ in range(50):
                if not (top / self.cgroup).exists():
                    break
                for folder, _, _ in os.walk(top / self.cgroup, topdown=False):
                    try:
                        os.rmdir(folder)
                    except OSError:
                        time.sleep(0.02)  # its processes are not all gone yet
            try:
                (top / self.cgroup).parent.rmdir()
            except OSError:
                pass  # another node's is in it

    # -- power

    def write_files(self):
        d = self.dir
        (d / "root").mkdir(parents=True, exist_ok=True)
        (d / "disk").mkdir(exist_ok=True)
        (d / "resolv.conf").write_text("")
        (d / "containerd.toml").write_text(CONTAINERD)
        (d / "cni.conflist").write_text(json.dumps({"cniVersion": "0.4.0", "name": "test", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isDefaultGateway": True, "ipMasq": False, "hairpinMode": True,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": self.subnet}]]}}, {"type": "portmap", "capabilities": {"portMappings": True}}]}))
        pki = self.cluster.pki
        (d / "kubelet.yaml").write_text(json.dumps({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": f"{pki}/ca.crt"}},
            "authorization": {"mode": "Webhook"}, "tlsCertFile": f"{pki}/{self.name}.crt", "tlsPrivateKeyFile": f"{pki}/{self.name}.key",
            "cgroupDriver": "cgroupfs", "cgroupRoot": "/" + self.cgroup, "failCgroupV1": False, "failSwapOn": False,
            "oomScoreAdj": 0, "maxOpenFiles": 20000,  # more needs CAP_SYS_RESOURCE
            "clusterDNS": [DNS], "clusterDomain": "cluster.local", "resolvConf": f"{d}/resolv.conf",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "nodeStatusUpdateFrequency": "2s", "nodeLeaseDurationSeconds": 8, "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%",
                             "imagefs.inodesFree": "0%"}}))
        values = {"d": d, "name": self.name, "ip": self.ip, "images": self.cluster.dir / "images", "bin": self.cluster.binaries, "pods": PODS,
                  "kubeconfigs": self.cluster.dir, "kernel": " ".join(KERNEL)}
        (d / "boot.sh").write_text(BOOT.format(**values))
        (d / "init.sh").write_text(INIT.format(**values))

    def up(self):
        """Switches it on; returns when it has its network. Called in the control plane's network."""
        if self.cluster.pid(self.name):
            return
        self.write_files()
        self.make_cgroups()
        mine = os.readlink("/proc/self/ns/net")
        pid = self.cluster.spawn(self.name, ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                                             "--propagation=unchanged", "bash", self.dir / "boot.sh"], {"PATH": PATHS, "HOME": "/root"})
        deadline = time.monotonic() + 10
        while os.readlink(f"/proc/{pid}/ns/net") == mine:
            if time.monotonic() > deadline:
                raise OSError(f"{self.name} gets no network")
            time.sleep(0.01)
        cable = f"cable{self.index}"
        subprocess.run(["ip", "link", "delete", cable], capture_output=True)  # of a life before; goes by itself a moment later
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", pid)
        run("ip", "link", "set", cable, "master", "nodes", "up")
        run("ip", "route", "replace", self.subnet, "via", self.ip)
        run("nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-ec", f"""ip link set lo up; ip link set eth0 up
            echo 1 >/proc/sys/net/ipv4/ip_forward; for f in all eth0; do echo 0 >/proc/sys/net/ipv4/conf/$f/accept_redirects; done
            ip address add {self.ip}/24 dev eth0; ip route add {PODS} via {CONTROL_PLANE}; ip route add {SERVICES} via {CONTROL_PLANE}""")

    def cable(self, state):
        """`down` pulls it: what runs goes on running, unreachable. `up` plugs it in again."""
        run("ip", "link", "set", f"cable{self.index}", state)

    def processes(self):
        """All of it, its containers too: pid 1 and its descendants."""
        children = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit():
                    children.setdefault(int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]), []).append(int(entry.name))
            except OSError:
                pass  # ended meanwhile
        found = list(children.get(self.cluster.pid(self.name), []))
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def signal(self, number):
        for _ in range(2):  # what was forked while the first round went on
            for pid in self.processes():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass

    def kill(self):
        """Cuts its power, and waits until nothing of it is left but its disk."""
        before = {pid: self.cluster.birth(pid) for pid in self.processes()}
        for pid in list(before)[:1]:
            os.kill(pid, signal.SIGKILL)
        self.cluster.end(self.name)
        deadline = time.monotonic() + 20
        while any(born is not None and self.cluster.birth(pid) == born for pid, born in before.items()):
            if time.monotonic() > deadline:
                raise OSError(f"{self.name} does not end")
            time.sleep(0.02)
        self.remove_cgroups()

    def execute(self, *command, **options):
        """Runs a command on the node and returns subprocess's result."""
        first = self.processes()[0]
        return subprocess.run(["nsenter", f"--target={first}", "--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd", *map(str, command)],
                              capture_output=True, text=True, **options)

    def inside(self, function):
        """Calls function() with this node's network, where Services have addresses, and returns its result."""
        box = {}
        node_pid = self.cluster.pid(self.name)

        def call():
            try:
                enter_network(node_pid)
                box["value"] = function()
            except BaseException as e:  # handed to the caller below
                box["error"] = e
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join()
        if "error" in box:
            raise box["error"]
        return box["value"]

    def programs(self, pattern):
        """[(pid, environment)] of processes on the node whose program's name matches: what really runs, whatever the API says."""
        found = []
        for pid in self.processes():
            try:
                if re.fullmatch(pattern, Path(f"/proc/{pid}/comm").read_text().strip()):
                    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                    found.append((pid, dict(p.split("=", 1) for p in pairs if "=" in p)))
            except OSError:
                pass  # ended meanwhile
        return found
