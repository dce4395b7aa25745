// stage/server/stop_checker.h — stop strings in streamed text. Text that may be the beginning of a stop string is held
// back until it is known, so that a client never sees a part of one.
//
// Thread safety: none; one per choice.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace qwen::server {

class StopChecker {
 public:
  // Empty strings among `stops` are a caller's mistake (REQUIRES none). With `include`, the stop string stays in the text.
  StopChecker(std::vector<std::string> stops, bool include);

  // Takes more text; gives what can be shown now. After a match everything else is swallowed.
  std::string Push(std::string_view text);
  std::string Finish();  // the text ended without a stop string: what was held back

  bool stopped() const { return match_ >= 0; }
  const std::string& match() const { return stops_[match_]; }  // REQUIRES: stopped()

 private:
  const std::vector<std::string> stops_;
  const bool include_;
  int match_ = -1;
  std::string held_;  // shorter than the longest stop string
};

// How many bytes at the end of `text` are a proper prefix of `tag`: they must wait for more. REQUIRES: !tag.empty().
size_t PartialSuffix(std::string_view text, std::string_view tag);

}  // namespace qwen::server
