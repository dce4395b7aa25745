// stage/server/request_id.h — the id that joins a client's view of a request with our log lines. Thread safety: any thread.
#pragma once
#include <string>
#include <string_view>

namespace qwen::server {

// What a client may choose: 1..128 of [A-Za-z0-9._-]; anything else gives "" (it would end up in headers and log lines).
std::string SaneRequestId(std::string_view text);
std::string NewRequestId();  // 32 hex digits, random; unique, not secret

}  // namespace qwen::server
