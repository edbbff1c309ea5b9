#include "isa.h"

#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace polymoe {
namespace {

// A CPU fact some level depends on, where CPUID reports it (leaf, subleaf, register, bit) and the lowest level that
// needs it. The compiler flags of each level (setup.py) may generate instructions of these extensions and no others.
enum Register : int { eax, ebx, ecx, edx };
struct Flag {
  const char* name;
  Isa needed_from;
  unsigned leaf, subleaf;
  Register reg;
  int bit;
};
constexpr std::array<Flag, 18> kCpuidFlags{{
    {"sse3", Isa::avx2, 1, 0, ecx, 0},
    {"ssse3", Isa::avx2, 1, 0, ecx, 9},
    {"sse4_1", Isa::avx2, 1, 0, ecx, 19},
    {"sse4_2", Isa::avx2, 1, 0, ecx, 20},
    {"popcnt", Isa::avx2, 1, 0, ecx, 23},
    {"avx", Isa::avx2, 1, 0, ecx, 28},
    {"f16c", Isa::avx2, 1, 0, ecx, 29},
    {"fma", Isa::avx2, 1, 0, ecx, 12},
    {"avx2", Isa::avx2, 7, 0, ebx, 5},
    {"avx512f", Isa::avx512, 7, 0, ebx, 16},
    {"avx512bw", Isa::avx512, 7, 0, ebx, 30},
    {"avx512dq", Isa::avx512, 7, 0, ebx, 17},
    {"avx512vl", Isa::avx512, 7, 0, ebx, 31},
    {"avx512_vnni", Isa::avx512_bf16, 7, 0, ecx, 11},
    {"avx512_bf16", Isa::avx512_bf16, 7, 1, eax, 5},
    {"amx_tile", Isa::amx, 7, 0, edx, 24},
    {"amx_bf16", Isa::amx, 7, 0, edx, 22},
    {"amx_int8", Isa::amx, 7, 0, edx, 25},
}};
// Not CPUID flags but XCR0: the registers that the operating system saves when it switches threads.
constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6, kTileState = 0x60000;
struct OsState {
  const char* name;
  Isa needed_from;
  uint64_t mask;
};
constexpr std::array<OsState, 3> kOsStates{{
    {"os_saves_ymm", Isa::avx2, kYmmState},
    {"os_saves_zmm", Isa::avx512, kZmmState},
    {"os_saves_tiles", Isa::amx, kTileState},
}};
constexpr size_t kFacts = kCpuidFlags.size() + kOsStates.size();

struct Fact {
  const char* name;
  Isa needed_from;
  bool present;
};

#if defined(__x86_64__)
bool read_flag(const Flag& flag) {
  unsigned registers[4] = {};
  if (!__get_cpuid_count(flag.leaf, flag.subleaf, &registers[eax], &registers[ebx], &registers[ecx], &registers[edx]))
    return false;
  return registers[flag.reg] >> flag.bit & 1;
}

uint64_t read_xcr0() {
  constexpr Flag osxsave{"osxsave", Isa::portable, 1, 0, ecx, 27};
  if (!read_flag(osxsave)) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// The registers that the system saves for this process. Linux has every process ask for the tiles: they are 8 KiB.
uint64_t read_saved_state() {
  const uint64_t xcr0 = read_xcr0();
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if ((xcr0 & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return xcr0;
#endif
  return xcr0 & ~kTileState;
}
#else
bool read_flag(const Flag&) { return false; }
uint64_t read_saved_state() { return 0; }
#endif

std::array<Fact, kFacts> read_facts() {
  std::array<Fact, kFacts> facts{};
  size_t n = 0;
  for (const Flag& flag : kCpuidFlags) facts[n++] = {flag.name, flag.needed_from, read_flag(flag)};
  const uint64_t saved = read_saved_state();
  for (const OsState& state : kOsStates)
    facts[n++] = {state.name, state.needed_from, (saved & state.mask) == state.mask};
  return facts;
}

// Written only by disable_cpu_flags.
std::array<Fact, kFacts>& facts() {
  static std::array<Fact, kFacts> all = read_facts();
  return all;
}

constexpr const char* kLevelNames[kIsaLevels] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// A sysfs number with its unit, such as "32K".
int64_t parse_size(const std::string& text) {
  size_t digits = 0;
  const int64_t value = std::stoll(text, &digits);
  const char unit = digits < text.size() ? text[digits] : ' ';
  return value << (unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0);
}

CacheSizes read_cache_sizes() {
  int64_t bytes[4] = {};  // by level
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    std::string type, size;
    int level = 0;
    if (!(std::ifstream(folder + "level") >> level && std::ifstream(folder + "type") >> type &&
          std::ifstream(folder + "size") >> size))
      break;
    if (type != "Instruction" && level >= 1 && level <= 3) bytes[level] = parse_size(size);
  }
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  constexpr int kSysconf[4] = {0, _SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  for (int level = 1; level <= 3; ++level)
    if (bytes[level] <= 0) bytes[level] = sysconf(kSysconf[level]);
#endif
  constexpr int64_t kUsual[4] = {0, 32 << 10, 512 << 10, 8 << 20};
  for (int level = 1; level <= 3; ++level)
    if (bytes[level] <= 0) bytes[level] = kUsual[level];
  return {bytes[1], bytes[2], bytes[3]};
}

}  // namespace

namespace detail {
std::atomic<Isa> active_level{best_isa()};
}

const char* isa_name(Isa level) { return kLevelNames[static_cast<int>(level)]; }

Isa isa_from_name(const std::string& name) {
  for (int level = 0; level < kIsaLevels; ++level)
    if (name == kLevelNames[level]) return static_cast<Isa>(level);
  throw std::invalid_argument("polymoe.set_isa_level: level: expected one of " +
                              join({std::begin(kLevelNames), std::end(kLevelNames)}) + ", got '" + name + "'");
}

std::vector<std::string> isa_flags(Isa level) {
  std::vector<std::string> names;
  for (const Fact& fact : facts())
    if (level >= fact.needed_from) names.emplace_back(fact.name);
  return names;
}

std::vector<std::string> isa_missing(Isa level) {
#if !defined(__x86_64__)
  if (level != Isa::portable) return {"a build for x86-64"};
#endif
  std::vector<std::string> names;
  for (const Fact& fact : facts())
    if (level >= fact.needed_from && !fact.present) names.emplace_back(fact.name);
  return names;
}

Isa best_isa() {
  int level = kIsaLevels - 1;
  while (!isa_missing(static_cast<Isa>(level)).empty()) --level;
  return static_cast<Isa>(level);
}

void set_active_isa(Isa level) {
  const std::vector<std::string> missing = isa_missing(level);
  if (!missing.empty()) {
    throw std::invalid_argument(std::string("polymoe.set_isa_level: level: expected at most ") + isa_name(best_isa()) +
                                " on this machine, got " + isa_name(level) + ", which needs " + join(missing));
  }
  detail::active_level.store(level, std::memory_order_relaxed);
}

std::vector<std::pair<std::string, bool>> cpu_flags() {
  std::vector<std::pair<std::string, bool>> flags;
  for (const Fact& fact : facts()) flags.emplace_back(fact.name, fact.present);
  return flags;
}

void disable_cpu_flags(const std::vector<std::string>& flags) {
  std::vector<Fact*> found;
  for (const std::string& flag : flags) {
    const auto fact = std::find_if(facts().begin(), facts().end(), [&](const Fact& f) { return flag == f.name; });
    if (fact == facts().end()) {
      throw std::invalid_argument("polymoe.disable_cpu_flags: flags: expected flags from " + join(isa_flags(Isa::amx)) +
                                  ", got '" + flag + "'");
    }
    found.push_back(&*fact);
  }
  for (Fact* fact : found) fact->present = false;
  if (active_isa() > best_isa()) set_active_isa(best_isa());
}

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes = read_cache_sizes();
  return sizes;
}

}  // namespace polymoe
