#include "weight_format.h"

#include <algorithm>
#include <iterator>

#include "check.h"

namespace polymoe {

StoredAs parse_weight_format(const char* op, c10::string_view name) {
  if (name == "plain") return {WeightFormat::plain, 1};
  if (name == "packed") return {WeightFormat::packed, 1};
  POLYMOE_CHECK(name == "packed_gate_up", op, "weight_format",
                "one of 'plain', 'packed', 'packed_gate_up' or a quantised format", "'", name, "'");
  return {WeightFormat::packed, 2};
}

bool is_quantized(c10::string_view weight_format) {
  static constexpr const char* kNames[] = {"fp8_block32", "fp8_block64", "fp8_block128", "mxfp4",    "mxfp8",
                                           "int8",        "int4_g32",    "int4_g64",     "int4_g128"};
  return std::any_of(std::begin(kNames), std::end(kNames), [&](const char* name) { return weight_format == name; });
}

void check_unquantized(const char* op, c10::string_view weight_format, c10::string_view mode,
                       std::initializer_list<std::pair<const char*, const std::optional<at::Tensor>&>> companions) {
  POLYMOE_CHECK(mode == "weight_only", op, "mode", c10::str("'weight_only' for ", weight_format, " weights"), "'", mode,
                "'");
  for (const auto& [name, tensor] : companions)
    POLYMOE_CHECK(!tensor.has_value(), op, name, c10::str("nothing for ", weight_format, " weights"),
                  describe(*tensor));
}

}  // namespace polymoe
