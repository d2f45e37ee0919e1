// protofast._C: what was built. The ops register themselves with torch when this library loads, through its stable
// ABI; only plain Python objects pass through here, so one build serves several torch releases.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/version.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list devices;
  devices.append("cpu");
#ifdef PROTOFAST_CUDA
  devices.append("cuda");
#endif
  py::dict kernels;
  for (const char* op : {"ddim_step", "ddim_step_out", "ddim_coefficients", "philox_normal", "prototype_activation",
                         "prototype_backward", "prototype_map", "k_center", "cover", "relax"})
    kernels[op] = devices.attr("copy")();
  for (const char* op :
       {"farthest_pair", "max_min_swaps", "max_sum", "k_medoids", "channel_purity", "channel_purity_backward"})
    kernels[op] = py::list(py::make_tuple("cpu"));

  const auto version = [](unsigned long long packed) {
    return std::to_string(packed >> 56) + "." + std::to_string(packed >> 48 & 0xff);
  };
  py::dict info;
  info["kernels"] = kernels;
  info["isa"] = protofast::name(protofast::cpu_isa());
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx"] = __cplusplus / 100 % 100;
  info["torch_abi"] = version(TORCH_FEATURE_VERSION);
  info["built_with_torch"] = version(TORCH_ABI_VERSION);
#ifdef PROTOFAST_CUDA
  info["cuda"] = PROTOFAST_CUDA;
  info["cuda_archs"] = PROTOFAST_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this library holds and how it was built; plain Python objects.");
}
