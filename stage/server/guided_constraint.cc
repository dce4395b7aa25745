#include "stage/server/guided_constraint.h"

#include <utility>

namespace qwen::server {
namespace {

class GuidedConstraint final : public engine::Constraint {
 public:
  // `free_until`: the token that ends the free part; -1: the grammar holds from the start.
  GuidedConstraint(std::unique_ptr<text::TokenConstraint> grammar, int32_t free_until) : grammar_(std::move(grammar)), free_until_(free_until) {}

  void FillMask(std::vector<uint32_t>& mask) override {
    if (free_until_ >= 0) {
      std::fill(mask.begin(), mask.end(), ~uint32_t{0});  // padding columns are cut off by SamplingParams::token_limit
    } else {
      grammar_->FillMask(mask);
    }
  }
  Status Accept(int32_t token) override {
    if (free_until_ < 0) return grammar_->Accept(token);
    if (token == free_until_) free_until_ = -1;
    return OkStatus();
  }

 private:
  const std::unique_ptr<text::TokenConstraint> grammar_;
  int32_t free_until_;
};

}  // namespace

Result<std::unique_ptr<engine::Constraint>> MakeConstraint(const ModelAssets& assets, const GuidedDecoding& guided, bool after_think) {
  using Kind = GuidedDecoding::Kind;
  const text::ConstraintCompiler& compiler = *assets.constraints;
  auto grammar = guided.kind == Kind::kAnyJson      ? compiler.AnyJsonObject()
                 : guided.kind == Kind::kJsonSchema ? compiler.JsonSchema(guided.text)
                 : guided.kind == Kind::kRegex      ? compiler.Regex(guided.text)
                                                    : compiler.Lark(guided.text);
  if (!grammar.ok()) return grammar.status();
  const int32_t free_until = after_think ? assets.tokenizer->TokenToId("</think>").value_or(-1) : -1;
  return std::unique_ptr<engine::Constraint>(std::make_unique<GuidedConstraint>(std::move(*grammar), free_until));
}

}  // namespace qwen::server
