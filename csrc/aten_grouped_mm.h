// Torch's own aten::_grouped_mm on the CPU, computed by polymoe while it is asked to.
//
// Torch has no kernel of its own for the dispatch key CPU: one for all devices serves it. A kernel under that key
// goes before it and leaves nothing behind when it is taken away.
#pragma once

#include <cstdint>
#include <utility>

namespace polymoe {

// Puts the kernel in place, or takes it away. Only with the GIL.
void serve_aten_grouped_mm(bool on);

// Calls that came to the kernel in this process: those it served, and those it passed on to torch's.
using AtenCalls = std::pair<int64_t, int64_t>;
AtenCalls aten_grouped_mm_calls();

}  // namespace polymoe
