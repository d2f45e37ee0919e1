// The host side of the DDIM ops: checks, layouts, outputs. A device gives a `launch` and registers the two ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ddim.h"

namespace protofast {

using torch::stable::Tensor;
using Launch = void (*)(const DdimArgs&);

struct DdimInputs {
  const Tensor &sample, &output;
  const std::optional<Tensor>&cond, &noise;
  const Tensor &alphas, &timestep, &prev_timestep;
  double eta;
  int64_t prediction;
  double low, high, guidance;
};

std::tuple<Tensor, Tensor> run_ddim_step(Launch launch, const DdimInputs& inputs);
void run_ddim_step_out(Launch launch, const DdimInputs& inputs, const Tensor& prev, const std::optional<Tensor>& x0);

template <Launch launch>
std::tuple<Tensor, Tensor> ddim_step(const Tensor& sample, const Tensor& output, const std::optional<Tensor>& cond,
                                     const std::optional<Tensor>& noise, const Tensor& alphas, const Tensor& timestep,
                                     const Tensor& prev_timestep, double eta, int64_t prediction, double low,
                                     double high, double guidance) {
  return run_ddim_step(
      launch, {sample, output, cond, noise, alphas, timestep, prev_timestep, eta, prediction, low, high, guidance});
}

template <Launch launch>
void ddim_step_out(const Tensor& sample, const Tensor& output, const std::optional<Tensor>& cond,
                   const std::optional<Tensor>& noise, const Tensor& alphas, const Tensor& timestep,
                   const Tensor& prev_timestep, double eta, int64_t prediction, double low, double high,
                   double guidance, const Tensor& prev, const std::optional<Tensor>& x0) {
  run_ddim_step_out(
      launch, {sample, output, cond, noise, alphas, timestep, prev_timestep, eta, prediction, low, high, guidance},
      prev, x0);
}

}  // namespace protofast
