#include "stage/weights/read_plan.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace qwen::weights {

ReadPlan PlanReads(const StageTensors& weights, const ReadPlanOptions& options) {
  QP_CHECK(options.request_bytes > 0);
  ReadPlan plan;
  std::map<std::string, int32_t> file_index;
  std::vector<ReadRequest> single;  // of one part each
  for (size_t e = 0; e < weights.entries.size(); ++e) {
    const Entry& entry = weights.entries[e];
    const int64_t row = options.row_bytes ? options.row_bytes(entry) : 1;
    if (!entry.alias_of.empty() || row == 0) continue;
    const int64_t step = std::max<int64_t>(1, options.request_bytes / row) * row;
    int64_t before = 0;  // bytes of the pieces before this one
    for (size_t p = 0; p < entry.pieces.size(); ++p) {
      const Piece& piece = entry.pieces[p];
      QP_CHECK_EQ(piece.bytes % row, 0) << piece.key;
      const auto file = file_index.emplace(piece.file, static_cast<int32_t>(file_index.size())).first->second;
      for (int64_t at = 0; at < piece.bytes; at += step) {
        const int64_t bytes = std::min(step, piece.bytes - at);
        single.push_back({file, piece.offset + at, bytes, {{static_cast<int32_t>(e), static_cast<int32_t>(p), before + at, bytes}}});
      }
      before += piece.bytes;
    }
  }
  plan.files.resize(file_index.size());
  for (const auto& [name, index] : file_index) plan.files[static_cast<size_t>(index)] = name;
  std::sort(single.begin(), single.end(),
            [](const ReadRequest& a, const ReadRequest& b) { return std::tie(a.file, a.offset) < std::tie(b.file, b.offset); });
  for (ReadRequest& next : single) {
    plan.bytes += next.bytes;
    ReadRequest* last = plan.requests.empty() ? nullptr : &plan.requests.back();
    if (last != nullptr && last->file == next.file && last->offset + last->bytes == next.offset && last->bytes + next.bytes <= options.request_bytes &&
        last->parts.size() < kReadPartsMax) {
      last->bytes += next.bytes;
      last->parts.push_back(next.parts[0]);
    } else {
      plan.requests.push_back(std::move(next));
    }
  }
  for (const ReadRequest& request : plan.requests) plan.request_bytes_max = std::max(plan.request_bytes_max, request.bytes);
  return plan;
}

}  // namespace qwen::weights
