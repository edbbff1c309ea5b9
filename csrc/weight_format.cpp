#include "weight_format.h"

#include "check.h"

namespace polymoe {

StoredAs parse_weight_format(const char* op, c10::string_view name) {
  if (name == "plain") return {WeightFormat::plain, 1};
  if (name == "packed") return {WeightFormat::packed, 1};
  POLYMOE_CHECK(name == "packed_gate_up", op, "weight_format", "one of 'plain', 'packed', 'packed_gate_up'", "'", name,
                "'");
  return {WeightFormat::packed, 2};
}

}  // namespace polymoe
