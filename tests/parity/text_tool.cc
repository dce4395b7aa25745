// tests/parity/text_tool.cc — stage/text behind JSON lines, for text_parity.py: one request a line on stdin, one answer
// a line on stdout ({"ok": ...} or {"error": message, "code": name}).
//
//   {"op":"load","dir":D}                       tokenizer of a checkpoint folder     -> size
//   {"op":"encode","text":T,"special":B}        -> ids
//   {"op":"decode","ids":[..],"skip":B}         -> text
//   {"op":"stream","ids":[..],"skip":B}         -> the pieces of a Detokenizer, Finish last
//   {"op":"tokens"}                             -> [[name, bytes in hex, special] or null] for every id
//   {"op":"template","dir":D} or {"source":S}   -> true
//   {"op":"render","context":JSON TEXT}         -> text; text, not an object, so that key order survives
//   {"op":"encode_file","path":P}               -> ids of a whole file, for the long cases
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "stage/text/chat_template.h"
#include "stage/text/detokenizer.h"
#include "stage/text/tokenizer.h"

namespace qwen::text {
namespace {

using Json = nlohmann::ordered_json;

struct Loaded {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
};

std::string Hex(const std::string& bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += "0123456789abcdef"[byte / 16], text += "0123456789abcdef"[byte % 16];
  return text;
}

Result<Json> Answer(const Json& request, Loaded& loaded) {
  const std::string op = request.at("op");
  if (op == "load") {
    ASSIGN_OR_RETURN(loaded.tokenizer, Tokenizer::Load(request.at("dir")));
    return Json(loaded.tokenizer->size());
  }
  if (op == "template") {
    auto made = request.contains("dir") ? ChatTemplate::Load(request.at("dir"))
                                        : ChatTemplate::FromSource(request.at("source").get<std::string>());
    ASSIGN_OR_RETURN(loaded.chat_template, std::move(made));
    return Json(true);
  }
  if (op == "render") {
    ASSIGN_OR_RETURN(std::string text, loaded.chat_template->Render(request.at("context").get<std::string>()));
    return Json(std::move(text));
  }
  const Tokenizer& tokenizer = *loaded.tokenizer;
  if (op == "encode") {
    ASSIGN_OR_RETURN(auto ids, tokenizer.Encode(request.at("text").get<std::string>(), request.at("special")));
    return Json(ids);
  }
  if (op == "encode_file") {
    std::ifstream file(request.at("path").get<std::string>(), std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    ASSIGN_OR_RETURN(auto ids, tokenizer.Encode(text, false));
    return Json(ids);
  }
  if (op == "decode") {
    ASSIGN_OR_RETURN(auto text, tokenizer.Decode(request.at("ids").get<std::vector<int32_t>>(), request.at("skip")));
    return Json(text);
  }
  if (op == "stream") {
    Detokenizer detokenizer(tokenizer, request.at("skip"));
    Json pieces = Json::array();
    for (const int32_t id : request.at("ids").get<std::vector<int32_t>>()) pieces.push_back(detokenizer.Push(id));
    pieces.push_back(detokenizer.Finish());
    return pieces;
  }
  if (op == "tokens") {
    Json tokens = Json::array();
    for (int32_t id = 0; id < tokenizer.size(); ++id) {
      const std::string name = tokenizer.IdToToken(id);
      tokens.push_back(name.empty() ? Json()
                                    : Json::array({name, Hex(tokenizer.TokenBytes(id)), tokenizer.IsSpecial(id)}));
    }
    return tokens;
  }
  return InvalidArgumentError("unknown op " + op);
}

}  // namespace
}  // namespace qwen::text

int main() {
  qwen::text::Loaded loaded;
  for (std::string line; std::getline(std::cin, line);) {
    const auto answer = qwen::text::Answer(qwen::text::Json::parse(line), loaded);
    qwen::text::Json out;
    if (answer.ok()) {
      out["ok"] = *answer;
    } else {
      out["error"] = answer.status().message();
      out["code"] = qwen::StatusCodeName(answer.status().code());
    }
    std::cout << out.dump() << '\n' << std::flush;
  }
}
