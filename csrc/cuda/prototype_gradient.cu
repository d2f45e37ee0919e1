// The gradient at the winners. Every sum runs in one order, so its bits repeat.
#include "prototype.cuh"
#include "prototype.h"

namespace protofast {
namespace {

constexpr int GRADIENT_WARPS = 4, OWN_PIXELS = 16, TILE_PIXELS = GRADIENT_WARPS * OWN_PIXELS, BATCH = 4;

template <class R>
struct Gradient {
  Geometry g, to;  // of x, and of its gradient
  const void *x, *p;
  const R *grad_activation, *grad_distance, *distance;
  const int64_t* index;
  Metric metric;
  Activation activation;
  double eps;
  void *to_x, *to_p;
  // Of each winner: the first pixel of its window or −1, what multiplies x − p (or x, p), and 1 / |x| for COSINE.
  int* pixel;
  R *weight, *inverse_x, *inverse_p;
  int64_t channel_tiles, pixel_tiles;
  bool x_along_pixels, to_along_pixels;
};

template <class R>
__device__ inline R slope(R distance, Activation activation, double eps) {
  switch (activation) {
    case LOG:
      return static_cast<R>(eps - 1) / ((distance + 1) * (distance + static_cast<R>(eps)));
    case LINEAR:
      return -1;
    case EXP:
      return -exp(-distance);
    case RECIPROCAL:
      return -1 / ((distance + 1) * (distance + 1));
    case NONE:
      break;
  }
  return 1;
}

// 1 / |v|, and 0 for no length.
template <class R, class Read>
__device__ inline R inverse_length(int depth, int lane, Read read) {
  double sum = 0;
  for (int k = lane; k < depth; k += LANES) {
    const double value = read(k);
    sum = multiply_add(value, value, sum);
  }
  const R square = static_cast<R>(warp_sum(sum));
  return square == 0 ? R(0) : 1 / sqrt(square);
}

// A warp a winner, and after them a warp a prototype.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) winners_kernel(const __grid_constant__ Gradient<Compute<T>> a) {
  using R = Compute<T>;
  const int64_t winners = a.g.samples * a.g.prototypes * a.g.topk;
  const int64_t at = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;
  if (at >= winners) {
    const int64_t prototype = at - winners;
    if (a.metric != COSINE || prototype >= a.g.prototypes) return;
    const T* const p = static_cast<const T*>(a.p) + prototype * a.g.depth;
    const R inverse = inverse_length<R>(a.g.depth, lane, [&](int k) { return widen(p[k]); });
    if (lane == 0) a.inverse_p[prototype] = inverse;
    return;
  }
  const int64_t index = a.index[at];
  if (index < 0) {
    if (lane == 0) a.pixel[at] = -1;
    return;
  }
  const int patch = static_cast<int>(index);
  if (a.metric == COSINE) {
    const T* const x = patch_data<T>(a.g, a.x, at / (a.g.prototypes * a.g.topk), patch);
    const R inverse = inverse_length<R>(a.g.depth, lane, [&](int k) { return widen(x[depth_offset(a.g, k)]); });
    if (lane == 0) a.inverse_x[at] = inverse;
  }
  if (lane != 0) return;
  const R distance = a.distance[at];
  R weight = a.grad_distance ? a.grad_distance[at] : R(0);
  if (a.grad_activation) weight = weight + a.grad_activation[at] * slope(distance, a.activation, a.eps);
  if (a.metric == SQEUCLIDEAN) weight = 2 * weight;
  if (a.metric == EUCLIDEAN) weight = weight * (distance == 0 ? R(0) : 1 / distance);
  a.weight[at] = weight;
  a.pixel[at] = place_pixel(a.g, a.g.grid, patch);
}

// What a winner gives to the gradient of `own`: x for x, p for p.
template <class R>
__device__ inline R contribution(Metric metric, R weight, R cosine, R inverse_own, R inverse_other, R own, R other,
                                 R sum) {
  if (metric == DOT) return multiply_add(-weight, other, sum);
  if (metric == COSINE)
    return multiply_add(weight * inverse_own, multiply_add(cosine, inverse_own * own, -(inverse_other * other)), sum);
  return multiply_add(weight, own - other, sum);
}

// 32 channels of 64 pixels of a sample, all of them written once. Each warp has 16 of the pixels and goes through all
// winners of the sample; a lane is a channel, so no two threads add to one number.
template <class T>
__global__ void __launch_bounds__(GRADIENT_WARPS* LANES, 1)
    features_kernel(const __grid_constant__ Gradient<Compute<T>> a) {
  using R = Compute<T>;
  __shared__ R x[TILE_PIXELS][LANES + 1], sum[TILE_PIXELS][LANES + 1];
  const int64_t block = blockIdx.x, rest = block / a.pixel_tiles;
  const int first_pixel = static_cast<int>(block % a.pixel_tiles) * TILE_PIXELS;
  const int first_channel = static_cast<int>(rest % a.channel_tiles) * LANES;
  const int64_t sample = rest / a.channel_tiles;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int pixels = a.g.pixels - first_pixel < TILE_PIXELS ? a.g.pixels - first_pixel : TILE_PIXELS;
  const int channels = a.g.channels - first_channel < LANES ? a.g.channels - first_channel : LANES;

  const auto each = [&](bool along_pixels, auto visit) {
    for (int i = threadIdx.x; i < TILE_PIXELS * LANES; i += GRADIENT_WARPS * LANES) {
      const int pixel = along_pixels ? i % TILE_PIXELS : i / LANES,
                channel = along_pixels ? i / TILE_PIXELS : i % LANES;
      if (pixel < pixels && channel < channels) visit(pixel, channel);
    }
  };
  const auto offset = [&](const Geometry& g, int pixel, int channel) {
    return sample * g.sample + (first_channel + channel) * g.channel +
           place_offset(g.size, g.stride, first_pixel + pixel);
  };
  each(a.x_along_pixels, [&](int pixel, int channel) {
    sum[pixel][channel] = 0;
    x[pixel][channel] = widen(static_cast<const T*>(a.x)[offset(a.g, pixel, channel)]);
  });
  __syncthreads();

  const int begin = first_pixel + warp * OWN_PIXELS;
  const int end = begin + OWN_PIXELS < first_pixel + pixels ? begin + OWN_PIXELS : first_pixel + pixels;
  const int span = place_pixel(a.g, a.g.kernel, a.g.window - 1);
  const int64_t winners = a.g.prototypes * a.g.topk, before = sample * winners;
  const bool own = lane < channels;
  const T* const p = static_cast<const T*>(a.p) + int64_t{first_channel + (own ? lane : 0)} * a.g.window;
  for (int64_t start = 0; start < winners; start += LANES) {
    const int mine = start + lane < winners ? a.pixel[before + start + lane] : -1;
    unsigned left = __ballot_sync(ALL, mine >= 0 && mine < end && mine + span >= begin);
    while (left) {
      // A few at once, so that their loads travel together.
      int place[BATCH];
      int64_t winner[BATCH], prototype[BATCH];
      R weight[BATCH], cosine[BATCH], inverse_x[BATCH], inverse_p[BATCH];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        place[u] = -1, winner[u] = before + start, prototype[u] = start / a.g.topk;
        const int source = left ? __ffs(static_cast<int>(left)) - 1 : 0;
        const int pixel = __shfl_sync(ALL, mine, source);
        if (left) {
          place[u] = pixel, winner[u] = before + start + source, prototype[u] = (start + source) / a.g.topk;
          left &= left - 1;
        }
        weight[u] = place[u] < 0 ? R(0) : a.weight[winner[u]];
        cosine[u] = inverse_x[u] = inverse_p[u] = 0;
        if (a.metric == COSINE && place[u] >= 0) {
          cosine[u] = 1 - a.distance[winner[u]];
          inverse_x[u] = a.inverse_x[winner[u]], inverse_p[u] = a.inverse_p[prototype[u]];
        }
      }
      for (int w = 0; w < a.g.window; ++w) {
        const int step = a.g.window == 1 ? 0 : place_pixel(a.g, a.g.kernel, w);
        R value[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; ++u) value[u] = own ? widen(p[prototype[u] * a.g.depth + w]) : R(0);
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
          const int pixel = place[u] + step;
          if (!own || place[u] < 0 || pixel < begin || pixel >= end) continue;
          R& to = sum[pixel - first_pixel][lane];
          to = contribution(a.metric, weight[u], cosine[u], inverse_x[u], inverse_p[u], x[pixel - first_pixel][lane],
                            value[u], to);
        }
      }
    }
  }
  __syncthreads();
  each(a.to_along_pixels, [&](int pixel, int channel) {
    narrow(sum[pixel][channel], static_cast<T*>(a.to_x)[offset(a.to, pixel, channel)]);
  });
}

// 32 elements of a prototype. Each warp adds every eighth winner of the prototype, then the warps' sums are added.
template <class T>
__global__ void __launch_bounds__(THREADS, 1) prototypes_kernel(const __grid_constant__ Gradient<Compute<T>> a) {
  using R = Compute<T>;
  __shared__ R part[WARPS][LANES];
  const int tiles = (a.g.depth + LANES - 1) / LANES;
  const int64_t prototype = blockIdx.x / tiles;
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int k = static_cast<int>(blockIdx.x % tiles) * LANES + lane;
  const bool own = k < a.g.depth;
  const int64_t at_k = own ? depth_offset(a.g, k) : 0;
  const R p = own ? widen(static_cast<const T*>(a.p)[prototype * a.g.depth + k]) : R(0);
  const R inverse_p = a.metric == COSINE ? a.inverse_p[prototype] : R(0);
  R sum = 0;
#pragma unroll 4
  for (int64_t i = warp; i < a.g.samples * a.g.topk; i += WARPS) {
    const int64_t sample = i / a.g.topk, winner = (sample * a.g.prototypes + prototype) * a.g.topk + i % a.g.topk;
    const int pixel = a.pixel[winner];
    const bool chosen = own && pixel >= 0;
    const int64_t offset = sample * a.g.sample + at_k + (chosen ? place_offset(a.g.size, a.g.stride, pixel) : 0);
    const R x = chosen ? widen(static_cast<const T*>(a.x)[offset]) : R(0);
    const R weight = chosen ? a.weight[winner] : R(0);
    const bool cosine = chosen && a.metric == COSINE;
    const R added = contribution(a.metric, weight, cosine ? 1 - a.distance[winner] : R(0), inverse_p,
                                 cosine ? a.inverse_x[winner] : R(0), p, x, sum);
    sum = chosen ? added : sum;
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !own) return;
  R total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += part[w][lane];
  narrow(total, static_cast<T*>(a.to_p)[prototype * a.g.depth + k]);
}

bool along_pixels(const Geometry& g) { return g.channel != 1 || g.channels == 1; }

template <class T>
const char* gradient(const PrototypeGradient& args, void* stream) {
  using R = Compute<T>;
  Gradient<R> a{};
  if (const char* problem = describe(args.shape, args.x, a.g)) return problem;
  if (const char* problem = describe(args.shape, args.to_x, a.to)) return problem;
  a.x = args.x.data, a.p = args.p, a.index = args.index;
  a.grad_activation = static_cast<const R*>(args.grad_activation);
  a.grad_distance = static_cast<const R*>(args.grad_distance);
  a.distance = static_cast<const R*>(args.distance);
  a.metric = args.metric, a.activation = args.activation, a.eps = args.eps;
  a.to_x = args.to_x.data, a.to_p = args.to_p;
  const int64_t winners = a.g.samples * a.g.prototypes * a.g.topk;
  if (winners > 0) {
    a.pixel = static_cast<int*>(args.scratch(winners * 4));
    a.weight = static_cast<R*>(args.scratch(winners * sizeof(R)));
    if (a.metric == COSINE) {
      a.inverse_x = static_cast<R*>(args.scratch(winners * sizeof(R)));
      a.inverse_p = static_cast<R*>(args.scratch(a.g.prototypes * sizeof(R)));
    }
    const int64_t warps = winners + (a.metric == COSINE ? a.g.prototypes : 0);
    if (const char* problem = launch_kernel(winners_kernel<T>, ceil_div(warps, WARPS), THREADS, stream, a))
      return problem;
  }
  if (a.to_x) {
    a.channel_tiles = ceil_div(a.g.channels, LANES), a.pixel_tiles = ceil_div(a.g.pixels, TILE_PIXELS);
    a.x_along_pixels = along_pixels(a.g), a.to_along_pixels = along_pixels(a.to);
    const int64_t blocks = a.g.samples * a.channel_tiles * a.pixel_tiles;
    if (const char* problem = launch_kernel(features_kernel<T>, blocks, GRADIENT_WARPS * LANES, stream, a))
      return problem;
  }
  if (!a.to_p) return nullptr;
  // With COSINE and no sample, the lengths are not there and are not read: no winner is.
  if (winners == 0) a.metric = SQEUCLIDEAN;
  return launch_kernel(prototypes_kernel<T>, a.g.prototypes * ceil_div(a.g.depth, LANES), THREADS, stream, a);
}

}  // namespace

const char* prototype_gradient_cuda(const PrototypeGradient& args, void* stream) {
  switch (args.dtype) {
    case Dtype::f32:
      return gradient<float>(args, stream);
    case Dtype::f64:
      return gradient<double>(args, stream);
    case Dtype::bf16:
      return gradient<__nv_bfloat16>(args, stream);
    case Dtype::f16:
      return gradient<__half>(args, stream);
  }
  return "unknown dtype";
}

}  // namespace protofast
