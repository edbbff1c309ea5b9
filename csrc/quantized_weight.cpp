#include "quantized_weight.h"

#include "check.h"
#include "tiling.h"

namespace polymoe {
namespace {

// What the name of a format says.
struct Layout {
  const char* name;
  WeightFormat format;
  int64_t scale_rows, scale_columns;  // as in QuantizedMatrix
};

constexpr Layout kLayouts[] = {
    {"fp8_block32", WeightFormat::fp8, 32, 32},    {"fp8_block64", WeightFormat::fp8, 64, 64},
    {"fp8_block128", WeightFormat::fp8, 128, 128}, {"mxfp8", WeightFormat::mxfp8, 1, 32},
    {"mxfp4", WeightFormat::mxfp4, 1, 32},         {"int8", WeightFormat::int8, 1, 0},
    {"int4_g32", WeightFormat::int4, 1, 32},       {"int4_g64", WeightFormat::int4, 1, 64},
    {"int4_g128", WeightFormat::int4, 1, 128},
};

// The modes that a format has, on whatever backend.
const char* modes_of(const Layout& layout) {
  switch (layout.format) {
    case WeightFormat::fp8:
      return R"("weight_only")";
    case WeightFormat::mxfp8:
      return R"("weight_only" or "fp8")";
    case WeightFormat::mxfp4:
      return R"("weight_only" or "int8" or "int8_g128" or "fp8")";
    default:
      return R"("weight_only" or "int8" or "int8_g128")";
  }
}

const Layout& layout_of(const char* op, c10::string_view name) {
  for (const Layout& layout : kLayouts)
    if (name == layout.name) return layout;
  POLYMOE_CHECK(false, op, "weight_format", "the name of a quantised format", "'", name, "'");
}

void check_dtypes(const char* op, const QuantizedNames& names, const Layout& layout, const at::Tensor& data,
                  const at::Tensor& scale) {
  switch (layout.format) {
    case WeightFormat::fp8:
      check_dtype(op, names.data, data, {at::kFloat8_e4m3fn});
      return check_dtype(op, names.scale, scale, {at::kFloat, at::kFloat8_e8m0fnu, at::kByte});
    case WeightFormat::mxfp8:
      check_dtype(op, names.data, data, {at::kFloat8_e4m3fn});
      return check_dtype(op, names.scale, scale, {at::kFloat8_e8m0fnu, at::kByte});
    case WeightFormat::mxfp4:
      check_dtype(op, names.data, data, {at::kByte, at::kChar});
      return check_dtype(op, names.scale, scale, {at::kFloat8_e8m0fnu, at::kByte});
    case WeightFormat::int8:
      check_dtype(op, names.data, data, {at::kChar});
      return check_dtype(op, names.scale, scale, {at::kFloat});
    default:
      check_dtype(op, names.data, data, {at::kByte, at::kChar});
      return check_dtype(op, names.scale, scale, {at::kFloat});
  }
}

// The kernels' format in this mode.
WeightFormat kernel_for(const char* op, const Layout& layout, c10::string_view mode) {
  if (mode == "weight_only") return layout.format;
  const bool g128 = mode == "int8_g128", fp8 = mode == "fp8";
  POLYMOE_CHECK(g128 || fp8 || mode == "int8", op, "mode", "one of weight_only, int8, int8_g128, fp8", '"', mode, '"');
  const WeightFormat format = layout.format;
  const bool has_fp8 = format == WeightFormat::mxfp8 || format == WeightFormat::mxfp4;
  const bool has_int8 = format != WeightFormat::mxfp8 && format != WeightFormat::fp8;
  POLYMOE_CHECK(fp8 ? has_fp8 : has_int8, op, "mode", c10::str(modes_of(layout), " for ", layout.name), '"', mode, '"');
  POLYMOE_CHECK(!fp8, op, "backend", "one that serves this call", "'cpu': it has no kernel for the mode \"fp8\"");
  switch (format) {
    case WeightFormat::mxfp4:
      return g128 ? WeightFormat::mxfp4_by_int8_g128 : WeightFormat::mxfp4_by_int8;
    case WeightFormat::int8:
      return g128 ? WeightFormat::int8_by_int8_g128 : WeightFormat::int8_by_int8;
    default:
      return g128 ? WeightFormat::int4_by_int8_g128 : WeightFormat::int4_by_int8;
  }
}

}  // namespace

QuantizedWeight check_quantized(const char* op, const QuantizedNames& names, const at::Tensor& data,
                                const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero,
                                c10::string_view weight_format, c10::string_view mode, int64_t D) {
  const Layout& layout = layout_of(op, weight_format);
  const WeightFormat kernel = kernel_for(op, layout, mode);
  check_cpu(op, names.data, data);
  POLYMOE_CHECK(data.dim() == 3, op, names.data, c10::str("3 dimensions for ", weight_format), describe(data));
  POLYMOE_CHECK(scale.has_value(), op, names.scale, c10::str("the scales of ", weight_format), "None");
  check_cpu(op, names.scale, *scale);
  check_dtypes(op, names, layout, data, *scale);
  const int64_t G = data.size(0), N = data.size(1);
  const bool halves = layout.format == WeightFormat::mxfp4 || layout.format == WeightFormat::int4;
  check_shape(op, names.data, data, {{"G", G}, {"N", N}, {halves ? "D / 2" : "D", halves ? ceil_div(D, 2) : D}});
  const int64_t down = ceil_div(N, layout.scale_rows);
  const int64_t along = layout.scale_columns == 0 ? 1 : ceil_div(D, layout.scale_columns);
  if (layout.scale_columns == 0)
    check_shape(op, names.scale, *scale, {{"G", G}, {"N", N}});
  else
    check_shape(op, names.scale, *scale, {{"G", G}, {"blocks of N", down}, {"blocks of D", along}});
  check_contiguous(op, names.data, data);
  check_contiguous(op, names.scale, *scale);

  const int64_t scale_row = along * scale->element_size();
  QuantizedMatrix matrix{static_cast<const char*>(data.const_data_ptr()),
                         static_cast<const char*>(scale->const_data_ptr()),
                         nullptr,
                         data.size(2),
                         scale_row,
                         0,
                         layout.scale_rows,
                         layout.scale_columns,
                         scale->scalar_type() != at::kFloat};
  if (zero) {
    check_cpu(op, names.zero, *zero);
    POLYMOE_CHECK(layout.format == WeightFormat::int4, op, names.zero, c10::str("None for ", weight_format),
                  describe(*zero));
    check_dtype(op, names.zero, *zero, {at::kByte});
    check_shape(op, names.zero, *zero, {{"G", G}, {"N", N}, {"blocks of D", along}});
    check_contiguous(op, names.zero, *zero);
    matrix.zero = static_cast<const char*>(zero->const_data_ptr());
    matrix.zero_stride = along;
  }
  return {kernel, matrix, G, N, N * data.size(2), down * scale_row, N * along};
}

}  // namespace polymoe
