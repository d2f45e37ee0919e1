// k-center and covers on the CPU. Every loop gives the values of protofast/_ops/selection.py to the bit, so which
// engine, instruction set or number of threads runs never changes a result.
#include "../selection_op.h"
#include "selection_allowed.h"
#include "selection_box_traversal.h"
#include "selection_greedy.h"
#include "selection_relax.h"

#define LOOPS "selection_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

template <class T>
SelectionLoops loops(const Cloud& cloud) {
  return {BEST(coordinates<T>), BEST(measure_norms<T>), BEST(measure_loop<T>(cloud)),
          BEST(round_centers),  BEST(meet<T>),          BEST(between)};
}

SelectionLoops loops(Dtype dtype, const Cloud& cloud) {
  return with_type(dtype, [&]<class T>() { return loops<T>(cloud); });
}

// What has been chosen so far, and what next.
struct Choices {
  const Cloud& cloud;
  Nearest near;
  const int64_t* given;  // positions
  int64_t first, k;      // how many are given, and wanted
  bool assign;           // whether every point's nearest is
  int64_t* indices;
  double* radii;

  // choose(position) takes a choice into account and returns the farthest point then; finish() leaves `near` complete.
  template <class Choose, class Finish>
  void run(const Choose& choose, const Finish& finish) const {
    Key farthest;
    int64_t number = 0;
    for (; number < k && (number < first || farthest.value > 0); ++number) {
      indices[number] = number < first ? given[number] : farthest.position;
      farthest = choose(indices[number]);
      radii[number] = std::max(0.0, farthest.value);
    }
    if (assign || number < k) finish();
    fill(number);
  }

  // Only copies of chosen points are left.
  void fill(int64_t number) const {
    for (int64_t position = 0; position < cloud.count && number < k; ++position)
      if (near.value[position] >= 0) near.value[position] = -1, indices[number] = position, radii[number++] = 0;
    for (; number < k; ++number) indices[number] = -1, radii[number] = 0;
  }
};

template <class T>
Key measure_row(const Cloud& cloud, int64_t position, int64_t number, const Nearest& near) {
  const T* const row = static_cast<const T*>(cloud.data) + cloud.at(position) * cloud.row;
  Key best;
  for (int64_t i = 0; i < cloud.count; ++i) {
    const double value = static_cast<double>(row[cloud.at(i) * cloud.column]);
    if (value < near.value[i]) near.value[i] = value, near.label[i] = number;
    if (const Key key{near.value[i], i}; key.over(best)) best = key;
  }
  return best;
}

Key measure_row(Dtype dtype, const Cloud& cloud, int64_t position, int64_t number, const Nearest& near) {
  return with_type(dtype, [&]<class T>() { return measure_row<T>(cloud, position, number, near); });
}

template <class Real>
BoxLoops<Real> box_loops(Dtype dtype, const Cloud& cloud) {
  const bool manhattan = cloud.manhattan();
  const int axes = static_cast<int>(cloud.dim + cloud.cosine());
  return with_type(dtype, [&]<class T>() { return BEST(box_loops<T, Real>(manhattan, axes)); });
}

// The fastest, as far as the shape tells.
Engine engine_for(const KCenter& args, const Cloud& cloud) {
  const bool few_axes = cloud.dim >= 1 && cloud.dim + cloud.cosine() <= MOST_AXES;
  if (args.engine == Engine::boxes) return few_axes ? Engine::boxes : Engine::plain;
  if (args.engine != Engine::automatic) return args.engine;
  if (cloud.count < 512 || args.k < (few_axes ? 16 : 4)) return Engine::plain;
  return few_axes ? Engine::boxes : Engine::pool;
}

bool multiplies_bytes() { return cpu_isa() >= Isa::avx512vnni; }

void k_center_of(const KCenter& args, int64_t number) {
  const int64_t n = args.points.count, k = args.k;
  const Allowed allowed(args.points, args.measure, number, loops(args.points.dtype, Cloud{}).norms);
  const Cloud& cloud = allowed.cloud;
  const Nearest near{args.distances + number * n, args.labels + number * n};
  std::fill_n(near.value, cloud.count, std::numeric_limits<double>::infinity());
  std::fill_n(near.label, cloud.count, 0);
  std::vector<int64_t> given(args.initial + number * args.given, args.initial + (number + 1) * args.given);
  for (int64_t& index : given) index = allowed.position(index);
  const Choices choices{
      cloud, near, given.data(), std::ssize(given), k, args.assign, args.indices + number * k, args.radii + number * k};
  const Dtype dtype = args.points.dtype;
  if (args.measure == Measure::precomputed) {
    int64_t round = 0;
    choices.run(
        [&](int64_t position) {
          near.leave(position, round);
          return measure_row(dtype, cloud, position, round++, near);
        },
        [] {});
  } else {
    Covering covering(cloud, loops(dtype, cloud), near, k, multiplies_bytes(), dtype == Dtype::f64);
    const auto traverse = [&](auto&& traversal) {
      choices.run(
          [&](int64_t position) {
            covering.add(position);
            return traversal.next(position);
          },
          [&] { traversal.finish(); });
    };
    switch (engine_for(args, cloud)) {
      case Engine::boxes:
        if (dtype == Dtype::f64 || cloud.cosine())
          traverse(BoxTraversal<double>(covering, box_loops<double>(dtype, cloud), k));
        else
          traverse(BoxTraversal<float>(covering, box_loops<float>(dtype, cloud), k));
        break;
      case Engine::pool:
        traverse(PoolTraversal(covering));
        break;
      default:
        traverse(PlainTraversal(covering));
    }
  }
  parallel(args.assign ? cloud.count : 0, 1 << 15, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) near.value[begin] = distance(args.measure, std::max(0.0, near.value[begin]));
  });
  for (int64_t i = 0; i < k; ++i) {
    double& radius = args.radii[number * k + i];
    radius = distance(args.measure, radius);
    int64_t& index = args.indices[number * k + i];
    if (index >= 0) index = cloud.at(index);
  }
  if (!args.assign) return;
  allowed.spread(near.value, n, std::numeric_limits<double>::infinity());
  allowed.spread<int64_t>(near.label, n, -1);
}

void k_center(const KCenter& args) {
  // What is raised in a thread loses its text.
  const int64_t n = args.points.count;
  for (int64_t i = 0; i < args.points.clouds * args.given; ++i) {
    const int64_t index = args.initial[i];
    STD_TORCH_CHECK(
        0 <= index && index < n && (!args.points.allowed || args.points.allowed[i / args.given * n + index]),
        "initial holds ", index, ", which is not an allowed point");
  }
  parallel(args.points.clouds, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) k_center_of(args, number);
  });
}

void relax(const Relax& args) {
  const auto norms = loops(args.points.dtype, Cloud{}).norms;
  const Allowed points(args.points, args.measure, 0, norms), others(args.centers, args.measure, 0, norms);
  const Cloud& cloud = points.cloud;
  const Nearest near{args.values, args.labels};
  for (int64_t i = 0; i < cloud.count; ++i) {
    near.value[i] = args.nearest ? args.nearest[cloud.at(i)] : std::numeric_limits<double>::infinity();
    near.label[i] = -1;
  }
  Covering covering(cloud, loops(args.points.dtype, cloud), near, others.cloud.count, multiplies_bytes(),
                    args.points.dtype == Dtype::f64);
  covering.take(others.cloud, loops(args.points.dtype, others.cloud));
  points.spread(near.value, args.points.count, std::numeric_limits<double>::infinity());
  points.spread<int64_t>(near.label, args.points.count, -1);
}

constexpr SelectionKernels KERNELS{&k_center, &relax};

}  // namespace

void relax_points(const Relax& args) { relax(args); }

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_selection<KERNELS>(m); }

}  // namespace protofast
