// Prototype distance (Chen et al. 2019, eq. 1): what a kernel is given, for the CPU and for CUDA.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "scratch.h"

namespace protofast {

// Numbered as in protofast/_ops/prototype.py.
enum Metric : int64_t { SQEUCLIDEAN, EUCLIDEAN, COSINE, DOT };
constexpr bool is_squared(Metric metric) { return metric == SQEUCLIDEAN || metric == EUCLIDEAN; }  // while searched
enum Activation : int64_t { NONE, LOG, LINEAR, EXP, RECIPROCAL };
enum Precision : int64_t { AUTO, IEEE, TF32X3, TF32, BF16 };

constexpr int AXES = 4;  // of a feature map, once neighbours that lie in one run are merged; unused ones have size 1

// `samples` maps of `channels` by size[0] × … × size[3] pixels, and windows of kernel[0] × … × kernel[3] of them. A
// patch is a window: its index is flat, row-major over grid(0) × … × grid(3).
struct PrototypeShape {
  int64_t samples, channels, prototypes, topk;
  int64_t size[AXES], kernel[AXES];

  int64_t grid(int axis) const { return size[axis] - kernel[axis] + 1; }
  int64_t patches() const { return grid(0) * grid(1) * grid(2) * grid(3); }
  int64_t pixels() const { return size[0] * size[1] * size[2] * size[3]; }
  int64_t window() const { return kernel[0] * kernel[1] * kernel[2] * kernel[3]; }  // pixels of a patch
};

// Pixel (i, j, k, l) in channel c of sample b lies at data[b·sample + c·channel + i·stride[0] + … + l·stride[3]].
struct FeatureMap {
  void* data;
  int64_t sample, channel, stride[AXES];
};

struct PrototypeSearch {
  PrototypeShape shape;
  FeatureMap x;
  const void* p;     // (prototypes, channels, window), contiguous
  const bool* mask;  // (samples, patches), contiguous; null: all may win
  Metric metric;
  Activation activation;
  double eps;
  Precision precision;
  bool verify;
  void *activated, *distance;  // (samples, prototypes, topk) in float32, or float64 for float64; activated may be null
  int64_t* index;
  Dtype dtype;  // of x and p
  int32_t device;
  Scratch scratch;
};

struct PrototypeGradient {
  PrototypeShape shape;
  FeatureMap x;
  const void* p;
  const void *grad_activation, *grad_distance;  // like distance, contiguous; either may be null
  const void* distance;
  const int64_t* index;
  Metric metric;
  Activation activation;
  double eps;
  FeatureMap to_x;  // every element is to be written; null data: not wanted
  void* to_p;       // like p; null: not wanted
  Dtype dtype;
  int32_t device;
  Scratch scratch;
};

struct PrototypeMap {
  PrototypeShape shape;
  FeatureMap x;
  const void* p;
  Metric metric;
  void* distance;  // (samples, prototypes, patches)
  Dtype dtype;
  int32_t device;
  Scratch scratch;
};

}  // namespace protofast
