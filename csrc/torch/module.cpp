// The pybind11 module _C: what was compiled, and what this machine runs of it. No tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "csrc/cpu/isa_level.h"
#include "csrc/ops/attention.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTGPT_VERSION;
  info["compiler"] = FASTGPT_COMPILER;
  info["torch_target"] = "2.10";
  info["cpu_isa_levels"] = split(FASTGPT_ISA_LEVELS);
  info["cuda_version"] = FASTGPT_CUDA_VERSION;
  info["cuda_architectures"] = split(FASTGPT_CUDA_ARCHITECTURES);
  return info;
}

// The CUDA version that the driver supports, as 13000; 0 without a driver.
int driver_version() {
  int version = 0;
#if defined(__linux__)
  if (void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) {
    using Query = int (*)(int*);
    if (auto query = reinterpret_cast<Query>(dlsym(driver, "cuDriverGetVersion"))) query(&version);
    dlclose(driver);
  }
#endif
  return version;
}

// Any driver of a major version of CUDA runs what was compiled with that version.
std::optional<std::string> cuda_driver_error() {
  const int compiled = std::atoi(FASTGPT_CUDA_VERSION), version = driver_version();
  if (version / 1000 >= compiled) return std::nullopt;
  const std::string needed = "needs a driver for CUDA " + std::to_string(compiled) + " or later";
  if (version == 0) return needed + ", and there is no CUDA driver";
  return needed + "; this one is for CUDA " + std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How fastgpt was built and which of it this machine runs.";
  m.def("build_info", &build_info,
        "Version, compiler, CPU ISA levels, CUDA version and GPU architectures of this build.");
  m.def(
      "cpu_isa", [] { return std::string(fastgpt::isa_name(fastgpt::isa_level())); },
      "The CPU ISA level in use: baseline, v3, v4 or v4_bf16. Set FASTGPT_CPU_ISA before the "
      "import to lower it.");
  m.def("cuda_driver_error", &cuda_driver_error,
        "Why the CUDA driver of this machine is too old for this build; None if it is not.");
  m.def(
      "suits_warpgroups",
      [](int bits, int64_t head_dim, bool features, int capability) {
        const auto dtype = bits == 16 ? fastgpt::DType::bf16 : fastgpt::DType::f32;
        return fastgpt::suits_warpgroups(dtype, head_dim, features, capability);
      },
      py::arg("bits"), py::arg("head_dim"), py::arg("features"), py::arg("capability"),
      "Whether attention on elements of so many bits takes Hopper's warpgroups on such a GPU.");
}
