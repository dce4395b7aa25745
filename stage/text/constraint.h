// stage/text/constraint.h — grammar-constrained decoding (llguidance): which tokens may come next.
//
// A control token (an added one: <|im_end|>, <tool_call>, <think>) is never allowed as text; only a Lark grammar that
// names it lets it in, and the end-of-sequence ids wherever the grammar may end.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"
#include "stage/text/tokenizer.h"

struct qt_compiler;
struct qt_constraint;

namespace qwen::text {

// The state of one sequence. Thread safety: one thread at a time. Outlives its compiler and tokenizer if it must.
class TokenConstraint {
 public:
  ~TokenConstraint();
  TokenConstraint(const TokenConstraint&) = delete;
  TokenConstraint& operator=(const TokenConstraint&) = delete;

  // Sets bit i%32 of word i/32 for every token that may come next. REQUIRES: `mask` has at least ceil(vocab_size/32)
  // words, all zero. A mask costs 0.05 ms typically, a few ms at worst. If the grammar's work bound is hit, only the
  // end-of-sequence ids are set, and the next Accept of anything else gives the reason.
  void FillMask(std::vector<uint32_t>& mask);
  // Moves on by the token that was sampled. kInvalidArgument when the grammar does not allow it (nothing changes then),
  // kResourceExhausted when a bound of the grammar engine was hit (the sequence cannot go on).
  Status Accept(int32_t token);
  bool finished() const;  // only an end-of-sequence id may follow, or one has been accepted

 private:
  friend class ConstraintCompiler;
  TokenConstraint(qt_constraint* handle, std::vector<int32_t> eos);
  qt_constraint* const handle_;
  const std::vector<int32_t> eos_;
  Status broken_;  // sticky
};

// Thread safety: immutable after Load; any thread. Compiling takes about a millisecond for a common schema and is
// bounded (1 MiB of text; llguidance's default limits on grammar size and lexer states).
class ConstraintCompiler {
 public:
  // `checkpoint_dir` is named in errors. `vocab_size` is the number of logit columns (>= tokenizer.size()); `eos` the
  // ids that end a sequence, at least one. Takes about 0.3 s for 151,669 tokens.
  static Result<std::unique_ptr<ConstraintCompiler>> Load(const Tokenizer& tokenizer, const std::string& checkpoint_dir,
                                                          int32_t vocab_size, std::vector<int32_t> eos);
  ~ConstraintCompiler();
  ConstraintCompiler(const ConstraintCompiler&) = delete;
  ConstraintCompiler& operator=(const ConstraintCompiler&) = delete;

  // kInvalidArgument for a schema, regex or grammar that is malformed or uses what is not supported; the message says.
  Result<std::unique_ptr<TokenConstraint>> JsonSchema(std::string_view schema_json) const;
  Result<std::unique_ptr<TokenConstraint>> AnyJsonObject() const;
  Result<std::unique_ptr<TokenConstraint>> Regex(std::string_view regex) const;  // matches the whole output
  Result<std::unique_ptr<TokenConstraint>> Lark(std::string_view grammar) const;

 private:
  ConstraintCompiler(qt_compiler* handle, std::vector<int32_t> eos);
  Result<std::unique_ptr<TokenConstraint>> Compile(int grammar, std::string_view text) const;
  qt_compiler* const handle_;
  const std::vector<int32_t> eos_;
};

}  // namespace qwen::text
