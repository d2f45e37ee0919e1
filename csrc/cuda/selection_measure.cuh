// Values between points and a center, to the bit (protofast/_ops/selection.py), and bounds on them from float32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "numbers.cuh"

namespace protofast {

constexpr int WARP = 32, LANES = 8;
constexpr unsigned ALL = 0xffffffff;

struct Measuring {
  int dim;
  bool manhattan, cosine;
  double keep, slack;  // a sum in float32, times keep, less slack, is at most the value
};

// Points or one point: element (i, c) is at i·row + c·column.
template <class T>
struct Rows {
  const T* data;
  int64_t row, column;

  __device__ const T* at(int64_t i) const { return data + i * row; }
};

template <class T, int width>
struct alignas(sizeof(T) * width) Pack {
  T lane[width];
};

// Of values that float32 sums can take: u = 2⁻²⁴, a difference, a product and dim + 3 sums, so value ≥ sum·(1 − (dim +
// 8)u); each step may lose 2⁻¹²⁵ to underflow. Unit vectors x·r are rounded first: r by 2.1u, and the center's
// coordinates by 3.1u, so |x̂−ŷ| is off by 5.3u and its square, at most 4, by less than 32u.
inline Measuring measuring(int64_t dim, bool manhattan, bool cosine) {
  const auto terms = static_cast<double>(dim);
  return {static_cast<int>(dim), manhattan, cosine, 1 - (terms + 8) * 0x1p-24,
          terms * 0x1p-125 + (cosine ? 0x1p-19 : 0)};
}

// Whether float32 leaves it open that a value is below `nearest`. Infinite sums and NaN do.
__device__ inline bool unsettled(const Measuring& m, float sum, double nearest) {
  return nearest > 0 && !(sum <= FLT_MAX && sum * m.keep - m.slack >= nearest);
}

// For unit vectors in float32: 0 of a zero vector, NaN where float32 does not hold it in full precision.
__device__ inline float inverse(double norm) {
  const auto length = static_cast<float>(norm);
  return norm == 0 ? 0 : length > 0x1p-100f && length < 0x1p100f ? 1 / length : NAN;
}

// Adds a term of the difference to the sum; scaled points are unit vectors, as `y` is then.
__device__ inline float added(float sum, float x, float scale, float y, bool manhattan) {
  const float gap = multiply_add(x, scale, -y);
  return multiply_add(gap, manhattan ? copysignf(1, gap) : gap, sum);
}

__device__ inline double term(double gap, bool manhattan) { return manhattan ? fabs(gap) : gap * gap; }

__device__ inline double unit(double x, double norm) { return norm > 0 ? x / norm : x; }

// The direction of zero vectors is the coordinate after the last.
__device__ inline double of_zeros(double norm_x, double norm_y) { return (norm_x == 0) != (norm_y == 0) ? 1 : 0; }

__device__ inline double by_halves(const double (&lane)[LANES]) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// By a thread alone; at most eight coordinates. `y` is a unit vector where the metric asks for one.
template <int most, class C>
__device__ inline double exact_value(const Measuring& m, int dim, const C (&x)[most], const double (&y)[most],
                                     double norm_x, double norm_y) {
  double lane[LANES] = {};
#pragma unroll
  for (int c = 0; c < most; ++c) {
    const double a = m.cosine ? unit(x[c], norm_x) : x[c];
    if (c < dim) lane[c] = term(a - y[c], m.manhattan);
  }
  const double more = m.cosine ? of_zeros(norm_x, norm_y) : 0;
  if (dim == LANES) lane[0] += more;
#pragma unroll
  for (int c = 0; c < LANES; ++c)
    if (c == dim) lane[c] = more;
  return by_halves(lane);
}

// Sums over the eight threads of a group; all threads of the warp take part. In the order of by_halves.
template <class A>
__device__ inline A group_sum(A value) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// By a group of eight threads, one a lane of the sum.
template <class T>
__device__ inline double exact_value(const Measuring& m, const T* x, int64_t column_x, const T* y, int64_t column_y,
                                     double norm_x, double norm_y, bool wanted, int lane) {
  double sum = 0;
  for (int c = wanted ? lane : m.dim; c < m.dim; c += LANES) {
    double a = widen(x[c * column_x]), b = widen(y[c * column_y]);
    if (m.cosine) a = unit(a, norm_x), b = unit(b, norm_y);
    sum += term(a - b, m.manhattan);
  }
  if (m.cosine && lane == m.dim % LANES) sum += of_zeros(norm_x, norm_y);
  return group_sum(sum);
}

template <class T>
__device__ inline double exact_norm(int dim, const T* x, int64_t column, bool wanted, int lane) {
  double sum = 0;
  for (int c = wanted ? lane : dim; c < dim; c += LANES) {
    const double value = widen(x[c * column]);
    sum += value * value;
  }
  return sqrt(group_sum(sum));
}

}  // namespace protofast
