// The selection kernels on the CPU, for ctypes. Points are 6 numbers: clouds, count, dim and the strides of a cloud, a
// point and a coordinate.
#include "../../csrc/cuda/selection.h"
#include "scratch.h"

using namespace protofast;

namespace {

PointClouds points_of(const void* data, const int64_t* n, const bool* allowed, int dtype) {
  return {data, Dtype(dtype), n[0], n[1], n[2], n[3], n[4], n[5], allowed};
}

}  // namespace

extern "C" {

void emulate(int multiprocessors, int descending, int cooperative, int shared) {
  emulation::device = {multiprocessors, descending != 0, cooperative != 0, shared};
}

const char* k_center(const void* data, const int64_t* layout, const bool* allowed, int64_t metric,
                     const int64_t* initial, int64_t given, int64_t k, int64_t* indices, double* radii, int64_t* labels,
                     double* distances, int dtype) {
  return done(k_center_cuda({points_of(data, layout, allowed, dtype), Measure(metric), Engine::automatic, initial,
                             given, k, true, indices, radii, labels, distances, 0, scratch},
                            nullptr));
}

const char* relax(const void* data, const int64_t* layout, const bool* allowed, int64_t metric, const void* centers,
                  const int64_t* centers_layout, const double* nearest, double* values, int64_t* labels, int dtype) {
  return done(relax_cuda({points_of(data, layout, allowed, dtype), points_of(centers, centers_layout, nullptr, dtype),
                          Measure(metric), nearest, values, labels, 0, scratch},
                         nullptr));
}
}
