#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ddim_step.h"

namespace protofast {
namespace {

constexpr int THREADS = 256;
// Vectors a thread: loads in flight, and a block's float64 coefficients spread over more data.
constexpr int UNROLL = 4;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }

template <class T>
using Compute = decltype(widen(T{}));

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

// One block does `UNROLL * THREADS` packs of one batch entry. A thread reads every element that it writes, and before
// it writes it, so an output may be an input.
template <class T, int width>
__global__ void __launch_bounds__(THREADS) ddim_step_kernel(const __grid_constant__ DdimArgs args, int64_t chunks) {
  using C = Compute<T>;
  __shared__ DdimCoefficients<C> shared;
  const int64_t entry = blockIdx.x / chunks;
  const int64_t first = (blockIdx.x % chunks * (UNROLL * THREADS) + threadIdx.x) * width;
  constexpr int64_t step = int64_t{THREADS} * width;

  // Ask for the data first: the coefficients are computed while it travels. `inner` is a multiple of `width`.
  Pack<T, width> x[UNROLL], m[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (first + u * step < args.inner) {
      x[u] = load<T, width>(args.sample, entry, first + u * step);
      m[u] = load<T, width>(args.output, entry, first + u * step);
    }
  }
  if (threadIdx.x == 0) shared = ddim_coefficients<C>(args, entry);
  __syncthreads();
  const DdimCoefficients<C> k = shared;
  const C low = static_cast<C>(args.low), high = static_cast<C>(args.high), guidance = static_cast<C>(args.guidance);

#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t element = first + u * step;
    if (element >= args.inner) break;
    Pack<T, width> cond{}, noise{}, prev, x0;
    if (args.cond.data) cond = load<T, width>(args.cond, entry, element);
    if (args.noise.data) noise = load<T, width>(args.noise, entry, element);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const C sample = widen(x[u].lane[i]);
      C output = widen(m[u].lane[i]);
      if (args.cond.data) output += guidance * (widen(cond.lane[i]) - output);
      C image = k.a * sample + k.b * output;
      C before = k.sample * sample + k.output * output;
      if (args.noise.data) before += k.noise * widen(noise.lane[i]);
      if (args.clips) {
        image = image < low ? low : image;  // comparisons with NaN are false: it stays
        image = image > high ? high : image;
        before += k.clipped * image;
      }
      narrow(before, prev.lane[i]);
      narrow(image, x0.lane[i]);
    }
    if (args.x0.data) store(args.x0, entry, element, x0);
    store(args.prev, entry, element, prev);
  }
}

template <class T, int width>
const char* launch(const DdimArgs& args, cudaStream_t stream) {
  constexpr int64_t block = int64_t{UNROLL} * THREADS * width;
  const int64_t chunks = (args.inner + block - 1) / block, blocks = chunks * args.batch;
  if (blocks > 0x7fffffff) return "the tensor is too large for one launch";
  ddim_step_kernel<T, width><<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(args, chunks);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <class T>
const char* launch_widest(const DdimArgs& args, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  bool aligned = args.inner % width == 0;
  for (const Operand& o : {args.sample, args.output, args.cond, args.noise, args.prev, args.x0})
    aligned = aligned && reinterpret_cast<uintptr_t>(o.data) % 16 == 0 && (args.batch == 1 || o.stride % width == 0);
  return aligned ? launch<T, width>(args, stream) : launch<T, 1>(args, stream);
}

}  // namespace

const char* ddim_step_cuda(const DdimArgs& args, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Dtype::f32:
      return launch_widest<float>(args, queue);
    case Dtype::f64:
      return launch_widest<double>(args, queue);
    case Dtype::bf16:
      return launch_widest<__nv_bfloat16>(args, queue);
    case Dtype::f16:
      return launch_widest<__half>(args, queue);
  }
  return "unknown dtype";
}

}  // namespace protofast
