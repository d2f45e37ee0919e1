// The host side of the DDIM ops: checks, layouts, outputs. A device gives its `Kernels` and registers the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ddim.h"
#include "view.h"

namespace protofast {

struct Kernels {
  void (*step)(const DdimArgs&);
  void (*coefficients)(const CoefficientArgs&);
  void (*normal)(const NormalArgs&);
};

struct DdimInputs {
  const Tensor *sample, *output, *table;
  const MaybeTensor& row;
  int64_t prediction;
  bool bitwise;
  std::optional<double> low, high;
  bool clipped_direction;
  const MaybeTensor& cond;
  double guidance;
  const MaybeTensor &rescale, &threshold, &noise, &seed, &known, &known_noise, &mask;
};

std::tuple<Tensor, Tensor> run_ddim_step(const Kernels& kernels, const DdimInputs& inputs);
void run_ddim_step_out(const Kernels& kernels, const DdimInputs& inputs, const Tensor& prev, const MaybeTensor& x0);
Tensor run_ddim_coefficients(const Kernels& kernels, const Tensor& alphas, const Tensor& timestep,
                             const Tensor& prev_timestep, double eta);
Tensor run_philox_normal(const Kernels& kernels, const Tensor& like, const Tensor& seed);

#define DDIM_ARGUMENTS                                                                                             \
  const Tensor &sample, const Tensor &output, const Tensor &table, const MaybeTensor &row, int64_t prediction,     \
      bool bitwise, std::optional<double> low, std::optional<double> high, bool clipped_direction,                 \
      const MaybeTensor &cond, double guidance, const MaybeTensor &rescale, const MaybeTensor &threshold,          \
      const MaybeTensor &noise, const MaybeTensor &seed, const MaybeTensor &known, const MaybeTensor &known_noise, \
      const MaybeTensor &mask
#define DDIM_INPUTS                                                                                   \
  {&sample, &output,  &table,  row,       prediction, bitwise, low,   high,        clipped_direction, \
   cond,    guidance, rescale, threshold, noise,      seed,    known, known_noise, mask}

template <const Kernels& kernels>
std::tuple<Tensor, Tensor> ddim_step(DDIM_ARGUMENTS) {
  return run_ddim_step(kernels, DDIM_INPUTS);
}

template <const Kernels& kernels>
void ddim_step_out(DDIM_ARGUMENTS, const Tensor& prev, const MaybeTensor& x0) {
  run_ddim_step_out(kernels, DDIM_INPUTS, prev, x0);
}

template <const Kernels& kernels>
Tensor ddim_coefficients(const Tensor& alphas, const Tensor& timestep, const Tensor& prev_timestep, double eta) {
  return run_ddim_coefficients(kernels, alphas, timestep, prev_timestep, eta);
}

template <const Kernels& kernels>
Tensor philox_normal(const Tensor& like, const Tensor& seed) {
  return run_philox_normal(kernels, like, seed);
}

template <const Kernels& kernels, class Library>
void register_ddim(Library& m) {
  m.impl("ddim_step.native", TORCH_BOX(&ddim_step<kernels>));
  m.impl("ddim_step.native_nograd", TORCH_BOX(&ddim_step<kernels>));
  m.impl("ddim_step_out.native", TORCH_BOX(&ddim_step_out<kernels>));
  m.impl("ddim_coefficients.native", TORCH_BOX(&ddim_coefficients<kernels>));
  m.impl("philox_normal.native", TORCH_BOX(&philox_normal<kernels>));
}

}  // namespace protofast
