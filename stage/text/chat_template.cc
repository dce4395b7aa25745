#include "stage/text/chat_template.h"

#include <optional>

#include "stage/text/ffi.h"
#include "stage/text/qwen_text.h"

namespace qwen::text {
namespace {

Result<std::optional<std::string>> ReadOptional(const std::string& path) {
  Result<std::string> text = ReadFile(path);
  if (text.ok()) return std::optional<std::string>(std::move(text).value());
  if (text.status().code() == StatusCode::kNotFound) return std::optional<std::string>();
  return text.status();
}

Result<qt_template*> Make(const qt_template_files& files) {
  qt_template* handle = nullptr;
  std::string message;
  const qt_code code = qt_template_new(&files, &handle, AppendToString, &message);
  if (code != QT_OK) return StatusOf(code, std::move(message));
  return handle;
}

}  // namespace

ChatTemplate::~ChatTemplate() { qt_template_free(handle_); }

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::Load(const std::string& checkpoint_dir) {
  ASSIGN_OR_RETURN(const std::optional<std::string> jinja, ReadOptional(checkpoint_dir + "/chat_template.jinja"));
  ASSIGN_OR_RETURN(const std::optional<std::string> legacy, ReadOptional(checkpoint_dir + "/chat_template.json"));
  ASSIGN_OR_RETURN(const std::optional<std::string> config, ReadOptional(checkpoint_dir + "/tokenizer_config.json"));
  if (!jinja && !legacy && !config) return NotFoundError(checkpoint_dir + " has no chat template");
  qt_template_files files = {};
  if (jinja) files.jinja = jinja->data(), files.jinja_size = jinja->size();
  if (legacy) files.legacy_json = legacy->data(), files.legacy_json_size = legacy->size();
  if (config) files.config_json = config->data(), files.config_json_size = config->size();
  const Result<qt_template*> handle = Make(files);
  if (!handle.ok()) return handle.status().WithContext(checkpoint_dir);
  return std::unique_ptr<ChatTemplate>(new ChatTemplate(*handle));
}

Result<std::unique_ptr<ChatTemplate>> ChatTemplate::FromSource(std::string_view jinja) {
  qt_template_files files = {};
  files.jinja = jinja.empty() ? "" : jinja.data();  // null would mean that there is no such file
  files.jinja_size = jinja.size();
  ASSIGN_OR_RETURN(qt_template* const handle, Make(files));
  return std::unique_ptr<ChatTemplate>(new ChatTemplate(handle));
}

Result<std::string> ChatTemplate::Render(std::string_view context_json) const {
  std::string text;
  const qt_code code =
      qt_template_render(handle_, context_json.data(), context_json.size(), kOutputBytesMax, AppendToString, &text);
  if (code != QT_OK) return StatusOf(code, std::move(text));
  return text;
}

}  // namespace qwen::text
