// controller/ctl/units.h — sizes and times as people write and read them. Pure.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "stage/base/status.h"

namespace qwen::ctl {

// "141GB", "80 GiB", "512MiB", "1000" (bytes): decimal and binary units. kInvalidArgument for anything else.
Result<int64_t> ParseBytes(std::string_view text);
std::string FormatBytes(double bytes);      // decimal, three digits: "119.4 GB", "8.19 KB"
std::string FormatCount(int64_t count);     // with thousands separators: "262,144"
std::string FormatSeconds(double seconds);  // "12.3 ms", "1.52 s"

}  // namespace qwen::ctl
