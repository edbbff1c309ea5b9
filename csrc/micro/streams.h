// Asks for rows of weights that will be read next, where the hardware's own prefetch finds them first: then a line is
// in the L2 cache already and soon leaves its fill buffer, of which the L1 cache has few and loads need some, too. On
// Zen 4 that is one line after the other; on the Xeon, lines of four pages in turn, or of four rows that do not lie
// side by side.
#pragma once

#include <cstdint>

namespace polymoe::POLYMOE_LEVEL {
namespace {

class Streams {
 public:
#if defined(POLYMOE_LEVEL_AVX512_BF16) && !defined(POLYMOE_LEVEL_AMX)
  static constexpr int count = 1;
#else
  static constexpr int count = 4;  // of 1 to 16 the best for bf16, mxfp4 and int8 together
#endif

  Streams() = default;  // asks for nothing
  // `rows` rows of `bytes` bytes, `stride` bytes from one to the next.
  Streams(const char* from, int64_t rows, int64_t bytes, int64_t stride) : at_(from), block_(from) {
    constexpr int64_t kPage = 4096;
    if (rows <= 0 || bytes <= 0) return;
    if (stride == bytes) {
      blocks_ = count == 1 ? 1 : ceil_div(rows * bytes, count * kPage);
      lines_ = ceil_div(rows * bytes, blocks_ * count * kLine);
      apart_ = lines_ * kLine;
    } else {
      blocks_ = ceil_div(rows, count);
      lines_ = ceil_div(bytes, kLine);
      apart_ = stride;
    }
    left_ = lines_;
  }

  // For 4 * LINES lines, until all have been asked for.
  template <int LINES = 1>
  [[gnu::always_inline]] void ask() {
    if (left_ <= 0) return;
    constexpr int kOfEach = 4 * LINES / count;
    const char* const at = at_;
#pragma GCC unroll 4
    for (int stream = 0; stream < count; ++stream)
#pragma GCC unroll 16
      for (int line = 0; line < kOfEach; ++line) __builtin_prefetch(at + stream * apart_ + line * kLine, 0, 2);
    advance(kOfEach);
  }

  // Where the next 4 * LINES lines are, for a caller who asks for them one at a time between other work, which holds up
  // loads less than all at once. When nothing is left, memory that the caches hold.
  template <int LINES>
  [[gnu::always_inline]] const char* take() {
    static_assert(count == 1 && LINES > 0, "the lines have to follow one another");
    if (left_ <= 0) return reinterpret_cast<const char*>(this);
    const char* const at = at_;
    advance(4 * LINES);
    return at;
  }

 private:
  static constexpr int64_t kLine = 64;
  [[gnu::always_inline]] void advance(int lines) {
    at_ += lines * kLine;
    left_ -= lines;
    if (left_ <= 0 && --blocks_ > 0) at_ = block_ += count * apart_, left_ = lines_;
  }
  static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  const char *at_ = nullptr, *block_ = nullptr;  // of the first stream: the next line, and where it began
  int64_t left_ = 0, lines_ = 0;                 // of each stream, in this block and in any
  int64_t apart_ = 0;                            // bytes from a stream to the next
  int64_t blocks_ = 0;                           // this one and those to come
};

}  // namespace
}  // namespace polymoe::POLYMOE_LEVEL
