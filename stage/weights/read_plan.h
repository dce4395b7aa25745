// stage/weights/read_plan.h — in which requests a stage's bytes are read: sorted by file and place, neighbours joined, large
// tensors cut at whole rows. Pure: names and offsets, no file is touched.
//
// Thread safety: pure.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "stage/weights/checkpoint.h"

namespace qwen::weights {

// A run of bytes of one tensor on disk.
struct ReadPart {
  int32_t entry = 0;         // index into StageTensors::entries
  int32_t piece = 0;         // of that entry
  int64_t entry_offset = 0;  // of its first byte, within the concatenation of all pieces
  int64_t bytes = 0;
};

// One read: its parts lie one after another in the file, in this order.
struct ReadRequest {
  int32_t file = 0;  // index into ReadPlan::files
  int64_t offset = 0, bytes = 0;
  std::vector<ReadPart> parts;
};

struct ReadPlan {
  std::vector<std::string> files;     // names inside the checkpoint's folder
  std::vector<ReadRequest> requests;  // by file, ascending offsets, not overlapping
  int64_t bytes = 0;                  // of all requests: what progress counts
  int64_t request_bytes_max = 0;      // of the largest request
};

struct ReadPlanOptions {
  int64_t request_bytes = 8 << 20;  // of a request, at most; a single longer row is read whole
  // Bytes of a row of the entry as stored: its parts are whole rows. 1: parts may end anywhere; 0: the entry is not read.
  // REQUIRES: divides every piece of the entry. Empty: 1 for all. Aliases (no bytes of their own) are never read.
  std::function<int64_t(const Entry&)> row_bytes;
};
inline constexpr size_t kReadPartsMax = 256;  // of a request; below IOV_MAX
ReadPlan PlanReads(const StageTensors& weights, const ReadPlanOptions& options);

}  // namespace qwen::weights
