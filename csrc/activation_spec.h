// Turns the activation arguments of an op into an ActivationSpec.
#pragma once

#include <c10/util/string_view.h>

#include <optional>

#include "micro/activation.h"

namespace polymoe {

// `argument` is the op's name for the kind. Raises ValueError for an unknown kind, for alpha or limit given to a kind
// that takes none, missing where it is required, or not positive and finite.
ActivationSpec parse_activation(const char* op, const char* argument, c10::string_view kind,
                                std::optional<double> alpha, std::optional<double> limit);

}  // namespace polymoe
