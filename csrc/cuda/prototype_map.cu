// The dense map of distances in the direct form.
#include "prototype.cuh"
#include "prototype.h"

namespace protofast {
namespace {

constexpr int SIDE = 64, OWN = 4, ACROSS = SIDE / OWN, CHUNK = 16;  // a tile is SIDE × SIDE results, OWN × OWN a thread

template <class R>
struct Map {
  Geometry g;
  const void *x, *p;
  Metric metric;
  R *distance, *inverse_x, *inverse_p;  // inverse lengths for COSINE, of all patches and prototypes
  bool along_depth;
  int64_t columns;
};

// 0 for no length; NaN where R does not hold the inverse in full precision, which sends a result to float64.
template <class R>
__device__ inline R safe_inverse(double square) {
  if (square == 0) return 0;
  if (sizeof(R) == 4 && !(square > 0x1p-80 && square < 0x1p120)) return NAN;
  return static_cast<R>(1 / sqrt(square));
}

template <class T>
__global__ void __launch_bounds__(THREADS) lengths_kernel(const __grid_constant__ Map<Compute<T>> a) {
  const int64_t patches = a.g.samples * a.g.patches, at = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (at >= patches + a.g.prototypes) return;
  double sum = 0;
  if (at < patches) {
    const T* const x = patch_data<T>(a.g, a.x, at / a.g.patches, static_cast<int>(at % a.g.patches));
    for (int k = 0; k < a.g.depth; ++k) {
      const double value = widen(x[depth_offset(a.g, k)]);
      sum = multiply_add(value, value, sum);
    }
    a.inverse_x[at] = safe_inverse<Compute<T>>(sum);
  } else {
    const T* const p = static_cast<const T*>(a.p) + (at - patches) * a.g.depth;
    for (int k = 0; k < a.g.depth; ++k) {
      const double value = widen(p[k]);
      sum = multiply_add(value, value, sum);
    }
    a.inverse_p[at - patches] = safe_inverse<Compute<T>>(sum);
  }
}

template <class T, bool product>
__global__ void __launch_bounds__(THREADS, 1) map_kernel(const __grid_constant__ Map<Compute<T>> a) {
  using R = Compute<T>;
  __shared__ R x[CHUNK][SIDE + 1], p[CHUNK][SIDE + 1];
  __shared__ int64_t offset[SIDE];
  const int64_t patches = a.g.samples * a.g.patches;
  const int64_t first_row = blockIdx.x / a.columns * SIDE, first_column = blockIdx.x % a.columns * SIDE;
  const int thread = threadIdx.x, row = thread % ACROSS, column = thread / ACROSS;
  for (int r = thread; r < SIDE; r += THREADS) {
    const int64_t flat = first_row + r;
    offset[r] = flat < patches ? flat / a.g.patches * a.g.sample +
                                     place_offset(a.g.grid, a.g.stride, static_cast<int>(flat % a.g.patches))
                               : -1;
  }
  __syncthreads();
  R sum[OWN][OWN] = {};
  for (int first = 0; first < a.g.depth; first += CHUNK) {
    const int left = a.g.depth - first;
#pragma unroll
    for (int i = thread; i < CHUNK * SIDE; i += THREADS) {
      const int r = a.along_depth ? i / CHUNK : i % SIDE, k = a.along_depth ? i % CHUNK : i / SIDE;
      const bool there = offset[r] >= 0 && k < left;
      R value = there ? widen(static_cast<const T*>(a.x)[offset[r] + depth_offset(a.g, first + k)]) : R(0);
      if (there && a.metric == COSINE) value = value * a.inverse_x[first_row + r];
      x[k][r] = value;
    }
#pragma unroll
    for (int i = thread; i < CHUNK * SIDE; i += THREADS) {
      const int c = i / CHUNK, k = i % CHUNK;
      const bool there = first_column + c < a.g.prototypes && k < left;
      R value = there ? widen(static_cast<const T*>(a.p)[(first_column + c) * a.g.depth + first + k]) : R(0);
      if (there && a.metric == COSINE) value = value * a.inverse_p[first_column + c];
      p[k][c] = value;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) {
      R own_x[OWN], own_p[OWN];
#pragma unroll
      for (int i = 0; i < OWN; ++i) own_x[i] = x[k][row + ACROSS * i], own_p[i] = p[k][column + ACROSS * i];
#pragma unroll
      for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
          if constexpr (product) {
            sum[i][j] = multiply_add(-own_x[i], own_p[j], sum[i][j]);
          } else {
            const R difference = own_x[i] - own_p[j];
            sum[i][j] = multiply_add(difference, difference, sum[i][j]);
          }
        }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int64_t flat = first_row + row + ACROSS * i;
    if (flat >= patches) continue;
    const int64_t sample = flat / a.g.patches, patch = flat % a.g.patches;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const int64_t prototype = first_column + column + ACROSS * j;
      if (prototype >= a.g.prototypes) continue;
      R value = sum[i][j];
      bool exact = sizeof(R) == 8 || in_range(static_cast<float>(value));
      if (a.metric == COSINE) {
        const R inverse_x = a.inverse_x[flat], inverse_p = a.inverse_p[prototype];
        const bool number = inverse_x == inverse_x && inverse_p == inverse_p, none = inverse_x == 0 || inverse_p == 0;
        value = number && none ? R(1) : value / 2;
        exact = exact || (number && none);
      }
      if (!exact) {
        const T* const from = static_cast<const T*>(a.x) + offset[row + ACROSS * i];
        const T* const to = static_cast<const T*>(a.p) + prototype * a.g.depth;
        value = finished<R>(direct_form<double>(a.g, from, to, a.metric, 0, 1, [](double v) { return v; }), a.metric);
      } else if (a.metric == EUCLIDEAN) {
        value = sqrt(value);
      }
      a.distance[(sample * a.g.prototypes + prototype) * a.g.patches + patch] = value;
    }
  }
}

template <class T>
const char* map(const PrototypeMap& args, void* stream) {
  using R = Compute<T>;
  Map<R> a{};
  if (const char* problem = describe(args.shape, args.x, a.g)) return problem;
  const int64_t patches = a.g.samples * a.g.patches;
  if (patches == 0 || a.g.prototypes == 0) return nullptr;
  a.x = args.x.data, a.p = args.p, a.metric = args.metric, a.distance = static_cast<R*>(args.distance);
  a.along_depth = a.g.channel == 1 && a.g.channels > 1, a.columns = ceil_div(a.g.prototypes, SIDE);
  if (a.metric == COSINE) {
    a.inverse_x = static_cast<R*>(args.scratch(patches * sizeof(R)));
    a.inverse_p = static_cast<R*>(args.scratch(a.g.prototypes * sizeof(R)));
    const int64_t vectors = patches + a.g.prototypes;
    if (const char* problem = launch_kernel(lengths_kernel<T>, ceil_div(vectors, THREADS), THREADS, stream, a))
      return problem;
  }
  return launch_kernel(a.metric == DOT ? map_kernel<T, true> : map_kernel<T, false>,
                       a.columns * ceil_div(patches, SIDE), THREADS, stream, a);
}

}  // namespace

const char* prototype_map_cuda(const PrototypeMap& args, void* stream) {
  switch (args.dtype) {
    case Dtype::f32:
      return map<float>(args, stream);
    case Dtype::f64:
      return map<double>(args, stream);
    case Dtype::bf16:
      return map<__nv_bfloat16>(args, stream);
    case Dtype::f16:
      return map<__half>(args, stream);
  }
  return "unknown dtype";
}

}  // namespace protofast
