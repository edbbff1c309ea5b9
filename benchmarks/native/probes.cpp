// What this machine can do at most: read bandwidth of memory, and operations per second of the instructions that the
// kernels use. benchmarks/probes.py compiles this file and calls it through ctypes; the threads are those of torch's
// own OpenMP runtime.
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
// Of one stream inside a chunk. Not a power of two, so that the streams do not meet in one set of a cache.
constexpr size_t kStreamBytes = (size_t{1} << 20) + 5 * kLine;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Tells the compiler that a value may change here, so that it neither folds nor drops what is computed from it.
template <class Vector>
inline void touch(Vector& value) {
  asm volatile("" : "+x"(value));
}

// ---- Tiles ----

// Linux has every process ask for the tile registers.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_tiles() {
  static const bool found = __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  return found;
}

// Eight tiles of 16 rows of 64 bytes.
__attribute__((target("amx-tile"))) void configure_tiles() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// ---- Reading ----

// The kStreams equal parts of a chunk are read side by side, a cache line of each in turn.
template <int kStreams>
void read_sse(const char* chunk, size_t prefetch) {
  __m128i sum[kStreams];
  for (auto& s : sum) s = _mm_setzero_si128();
  for (size_t at = 0; at < kStreamBytes; at += kLine)
    for (int s = 0; s < kStreams; ++s) {
      const char* p = chunk + s * kStreamBytes + at;
      if (prefetch) _mm_prefetch(p + prefetch, _MM_HINT_T1);
      for (size_t i = 0; i < kLine; i += 16)
        sum[s] = _mm_or_si128(sum[s], _mm_load_si128(reinterpret_cast<const __m128i*>(p + i)));
    }
  for (auto& s : sum) touch(s);
}

template <int kStreams>
__attribute__((target("avx2"))) void read_avx2(const char* chunk, size_t prefetch) {
  __m256i sum[kStreams];
  for (auto& s : sum) s = _mm256_setzero_si256();
  for (size_t at = 0; at < kStreamBytes; at += kLine)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const char* p = chunk + s * kStreamBytes + at;
      if (prefetch) _mm_prefetch(p + prefetch, _MM_HINT_T1);
      sum[s] = _mm256_or_si256(sum[s], _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
      sum[s] = _mm256_or_si256(sum[s], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32)));
    }
  for (auto& s : sum) touch(s);
}

template <int kStreams>
__attribute__((target("avx512f"))) void read_avx512(const char* chunk, size_t prefetch) {
  __m512i sum[kStreams];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (size_t at = 0; at < kStreamBytes; at += kLine)
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const char* p = chunk + s * kStreamBytes + at;
      if (prefetch) _mm_prefetch(p + prefetch, _MM_HINT_T1);
      sum[s] = _mm512_or_si512(sum[s], _mm512_load_si512(p));
    }
  for (auto& s : sum) touch(s);
}

using Read = void (*)(const char* chunk, size_t prefetch);

template <int kStreams>
Read widest() {
  if (__builtin_cpu_supports("avx512f")) return read_avx512<kStreams>;
  if (__builtin_cpu_supports("avx2")) return read_avx2<kStreams>;
  return read_sse<kStreams>;
}

// Two streams as the kernel for 16 rows reads two panels of packed bf16 weights: 2 KiB of each in turn, by two tiles
// whose rows alternate; with the four tile products of such a step, or without. What is left of a stream is dropped.
template <bool kMultiply>
__attribute__((target("amx-tile,amx-bf16"))) void read_tiles(const char* chunk, size_t) {
  constexpr size_t kStep = 32 * kLine;
  alignas(64) static const char rows[16 * kLine] = {};
  configure_tiles();
  for (size_t at = 0; at + kStep <= kStreamBytes; at += kStep) {
    const char *const first = chunk + at, *const second = first + kStreamBytes;
    _tile_loadd(4, first, 2 * kLine);
    _tile_loadd(5, first + kLine, 2 * kLine);
    _tile_loadd(6, second, 2 * kLine);
    if (!kMultiply) {
      _tile_loadd(7, second + kLine, 2 * kLine);
      continue;
    }
    // Eight tiles are four sums and four operands, so the rows take the place of a weight that was multiplied.
    _tile_loadd(7, rows, kLine);
    _tile_dpbf16ps(0, 7, 4);
    _tile_dpbf16ps(1, 7, 5);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(4, second + kLine, 2 * kLine);
    _tile_dpbf16ps(3, 7, 4);
  }
  _tile_release();
}

Read reader(int streams) {
  switch (streams) {
    case 1:
      return widest<1>();
    case 4:
      return widest<4>();
    case 8:
      return widest<8>();
    default:
      return nullptr;
  }
}

// ---- Computing ----

// One kernel per instruction: `steps` times kChains independent instructions, enough to hide their latency.
constexpr int kChains = 12;

void mul_add_sse(int64_t steps) {
  __m128 sum[kChains / 2], a = _mm_setzero_ps(), b = a;
  for (auto& s : sum) s = a;
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      touch(a);
#pragma GCC unroll 6
      for (auto& s : sum) {
        __m128 product = _mm_mul_ps(a, b);
        touch(product);
        s = _mm_add_ps(s, product);
      }
    }
  for (auto& s : sum) touch(s);
}

__attribute__((target("avx2,fma"))) void fma_avx2(int64_t steps) {
  __m256 sum[kChains], a = _mm256_setzero_ps(), b = a;
  for (auto& s : sum) s = a;
  for (int64_t i = 0; i < steps; ++i) {
    touch(a);
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm256_fmadd_ps(a, b, s);
  }
  for (auto& s : sum) touch(s);
}

__attribute__((target("avx512f"))) void fma_avx512(int64_t steps) {
  __m512 sum[kChains], a = _mm512_setzero_ps(), b = a;
  for (auto& s : sum) s = a;
  for (int64_t i = 0; i < steps; ++i) {
    touch(a);
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm512_fmadd_ps(a, b, s);
  }
  for (auto& s : sum) touch(s);
}

__attribute__((target("avx512f,avx512bf16"))) void dpbf16_avx512(int64_t steps) {
  __m512 sum[kChains];
  for (auto& s : sum) s = _mm512_setzero_ps();
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < steps; ++i) {
    touch(bits);
    const __m512bh a = reinterpret_cast<__m512bh>(bits);
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm512_dpbf16_ps(s, a, a);
  }
  for (auto& s : sum) touch(s);
}

__attribute__((target("avx512f,avx512vnni"))) void dpbusd_avx512(int64_t steps) {
  __m512i sum[kChains], a = _mm512_setzero_si512();
  for (auto& s : sum) s = a;
  for (int64_t i = 0; i < steps; ++i) {
    touch(a);
#pragma GCC unroll 12
    for (auto& s : sum) s = _mm512_dpbusd_epi32(s, a, a);
  }
  for (auto& s : sum) touch(s);
}

// Tiles of zeros: four sums from two by two operands.
__attribute__((target("amx-tile,amx-bf16"))) void tdpbf16ps(int64_t steps) {
  configure_tiles();
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 3
    for (int group = 0; group < kChains / 4; ++group) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
}

struct Instruction {
  const char* name;
  void (*run)(int64_t steps);
  double operations;  // of one instruction: a product and a sum are two
  bool supported;
};

const Instruction* find(const char* name) {
  static const bool avx512f = __builtin_cpu_supports("avx512f");
  static const Instruction all[] = {
      {"mul_add_sse", mul_add_sse, 2 * 4, true},
      {"fma_avx2", fma_avx2, 2 * 8, bool(__builtin_cpu_supports("avx2")) && bool(__builtin_cpu_supports("fma"))},
      {"fma_avx512", fma_avx512, 2 * 16, avx512f},
      {"vdpbf16ps", dpbf16_avx512, 2 * 32, avx512f && __builtin_cpu_supports("avx512bf16")},
      {"tdpbf16ps", tdpbf16ps, 2 * 16 * 16 * 32, has_tiles()},
      {"vpdpbusd", dpbusd_avx512, 2 * 64, avx512f && __builtin_cpu_supports("avx512vnni")},
  };
  for (const Instruction& one : all)
    if (std::strcmp(one.name, name) == 0) return one.supported ? &one : nullptr;
  return nullptr;
}

// Bytes per second, of whole chunks of `streams` streams handed out one by one; negative if there is none.
double read_chunks(Read read, const char* memory, size_t bytes, int threads, int streams, size_t prefetch) {
  const size_t chunk = streams * kStreamBytes, chunks = bytes / chunk;
  if (chunks == 0) return -1;
  std::atomic<size_t> next{0};
  double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp single
    start = now();
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) read(memory + i * chunk, prefetch);
#pragma omp barrier
#pragma omp single
    end = now();
  }
  return chunks * chunk / (end - start);
}

}  // namespace

extern "C" {

// Memory in pages of 2 MiB where the system grants them, or of 4 KiB; null if there is none.
char* polymoe_probe_allocate(size_t bytes, int huge_pages, int threads) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  char* buffer = static_cast<char*>(memory);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t at = 0; at < bytes; at += kHugePage) std::memset(buffer + at, 1, std::min(kHugePage, bytes - at));
  return buffer;
}

void polymoe_probe_free(char* memory, size_t bytes) { munmap(memory, bytes); }

// Bytes per second; negative for an unknown variant.
double polymoe_probe_read(const char* memory, size_t bytes, int threads, int streams, size_t prefetch) {
  const Read read = reader(streams);
  return read ? read_chunks(read, memory, bytes, threads, streams, prefetch) : -1;
}

// The same by loads of matrix tiles, with products or without; negative where this CPU lacks them.
double polymoe_probe_read_tiles(const char* memory, size_t bytes, int threads, int multiply) {
  if (!has_tiles()) return -1;
  return read_chunks(multiply ? read_tiles<true> : read_tiles<false>, memory, bytes, threads, 2, 0);
}

// Operations per second, summed over the threads; negative where this CPU lacks the instruction.
double polymoe_probe_compute(const char* name, int64_t steps, int threads) {
  const Instruction* instruction = find(name);
  if (!instruction) return -1;
  double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
  {
#pragma omp barrier
    const double start = now();
    instruction->run(steps);
    rate = instruction->operations * kChains * steps / (now() - start);
  }
  return rate;
}
}
