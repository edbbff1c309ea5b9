// The Python module polymoe._C: facts about this machine and build. The ops register themselves with torch when the
// library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "aten_grouped_mm.h"
#include "isa.h"
#include "micro/gemm_kernel.h"
#include "threads.h"
#include "tiling.h"

namespace py = pybind11;

namespace polymoe {
namespace {

std::vector<std::string> known_levels() {
  std::vector<std::string> names;
  for (int level = 0; level < kIsaLevels; ++level) names.emplace_back(isa_name(static_cast<Isa>(level)));
  return names;
}

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= static_cast<int>(best_isa()); ++level)
    names.emplace_back(isa_name(static_cast<Isa>(level)));
  return names;
}

py::dict cpu_flags_dict() {
  py::dict flags;
  for (const auto& [name, present] : cpu_flags()) flags[py::str(name)] = present;
  return flags;
}

py::dict cache_sizes_dict() {
  const CacheSizes& sizes = cache_sizes();
  py::dict bytes;
  bytes["l1d"] = sizes.l1d;
  bytes["l2"] = sizes.l2;
  bytes["l3"] = sizes.l3;
  return bytes;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("isa_levels", &known_levels);
  m.def("isa_supported", &supported_levels);
  m.def("isa_level", [] { return isa_name(active_isa()); });
  m.def("set_isa_level",
        [](const std::string& name) { set_active_isa(name.empty() ? best_isa() : isa_from_name(name)); });
  m.def("isa_flags", [](const std::string& name) { return isa_flags(isa_from_name(name)); });
  m.def("isa_missing", [](const std::string& name) { return isa_missing(isa_from_name(name)); });
  m.def("cpu_flags", &cpu_flags_dict);
  m.def("disable_cpu_flags", &disable_cpu_flags);
  m.def("cache_sizes", &cache_sizes_dict);
  m.def("num_threads", &num_threads);
  m.def("in_forked_child", &in_forked_child);
  m.def("block_rows", &block_rows);
  m.def("task_columns", &task_columns);
  m.def("sum_columns", &sum_columns);
  m.def("worthwhile_threads", &worthwhile_threads);
  m.def("decodes_once", &decodes_once);
  m.def("serve_aten_grouped_mm", &serve_aten_grouped_mm);
  m.def("aten_grouped_mm_calls", &aten_grouped_mm_calls);
  m.def("torch_version", [] { return TORCH_VERSION; });
}

}  // namespace polymoe
