// The DDIM step (Song et al. 2021, eq. 12): its coefficients and what a kernel is given, for the CPU and for CUDA.
// Compiled without contraction: a fused multiply-add is written where one is meant.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace protofast {

enum Prediction : int64_t { EPSILON, SAMPLE, V_PREDICTION };  // numbered as in protofast/_ops/ddim.py

// The columns of a table, as there.
enum Column { SIGNAL, SPREAD, PREV_SIGNAL, DIRECTION, SIGMA, PREV_SPREAD, COLUMNS };

// Element i of batch entry n lies at data[n * stride + i]. A null `data` is an absent operand.
struct Operand {
  void* data = nullptr;
  int64_t stride = 0;
};

// Everything a step needs. With one set of coefficients for the whole tensor, `batch` may be 1.
struct DdimArgs {
  Operand sample, output, cond, noise, known, known_noise, mask;  // in; mask holds bytes
  Operand prev, x0;                                               // out; x0 may be absent
  int64_t batch, inner;
  const double* table;  // `rows` rows of COLUMNS
  int64_t rows;
  const int64_t* row;  // of each entry, by `row_stride`; null: row n, or row 0 if there is but one
  int64_t row_stride;
  const double *rescale, *threshold;  // one an entry, by the strides; may be null
  int64_t rescale_stride, threshold_stride;
  const int64_t* seed;  // seed and offset, or null
  double low, high, guidance;
  int64_t prediction;
  bool clips, clipped_direction, bitwise;  // `clips` also for a threshold
  Dtype dtype, output_dtype;               // the latter of output and cond
  int32_t device;
};

struct CoefficientArgs {
  const double* alphas;  // `rows` cumulative alphas; row t + 1 is timestep t
  int64_t rows;
  const int64_t *timestep, *prev_timestep;
  int64_t timestep_stride, prev_timestep_stride;
  double eta;
  double* out;  // `count` rows of COLUMNS
  int64_t count;
  int32_t device;
};

// Normal numbers, `inner` for each of `batch` samples, row-major.
struct NormalArgs {
  void* out;
  int64_t batch, inner;
  const int64_t* seed;
  Dtype dtype;
  int32_t device;
};

// A timestep outside the table gives NaN.
HOST_DEVICE inline double cumulative_alpha(const double* alphas, int64_t rows, int64_t timestep) {
  return timestep >= -1 && timestep < rows - 1 ? alphas[timestep + 1] : NAN;
}

// One row of a table. The same operations as in backends/reference/ddim.py, so the same bits.
HOST_DEVICE inline void ddim_coefficients(const CoefficientArgs& args, int64_t index) {
  const double now = cumulative_alpha(args.alphas, args.rows, args.timestep[index * args.timestep_stride]);
  const double prev = cumulative_alpha(args.alphas, args.rows, args.prev_timestep[index * args.prev_timestep_stride]);
  const double eta = args.eta;
  double* out = args.out + index * COLUMNS;
  double sigma = 0, rest = 1 - prev;
  if (eta != 0) {
    // Eq. 16 and 1 − prev − sigma² in a form that cannot cancel or come out negative: added + kept = 1 for
    // now ≤ prev. The comparisons let a NaN through.
    const double added = (prev - now) / (prev * (1 - now)), kept = now * (1 - prev) / (prev * (1 - now));
    sigma = eta * sqrt((1 - prev) * (added < 0 ? 0 : added));
    rest = (1 - prev) * ((1 - eta) * (1 + eta) + eta * eta * (kept > 1 ? 1 : kept));
  }
  out[SIGNAL] = sqrt(now), out[SPREAD] = sqrt(1 - now), out[PREV_SIGNAL] = sqrt(prev);
  out[DIRECTION] = sqrt(rest), out[SIGMA] = sigma, out[PREV_SPREAD] = sqrt(1 - prev);
}

// x0 = a·x + b·m;  prev = sample·x + output·m + clipped·clip(x0) + sigma·noise.
// Without a clip the step is linear, and its two coefficients are combined here, in float64. The bitwise form uses the
// columns of the table instead.
template <class T>
struct DdimCoefficients {
  T a, b, sample, output, clipped, rescale, threshold;
  T column[COLUMNS];
};

template <class T>
HOST_DEVICE inline DdimCoefficients<T> combine(const DdimArgs& args, int64_t entry) {
  const int64_t index = args.row ? args.row[entry * args.row_stride] : args.rows == 1 ? 0 : entry;
  double column[COLUMNS];
  DdimCoefficients<T> out;
  for (int i = 0; i < COLUMNS; ++i) {
    column[i] = index >= 0 && index < args.rows ? args.table[index * COLUMNS + i] : NAN;
    out.column[i] = static_cast<T>(column[i]);
  }
  const double signal = column[SIGNAL], spread = column[SPREAD], p = column[PREV_SIGNAL], q = column[DIRECTION];
  double a, b, c, d;  // x0 = a·x + b·m, e = c·x + d·m
  if (args.prediction == EPSILON) {
    a = 1 / signal, b = -spread / signal, c = 0, d = 1;
  } else if (args.prediction == SAMPLE) {
    a = 0, b = 1, c = 1 / spread, d = -signal / spread;
  } else {
    a = signal, b = -spread, c = spread, d = signal;
  }
  double sample = q * c, output = q * d, clipped = p;
  if (!args.clips)
    sample += p * a, output += p * b;
  else if (args.clipped_direction)  // e = (x − signal·x0) / spread
    sample = q / spread, output = 0, clipped = p - q * (signal / spread);
  out.a = static_cast<T>(a), out.b = static_cast<T>(b);
  out.sample = static_cast<T>(sample), out.output = static_cast<T>(output), out.clipped = static_cast<T>(clipped);
  out.rescale = static_cast<T>(args.rescale ? args.rescale[entry * args.rescale_stride] : 1);
  out.threshold = static_cast<T>(args.threshold ? args.threshold[entry * args.threshold_stride] : 1);
  return out;
}

}  // namespace protofast
