// A model without LibTorch: 64-bit integers for hidden states, a paged "KV cache" of integers, DeepStack taps. Any error in
// order, blocks, splits or bytes changes the tokens. The oracle next to it works on whole sequences, without blocks, spans
// or stages, and shares only the mixing function.
#pragma once
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "stage/contract/layer_plan.h"
#include "stage/worker/stage_compute.h"

namespace qwen::test {

inline constexpr int32_t kVocab = 1000;
inline constexpr int32_t kLayers = 4;
inline constexpr int32_t kTaps = 2;
inline constexpr int32_t kBlockTokens = 4;
inline constexpr int64_t kPatchesTogether = 64;  // of images in one call of AddVision

inline uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9E3779B97F4A7C15ull + b + 0x7F4A7C15u;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9ull;
  return x ^ (x >> 32);
}
// Merged feature row `row` of an image; tap -1 is what replaces the embedding.
inline uint64_t Feature(const step::VisionInput& image, int64_t row, int tap) {
  uint64_t sum = static_cast<uint64_t>(tap + 7);
  for (int64_t i = row * 4 * 1536; i < (row + 1) * 4 * 1536; ++i) sum = Mix(sum, image.patches[static_cast<size_t>(i)]);
  return sum;
}

// What the model must say after `tokens`; `image` rows stand at [image_at, image_at + rows).
inline int32_t OracleNext(const std::vector<int32_t>& tokens, const step::VisionInput* image = nullptr, int64_t image_at = 0) {
  const int64_t rows = image ? image->token_count() : 0;
  std::vector<uint64_t> h(tokens.size());
  const auto row_of = [&](size_t i) { return static_cast<int64_t>(i) - image_at; };
  const auto visual = [&](size_t i) { return image && row_of(i) >= 0 && row_of(i) < rows; };
  for (size_t i = 0; i < tokens.size(); ++i) h[i] = visual(i) ? Feature(*image, row_of(i), -1) : Mix(1, static_cast<uint64_t>(tokens[i]));
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    uint64_t prefix = 0;
    for (size_t i = 0; i < h.size(); ++i) {
      prefix += h[i];
      h[i] = Mix(prefix, static_cast<uint64_t>(layer));
      if (layer < kTaps && visual(i)) h[i] += Feature(*image, row_of(i), layer);
    }
  }
  return static_cast<int32_t>(h.back() % kVocab);
}

// Knobs that a test turns while the stage runs. Thread safety: any thread.
struct FakeControl {
  std::atomic<int> loads{0};
  std::atomic<bool> loads_for_ever{false};  // until progress says to stop
  std::atomic<int> forwards{0};
  std::atomic<int> delay_micros{0};
  std::atomic<bool> block{false};       // Forward waits until this is false again
  std::atomic<bool> blocked{false};     // and says that it waits
  std::atomic<int> fail_next{0};        // so many Forwards fail with kInvalidArgument
  std::atomic<int64_t> vision_calls{0}, vision_inputs{0};  // of AddVision
};

class FakeModel final : public worker::StageCompute {
 public:
  FakeModel(contract::LayerRange layers, int32_t block_count, std::shared_ptr<FakeControl> control)
      : layers_(layers), block_count_(block_count), control_(std::move(control)) {
    Reset();
  }
  transport::StageCapacity capacity() const override {
    return {.block_tokens = kBlockTokens, .block_count = block_count_, .max_slots = 8, .max_batch_tokens = 4096, .max_sequence_tokens = 4096, .weight_bytes = 1000 + layers_.begin};
  }
  step::ActivationSizes activation_sizes() const override { return {.hidden = 4, .deepstack_taps = kTaps, .element_bytes = 2}; }  // 8 bytes a row
  int32_t vocab_size() const override { return kVocab; }
  void Reset() override {
    kv_.assign(static_cast<size_t>(layers_.count()), std::vector<uint64_t>(static_cast<size_t>(block_count_) * kBlockTokens, 0xDEAD));
    images_.clear();
    slots_.clear();
  }
  int64_t vision_patches_together() const override { return kPatchesTogether; }
  Status AddVision(std::span<const step::VisionInput> inputs) override {
    int64_t patches = 0;
    for (const step::VisionInput& input : inputs) {
      images_[input.id] = input;
      patches += input.patch_count();
    }
    control_->vision_inputs += static_cast<int64_t>(inputs.size());
    ++control_->vision_calls;
    if (inputs.empty() || (inputs.size() > 1 && patches > kPatchesTogether)) return InternalError("vision: more than was asked for");
    return OkStatus();
  }
  Status Forward(const step::StepPlan& plan, std::span<const std::byte> in, std::span<std::byte> out,
                 std::vector<step::SampledToken>& samples) override {
    ++control_->forwards;
    if (control_->delay_micros > 0) std::this_thread::sleep_for(std::chrono::microseconds(control_->delay_micros.load()));
    while (control_->block) {
      control_->blocked = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    control_->blocked = false;
    if (control_->fail_next.load() > 0 && control_->fail_next.fetch_sub(1) > 0) return InvalidArgumentError("told to fail");
    std::vector<uint64_t> h(static_cast<size_t>(plan.token_count()));
    std::vector<uint64_t> taps;  // (taps still owed, visual tokens)
    const auto visual = static_cast<size_t>(plan.vision_token_count());
    if (layers_.begin == 0) {
      Embed(plan, h, taps);
    } else {
      std::memcpy(h.data(), in.data(), h.size() * 8);
      taps.resize((in.size() - h.size() * 8) / 8);
      if (!taps.empty()) std::memcpy(taps.data(), in.data() + h.size() * 8, taps.size() * 8);
    }
    for (int32_t layer = layers_.begin; layer < layers_.end; ++layer) {
      Layer(plan, layer, h);
      if (taps.empty()) continue;
      AddTap(plan, h, taps);
      taps.erase(taps.begin(), taps.begin() + static_cast<std::ptrdiff_t>(visual));
    }
    for (const step::SequenceStart& start : plan.starts) slots_[start.slot] = start.sequence;
    if (layers_.end < kLayers) {
      EXPECT_EQ(out.size(), (h.size() + taps.size()) * 8);
      std::memcpy(out.data(), h.data(), h.size() * 8);
      if (!taps.empty()) std::memcpy(out.data() + h.size() * 8, taps.data(), taps.size() * 8);
      return OkStatus();
    }
    EXPECT_TRUE(out.empty());
    size_t at = 0;
    for (const step::SequenceSpan& span : plan.spans) {
      at += span.tokens.size();
      if (!span.sample) continue;
      if (slots_[span.slot] != span.sequence) return FailedPreconditionError("slot not started");
      samples.push_back({.sequence = span.sequence, .token = static_cast<int32_t>(h[at - 1] % kVocab)});
    }
    return OkStatus();
  }

 private:
  void Embed(const step::StepPlan& plan, std::vector<uint64_t>& h, std::vector<uint64_t>& taps) {
    size_t at = 0;
    std::vector<std::pair<const step::VisionInput*, int64_t>> rows;
    for (const step::SequenceSpan& span : plan.spans) {
      for (size_t i = 0; i < span.tokens.size(); ++i) h[at + i] = Mix(1, static_cast<uint64_t>(span.tokens[i]));
      for (const step::VisionSlice& slice : span.vision) {
        const auto found = images_.find(slice.id);
        EXPECT_TRUE(found != images_.end()) << "the image was not there before its plan";
        if (found == images_.end()) return;
        for (int32_t i = 0; i < slice.count; ++i) {
          h[at + static_cast<size_t>(slice.span_offset + i)] = Feature(found->second, slice.feature_begin + i, -1);
          rows.emplace_back(&found->second, slice.feature_begin + i);
        }
      }
      at += span.tokens.size();
    }
    if (rows.empty()) return;
    for (int tap = 0; tap < kTaps; ++tap) {
      for (const auto& [image, row] : rows) taps.push_back(Feature(*image, row, tap));
    }
  }
  void Layer(const step::StepPlan& plan, int32_t layer, std::vector<uint64_t>& h) {
    std::vector<uint64_t>& kv = kv_[static_cast<size_t>(layer - layers_.begin)];
    const auto cell = [&](const step::SequenceSpan& span, int64_t position) -> uint64_t& {
      return kv[static_cast<size_t>(span.blocks[static_cast<size_t>(position / kBlockTokens)] * kBlockTokens + position % kBlockTokens)];
    };
    size_t at = 0;
    for (const step::SequenceSpan& span : plan.spans) {
      for (size_t i = 0; i < span.tokens.size(); ++i, ++at) {
        const int64_t position = span.begin + static_cast<int64_t>(i);
        cell(span, position) = h[at];
        uint64_t prefix = 0;
        for (int64_t p = 0; p <= position; ++p) prefix += cell(span, p);
        h[at] = Mix(prefix, static_cast<uint64_t>(layer));
      }
    }
  }
  static void AddTap(const step::StepPlan& plan, std::vector<uint64_t>& h, const std::vector<uint64_t>& taps) {
    size_t at = 0, row = 0;
    for (const step::SequenceSpan& span : plan.spans) {
      for (const step::VisionSlice& slice : span.vision) {
        for (int32_t i = 0; i < slice.count; ++i) h[at + static_cast<size_t>(slice.span_offset + i)] += taps[row++];
      }
      at += span.tokens.size();
    }
  }

  const contract::LayerRange layers_;
  const int32_t block_count_;
  const std::shared_ptr<FakeControl> control_;
  std::vector<std::vector<uint64_t>> kv_;
  std::map<step::VisionId, step::VisionInput> images_;
  std::map<int32_t, step::SequenceId> slots_;
};

}  // namespace qwen::test
