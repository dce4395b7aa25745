// controller/ctl/table.h — text in aligned columns. The first column is left-aligned, the others right-aligned.
#pragma once
#include <string>
#include <vector>

namespace qwen::ctl {

class Table {
 public:
  explicit Table(std::vector<std::string> titles) : rows_{std::move(titles)} {}
  void Add(std::vector<std::string> row);  // REQUIRES: as many cells as titles
  std::string ToString() const;            // with a rule under the titles, each line ended

 private:
  std::vector<std::vector<std::string>> rows_;  // [0]: the titles
};

}  // namespace qwen::ctl
