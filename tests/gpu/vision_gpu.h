// tests/gpu/vision_gpu.h — the job `stage_gpu vision`: the fused vision tower against the reference, and how long both take.
#pragma once

namespace qwen {

// The 30B's tower with generated weights, several images and videos together (in one pass, and cut into small ones), against the
// reference tower one by one in float32 on the same GPU; that one against the CPU. Returns how many comparisons failed.
int CheckVision();
// The same tower: milliseconds and images a second, the reference one by one and the fused tower, and of some parts.
void BenchVision();

}  // namespace qwen
