// stage/kernels/vision.h — what stands around the vision tower's products and attention: the position table resampled to each
// patch's grid, and the 2-D rotation of q and k. Both take patches of several images and frames, one after the other.
// Each enqueues one kernel on `stream`, never synchronises, safe in graph capture. Roundings: docs/numerics.md, section 2.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

// Where a patch lies in its frame, and the frame's size in patches. 0 <= row < height, 0 <= column < width.
struct alignas(16) PatchPlace {
  int32_t row = 0, column = 0, height = 0, width = 0;
};

// hidden: (patches, width) bf16, in place: hidden[p] += the bilinear mean of four rows of table, both roundings the reference's.
//   table: (side * side, width) bf16, corners on the corners of the frame: source = index * (side - 1) / max(size - 1, 1)
//   bytes moved: 4 * patches * width (the table stays in the L2 cache)      REQUIRES: width % 8 == 0, rows 16-byte aligned
struct VisionPositionArgs {
  const PatchPlace* places = nullptr;
  const __nv_bfloat16* table = nullptr;
  __nv_bfloat16* hidden = nullptr;
  int64_t patches = 0;
  int side = 0, width = 0;
};
cudaError_t VisionPosition(const VisionPositionArgs& args, cudaStream_t stream);

// qkv: (patches, 3, heads, head_dim) bf16; q and k are rotated in place in float32, rounded once; v is not touched. Halves
// (i, i + head_dim / 2) turn together; pair i follows the row for i < head_dim / 4, the column beyond.
//   cosines, sines: (sides, head_dim / 4) float32, of index * frequency      sides: more than any row or column
//   bytes moved: 8 * patches * heads * head_dim      REQUIRES: head_dim % 8 == 0, head_dim <= 256, rows 8-byte aligned
struct VisionRopeArgs {
  const PatchPlace* places = nullptr;
  const float* cosines = nullptr;
  const float* sines = nullptr;
  __nv_bfloat16* qkv = nullptr;
  int64_t patches = 0;
  int heads = 0, head_dim = 0;
};
cudaError_t VisionRope(const VisionRopeArgs& args, cudaStream_t stream);

}  // namespace qwen::kernels
