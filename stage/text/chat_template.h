// stage/text/chat_template.h — a checkpoint's chat template, rendered as transformers 5.17 renders it with
// apply_chat_template(tokenize=False): the same Jinja environment (trim_blocks, lstrip_blocks, loop controls, tojson,
// raise_exception, strftime_now, {% generation %}) over minijinja, with Python's str(), json.dumps and string methods.
//
// Known to differ, all of them lenient where Jinja2 raises or not reachable through a chat template we have seen:
// iterating over None gives nothing; integers beyond 64 bits become floats; `~` prints lists with minijinja's quoting.
// Thread safety: immutable after Load; any thread.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "stage/base/status.h"

struct qt_template;

namespace qwen::text {

class ChatTemplate {
 public:
  // A prompt of more bytes than this is refused: 1 M tokens are about 4 MB of text.
  static constexpr size_t kOutputBytesMax = size_t{64} << 20;

  // From chat_template.jinja, else chat_template.json, else tokenizer_config.json (a string, or a list of
  // {name, template}: "tool_use" when there are tools, else "default"). kNotFound when no file is there,
  // kInvalidArgument when the template cannot be used.
  static Result<std::unique_ptr<ChatTemplate>> Load(const std::string& checkpoint_dir);
  // The same from the text of a template, without special tokens.
  static Result<std::unique_ptr<ChatTemplate>> FromSource(std::string_view jinja);
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // `context_json` is an object: messages (a list, not empty), and as wanted tools, documents, add_generation_prompt,
  // continue_final_message, and any further name the template knows (enable_thinking). The order of its keys is the
  // order of tojson's output, so it must be written in the order in which the client sent it.
  // kInvalidArgument carries the message of raise_exception() alone, or the engine's; kResourceExhausted a bound.
  Result<std::string> Render(std::string_view context_json) const;

 private:
  explicit ChatTemplate(qt_template* handle) : handle_(handle) {}
  qt_template* const handle_;
};

}  // namespace qwen::text
