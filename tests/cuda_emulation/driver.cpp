// The prototype kernels on the CPU, for ctypes. A layout is 17 numbers: samples, channels, prototypes, topk, size[4],
// kernel[4]; then the strides of sample, channel and the four axes come on their own.
#include "../../csrc/cuda/prototype.h"
#include "scratch.h"

using namespace protofast;

namespace {

PrototypeShape shape_of(const int64_t* n) {
  PrototypeShape shape{n[0], n[1], n[2], n[3], {}, {}};
  for (int i = 0; i < AXES; ++i) shape.size[i] = n[4 + i], shape.kernel[i] = n[8 + i];
  return shape;
}

FeatureMap map_of(void* data, const int64_t* stride) {
  return {data, stride[0], stride[1], {stride[2], stride[3], stride[4], stride[5]}};
}

}  // namespace

extern "C" {

void emulate(int multiprocessors, int descending) {
  emulation::device.multiprocessors = multiprocessors, emulation::device.descending = descending;
}

const char* search(const int64_t* shape, void* x, const int64_t* stride, const void* p, const bool* mask,
                   int64_t metric, int64_t activation, double eps, int64_t precision, int verify, void* activated,
                   void* distance, int64_t* index, int dtype) {
  return done(
      prototype_search_cuda({shape_of(shape), map_of(x, stride), p, mask, Metric(metric), Activation(activation), eps,
                             Precision(precision), verify != 0, activated, distance, index, Dtype(dtype), 0, scratch},
                            nullptr));
}

const char* gradient(const int64_t* shape, void* x, const int64_t* stride, const void* p, const void* grad_activation,
                     const void* grad_distance, const void* distance, const int64_t* index, int64_t metric,
                     int64_t activation, double eps, void* to_x, const int64_t* to_stride, void* to_p, int dtype) {
  return done(prototype_gradient_cuda(
      {shape_of(shape), map_of(x, stride), p, grad_activation, grad_distance, distance, index, Metric(metric),
       Activation(activation), eps, map_of(to_x, to_stride), to_p, Dtype(dtype), 0, scratch},
      nullptr));
}

const char* map(const int64_t* shape, void* x, const int64_t* stride, const void* p, int64_t metric, void* distance,
                int dtype) {
  return done(prototype_map_cuda(
      {shape_of(shape), map_of(x, stride), p, Metric(metric), distance, Dtype(dtype), 0, scratch}, nullptr));
}
}
