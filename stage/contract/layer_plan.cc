#include "stage/contract/layer_plan.h"

#include <charconv>
#include <cmath>
#include <limits>

namespace qwen::contract {
namespace {

// Tokens of one decode microbatch at which the stages are balanced. At 235B 8 tokens touch 52 of 128 experts; with fewer,
// lm_head would weigh more layers than it does in a server that is worth balancing, with more it would weigh nothing.
constexpr double kBalanceTokens = 8;

struct LinearBytes {
  Dtype dtype;
  int64_t element;  // of what is never quantised: norms, biases, router, embeddings, vision
  QuantizationShape block;
  // A weight (rows, columns), `count` of them. Block scales are bf16, one per started block.
  int64_t operator()(int64_t rows, int64_t columns, int64_t count = 1) const {
    if (dtype != Dtype::kFloat8E4M3) return count * rows * columns * element;
    const int64_t blocks = ((rows + block.block_rows - 1) / block.block_rows) * ((columns + block.block_columns - 1) / block.block_columns);
    return count * (rows * columns + blocks * 2);
  }
};

LinearBytes LinearOf(const ModelShape& shape, Dtype dtype) {
  const int64_t element = dtype == Dtype::kFloat8E4M3 ? 2 : DtypeBytes(dtype);
  return {dtype, element, shape.quantization.value_or(QuantizationShape{})};
}

// Bytes of one layer with that fraction of its experts: 1 is what must be loaded, less is what one decode step reads.
double LayerBytes(const ModelShape& s, int32_t layer, Dtype dtype, double experts_fraction) {
  const LinearBytes linear = LinearOf(s, dtype);
  const int64_t q = int64_t{s.heads} * s.head_dim, kv = int64_t{s.kv_heads} * s.head_dim;
  int64_t bytes = linear(q, s.hidden) + 2 * linear(kv, s.hidden) + linear(s.hidden, q);
  bytes += linear.element * (2 * int64_t{s.head_dim} + 2 * int64_t{s.hidden});              // q_norm, k_norm; two layer norms
  if (s.attention_bias) bytes += linear.element * (q + 2 * kv + s.hidden);
  if (!s.IsMoeLayer(layer)) return static_cast<double>(bytes + 2 * linear(s.intermediate, s.hidden) + linear(s.hidden, s.intermediate));
  const MoeShape& moe = *s.moe;
  bytes += linear.element * moe.experts * s.hidden;  // router
  const int64_t expert = linear(2 * int64_t{moe.intermediate}, s.hidden) + linear(s.hidden, moe.intermediate);
  return static_cast<double>(bytes) + experts_fraction * static_cast<double>(moe.experts * expert);
}

int64_t VisionBytes(const ModelShape& s, Dtype dtype) {
  if (!s.vision) return 0;
  const VisionShape& v = *s.vision;
  const int64_t h = v.hidden, merged = h * v.merge * v.merge;
  const int64_t norm = 2 * h;
  const int64_t block = 2 * norm + (3 * h * h + 3 * h) + (h * h + h) + (v.intermediate * h + v.intermediate) + (h * v.intermediate + h);
  const int64_t merger_linears = (merged * merged + merged) + (v.out_hidden * merged + v.out_hidden);
  int64_t parameters = h * v.patch_elements() + h + int64_t{v.position_table} * h + v.depth * block;
  parameters += norm + merger_linears;                                                            // merger: norm before the view
  parameters += static_cast<int64_t>(v.deepstack_layers.size()) * (2 * merged + merger_linears);  // taps: norm after the view
  return parameters * LinearOf(s, dtype).element;
}

int64_t EmbeddingBytes(const ModelShape& s, Dtype dtype) { return int64_t{s.vocab} * s.hidden * LinearOf(s, dtype).element; }

// The partition of `cost` into `stages` runs with the smallest greatest cost, and among those the smallest sum of squares.
// 94 layers on 64 stages are 2 * 94 * 94 * 64 = 1.1 M steps.
std::vector<int32_t> Balance(const std::vector<double>& cost, int32_t stages, double first_extra, double last_extra, int32_t first_minimum) {
  const int32_t layers = static_cast<int32_t>(cost.size());
  std::vector<double> prefix(layers + 1, 0.0);
  for (int32_t i = 0; i < layers; ++i) prefix[i + 1] = prefix[i] + cost[i];
  const auto stage_cost = [&](int32_t stage, int32_t begin, int32_t end) {
    return prefix[end] - prefix[begin] + (stage == 0 ? first_extra : 0.0) + (stage == stages - 1 ? last_extra : 0.0);
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double bound = kInfinity;
  std::vector<int32_t> ends(stages);
  for (const bool squares : {false, true}) {
    // best[k][end]: the best value of stages 0..k covering [0, end); from[k][end]: where stage k begins.
    std::vector<std::vector<double>> best(stages, std::vector<double>(layers + 1, kInfinity));
    std::vector<std::vector<int32_t>> from(stages, std::vector<int32_t>(layers + 1, -1));
    for (int32_t k = 0; k < stages; ++k) {
      for (int32_t end = k + 1; end <= layers - (stages - 1 - k); ++end) {
        for (int32_t begin = k; begin < end; ++begin) {
          if (k == 0 && (begin > 0 || end < first_minimum)) continue;
          const double before = k == 0 ? 0.0 : best[k - 1][begin];
          const double own = stage_cost(k, begin, end);
          if (before == kInfinity || own > bound) continue;
          const double value = squares ? before + own * own : std::max(before, own);
          if (value < best[k][end]) best[k][end] = value, from[k][end] = begin;
        }
      }
    }
    QP_CHECK(best[stages - 1][layers] < kInfinity);
    if (!squares) {
      bound = best[stages - 1][layers] * (1 + 1e-9);
      continue;
    }
    for (int32_t k = stages - 1, end = layers; k >= 0; --k) {
      ends[k] = end;
      end = from[k][end];
    }
  }
  return ends;
}

}  // namespace

std::string ToString(const LayerRange& range) { return std::to_string(range.begin) + ":" + std::to_string(range.end); }

Result<LayerRange> ParseLayerRange(std::string_view text) {
  LayerRange range;
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, range.begin);
  if (first.ec == std::errc() && first.ptr != end && *first.ptr == ':') {
    const auto second = std::from_chars(first.ptr + 1, end, range.end);
    if (second.ec == std::errc() && second.ptr == end && 0 <= range.begin && range.begin < range.end) return range;
  }
  return InvalidArgumentError("layers \"" + std::string(text.substr(0, 40)) + "\": must be FIRST:END with 0 <= FIRST < END");
}

Result<std::vector<LayerRange>> PlanLayers(const ModelShape& shape, int32_t stages, BalancePolicy policy) {
  if (stages < 1 || stages > shape.layers)
    return InvalidArgumentError("stages: must be in [1, " + std::to_string(shape.layers) + "] for " + std::to_string(shape.layers) +
                                " layers, found " + std::to_string(stages));
  std::vector<LayerRange> ranges;
  if (policy == BalancePolicy::kEvenLayers) {
    const int32_t each = shape.layers / stages, more = shape.layers % stages;
    for (int32_t k = 0, begin = 0; k < stages; ++k) {
      const int32_t end = begin + each + (k < more ? 1 : 0);
      ranges.push_back({begin, end});
      begin = end;
    }
  } else {
    const int32_t first_minimum = std::max(1, shape.deepstack_count());
    if (first_minimum + stages - 1 > shape.layers)
      return InvalidArgumentError("stages: at most " + std::to_string(shape.layers - first_minimum + 1) + ", because stage 0 holds the first " +
                                  std::to_string(first_minimum) + " layers (DeepStack), found " + std::to_string(stages));
    const Dtype dtype = shape.quantization ? Dtype::kFloat8E4M3 : shape.dtype;
    // Uniform routing: 8 tokens touch E * (1 - (1 - k/E)^8) distinct experts of a layer.
    const double touched = shape.moe ? 1.0 - std::pow(1.0 - static_cast<double>(shape.moe->experts_per_token) / shape.moe->experts, kBalanceTokens) : 1.0;
    std::vector<double> cost;
    for (int32_t i = 0; i < shape.layers; ++i) cost.push_back(LayerBytes(shape, i, dtype, touched));
    // The embedding is a gather of a few rows: no cost. ViT weights are read once per image.
    const auto first_extra = static_cast<double>(VisionBytes(shape, dtype)), last_extra = static_cast<double>(EmbeddingBytes(shape, dtype));
    int32_t begin = 0;
    for (int32_t end : Balance(cost, stages, first_extra, last_extra, first_minimum)) {
      ranges.push_back({begin, end});
      begin = end;
    }
  }
  RETURN_IF_ERROR(ValidateLayers(shape, ranges));
  return ranges;
}

Status ValidateLayers(const ModelShape& shape, const std::vector<LayerRange>& ranges) {
  if (ranges.empty()) return InvalidArgumentError("stages: there are none");
  int32_t expected = 0;
  for (size_t k = 0; k < ranges.size(); ++k) {
    const std::string where = "stage " + std::to_string(k) + " [" + ToString(ranges[k]) + ")";
    if (ranges[k].begin != expected) return InvalidArgumentError(where + ": must begin at layer " + std::to_string(expected));
    if (ranges[k].count() < 1) return InvalidArgumentError(where + ": holds no layer");
    if (ranges[k].end > shape.layers) return InvalidArgumentError(where + ": the model has only " + std::to_string(shape.layers) + " layers");
    expected = ranges[k].end;
  }
  if (expected != shape.layers)
    return InvalidArgumentError("stage " + std::to_string(ranges.size() - 1) + ": must end at layer " + std::to_string(shape.layers) + ", found " +
                                std::to_string(expected));
  if (ranges[0].count() < shape.deepstack_count())
    return InvalidArgumentError("stage 0 [" + ToString(ranges[0]) + "): must hold the first " + std::to_string(shape.deepstack_count()) +
                                " layers, because the features of the vision tower are added after them (DeepStack)");
  return OkStatus();
}

StageWeights WeightBytes(const ModelShape& shape, const LayerRange& range, Dtype dtype) {
  QP_CHECK(0 <= range.begin && range.begin < range.end && range.end <= shape.layers) << ToString(range);
  StageWeights weights;
  for (int32_t i = range.begin; i < range.end; ++i) weights.layer_bytes += std::llround(LayerBytes(shape, i, dtype, 1.0));
  const bool first = range.begin == 0, last = range.end == shape.layers;
  if (first) {
    weights.embedding_bytes = EmbeddingBytes(shape, dtype);
    weights.vision_bytes = VisionBytes(shape, dtype);
  }
  if (last) {
    weights.head_bytes = shape.hidden * LinearOf(shape, dtype).element;                       // final norm
    if (!(first && shape.tie_embeddings)) weights.head_bytes += EmbeddingBytes(shape, dtype);  // a lone stage shares the tied matrix
  }
  return weights;
}

int64_t KvBytesPerToken(const ModelShape& shape, const LayerRange& range, Dtype kv_dtype) {
  return 2 * int64_t{range.count()} * shape.kv_heads * shape.head_dim * DtypeBytes(kv_dtype);
}

}  // namespace qwen::contract
