// Registers a CPU kernel that honours the op's last argument, the backend:
//
//   Tensor plan_cpu(..., c10::string_view backend);
//   TORCH_LIBRARY_IMPL(polymoe, CPU, m) { POLYMOE_IMPL(m, "plan", plan_cpu); }
//
// "" and "cpu" run the kernel; any other name goes to the overload "plan.routed", which Python implements for every
// backend. So the usual call costs no detour through Python.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

namespace polymoe {

// The overload "<op>.routed", of the kernel's type.
template <class Kernel>
auto routed_op(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "routed").template typed<Kernel>();
}

template <class Name, class Kernel, Kernel* kernel>
struct Routed;

template <class Name, class Result, class... Args, Result (*kernel)(Args...)>
struct Routed<Name, Result(Args...), kernel> {
  static Result call(Args... args) {
    const c10::string_view backend = std::get<sizeof...(Args) - 1>(std::tie(args...));
    if (backend.empty() || backend == "cpu") return kernel(std::forward<Args>(args)...);
    static const auto routed = routed_op<Result(Args...)>(Name::qualified());
    // The op's own autograd kernel has run by now; the overload must not record a second time.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return routed.call(std::forward<Args>(args)...);
  }
};

}  // namespace polymoe

#define POLYMOE_IMPL(library, op, kernel)                                                     \
  do {                                                                                        \
    struct Name {                                                                             \
      static const char* qualified() { return "polymoe::" op; }                               \
    };                                                                                        \
    (library).impl(op, TORCH_FN((::polymoe::Routed<Name, decltype(kernel), &kernel>::call))); \
  } while (false)
