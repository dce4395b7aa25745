#!/usr/bin/env bash
# check_library.sh LIBRARY SITE KERNEL_TESTS: what can be known of the CUDA part without a GPU. It holds sm_90a code, exports
# each op, links torch-free, and on a machine without a device fails with CUDA's error instead of crashing.
set -euo pipefail
cuobjdump=$2/nvidia/cu13/bin/cuobjdump
[ -x "$cuobjdump" ] || cuobjdump=$(find "$2" -name cuobjdump -type f | head -1)
chmod +x "$cuobjdump"
elfs=$("$cuobjdump" --list-elf "$1")
echo "$elfs"
grep -q 'sm_90a' <<<"$elfs" || { echo "no sm_90a code in $1"; exit 1; }
symbols=$(nm -DC "$1")  # into a variable: `nm | grep -q` fails under pipefail when grep is done before nm
for op in PackFp8Weights MultiplyOutFp8 MoeGroupedGateUp MoeGroupedDown MakeMoeGroupedWeights DecodeLayers RmsNorm GatherRows RotaryTable RopeKvWrite MoePermute SiluMul MoePrefillCombine DecodeLinear MoeRoute MoeGateUp MoeDown MoeCombine AttentionDecode Sample FillSamplerState VisionPosition VisionRope; do
  grep -q " T qwen::kernels::$op(" <<<"$symbols" || { echo "$op is not exported"; exit 1; }
done
for fp8 in MoeGateUp MoeDown MakeMoeGroupedWeights; do
  grep -q " T qwen::kernels::$fp8(.*Fp8Matrix" <<<"$symbols" || { echo "$fp8 takes no FP8 weights"; exit 1; }
done
if grep -E 'NEEDED.*(torch|c10|python)' <<<"$(readelf -d "$1")"; then echo "the kernels may not need torch"; exit 1; fi
if [ ! -e /dev/nvidiactl ]; then
  out=$("$3" --gtest_filter='DecodeLinear.EqualsTheOracle' 2>&1) && { echo "passed without a GPU?"; exit 1; }
  grep -qiE 'no CUDA-capable device|driver version is insufficient' <<<"$out" || { echo "$out"; echo "not a clean error"; exit 1; }
fi
echo ok
