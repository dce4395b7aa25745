#!/usr/bin/env bash
# The root file system of a stage's image: rootfs.sh with what qwen-stage opens by name on that device.
#   stage_rootfs.sh cpu|cuda DEST BUILD_DIR TORCH_SITE
set -euo pipefail
[ $# = 4 ] || { sed -n '2,3p' "${BASH_SOURCE[0]}"; exit 64; }
device=$1 dest=$2 build=$3 site=$4
opened=()
if [ "$device" = cuda ]; then
  # Our GPU part, LibTorch's, and what those open in turn: cuDNN's parts and the run-time compiler.
  opened=("$build"/lib/libqwen_*.so "$site"/torch/lib/libtorch_cuda.so "$site"/nvidia/cudnn/lib/libcudnn*.so.9
          "$site"/nvidia/cu13/lib/libnvrtc.so.13 "$site"/nvidia/cu13/lib/libnvrtc-builtins.so.13.0)
fi
exec "$(dirname "${BASH_SOURCE[0]}")"/rootfs.sh "$dest" "$build"/bin/qwen-stage ${opened[@]+--opened "${opened[@]}"}
