// tests/gpu/sampler_gpu.h — the job `stage_gpu sampler`: sampling on the device against the host's pipeline, and how long both take.
#pragma once

namespace qwen {

// The same logits and plans through a sampler with the device and one without: rows of noise, ties and peaks under many parameters, and a
// small model on the fused backend that runs ahead. Tokens must be equal. Returns how many comparisons failed.
int CheckSampler();
// Milliseconds of a sampling step at the vocabulary of Qwen3, on the device and on the host.
void BenchSampler();

}  // namespace qwen
