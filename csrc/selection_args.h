// Checks of what selection ops are given, and their outputs.
#pragma once

#include "selection.h"
#include "temporaries.h"
#include "view.h"

namespace protofast::op {

inline void check_same(const char* name, const View& tensor, const View& points, int32_t dtype) {
  STD_TORCH_CHECK(tensor.dtype == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device_type == points.device_type && tensor.device == points.device, name,
                  " must be on the points' device");
}

inline PointClouds clouds(const View& points, bool may_be_many) {
  STD_TORCH_CHECK(points.dim == 2 || (may_be_many && points.dim == 3), "points must be (n, d)",
                  may_be_many ? " or (clouds, n, d)" : "");
  PointClouds found{};
  const int64_t axis = points.dim - 2;
  found.data = points.data(), found.dtype = dtype_of(points);
  found.clouds = axis ? points.sizes[0] : 1, found.cloud = axis ? points.strides[0] : 0;
  found.count = points.sizes[axis], found.row = points.strides[axis];
  found.dim = points.sizes[axis + 1], found.column = points.strides[axis + 1];
  return found;
}

inline const bool* allowed(const MaybeTensor& mask, const View& points, const PointClouds& clouds, Temporaries& kept) {
  if (!mask) return nullptr;
  const View flags(*mask);
  check_same("mask", flags, points, numbers().boolean);
  STD_TORCH_CHECK(flags.dim == points.dim - 1 && flags.numel == clouds.clouds * clouds.count,
                  "mask must have one flag a point");
  return static_cast<const bool*>(kept.packed(*mask).data_ptr());
}

inline Measure measure(int64_t metric, const PointClouds& points) {
  STD_TORCH_CHECK(metric >= 0 && metric <= int64_t(Measure::precomputed), "metric is out of range");
  STD_TORCH_CHECK(Measure(metric) != Measure::precomputed || points.count == points.dim,
                  "precomputed distances must be (n, n)");
  return Measure(metric);
}

// (clouds, width), or (width) for points (n, d).
inline Tensor table(const View& points, int64_t clouds, int64_t width, int32_t dtype) {
  const int64_t sizes[] = {clouds, width}, strides[] = {width, 1};
  const int64_t skip = points.dim == 3 ? 0 : 1;
  return empty(points, 2 - skip, sizes + skip, strides + skip, dtype);
}

}  // namespace protofast::op
