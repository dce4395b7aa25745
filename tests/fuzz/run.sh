#!/usr/bin/env bash
# run.sh TARGET CORPUS SECONDS: fuzzes for that long from the committed seeds; new inputs stay in a temporary folder.
# A finding (crash, leak, timeout of one input over 10 s, more than 2 GiB) fails and names the input that shows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -x "$1" ] || { echo "$1 is not built: make build-fuzz"; exit 1; }
mkdir -p "$work/corpus"
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ASAN_OPTIONS=allocator_may_return_null=1 \
  "$1" -max_total_time="$3" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="${QP_FUZZ_ARTIFACTS:-/tmp/}" \
  "$work/corpus" "$2"
