// stage/base/check.h — our own invariants: QP_CHECK(x) and QP_CHECK_EQ(a, b) print file:line, the text, both values and
// whatever is streamed after them, then abort. Never for input of the outside world: that is a Status (status.h).
// The QP_ prefix keeps them apart from the CHECK macros that c10 defines.
#pragma once
#include <sstream>
#include <string>

namespace qwen::internal {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* text);
  [[noreturn]] ~CheckFailure();  // prints to stderr and aborts
  template <typename T>
  CheckFailure& operator<<(const T& value) {
    stream_ << value;
    return *this;
  }

 private:
  std::ostringstream stream_;
};
// Lets `condition ? (void)0 : Voidify() & CheckFailure(...) << ...` have type void.
struct Voidify {
  void operator&(const CheckFailure&) const {}
};

}  // namespace qwen::internal

#define QP_CHECK(condition) \
  (condition) ? (void)0 : ::qwen::internal::Voidify() & ::qwen::internal::CheckFailure(__FILE__, __LINE__, #condition)
#define QP_CHECK_OP_(op, a, b)                                                                                       \
  ((a)op(b)) ? (void)0                                                                                               \
             : ::qwen::internal::Voidify() & ::qwen::internal::CheckFailure(__FILE__, __LINE__, #a " " #op " " #b) \
                                                 << "(" << (a) << " vs " << (b) << ") "
#define QP_CHECK_EQ(a, b) QP_CHECK_OP_(==, a, b)
#define QP_CHECK_NE(a, b) QP_CHECK_OP_(!=, a, b)
#define QP_CHECK_LT(a, b) QP_CHECK_OP_(<, a, b)
#define QP_CHECK_LE(a, b) QP_CHECK_OP_(<=, a, b)
#define QP_CHECK_GT(a, b) QP_CHECK_OP_(>, a, b)
#define QP_CHECK_GE(a, b) QP_CHECK_OP_(>=, a, b)
