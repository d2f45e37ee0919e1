#include "ddim_step.h"
#include "numbers.cuh"
#include "philox.cuh"

namespace protofast {
namespace {

constexpr int THREADS = 256;
// Vectors a thread: loads in flight, and a block's float64 coefficients spread over more data.
template <bool full>
constexpr int UNROLL = full ? 2 : 4;

template <class T, int width>
struct alignas(sizeof(T) * width) Pack {
  T lane[width];
};

template <class T, int width>
__device__ inline Pack<T, width> load(const Operand& operand, int64_t entry, int64_t element) {
  return *reinterpret_cast<const Pack<T, width>*>(static_cast<const T*>(operand.data) + entry * operand.stride +
                                                  element);
}

template <class T, int width>
__device__ inline void store(const Operand& operand, int64_t entry, int64_t element, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(static_cast<T*>(operand.data) + entry * operand.stride + element) = pack;
}

template <class C>
__device__ inline C clamp(C value, C low, C high) {
  value = value < low ? low : value;  // comparisons with NaN are false: it stays
  return value > high ? high : value;
}

// What the step makes of one element, with all its options. `drawn` is the noise, whether given or drawn.
template <class C>
__device__ inline void full_step(const DdimArgs& args, const DdimCoefficients<C>& k, C x, C m, C cond, C drawn, C known,
                                 C known_noise, bool free, C& prev, C& x0) {
  const bool bitwise = args.bitwise;
  const auto mul_add = [&](C a, C b, C c) { return bitwise ? a * b + c : multiply_add(a, b, c); };
  const C signal = k.column[SIGNAL], spread = k.column[SPREAD];
  if (args.cond.data) m = mul_add(static_cast<C>(args.guidance), cond - m, m);
  if (args.rescale) m = m * k.rescale;
  C e = m;
  if (args.prediction == SAMPLE) {
    x0 = m;
    if (bitwise) e = (x - signal * m) / spread;
  } else if (!bitwise) {
    x0 = multiply_add(k.a, x, k.b * m);
  } else if (args.prediction == EPSILON) {
    x0 = (x - spread * m) / signal;
  } else {
    x0 = signal * x - spread * m;
    e = signal * m + spread * x;
  }
  if (args.threshold)
    x0 = clamp(x0, -k.threshold, k.threshold) / k.threshold;
  else if (args.clips)
    x0 = clamp(x0, static_cast<C>(args.low), static_cast<C>(args.high));
  if (bitwise) {
    if (args.clipped_direction) e = (x - signal * x0) / spread;
    prev = k.column[PREV_SIGNAL] * x0 + k.column[DIRECTION] * e;
  } else {
    prev = multiply_add(k.sample, x, k.output * m);
  }
  if (args.noise.data || args.seed) prev = mul_add(k.column[SIGMA], drawn, prev);
  if (!bitwise && args.clips) prev = multiply_add(k.clipped, x0, prev);  // after the noise, as without other options
  if (args.known.data && !free)
    prev = args.known_noise.data ? mul_add(k.column[PREV_SIGNAL], known, k.column[PREV_SPREAD] * known_noise) : known;
}

// One block does `UNROLL<full> * THREADS` packs of one batch entry. A thread reads every element that it writes, and
// before it writes it, so an output may be an input. S is the sample's dtype, M the prediction's.
template <class S, class M, int width, bool full>
__global__ void __launch_bounds__(THREADS) ddim_step_kernel(const __grid_constant__ DdimArgs args, int64_t chunks) {
  using C = Compute<S>;
  __shared__ DdimCoefficients<C> shared;
  const int64_t entry = blockIdx.x / chunks;
  const int64_t first = (blockIdx.x % chunks * (UNROLL<full> * THREADS) + threadIdx.x) * width;
  constexpr int64_t step = int64_t{THREADS} * width;

  // Ask for the data first: the coefficients are computed while it travels. `inner` is a multiple of `width`.
  Pack<S, width> x[UNROLL<full>];
  Pack<M, width> m[UNROLL<full>];
#pragma unroll
  for (int u = 0; u < UNROLL<full>; ++u) {
    if (first + u * step < args.inner) {
      x[u] = load<S, width>(args.sample, entry, first + u * step);
      m[u] = load<M, width>(args.output, entry, first + u * step);
    }
  }
  if (threadIdx.x == 0) shared = combine<C>(args, entry);
  __syncthreads();
  const DdimCoefficients<C> k = shared;

#pragma unroll
  for (int u = 0; u < UNROLL<full>; ++u) {
    const int64_t element = first + u * step;
    if (element >= args.inner) break;
    Pack<M, width> cond{};
    Pack<S, width> noise{}, prev, x0;
    if (args.cond.data) cond = load<M, width>(args.cond, entry, element);
    if (args.noise.data) noise = load<S, width>(args.noise, entry, element);
    if constexpr (full) {
      Pack<S, width> known{}, known_noise{};
      Pack<uint8_t, width> mask{};
      float drawn[width];
      if (args.seed) normals<width>(args.seed[0], args.seed[1] + static_cast<uint64_t>(entry), element, drawn);
      if (args.known.data) {
        known = load<S, width>(args.known, entry, element);
        mask = load<uint8_t, width>(args.mask, entry, element);
      }
      if (args.known_noise.data) known_noise = load<S, width>(args.known_noise, entry, element);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (args.seed) narrow(static_cast<C>(drawn[i]), noise.lane[i]);  // rounded as a given one is
        C result, image;
        full_step<C>(args, k, widen(x[u].lane[i]), widen(m[u].lane[i]), widen(cond.lane[i]), widen(noise.lane[i]),
                     widen(known.lane[i]), widen(known_noise.lane[i]), mask.lane[i], result, image);
        narrow(result, prev.lane[i]);
        narrow(image, x0.lane[i]);
      }
    } else {
      const C low = static_cast<C>(args.low), high = static_cast<C>(args.high);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C sample = widen(x[u].lane[i]);
        C output = widen(m[u].lane[i]);
        if (args.cond.data) output = multiply_add(static_cast<C>(args.guidance), widen(cond.lane[i]) - output, output);
        C image = args.prediction == SAMPLE ? output : multiply_add(k.a, sample, k.b * output);
        C result = multiply_add(k.sample, sample, k.output * output);
        if (args.noise.data) result = multiply_add(k.column[SIGMA], static_cast<C>(widen(noise.lane[i])), result);
        if (args.clips) {
          image = clamp(image, low, high);
          result = multiply_add(k.clipped, image, result);
        }
        narrow(result, prev.lane[i]);
        narrow(image, x0.lane[i]);
      }
    }
    if (args.x0.data) store(args.x0, entry, element, x0);
    store(args.prev, entry, element, prev);
  }
}

const char* launched() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

constexpr int64_t MOST_BLOCKS = 0x7fffffff;
constexpr const char* TOO_LARGE = "the tensor is too large for one launch";

template <class S, class M, int width, bool full>
const char* launch(const DdimArgs& args, cudaStream_t stream) {
  constexpr int64_t block = int64_t{UNROLL<full>} * THREADS * width;
  const int64_t chunks = (args.inner + block - 1) / block, blocks = chunks * args.batch;
  if (blocks > MOST_BLOCKS) return TOO_LARGE;
  ddim_step_kernel<S, M, width, full><<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(args, chunks);
  return launched();
}

template <class S, class M = S>
const char* launch_widest(const DdimArgs& args, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  constexpr int width = 16 / sizeof(S);
  bool aligned = args.inner % width == 0;
  const auto check = [&](const Operand& o, size_t bytes) {
    aligned = aligned && reinterpret_cast<uintptr_t>(o.data) % (width * bytes) == 0 &&
              (args.batch == 1 || o.stride % width == 0);
  };
  for (const Operand& o : {args.sample, args.noise, args.known, args.known_noise, args.prev, args.x0})
    check(o, sizeof(S));
  for (const Operand& o : {args.output, args.cond}) check(o, sizeof(M));
  check(args.mask, 1);
  if (args.bitwise || args.rescale || args.threshold || args.seed || args.known.data)
    return aligned ? launch<S, M, width, true>(args, stream) : launch<S, M, 1, true>(args, stream);
  return aligned ? launch<S, M, width, false>(args, stream) : launch<S, M, 1, false>(args, stream);
}

__global__ void coefficients_kernel(const __grid_constant__ CoefficientArgs args) {
  const int64_t index = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (index < args.count) ddim_coefficients(args, index);
}

template <class T>
__global__ void __launch_bounds__(THREADS) normal_kernel(const __grid_constant__ NormalArgs args, int64_t blocks) {
  const int64_t entry = blockIdx.x / blocks;
  const int64_t first = (blockIdx.x % blocks * THREADS + threadIdx.x) * 4;
  if (first >= args.inner) return;
  float drawn[4];
  normals<4>(args.seed[0], args.seed[1] + static_cast<uint64_t>(entry), first, drawn);
  T* out = static_cast<T*>(args.out) + entry * args.inner + first;
  for (int i = 0; i < 4 && first + i < args.inner; ++i) narrow(static_cast<Compute<T>>(drawn[i]), out[i]);
}

template <class T>
const char* launch_normal(const NormalArgs& args, void* stream) {
  const int64_t blocks = (args.inner + 4 * THREADS - 1) / (4 * THREADS);
  if (blocks * args.batch > MOST_BLOCKS) return TOO_LARGE;
  normal_kernel<T>
      <<<static_cast<unsigned>(blocks * args.batch), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args, blocks);
  return launched();
}

}  // namespace

const char* ddim_step_cuda(const DdimArgs& args, void* stream) {
  switch (args.dtype) {
    case Dtype::f32:
      if (args.output_dtype == Dtype::bf16) return launch_widest<float, __nv_bfloat16>(args, stream);
      if (args.output_dtype == Dtype::f16) return launch_widest<float, __half>(args, stream);
      return launch_widest<float>(args, stream);
    case Dtype::f64:
      return launch_widest<double>(args, stream);
    case Dtype::bf16:
      return launch_widest<__nv_bfloat16>(args, stream);
    case Dtype::f16:
      return launch_widest<__half>(args, stream);
  }
  return "unknown dtype";
}

const char* ddim_coefficients_cuda(const CoefficientArgs& args, void* stream) {
  const auto blocks = static_cast<unsigned>((args.count + THREADS - 1) / THREADS);
  coefficients_kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return launched();
}

const char* philox_normal_cuda(const NormalArgs& args, void* stream) {
  switch (args.dtype) {
    case Dtype::f32:
      return launch_normal<float>(args, stream);
    case Dtype::f64:
      return launch_normal<double>(args, stream);
    case Dtype::bf16:
      return launch_normal<__nv_bfloat16>(args, stream);
    case Dtype::f16:
      return launch_normal<__half>(args, stream);
  }
  return "unknown dtype";
}

}  // namespace protofast
