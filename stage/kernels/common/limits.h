// stage/kernels/common/limits.h — the sizes that kernels are compiled for. Each limit is declared here and nowhere else.
#pragma once

namespace qwen::kernels {

constexpr int kHeadDim = 128;          // every released Qwen3-VL text model
constexpr int kMaxExperts = 256;       // 128 in the released models
constexpr int kMaxExpertsPerToken = 16;  // 8 in the released models
constexpr int kDecodeTokensMax = 32;   // tokens of one skinny linear launch: beyond it a tiled GEMM is faster

}  // namespace qwen::kernels
