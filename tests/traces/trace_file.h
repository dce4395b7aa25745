// tests/traces/trace_file.h — stories as text files: commands, a line ----, what they must print, an empty line.
//
// Lines that begin with # are comments and stay where they are. A runner answers one command at a time; the answers of
// a block's commands are compared together. With --rewrite the file gets what was printed instead, to be read as a
// diff.
#pragma once
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace qwen::traces {

// "verb key=value key=value": words without = become keys with an empty value.
struct Command {
  std::string verb;
  std::vector<std::pair<std::string, std::string>> arguments;  // in order

  bool Has(const std::string& key) const {
    for (const auto& argument : arguments) {
      if (argument.first == key) return true;
    }
    return false;
  }
  std::string Text(const std::string& key, const std::string& otherwise = "") const {
    for (const auto& [k, value] : arguments) {
      if (k == key) return value;
    }
    return otherwise;
  }
  int32_t Number(const std::string& key, int32_t otherwise) const {
    return Has(key) ? std::stoi(Text(key)) : otherwise;
  }
};

inline Command ParseCommand(const std::string& line) {
  std::istringstream words(line);
  Command command;
  words >> command.verb;
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    command.arguments.emplace_back(word.substr(0, equals), equals == std::string::npos ? "" : word.substr(equals + 1));
  }
  return command;
}

// Runs one file; true when everything was as expected (or was rewritten).
inline bool RunFile(const std::string& path, bool rewrite, const std::function<std::string(const Command&)>& run) {
  std::ifstream in(path);
  if (!in) return std::fprintf(stderr, "%s: cannot be read\n", path.c_str()), false;
  std::string text, output;  // the file as it would be rewritten
  bool right = true;
  std::vector<std::string> commands;
  int line_number = 0;
  for (std::string line; std::getline(in, line);) {
    ++line_number;
    text += line + "\n";
    if (line.empty() || line[0] == '#') {
      output += line + "\n";
      continue;
    }
    if (line != "----") {
      commands.push_back(line);
      output += line + "\n";
      continue;
    }
    const int block_line = line_number;
    std::string expected, got;
    while (std::getline(in, line) && !line.empty()) ++line_number, expected += line + "\n";
    ++line_number;
    text += expected + "\n";
    for (const std::string& command : std::exchange(commands, {})) got += run(ParseCommand(command));
    output += "----\n" + got + "\n";
    if (got == expected || rewrite) continue;
    right = false;
    std::fprintf(stderr, "%s:%d: expected\n%sgot\n%s\n", path.c_str(), block_line, expected.c_str(), got.c_str());
  }
  if (!commands.empty()) return std::fprintf(stderr, "%s: commands without ---- at the end\n", path.c_str()), false;
  while (output.ends_with("\n\n")) output.pop_back();
  if (rewrite) std::ofstream(path) << output;
  return right;
}

// main() of a runner: [--rewrite] FILES. `make` gives a fresh runner for every file.
inline int Main(int argc, char** argv, const std::function<std::function<std::string(const Command&)>()>& make) {
  bool rewrite = false, right = true;
  int files = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--rewrite") == 0) {
      rewrite = true;
      continue;
    }
    ++files;
    right = RunFile(argv[i], rewrite, make()) && right;
  }
  if (files == 0) return std::fprintf(stderr, "usage: %s [--rewrite] trace.txt...\n", argv[0]), 2;
  return right ? 0 : 1;
}

}  // namespace qwen::traces
