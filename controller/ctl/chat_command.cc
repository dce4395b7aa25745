// qwenctl chat: a conversation on the terminal. Lines in, streamed text out; the history is kept here and sent each time.
#include <unistd.h>

#include <iostream>

#include "controller/ctl/chat_client.h"
#include "controller/ctl/commands.h"
#include "controller/ctl/units.h"

namespace qwen::ctl {
namespace {

struct ChatFlags {
  std::string url = "http://127.0.0.1:8000", model, system, api_key;
  std::vector<std::string> images;
  std::optional<double> temperature;
  int max_tokens = 0;
};

constexpr const char* kHelp = "/image FILE  add a picture to the next message   /reset  forget the conversation   /quit  leave (or Ctrl-D)";

Status Chat(const ChatFlags& flags) {
  ASSIGN_OR_RETURN(const Url url, ParseUrl(flags.url));
  ChatRequest request{.model = flags.model, .api_key = flags.api_key, .max_tokens = flags.max_tokens, .temperature = flags.temperature};
  if (request.model.empty()) {
    ASSIGN_OR_RETURN(request.model, FirstModel(url, flags.api_key));
  }
  const bool terminal = ::isatty(0) == 1;
  std::vector<std::string> pending;
  for (const std::string& image : flags.images) {
    ASSIGN_OR_RETURN(std::string data, ImageDataUrl(image));
    pending.push_back(std::move(data));
  }
  const auto reset = [&] {
    request.messages.clear();
    if (!flags.system.empty()) request.messages.push_back({.role = "system", .text = flags.system});
  };
  reset();
  if (terminal) std::printf("%s at %s\n%s\n", request.model.c_str(), flags.url.c_str(), kHelp);
  std::string line;
  while (true) {
    if (terminal) std::printf("\n> ");
    std::fflush(stdout);
    if (!std::getline(std::cin, line) || line == "/quit") return OkStatus();
    if (line.empty()) continue;
    if (line == "/reset") {
      reset();
      pending.clear();
      continue;
    }
    if (line.starts_with("/image ")) {
      auto data = ImageDataUrl(line.substr(7));
      if (data.ok()) pending.push_back(std::move(*data));
      else std::printf("%s\n", data.status().message().c_str());
      continue;
    }
    if (line.starts_with("/")) {
      std::printf("%s\n", kHelp);
      continue;
    }
    request.messages.push_back({.role = "user", .text = line, .image_urls = std::exchange(pending, {})});
    const auto answer = StreamChat(url, request, [](std::string_view piece) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
      return true;
    });
    if (!answer.ok()) {
      if (!terminal) return answer.status();
      std::printf("\n[%s]\n", answer.status().message().c_str());
      request.messages.pop_back();
      continue;
    }
    std::printf("\n");
    if (terminal)
      std::printf("[first token %s, %.1f tokens/s, %s + %s tokens%s]\n", FormatSeconds(answer->first_token_seconds).c_str(), answer->tokens_per_second(),
                  FormatCount(answer->prompt_tokens).c_str(), FormatCount(answer->completion_tokens).c_str(),
                  answer->finish_reason == "length" ? ", cut off by the token limit" : "");
    request.messages.push_back({.role = "assistant", .text = answer->text});
  }
}

}  // namespace

void AddChat(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<ChatFlags>();
  CLI::App* command = app.add_subcommand("chat", "talk to a running pipeline on the terminal");
  command->add_option("--url", flags->url, "of the head")->capture_default_str();
  command->add_option("--model", flags->model, "default: the first that the server lists");
  command->add_option("--image", flags->images, "picture for the first message (repeatable)")->check(CLI::ExistingFile);
  command->add_option("--system", flags->system, "system prompt");
  command->add_option("--temperature", flags->temperature, "default: the server's")->check(CLI::Range(0.0, 2.0));
  command->add_option("--max-tokens", flags->max_tokens, "of one answer; default: the server's")->check(CLI::PositiveNumber);
  command->add_option("--api-key", flags->api_key, "sent as Authorization: Bearer")->envname("QWEN_API_KEY");
  command->callback([flags, &exit_code] {
    const Status status = Chat(*flags);
    exit_code = status.ok() ? 0 : Report(status);
  });
}

}  // namespace qwen::ctl
