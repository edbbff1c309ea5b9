// The autograd kernels of the ops for CPU tensors. The gradients are Python (ops/_library.py), and to enter Python
// costs more than a small op; so these go on to the op's own kernel where there is no gradient to record, and to
// Python's autograd kernel only where there is one.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>

namespace polymoe {
namespace {

bool records_gradient(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  if (!at::GradMode::is_enabled()) return false;
  const size_t arguments = op.schema().arguments().size();
  return std::any_of(stack.end() - ptrdiff_t(arguments), stack.end(), [](const c10::IValue& argument) {
    return argument.isTensor() && argument.toTensor().defined() && argument.toTensor().requires_grad();
  });
}

void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const c10::DispatchKeySet below = keys & c10::after_autograd_keyset;
  if (records_gradient(op, *stack)) {
    // Python registers its kernel for every device without one of its own; AutogradOther stands for those.
    op.redispatchBoxed(below | c10::DispatchKeySet(c10::DispatchKey::AutogradOther), stack);
    return;
  }
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(below, stack);
}

TORCH_LIBRARY_IMPL(polymoe, AutogradCPU, m) {
  for (const char* op : {"activate", "activate_backward", "combine", "dispatch", "experts", "gate", "gate_backward",
                         "grouped_mm", "grouped_mm_dx", "plan", "quantized_backward", "row_dot"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&autograd>());
}

}  // namespace
}  // namespace polymoe
