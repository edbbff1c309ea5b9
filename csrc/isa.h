// CPU facts: which instruction-set levels this machine can run, which one the kernels use, cache sizes.
//
// A level is one column of the per-level kernel tables in micro/. Every level uses all CPUID flags of the level
// below it. Level names are the ones users see: "portable", "avx2", "avx512", "avx512_bf16",
// "amx".
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace polymoe {

enum class Isa : int { portable, avx2, avx512, avx512_bf16, amx };
inline constexpr int kIsaLevels = 5;

namespace detail {
extern std::atomic<Isa> active_level;  // the best supported level once the library is loaded
}

// The level the kernels use now. Read it once per op call, so that a change in mid-call cannot mix levels.
inline Isa active_isa() { return detail::active_level.load(std::memory_order_relaxed); }

const char* isa_name(Isa level);
// The level of that name; std::invalid_argument names the accepted ones.
Isa isa_from_name(const std::string& name);
// The CPUID flags a level uses, and "os_saves_ymm" and its like for the registers the OS must save.
std::vector<std::string> isa_flags(Isa level);
// What this machine (or this build) lacks to run a level; empty: the level is supported.
std::vector<std::string> isa_missing(Isa level);
Isa best_isa();
// Throws std::invalid_argument naming what is missing, and leaves the active level as it is.
void set_active_isa(Isa level);

// Every flag some level uses, and whether this machine has it (and it was not disabled).
std::vector<std::pair<std::string, bool>> cpu_flags();
// From now on treat these CPUID flags as absent; the active level falls to the best one left where necessary.
// Flags already disabled stay disabled; not while ops run on other threads. Throws std::invalid_argument for a flag
// that no level uses.
void disable_cpu_flags(const std::vector<std::string>& flags);

struct CacheSizes {
  int64_t l1d, l2, l3;  // bytes of the cache that one core sees; l3 is shared between cores
};
const CacheSizes& cache_sizes();

}  // namespace polymoe
