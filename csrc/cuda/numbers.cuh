// The types of tensors, and of the arithmetic on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace protofast {

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }

__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

template <class T>
using Compute = decltype(widen(T{}));

}  // namespace protofast
