#include <cuda_fp8.h>

#include "tests/kernels/fp8_weights.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

__device__ uint64_t Mix(uint64_t z) {  // splitmix64
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

__global__ void NoiseKernel(__nv_bfloat16* data, size_t count, float scale, uint64_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const uint64_t bits = Mix(seed * 0x100000001b3ull + i);
    // Sum of four uniforms: variance 4/12, bounded, near enough to normal for weights.
    float sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>((bits >> (16 * j)) & 0xFFFF) / 65536.0f - 0.5f;
    data[i] = __float2bfloat16_rn(sum * 1.7320508f * scale);
  }
}

__global__ void Fp8NoiseKernel(Fp8* codes, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const uint64_t bits = Mix(seed * 0x100000001b3ull + i);
    float sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>((bits >> (16 * j)) & 0xFFFF) / 65536.0f - 0.5f;
    codes[i] = {static_cast<uint8_t>(__nv_cvt_float_to_fp8(sum * 41.6f, __NV_SATFINITE, __NV_E4M3))};
  }
}

__global__ void PackAndMultiplyOutKernel(const Fp8* plain, const float* value, const float* scales, Fp8* packed, __nv_bfloat16* bf16, int columns, int stride) {
  const size_t row = blockIdx.x;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    const size_t at = row * columns + column;
    packed[at / 16 * 16 + Fp8PlaceOf(column % 16)] = plain[at];
    bf16[at] = __float2bfloat16_rn(value[plain[at].code] * scales[row / kFp8Block * stride + column / kFp8Block]);
  }
}

__global__ void CopyKernel(const uint4* from, uint4* to, size_t count) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    to[i] = a;
    to[i + stride] = b;
    to[i + 2 * stride] = c;
    to[i + 3 * stride] = d;
  }
}

}  // namespace

void FillNoise(__nv_bfloat16* data, size_t count, float scale, uint64_t seed, cudaStream_t stream) {
  NoiseKernel<<<2048, 256, 0, stream>>>(data, count, scale, seed);
  CUDA_MUST(cudaGetLastError());
}

void FillFp8Noise(Fp8* codes, size_t count, uint64_t seed, cudaStream_t stream) {
  Fp8NoiseKernel<<<2048, 256, 0, stream>>>(codes, count, seed);
  CUDA_MUST(cudaGetLastError());
}

void PackAndMultiplyOut(const Fp8* plain, const float* value, const float* scales, Fp8* packed, __nv_bfloat16* bf16, size_t rows, int columns) {
  PackAndMultiplyOutKernel<<<static_cast<unsigned>(rows), 256>>>(plain, value, scales, packed, bf16, columns, Fp8ScaleStride(columns));
  CUDA_MUST(cudaGetLastError());
}

double TimeGraph(const std::function<void(int, cudaStream_t)>& enqueue, int calls, int replays) {
  cudaStream_t stream;
  CUDA_MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  enqueue(0, stream);
  CUDA_MUST(cudaStreamSynchronize(stream));
  CUDA_MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) enqueue(i, stream);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_MUST(cudaStreamEndCapture(stream, &graph));
  CUDA_MUST(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CUDA_MUST(cudaEventCreate(&begin));
  CUDA_MUST(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < replays + 2; ++i) {
    CUDA_MUST(cudaEventRecord(begin, stream));
    CUDA_MUST(cudaGraphLaunch(exec, stream));
    CUDA_MUST(cudaEventRecord(end, stream));
    CUDA_MUST(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_MUST(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) seconds.push_back(ms / 1e3 / calls);
  }
  CUDA_MUST(cudaGraphExecDestroy(exec));
  CUDA_MUST(cudaGraphDestroy(graph));
  CUDA_MUST(cudaEventDestroy(begin));
  CUDA_MUST(cudaEventDestroy(end));
  CUDA_MUST(cudaStreamDestroy(stream));
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

double CopyBandwidth() {
  static const double value = [] {
    const size_t bytes = size_t{2} << 30;
    DeviceBuffer<uint8_t> from(bytes), to(bytes);
    return 2.0 * bytes / TimeGraph([&](int, cudaStream_t s) {
      CopyKernel<<<132 * 16, 512, 0, s>>>(reinterpret_cast<const uint4*>(from.get()), reinterpret_cast<uint4*>(to.get()), bytes / 16);
    }, 8);
  }();
  return value;
}

void PrintRow(const std::string& name, double seconds, double bytes) {
  std::printf("{\"suite\":\"kernels\",\"case\":\"%s\",\"us\":%.2f,\"GBps\":%.0f,\"share\":%.3f}\n", name.c_str(), seconds * 1e6, bytes / seconds / 1e9,
              bytes / seconds / CopyBandwidth());
  std::fflush(stdout);
}

void PrintProductRow(const std::string& name, double seconds, double bytes, double flop) {
  const double bound = std::max(bytes / CopyBandwidth(), flop / 750e12);
  std::printf("{\"suite\":\"kernels\",\"case\":\"%s\",\"us\":%.2f,\"GBps\":%.0f,\"TFLOPs\":%.0f,\"share\":%.3f}\n", name.c_str(), seconds * 1e6,
              bytes / seconds / 1e9, flop / seconds / 1e12, bound / seconds);
  std::fflush(stdout);
}

}  // namespace qwen::kernels::testing
