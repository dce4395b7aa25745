#include "stage/weights/stream_loader.h"

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <optional>

#include "stage/base/log.h"
#include "stage/weights/guarded.h"
#include "stage/weights/place_rows.h"

namespace qwen::weights {
namespace {

at::ScalarType ScalarTypeOf(StoredDtype dtype) {
  switch (dtype) {
    case StoredDtype::kFloat32: return at::kFloat;
    case StoredDtype::kBFloat16: return at::kBFloat16;
    case StoredDtype::kFloat8E4M3: return at::kFloat8_e4m3fn;
    default: QP_CHECK(false) << StoredDtypeName(dtype);  // ResolveStage lets no other through
  }
  return at::kFloat;
}

// Where an entry's bytes go.
struct Placement {
  at::Tensor tensor;         // empty for an alias
  bool straight = false;     // stored as it is held
  int64_t row_bytes = 1;     // as stored; parts are whole rows
  int64_t matrices = 1;
  PlaceTarget target;        // its data only on a CPU
  const Placement* scale = nullptr;  // of FP8
};

class Streaming final : public ReadSink {
 public:
  Streaming(const StageTensors& found, const LoadOptions& options, const StreamOptions& stream)
      : found_(found), options_(options), on_host_(options.device.is_cpu() && !stream.device_operators) {
    if (!options.device.is_cpu()) {
      guard_.emplace(options.device.type());
      stream_ = guard_->getStreamFromGlobalPool(options.device, /*isHighPriority=*/false);
    }
  }
  ~Streaming() override { Synchronize(); }

  Status Allocate(const contract::ModelShape& shape) {
    placements_.resize(found_.entries.size());
    std::map<std::string_view, Placement*> by_slot;
    for (size_t i = 0; i < placements_.size(); ++i) {
      const Entry& entry = found_.entries[i];
      if (!entry.alias_of.empty()) continue;
      Placement& p = placements_[i];
      const bool quantized = entry.dtype == StoredDtype::kFloat8E4M3;
      const at::ScalarType held = IsScale(entry) ? at::kFloat : quantized && options_.keep_fp8 ? at::kFloat8_e4m3fn : options_.dtype;
      p.tensor = at::empty(entry.shape, at::TensorOptions().dtype(held).device(options_.device));
      p.target.transposed = entry.transform == Transform::kTransposeLastTwo;
      p.straight = ScalarTypeOf(entry.dtype) == held && !p.target.transposed;
      p.target.columns = entry.stored_shape.back();
      p.target.rows = p.tensor.numel() / p.target.columns;
      if (p.target.transposed || quantized) {
        p.target.rows = entry.stored_shape[entry.stored_shape.size() - 2];
        p.matrices = p.tensor.numel() / (p.target.rows * p.target.columns);
      }
      p.target.dtype = held == at::kFloat ? StoredDtype::kFloat32 : held == at::kBFloat16 ? StoredDtype::kBFloat16 : StoredDtype::kFloat8E4M3;
      p.row_bytes = p.straight ? 1 : p.target.columns * StoredDtypeBytes(entry.dtype);
      if (on_host_) p.target.data = static_cast<std::byte*>(p.tensor.mutable_data_ptr());
      by_slot[entry.slot] = &p;
    }
    for (size_t i = 0; i < placements_.size(); ++i) {
      const Entry& entry = found_.entries[i];
      if (entry.dtype != StoredDtype::kFloat8E4M3 || !entry.alias_of.empty()) continue;
      const auto scale = by_slot.find(entry.slot + "_scale_inv");
      if (scale == by_slot.end() || !shape.quantization) {
        return DataLossError("tensor " + entry.slot + ": float8 without a scale or without quantization_config");
      }
      if (options_.keep_fp8) continue;
      Placement& p = placements_[i];
      p.scale = scale->second;
      p.target.block_rows = shape.quantization->block_rows, p.target.block_columns = shape.quantization->block_columns;
      if (on_host_) p.target.scales = p.scale->tensor.const_data_ptr<float>();
    }
    Synchronize();  // the memory is free for another stream
    return OkStatus();
  }

  static bool IsScale(const Entry& entry) { return entry.slot.ends_with("_scale_inv"); }
  int64_t RowBytes(const Entry& entry) const { return placements_[static_cast<size_t>(&entry - found_.entries.data())].row_bytes; }

  std::byte* Destination(const ReadPart& part) override {
    const Placement& p = placements_[static_cast<size_t>(part.entry)];
    return on_host_ && p.straight ? p.target.data + part.entry_offset : nullptr;
  }

  Status Take(const ReadPart& part, std::span<const std::byte> bytes, int32_t buffer) override {
    const Placement& p = placements_[static_cast<size_t>(part.entry)];
    const StoredDtype stored = found_.entries[static_cast<size_t>(part.entry)].dtype;
    if (on_host_) {
      PlaceRows(p.target, stored, part.entry_offset / p.row_bytes, bytes);
      return OkStatus();
    }
    return Guarded("loading weights", [&]() -> Status {
      c10::InferenceMode inference;
      std::optional<c10::StreamGuard> guard;
      if (stream_) guard.emplace(*stream_);
      PlaceOnDevice(p, stored, part.entry_offset, bytes);
      if (stream_) events_[static_cast<size_t>(buffer)].record(*stream_);
      return OkStatus();
    });
  }

  Status Settle(int32_t buffer) override {
    if (!stream_) return OkStatus();
    return Guarded("loading weights", [&]() -> Status {
      events_[static_cast<size_t>(buffer)].synchronize();  // of a buffer that was not handed on yet: at once
      return OkStatus();
    });
  }

  Result<std::byte*> Ring(size_t bytes) override {
    Synchronize();  // an earlier ring's copies
    try {
      ring_ = at::empty({static_cast<int64_t>(bytes + kRingAlignment)}, at::TensorOptions().dtype(at::kByte).pinned_memory(stream_.has_value()));
    } catch (const c10::Error& error) {
      return ResourceExhaustedError("a ring of " + std::to_string(bytes >> 20) + " MiB for reading: " + error.what_without_backtrace());
    }
    const auto at = reinterpret_cast<uintptr_t>(ring_.mutable_data_ptr());
    return reinterpret_cast<std::byte*>((at + kRingAlignment - 1) / kRingAlignment * kRingAlignment);
  }
  // One event for each buffer that there may be.
  void MakeEvents(int32_t buffers) {
    if (!stream_) return;
    events_.clear();
    for (int32_t i = 0; i < buffers; ++i) events_.emplace_back(options_.device.type());
  }

  void Synchronize() noexcept {
    if (!stream_) return;
    try {
      guard_->synchronizeDevice(options_.device.index());
    } catch (const c10::Error& error) {  // a fault of the device: the first step meets it again
      log::Error("the GPU failed while loading", {{"reason", error.what_without_backtrace()}});
    }
  }

  TensorMap Finish() {
    Synchronize();
    TensorMap tensors;
    for (size_t i = 0; i < placements_.size(); ++i) {
      if (placements_[i].tensor.defined() && (options_.keep_fp8 || !IsScale(found_.entries[i]))) tensors[found_.entries[i].slot] = placements_[i].tensor;
    }
    for (const Entry& entry : found_.entries) {
      if (!entry.alias_of.empty()) tensors[entry.slot] = tensors.at(entry.alias_of);
    }
    return tensors;
  }

 private:
  // The same as PlaceRows in operators of the device, queued on the current stream.
  void PlaceOnDevice(const Placement& p, StoredDtype stored, int64_t entry_offset, std::span<const std::byte> bytes) const {
    const auto count = static_cast<int64_t>(bytes.size());
    const at::Tensor host = at::from_blob(const_cast<std::byte*>(bytes.data()), {count}, at::TensorOptions().dtype(at::kByte));
    if (p.straight) {
      p.tensor.view(-1).view(at::kByte).narrow(0, entry_offset, count).copy_(host, /*non_blocking=*/true);
      return;
    }
    const at::Tensor staged = at::empty({count}, at::TensorOptions().dtype(at::kByte).device(options_.device));
    staged.copy_(host, /*non_blocking=*/true);
    const PlaceTarget& t = p.target;
    const at::Tensor rows = staged.view(ScalarTypeOf(stored)).view({-1, t.columns});
    const at::Tensor matrices = t.transposed ? p.tensor.view({p.matrices, t.columns, t.rows}) : p.tensor.view({p.matrices, t.rows, t.columns});
    const int64_t first = entry_offset / p.row_bytes;
    for (int64_t done = 0; done < rows.size(0);) {
      const int64_t matrix = (first + done) / t.rows, within = (first + done) % t.rows;
      const int64_t run = std::min(rows.size(0) - done, t.rows - within);
      at::Tensor piece = rows.narrow(0, done, run);
      if (p.scale != nullptr) {
        at::Tensor scale = p.scale->tensor.view({p.matrices, p.scale->tensor.size(-2), p.scale->tensor.size(-1)})[matrix];
        if (t.transposed) scale = scale.t();
        const int64_t block_rows = t.transposed ? t.block_columns : t.block_rows, block_columns = t.transposed ? t.block_rows : t.block_columns;
        const int64_t begin = within / block_rows, end = (within + run - 1) / block_rows + 1;
        scale = scale.narrow(0, begin, end - begin).repeat_interleave(block_rows, 0).narrow(0, within - begin * block_rows, run);
        piece = piece.to(at::kFloat) * scale.repeat_interleave(block_columns, 1).narrow(1, 0, t.columns);
      }
      at::Tensor place = matrices[matrix].narrow(t.transposed ? 1 : 0, within, run);
      if (place.scalar_type() == piece.scalar_type() && piece.element_size() == 1) place = place.view(at::kByte), piece = piece.view(at::kByte);  // bits
      place.copy_(t.transposed ? piece.t() : piece);
      done += run;
    }
  }

  const StageTensors& found_;
  const LoadOptions& options_;
  const bool on_host_;
  std::optional<c10::impl::VirtualGuardImpl> guard_;  // of a GPU
  std::optional<c10::Stream> stream_;                 // of a GPU
  std::vector<Placement> placements_;                 // as found_.entries
  at::Tensor ring_;                 // with room to align
  std::vector<c10::Event> events_;  // by buffer
};

}  // namespace

Result<TensorMap> StreamTensors(const Checkpoint& checkpoint, const contract::ModelShape& shape, const StageTensors& found, const LoadOptions& options,
                                const StreamOptions& stream) {
  c10::InferenceMode inference;
  return Guarded("loading weights", [&]() -> Result<TensorMap> {
    const auto start = std::chrono::steady_clock::now();
    Streaming sink(found, options, stream);
    RETURN_IF_ERROR(sink.Allocate(shape));
    ReadPartsOptions read = stream.read;
    read.lanes = options.threads;
    int64_t before = 0;  // bytes of the phase before
    if (options.progress) read.progress = [&](int64_t done) { return options.progress(before + done, found.report.bytes); };
    ReadStats total;
    for (const bool scales : {true, false}) {
      const ReadPlan plan = PlanReads(found, {.request_bytes = stream.request_bytes,
                                              .row_bytes = [&](const Entry& entry) { return Streaming::IsScale(entry) == scales ? sink.RowBytes(entry) : 0; }});
      sink.MakeEvents(read.lanes * (read.depth + 1));
      ASSIGN_OR_RETURN(const ReadStats stats, ReadAllParts(checkpoint, found, plan, sink, read));
      before += stats.bytes;
      total = {.bytes = before,
               .direct_bytes = total.direct_bytes + stats.direct_bytes,
               .uring_lanes = std::max(total.uring_lanes, stats.uring_lanes),
               .ring_bytes = std::max(total.ring_bytes, stats.ring_bytes)};
    }
    TensorMap tensors = sink.Finish();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    log::Info("weights read", {{"bytes", total.bytes}, {"seconds", seconds}, {"past_the_page_cache", total.direct_bytes},
                               {"io_uring_threads", total.uring_lanes}, {"ring_mib", total.ring_bytes >> 20}});
    return tensors;
  });
}

}  // namespace qwen::weights
