// The DDIM step's coefficients (Song et al. 2021, eq. 12), one formula for the CPU and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace protofast {

enum Prediction : int64_t { EPSILON, SAMPLE, V_PREDICTION };  // numbered as in protofast/_ops/ddim.py

enum class Dtype { f32, f64, bf16, f16 };

// Element i of batch entry n lies at data[n * stride + i]. A null `data` is an absent operand.
struct Operand {
  void* data = nullptr;
  int64_t stride = 0;
};

// Everything a kernel needs. With one set of coefficients for the whole tensor, `batch` is 1.
struct DdimArgs {
  Operand sample, output, cond, noise;  // in
  Operand prev, x0;                     // out; x0 may be absent
  int64_t batch, inner;
  const double* alphas;  // `rows` cumulative alphas; row t + 1 is timestep t
  int64_t rows;
  const int64_t *timestep, *prev_timestep;
  int64_t timestep_stride, prev_timestep_stride;
  double eta, low, high, guidance;
  int64_t prediction;
  bool clips;
  Dtype dtype;
  int32_t device;
};

// x0 = a·x + b·m;  prev = sample·x + output·m + clipped·clip(x0) + noise·n.
// Without a clip the step is linear, and its two coefficients are combined here, in float64.
template <class T>
struct DdimCoefficients {
  T a, b, sample, output, clipped, noise;
};

// A timestep outside the table gives NaN.
HOST_DEVICE inline double cumulative_alpha(const double* alphas, int64_t rows, int64_t timestep) {
  return timestep >= -1 && timestep < rows - 1 ? alphas[timestep + 1] : NAN;
}

template <class T>
HOST_DEVICE inline DdimCoefficients<T> ddim_coefficients(const DdimArgs& args, int64_t entry) {
  const double now = cumulative_alpha(args.alphas, args.rows, args.timestep[entry * args.timestep_stride]);
  const double prev = cumulative_alpha(args.alphas, args.rows, args.prev_timestep[entry * args.prev_timestep_stride]);
  const double signal = sqrt(now), spread = sqrt(1 - now);
  const double zero = 0 * now;  // NaN where the timestep is outside the table
  double a, b, c, d;            // x0 = a·x + b·m, e = c·x + d·m
  if (args.prediction == EPSILON) {
    a = 1 / signal, b = -spread / signal, c = zero, d = zero + 1;
  } else if (args.prediction == SAMPLE) {
    a = zero, b = zero + 1, c = 1 / spread, d = -signal / spread;
  } else {
    a = signal, b = -spread, c = spread, d = signal;
  }
  double variance = 0, rest = 1 - prev;
  if (args.eta != 0) {
    // Eq. 16 and 1 − prev − variance in a form that cannot cancel or come out negative: added + kept = 1 for
    // now ≤ prev. The comparisons let a NaN through.
    const double added = (prev - now) / (prev * (1 - now)), kept = now * (1 - prev) / (prev * (1 - now));
    const double eta = args.eta;
    variance = eta * eta * (1 - prev) * (added < 0 ? 0 : added);
    rest = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * (kept > 1 ? 1 : kept));
  }
  const double p = sqrt(prev), q = sqrt(rest), sigma = sqrt(variance);
  DdimCoefficients<T> out;
  out.a = static_cast<T>(a);
  out.b = static_cast<T>(b);
  out.clipped = static_cast<T>(p);
  out.sample = static_cast<T>(args.clips ? q * c : p * a + q * c);
  out.output = static_cast<T>(args.clips ? q * d : p * b + q * d);
  out.noise = static_cast<T>(sigma);
  return out;
}

}  // namespace protofast
