#include "medoids_op.h"

#include <algorithm>

#include "selection_args.h"

namespace protofast::op {

std::tuple<Tensor, Tensor> k_medoids(const MedoidsKernels& kernels, const Tensor& points_tensor, const Tensor& initial,
                                     int64_t metric, int64_t max_iter, bool refine) {
  const View points(points_tensor), first(initial);
  check_same("initial", first, points, numbers().int64);
  Temporaries kept(points);
  KMedoids args{};
  args.points = clouds(points, false);
  args.measure = measure(metric, args.points);
  args.k = first.numel, args.max_iter = max_iter, args.refine = refine;
  STD_TORCH_CHECK(first.dim == 1 && 1 <= args.k && args.k <= args.points.count, "initial must hold 1 to n indices");
  std::tuple<Tensor, Tensor> out(table(points, 1, args.k, numbers().int64),
                                 empty(points, 0, nullptr, nullptr, numbers().boolean));
  args.indices = static_cast<int64_t*>(std::get<0>(out).data_ptr());
  args.settled = static_cast<bool*>(std::get<1>(out).data_ptr());
  const int64_t* const given = static_cast<const int64_t*>(kept.packed(initial).data_ptr());
  for (int64_t i = 0; i < args.k; ++i)
    STD_TORCH_CHECK(0 <= given[i] && given[i] < args.points.count, "initial must hold indices of points");
  std::copy_n(given, args.k, args.indices);
  kernels.k_medoids(args);
  return out;
}

}  // namespace protofast::op
