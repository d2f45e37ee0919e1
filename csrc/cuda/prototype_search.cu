// The search: screens the patches, then decides and evaluates in the direct form.
#include <algorithm>
#include <cmath>

#include "prototype.h"
#include "prototype_screen.h"

namespace protofast {
namespace {

struct Refine {
  Geometry g;
  const void *x, *p;
  const bool* mask;
  Metric metric;
  Activation activation;
  double eps;
  Lists lists;
  double *least, *length;  // as in Screen; what is verified has a null `length` here
  double bound;
  void *activated, *distance;
  int64_t* index;
};

template <class R>
__device__ inline R activate(R distance, Activation activation, double eps) {
  switch (activation) {
    case LOG:
      return log1p(static_cast<R>(1 - eps) / (distance + static_cast<R>(eps)));
    case LINEAR:
      return -distance;
    case EXP:
      return exp(-distance);
    case RECIPROCAL:
      return 1 / (distance + 1);
    case NONE:
      break;
  }
  return distance;
}

// Whether the scores of a pair decide nothing: some were not finite, or not enough of them were. (Nor do they where the
// prototype is so short that products are lost.)
__device__ inline bool undecided(const Entry& mine, int64_t topk) {
  const Entry first = entry_of(mine, 0), last = entry_of(mine, static_cast<int>(topk) - 1);
  return last.place == NOWHERE || first.key == to_key(-INFINITY);
}

// The score that a patch among the true nearest reaches, whatever the rounding; NaN where the direct form is to decide.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) least_kernel(const __grid_constant__ Refine a) {
  const int64_t pair = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;
  if (pair >= a.g.samples * a.g.prototypes) return;
  const int64_t sample = pair / a.g.prototypes, prototype = pair % a.g.prototypes;
  const T* const p = static_cast<const T*>(a.p) + prototype * a.g.depth;
  double square = 0;
  for (int k = lane; k < a.g.depth; k += LANES) {
    const double value = widen(p[k]);
    square = multiply_add(value, value, square);
  }
  const double length = sqrt(warp_sum(square));
  if (sample == 0 && lane == 0) a.length[prototype] = length;
  const Entry mine = merged(a.lists, pair, lane);
  double least = INFINITY;
  if (undecided(mine, a.lists.topk)) {
    least = NAN;
  } else {
    for (int j = 0; j < a.lists.topk; ++j) {
      const Entry entry = entry_of(mine, j);
      const T* const patch = patch_data<T>(a.g, a.x, sample, entry.place);
      double norm = 0;
      for (int k = lane; k < a.g.depth; k += LANES) {
        const double value = widen(patch[depth_offset(a.g, k)]);
        norm = multiply_add(value, value, norm);
      }
      norm = warp_sum(norm);
      const double error = score_error<Compute<T>>(a.g, a.metric, a.bound, norm, length);
      least = fmin(least, -from_key(entry.key) - error);
    }
    if (!(length * length > LEAST_SQUARE<Compute<T>>)) least = NAN;
  }
  // Rounded down, as it may be compared in float32.
  if (lane == 0) a.least[pair] = least - fabs(least) * (sizeof(Compute<T>) == 4 ? 0x1p-22 : 0x1p-50);
}

// A warp for every (sample, prototype).
template <class T>
__global__ void __launch_bounds__(THREADS, 1) refine_kernel(const __grid_constant__ Refine a) {
  using R = Compute<T>;
  const int64_t pair = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES, topk = static_cast<int>(a.lists.topk);
  if (pair >= a.g.samples * a.g.prototypes) return;
  const int64_t sample = pair / a.g.prototypes, prototype = pair % a.g.prototypes;
  const T* const p = static_cast<const T*>(a.p) + prototype * a.g.depth;
  const bool verified = a.least;
  const Entry candidates = merged(a.lists, pair, lane);
  bool direct = verified ? !(a.least[pair] == a.least[pair]) : undecided(candidates, topk);
  if (!verified && !direct) {  // as in least_kernel
    double square = 0;
    for (int k = lane; k < a.g.depth; k += LANES) {
      const double value = widen(p[k]);
      square = multiply_add(value, value, square);
    }
    direct = !(warp_sum(square) > LEAST_SQUARE<R>);
  }
  Entry mine;
  if (direct) {
    Entry worst;
    for (int64_t start = 0; start < a.g.patches && worst.key != 0; start += LANES) {
      const int64_t own = start + lane;
      const bool allowed = own < a.g.patches && (!a.mask || a.mask[sample * a.g.patches + own]);
      for (unsigned left = __ballot_sync(ALL, allowed); left; left &= left - 1) {
        Entry added;
        added.place = static_cast<int>(start) + __ffs(static_cast<int>(left)) - 1;
        added.key = to_key(exact_distance(a.g, patch_data<T>(a.g, a.x, sample, added.place), p, a.metric, lane));
        insert(mine, added, lane);
      }
      worst = entry_of(mine, topk - 1);
    }
  } else if (verified) {
    mine = candidates;
  } else {
    for (int j = 0; j < topk; ++j) {
      Entry added;
      added.place = entry_of(candidates, j).place;
      added.key = to_key(result_distance(a.g, patch_data<T>(a.g, a.x, sample, added.place), p, a.metric, lane));
      insert(mine, added, lane);
    }
  }
  if (lane >= topk) return;
  const bool found = mine.place != NOWHERE;
  const R distance = found ? finished<R>(from_key(mine.key), a.metric) : R(INFINITY);
  const int64_t at = pair * topk + lane;
  static_cast<R*>(a.distance)[at] = distance;
  if (a.activated) static_cast<R*>(a.activated)[at] = activate(distance, a.activation, a.eps);
  a.index[at] = found ? mine.place : -1;
}

template <class T>
const char* refine(const Refine& a, bool least, void* stream) {
  const int64_t blocks = ceil_div(a.g.samples * a.g.prototypes, WARPS);
  return launch_kernel(least ? least_kernel<T> : refine_kernel<T>, blocks, THREADS, stream, a);
}

const char* refine(Dtype dtype, const Refine& a, bool least, void* stream) {
  switch (dtype) {
    case Dtype::f32:
      return refine<float>(a, least, stream);
    case Dtype::f64:
      return refine<double>(a, least, stream);
    case Dtype::bf16:
      return refine<__nv_bfloat16>(a, least, stream);
    case Dtype::f16:
      return refine<__half>(a, least, stream);
  }
  return "unknown dtype";
}

// float64 has one search; the products of half-precision inputs are exact in TF32, and on tensor cores of their own.
Arithmetic arithmetic_of(Dtype dtype, Precision precision) {
  if (dtype == Dtype::f64 || precision == IEEE) return Arithmetic::IEEE;
  if (precision == BF16) return Arithmetic::BF16;
  if (dtype == Dtype::bf16) return Arithmetic::BF16;
  if (dtype == Dtype::f16) return Arithmetic::F16;
  return precision == AUTO ? Arithmetic::IEEE : precision == TF32 ? Arithmetic::TF32 : Arithmetic::TF32X3;
}

// |score − exact score| ≤ bound · (|x||p| + |x|²/2): of rounding the inputs, which may shift both factors, and of the
// sums. Tensor cores may truncate as they add.
double error_bound(Dtype dtype, Arithmetic arithmetic, int64_t depth) {
  const double terms = static_cast<double>(depth) + 16;
  double input = 0, sum = terms * 0x1p-22;
  if (arithmetic == Arithmetic::IEEE) sum = terms * (dtype == Dtype::f64 ? 0x1p-53 : 0x1p-24);
  if (arithmetic == Arithmetic::TF32X3) input = 3 * 0x1p-22;
  if (arithmetic == Arithmetic::TF32) input = 2.01 * 0x1p-11;
  if (arithmetic == Arithmetic::BF16 && dtype != Dtype::bf16) input = 2.01 * 0x1p-8;
  return 1.1 * (input + sum);
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

const char* screen(Dtype dtype, Arithmetic arithmetic, const Screen& a, void* stream) {
  switch (arithmetic) {
    case Arithmetic::IEEE:
      return screen_simt(a, dtype, stream);
    case Arithmetic::TF32X3:
    case Arithmetic::TF32:
      return screen_tf32(a, dtype, arithmetic, stream);
    case Arithmetic::BF16:
    case Arithmetic::F16:
      return screen_half(a, dtype, arithmetic, stream);
  }
  return "unknown arithmetic";
}

}  // namespace

const char* prototype_search_cuda(const PrototypeSearch& args, void* stream) {
  if (args.shape.topk > LANES) return "topk is at most 32 in the CUDA kernels; backend='reference' takes any";
  const int64_t pairs = args.shape.samples * args.shape.prototypes;
  if (pairs == 0 || args.shape.topk == 0) return nullptr;
  Geometry g;
  if (const char* problem = describe(args.shape, args.x, g)) return problem;

  const Arithmetic arithmetic = arithmetic_of(args.dtype, args.precision);
  const int rows = rows_of(args.dtype);
  const auto size = static_cast<int64_t>(bytes(args.dtype));
  const bool halves = arithmetic == Arithmetic::BF16 || arithmetic == Arithmetic::F16;
  const int64_t run = halves ? 8 : 4;                     // elements that a thread reads along depth
  const auto multiples = [&](int64_t of, bool channel) {  // of the strides that are used
    bool all = (g.samples == 1 || g.sample % of == 0) && (!channel || g.channels == 1 || g.channel % of == 0);
    for (int axis = 0; axis < AXES - 1 + !channel; ++axis) all = all && (g.size[axis] == 1 || g.stride[axis] % of == 0);
    return all;
  };
  const auto aligned = [](const void* data, int64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; };

  Screen a{};
  a.g = g, a.x = args.x.data, a.p = args.p, a.mask = args.mask, a.metric = args.metric;
  int inner = AXES - 1;
  while (inner > 0 && g.size[inner] == 1) --inner;
  a.along_depth = g.channel == 1 && g.channels > 1 && (g.window > 1 || g.size[inner] == 1 || g.stride[inner] != 1);
  if (a.along_depth)
    a.vector_x = g.window == 1 && g.depth % run == 0 && aligned(a.x, 16) && multiples(run, false);
  else
    a.vector_x = g.window == 1 && g.stride[AXES - 1] == 1 && g.size[AXES - 1] % 4 == 0 && aligned(a.x, 4 * size) &&
                 multiples(4, true);
  a.vector_p = g.depth % run == 0 && aligned(a.p, 16);

  // Several small samples share a tile (two of 7 × 7: 98 of 128 rows); of large ones, tiles go to several blocks where
  // there would be too few blocks.
  a.grouped = static_cast<int>(std::clamp<int64_t>(rows / std::max(g.patches, 1), 1, g.samples));
  a.tiles = ceil_div(g.patches, rows);
  a.columns = ceil_div(g.prototypes, COLUMNS);
  const int64_t blocks = a.columns * ceil_div(g.samples, a.grouped);
  a.splits = a.grouped > 1 ? 1 : std::clamp<int64_t>(ceil_div(4 * multiprocessors(), blocks), 1, a.tiles);
  a.bound = error_bound(args.dtype, arithmetic, g.depth);
  const int64_t entries = pairs * a.splits * g.topk;
  a.lists = {static_cast<uint64_t*>(args.scratch(entries * 8)), static_cast<int*>(args.scratch(entries * 4)), g.topk,
             a.splits};
  if (const char* problem = screen(args.dtype, arithmetic, a, stream)) return problem;

  Refine r{};
  r.g = g, r.x = a.x, r.p = a.p, r.mask = a.mask, r.metric = a.metric, r.activation = args.activation, r.eps = args.eps;
  r.lists = a.lists, r.bound = a.bound;
  r.activated = args.activated, r.distance = args.distance, r.index = args.index;
  if (args.verify) {
    r.least = static_cast<double*>(args.scratch(pairs * 8));
    r.length = static_cast<double*>(args.scratch(g.prototypes * 8));
    if (const char* problem = refine(args.dtype, r, true, stream)) return problem;
    a.least = r.least, a.length = r.length;
    if (const char* problem = screen(args.dtype, arithmetic, a, stream)) return problem;
  }
  return refine(args.dtype, r, false, stream);
}

}  // namespace protofast
