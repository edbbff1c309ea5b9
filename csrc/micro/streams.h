// Asks for rows of weights that will be read next. Lines of four pages take turns, or of four rows that do not lie side
// by side: where the hardware's own prefetch has run ahead in a page, a line is found in the L2 cache and soon leaves
// its fill buffer, of which the L1 cache has few and loads need some, too.
#pragma once

#include <cstdint>

namespace polymoe::POLYMOE_LEVEL {
namespace {

class Streams {
 public:
  static constexpr int count = 4;  // of 1 to 16 the best for bf16, mxfp4 and int8 together

  Streams() = default;  // asks for nothing
  // `rows` rows of `bytes` bytes, `stride` bytes from one to the next.
  Streams(const char* from, int64_t rows, int64_t bytes, int64_t stride) : at_(from), block_(from) {
    constexpr int64_t kPage = 4096;
    if (rows <= 0 || bytes <= 0) return;
    if (stride == bytes) {
      blocks_ = ceil_div(rows * bytes, count * kPage);
      lines_ = ceil_div(rows * bytes, blocks_ * count * kLine);
      apart_ = lines_ * kLine;
    } else {
      blocks_ = ceil_div(rows, count);
      lines_ = ceil_div(bytes, kLine);
      apart_ = stride;
    }
    left_ = lines_;
  }

  // For LINES lines of each stream, until all have been asked for.
  template <int LINES = 1>
  [[gnu::always_inline]] void ask() {
    if (left_ <= 0) return;
    const char* const at = at_;
#pragma GCC unroll 4
    for (int stream = 0; stream < count; ++stream)
#pragma GCC unroll 2
      for (int line = 0; line < LINES; ++line) __builtin_prefetch(at + stream * apart_ + line * kLine, 0, 2);
    at_ = at + LINES * kLine;
    left_ -= LINES;
    if (left_ <= 0 && --blocks_ > 0) at_ = block_ += count * apart_, left_ = lines_;
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  const char *at_ = nullptr, *block_ = nullptr;  // of the first stream: the next line, and where it began
  int64_t left_ = 0, lines_ = 0;                 // of each stream, in this block and in any
  int64_t apart_ = 0;                            // bytes from a stream to the next
  int64_t blocks_ = 0;                           // this one and those to come
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
