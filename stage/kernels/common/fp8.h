// stage/kernels/common/fp8.h — block-FP8 weights as the kernels hold them. Host and device; no CUDA call.
//
// A matrix (rows, columns) keeps its E4M3 codes, one byte each, and one float32 scale a block of 128 x 128; weight = code * scale,
// rounded to bf16 where it meets an activation. That is the reference's rounding (docs/numerics.md, section 1: multiplied out on
// load), so a kernel on FP8 weights computes what the same kernel computes on the reference's bf16 weights.
//
// Order of the codes. Within 16 neighbours of a row they lie as a tensor core's operand wants them: word t holds columns
// 2t, 2t+1, 2t+8, 2t+9, which is what thread t of a quad holds of mma.m16n8k16 and of wgmma's A. So one load of 4 bytes, or a row of
// ldmatrix, is one step of k16. A lane with 16 bytes of its own has 16 neighbours, whose activations lie as two uint4.
// Scales: (rows / 128, stride) with the stride of Fp8ScaleStride, so that 8 neighbours (1,024 columns) are an aligned 32 bytes.
#pragma once
#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "stage/kernels/common/host_device.h"

namespace qwen::kernels {

constexpr int kFp8Block = 128;  // rows and columns of a scale
constexpr int kFp8Group = 16;   // columns that change places among themselves

struct Fp8 {  // one code; names the type of weights in templates
  uint8_t code;
};
// codes: packed as above, 16-byte aligned, columns % 128 == 0, rows % 128 == 0; scales: as above, 32-byte aligned.
struct Fp8Matrix {
  const Fp8* codes = nullptr;
  const float* scales = nullptr;
};

constexpr int Fp8ScaleStride(int columns) { return ((columns + kFp8Block - 1) / kFp8Block + 7) / 8 * 8; }
// Where column k of 16 lies among 16 packed bytes.
constexpr int Fp8PlaceOf(int k) { return k % 8 / 2 * 4 + k / 8 * 2 + k % 2; }

// Index into the scales of a matrix of `columns` columns: of the block that holds (row, column).
QP_HOST_DEVICE size_t Fp8ScaleAt(size_t row, int column, int columns) { return row / kFp8Block * ((columns + 1023) / 1024 * 8) + column / kFp8Block; }

// Byte of a tile in shared memory, as the tensor memory accelerator lays rows of kRowBytes (128 or 64) in the swizzle of that width: 16
// bytes of `row` that begin at 16 * piece. The tile begins at a multiple of 1,024.
template <int kRowBytes>
QP_HOST_DEVICE uint32_t SwizzledAt(int row, int piece) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return static_cast<uint32_t>(row * kRowBytes + (piece ^ (kRowBytes == 128 ? row % 8 : row / 2 % 4)) * 16);
}
// What a lane asks ldmatrix for, so that a warp gets 16 rows of two neighbouring groups of 16 packed codes: its registers are then row g and
// row g+8 of the first group, and of the second.
QP_HOST_DEVICE int OperandRow(int lane) { return lane / 8 % 2 * 8 + lane % 8; }
QP_HOST_DEVICE int OperandPiece(int lane) { return lane / 16; }

struct Fp8Words {
  uint32_t word[4];
};
// 16 codes in the order of columns -> packed, and back.
QP_HOST_DEVICE Fp8Words PackFp8(const Fp8Words& plain) {
  const uint32_t* w = plain.word;
  return {{(w[0] & 0xFFFFu) | (w[2] << 16), (w[0] >> 16) | (w[2] & 0xFFFF0000u), (w[1] & 0xFFFFu) | (w[3] << 16), (w[1] >> 16) | (w[3] & 0xFFFF0000u)}};
}
QP_HOST_DEVICE Fp8Words UnpackFp8(const Fp8Words& packed) {
  const uint32_t* w = packed.word;
  return {{(w[0] & 0xFFFFu) | (w[1] << 16), (w[2] & 0xFFFFu) | (w[3] << 16), (w[0] >> 16) | (w[1] & 0xFFFF0000u), (w[2] >> 16) | (w[3] & 0xFFFF0000u)}};
}

// An E4M3 code as a float: exact; 0x7F and 0xFF are NaN. For the host: on the device the conversion is an instruction.
inline float Fp8ToFloat(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  if (exponent == 15 && fraction == 7) return __builtin_nanf("");
  const float magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-9f : static_cast<float>(8 + fraction) * 0x1p-10f * static_cast<float>(1 << exponent);
  return code & 0x80 ? -magnitude : magnitude;
}

struct Bf16Pairs {
  uint32_t low, high;  // of a word: its columns 2t, 2t+1 and its columns 2t+8, 2t+9, the lower column in the lower half
};
// Four codes times their block's scale, in float32, each rounded once to bf16.
QP_HOST_DEVICE Bf16Pairs MultiplyOut(uint32_t word, float scale) {
#ifdef __CUDA_ARCH__
  uint32_t half[2], pair[2];
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}" : "=r"(half[0]), "=r"(half[1]) : "r"(word));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&half[i]));
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(values.x * scale, values.y * scale);
    pair[i] = *reinterpret_cast<const uint32_t*>(&rounded);
  }
  return {pair[0], pair[1]};
#else
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat16_raw rounded = __float2bfloat16_rn(Fp8ToFloat(static_cast<uint8_t>(word >> 8 * i)) * scale);
    bits[i] = rounded.x;
  }
  return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
#endif
}

}  // namespace qwen::kernels
