#include "dispersion_op.h"

#include <algorithm>

#include "selection_args.h"

namespace protofast::op {
namespace {

Tensor scalar(const View& points) { return empty(points, 0, nullptr, nullptr, numbers().f64); }

template <class N>
N* data_of(const Tensor& tensor) {
  return static_cast<N*>(tensor.data_ptr());
}

// One result a point, without gaps.
template <class N>
const N* of_points(const char* name, const Tensor& tensor, const View& points, int32_t dtype, Temporaries& kept) {
  const View seen(tensor);
  check_same(name, seen, points, dtype);
  STD_TORCH_CHECK(seen.dim == 1 && seen.numel == points.sizes[0], name, " must have one number a point");
  return data_of<N>(kept.packed(tensor));
}

// The list of indices as the first of an output of k.
Tensor list_of(const Tensor& indices, const View& points, int64_t k, Temporaries& kept) {
  const View list(indices);
  check_same("indices", list, points, numbers().int64);
  STD_TORCH_CHECK(list.dim == 1 && 1 <= list.numel && list.numel <= k, "indices must be 1 to k in a list");
  Tensor out = table(points, 1, k, numbers().int64);
  std::copy_n(data_of<int64_t>(kept.packed(indices)), list.numel, data_of<int64_t>(out));
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> farthest_pair(const DispersionKernels& kernels, const Tensor& points_tensor,
                                         const MaybeTensor& mask, int64_t metric) {
  const View points(points_tensor);
  Temporaries kept(points);
  FarthestPair args{};
  args.points = clouds(points, false), args.points.allowed = allowed(mask, points, args.points, kept);
  args.measure = measure(metric, args.points);
  STD_TORCH_CHECK(args.points.count > 0, "points must not be empty");
  std::tuple<Tensor, Tensor> out(table(points, 1, 2, numbers().int64), scalar(points));
  args.pair = data_of<int64_t>(std::get<0>(out)), args.distance = data_of<double>(std::get<1>(out));
  kernels.farthest_pair(args);
  return out;
}

std::tuple<Tensor, Tensor> max_min_swaps(const DispersionKernels& kernels, const Tensor& points_tensor,
                                         const Tensor& indices, const Tensor& labels, const Tensor& distances,
                                         const MaybeTensor& mask, int64_t metric, int64_t swaps) {
  const View points(points_tensor);
  Temporaries kept(points);
  MaxMinSwaps args{};
  args.points = clouds(points, false), args.points.allowed = allowed(mask, points, args.points, kept);
  args.measure = measure(metric, args.points);
  args.k = View(indices).numel, args.swaps = swaps;
  args.labels = of_points<int64_t>("labels", labels, points, numbers().int64, kept);
  args.distances = of_points<double>("distances", distances, points, numbers().f64, kept);
  std::tuple<Tensor, Tensor> out(list_of(indices, points, args.k, kept), scalar(points));
  args.indices = data_of<int64_t>(std::get<0>(out)), args.smallest = data_of<double>(std::get<1>(out));
  kernels.max_min_swaps(args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> max_sum(const DispersionKernels& kernels, const Tensor& points_tensor,
                                           const Tensor& initial, const MaybeTensor& mask, int64_t k, int64_t metric,
                                           int64_t sweeps) {
  const View points(points_tensor);
  Temporaries kept(points);
  MaxSum args{};
  args.points = clouds(points, false), args.points.allowed = allowed(mask, points, args.points, kept);
  args.measure = measure(metric, args.points);
  args.given = View(initial).numel, args.k = k, args.sweeps = sweeps;
  std::tuple<Tensor, Tensor, Tensor> out(list_of(initial, points, k, kept), scalar(points), scalar(points));
  args.indices = data_of<int64_t>(std::get<0>(out));
  args.total = data_of<double>(std::get<1>(out)), args.detour = data_of<double>(std::get<2>(out));
  kernels.max_sum(args);
  return out;
}

}  // namespace protofast::op
