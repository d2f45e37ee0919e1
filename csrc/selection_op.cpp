#include "selection_op.h"

#include "selection_args.h"

namespace protofast::op {

std::tuple<Tensor, Tensor, Tensor, Tensor> k_center(const SelectionKernels& kernels, const Tensor& points_tensor,
                                                    const Tensor& initial, const MaybeTensor& mask, int64_t k,
                                                    int64_t metric, int64_t engine, bool assign) {
  const View points(points_tensor), first(initial);
  check_same("initial", first, points, numbers().int64);
  Temporaries kept(points);
  KCenter args{};
  args.points = clouds(points, true), args.points.allowed = allowed(mask, points, args.points, kept);
  args.measure = measure(metric, args.points);
  STD_TORCH_CHECK(engine >= 0 && engine <= int64_t(Engine::pool), "engine is out of range");
  args.engine = Engine(engine);
  STD_TORCH_CHECK(first.dim == points.dim - 1 && (first.dim == 1 || first.sizes[0] == args.points.clouds),
                  "initial must be (m) for points (n, d), or (clouds, m)");
  args.given = first.sizes[first.dim - 1], args.k = k, args.assign = assign;
  STD_TORCH_CHECK(1 <= args.given && args.given <= k, "initial must hold 1 to k indices");
  args.initial = static_cast<const int64_t*>(kept.packed(initial).data_ptr());
  const int64_t many = args.points.clouds, n = args.points.count;
  std::tuple<Tensor, Tensor, Tensor, Tensor> out(
      table(points, many, k, numbers().int64), table(points, many, k, numbers().f64),
      table(points, many, assign ? n : 0, numbers().int64), table(points, many, assign ? n : 0, numbers().f64));
  args.indices = static_cast<int64_t*>(std::get<0>(out).data_ptr());
  args.radii = static_cast<double*>(std::get<1>(out).data_ptr());
  args.device = points.device, args.scratch = kept.scratch();
  args.labels = static_cast<int64_t*>(assign ? std::get<2>(out).data_ptr() : args.scratch(many * n * 8));
  args.distances = static_cast<double*>(assign ? std::get<3>(out).data_ptr() : args.scratch(many * n * 8));
  if (many > 0 && n > 0) kernels.k_center(args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cover(const SelectionKernels& kernels, const Tensor& points, const Tensor& indices,
                                         const MaybeTensor& mask, int64_t metric) {
  auto all = k_center(kernels, points, indices, mask, View(indices).numel, metric, int64_t(Engine::automatic), true);
  return {std::get<1>(all), std::get<2>(all), std::get<3>(all)};
}

std::tuple<Tensor, Tensor> relax(const SelectionKernels& kernels, const Tensor& points_tensor,
                                 const Tensor& centers_tensor, const MaybeTensor& mask, const MaybeTensor& nearest,
                                 int64_t metric) {
  const View points(points_tensor), centers(centers_tensor);
  check_same("centers", centers, points, points.dtype);
  Temporaries kept(points);
  Relax args{};
  args.points = clouds(points, false), args.points.allowed = allowed(mask, points, args.points, kept);
  args.centers = clouds(centers, false);
  args.measure = Measure(metric);
  STD_TORCH_CHECK(metric >= 0 && args.measure < Measure::precomputed, "metric is out of range");
  STD_TORCH_CHECK(args.points.dim == args.centers.dim, "centers must have as many coordinates as points");
  const int64_t n = args.points.count;
  if (nearest) {
    const View seen(*nearest);
    check_same("nearest", seen, points, numbers().f64);
    STD_TORCH_CHECK(seen.dim == 1 && seen.numel == n, "nearest must have one value a point");
    args.nearest = static_cast<const double*>(kept.packed(*nearest).data_ptr());
  }
  std::tuple<Tensor, Tensor> out(table(points, 1, n, numbers().f64), table(points, 1, n, numbers().int64));
  args.values = static_cast<double*>(std::get<0>(out).data_ptr());
  args.labels = static_cast<int64_t*>(std::get<1>(out).data_ptr());
  args.device = points.device, args.scratch = kept.scratch();
  if (n > 0) kernels.relax(args);
  return out;
}

}  // namespace protofast::op
