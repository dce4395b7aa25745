#!/usr/bin/env bash
# build.sh OUT: compiles the multi-call binary into OUT and names it after each component; and `pause`, the one process that every pod
# has beside its own. Called by `cmake/deps.sh kube`.
#
# go.mod is k8s.io/kubernetes' own list of requirements at v1.34.4 with its staging modules replaced by the released v0.34.4; go.sum
# is its go.sum. For another version take those two files from that version's module and change `version` here. Never `go mod tidy`
# (it pulls the dependencies of every test).
set -euo pipefail
out=$1
version=v1.34.4
p=k8s.io/component-base/version
minor=${version#v1.}
mkdir -p "$out"
cd "$(dirname "${BASH_SOURCE[0]}")"
CGO_ENABLED=0 go build -mod=readonly -trimpath -o "$out/kube" -ldflags "-s -w -X $p.gitVersion=$version -X $p.gitMajor=1 \
  -X $p.gitMinor=${minor%%.*} -X $p.gitTreeState=clean -X $p.gitCommit=module -X $p.buildDate=2026-01-01T00:00:00Z" .
for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl fakelet clusterdns; do ln -sf kube "$out/$name"; done
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$out/pause" pause.go
