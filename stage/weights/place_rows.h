// stage/weights/place_rows.h — whole rows of a stored matrix to where they belong in the tensor that a stage holds: converted,
// multiplied by the scales of their blocks, transposed. Host memory only; the oracle of the same in ATen operators (loader.cc).
//
// Thread safety: pure; different rows may be placed by different threads at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "stage/weights/safetensors.h"

namespace qwen::weights {

struct PlaceTarget {
  std::byte* data = nullptr;                    // (matrices, rows, columns), or (matrices, columns, rows) when transposed; contiguous
  StoredDtype dtype = StoredDtype::kBFloat16;   // kBFloat16, kFloat32, or kFloat8E4M3 (from the same, without scales)
  int64_t rows = 0, columns = 0;                // of a matrix as it is stored
  bool transposed = false;
  // Block scales, or null: (matrices, ceil(R / block_rows), ceil(C / block_columns)) over the matrix (R, C) as the stage holds it.
  const float* scales = nullptr;
  int64_t block_rows = 1, block_columns = 1;
};
// `bytes`: rows first_row, first_row + 1, ... counted through all matrices, stored as `stored` (kBFloat16, kFloat32 or
// kFloat8E4M3). Values are widened to float32, multiplied by their scale there, and rounded to nearest even.
void PlaceRows(const PlaceTarget& target, StoredDtype stored, int64_t first_row, std::span<const std::byte> bytes);

}  // namespace qwen::weights
