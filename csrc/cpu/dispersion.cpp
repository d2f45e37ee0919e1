// The farthest pair and dispersion on the CPU. Every loop gives the values of protofast/_ops/selection.py to the bit,
// so which instruction set or number of threads runs never changes a result.
#include "../dispersion_op.h"
#include "dispersion_swaps.h"
#include "farthest.h"

#define LOOPS "dispersion_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

template <class T>
double entry(const Cloud& cloud, int64_t from, int64_t to) {
  return static_cast<double>(
      static_cast<const T*>(cloud.data)[cloud.at(from) * cloud.row + cloud.at(to) * cloud.column]);
}

template <class T>
PairLoops loops() {
  return {BEST(coordinates<T>), BEST(measure_norms<T>), BEST(pair_value<T>), BEST(pair_values<T>), BEST(pair_round<T>),
          BEST(pair_gap),       BEST(pair_angle),       BEST(pair_pack<T>),  BEST(pair_search<T>), BEST(PAIR_PANEL)};
}

// What an element type brings.
struct OfType {
  PairLoops loops;
  double (*entry)(const Cloud&, int64_t from, int64_t to);
};

OfType of(Dtype dtype) {
  return with_type(dtype, []<class T>() { return OfType{loops<T>(), &entry<T>}; });
}

std::pair<int64_t, int64_t> scan(const Cloud& cloud, const OfType& type, double& value) {
  BestPair best;
  std::atomic<int64_t> next{0};
  parallel(thread_count(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < cloud.count;) {
      Key key;
      for (int64_t j = i + 1; j < cloud.count; ++j)
        if (const double now = type.entry(cloud, i, j); now > key.value) key = {now, j};
      best.offer(i, key.position, key.value);
    }
  });
  value = std::max(0.0, best.value());
  return best.pair();
}

void farthest_pair(const FarthestPair& args) {
  const OfType type = of(args.points.dtype);
  const Allowed allowed(args.points, args.measure, 0, type.loops.norms);
  const Cloud& cloud = allowed.cloud;
  double value = 0;
  std::pair<int64_t, int64_t> pair;
  if (args.measure == Measure::precomputed)
    pair = scan(cloud, type, value);
  else
    pair = FarthestSearch(cloud, type.loops, cpu_isa() >= Isa::avx512vnni).run(value);
  STD_TORCH_CHECK(0 <= pair.first && pair.first < cloud.count && 0 <= pair.second && pair.second < cloud.count,
                  "points hold values that are not finite");
  args.pair[0] = cloud.at(pair.first), args.pair[1] = cloud.at(pair.second);
  *args.distance = distance(args.measure, value);
}

std::vector<int64_t> positions(const Allowed& allowed, const int64_t* indices, int64_t count) {
  std::vector<int64_t> found(count);
  for (int64_t i = 0; i < count; ++i) found[i] = allowed.position(indices[i]);
  return found;
}

// No less than the value at a distance.
double value_under(Measure measure, double distance) {
  if (measure == Measure::cosine) return 2 * distance;
  if (measure != Measure::euclidean) return distance;
  return distance * distance * (1 + 0x1p-50) + 1e-322;
}

void max_min_swaps(const MaxMinSwaps& args) {
  const OfType type = of(args.points.dtype);
  const Allowed allowed(args.points, args.measure, 0, type.loops.norms);
  const Cloud& cloud = allowed.cloud;
  ChosenPoints chosen(cloud, type.loops, type.entry, positions(allowed, args.indices, args.k));
  std::vector<int32_t> labels(cloud.count);
  std::vector<double> bounds(cloud.count);
  for (int64_t i = 0; i < cloud.count; ++i) {
    const int64_t label = args.labels[cloud.at(i)];
    STD_TORCH_CHECK(0 <= label && label < args.k, "labels must be positions in the list of indices");
    labels[i] = static_cast<int32_t>(label), bounds[i] = value_under(args.measure, args.distances[cloud.at(i)]);
  }
  MaxMinSwapping swapping(chosen, std::move(labels), std::move(bounds));
  swapping.run(args.swaps);
  for (int64_t i = 0; i < args.k; ++i) args.indices[i] = cloud.at(chosen.position(i));
  *args.smallest = distance(args.measure, swapping.smallest());
}

// Σ_{i<j} d(i, j) by way of a center is at most this; see the reference.
double detour(const ChosenPoints& chosen, const OfType& type) {
  const Cloud& cloud = chosen.cloud();
  const int64_t k = chosen.count();
  const double others = static_cast<double>(k - 1);
  std::vector<double> values(cloud.count);
  const auto largest = [&] {
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<>());
    return std::accumulate(values.begin(), values.begin() + k, 0.0);
  };
  if (cloud.measure == Measure::precomputed) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t number = 0; number < k; ++number) {
      for (int64_t i = 0; i < cloud.count; ++i) values[i] = chosen.value(number, i);
      least = std::min(least, largest());
    }
    return least * others;
  }
  std::vector<double> center(cloud.width());
  for (int64_t number = 0; number < k; ++number)
    for (int64_t c = 0; c < cloud.width(); ++c) center[c] += chosen.coordinates(number)[c];
  for (double& c : center) c /= static_cast<double>(k);
  parallel(cloud.count, values_at_once(cloud),
           [&](int64_t begin, int64_t end) { type.loops.values(cloud, center.data(), begin, end, values.data()); });
  const double far = largest();
  if (cloud.manhattan()) return far * others;
  const double all = static_cast<double>(k) * far;
  if (cloud.measure != Measure::euclidean) return distance(cloud.measure, all);
  return std::sqrt(static_cast<double>(k) * others / 2 * all);
}

void max_sum(const MaxSum& args) {
  const OfType type = of(args.points.dtype);
  const Allowed allowed(args.points, args.measure, 0, type.loops.norms);
  const Cloud& cloud = allowed.cloud;
  STD_TORCH_CHECK(args.k <= cloud.count, "k is larger than the number of allowed points");
  ChosenPoints chosen(cloud, type.loops, type.entry, positions(allowed, args.indices, args.given));
  SumsOfDistances sums(chosen);
  sums.choose(args.k);
  sums.sweep(args.sweeps);
  *args.total = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    args.indices[i] = cloud.at(chosen.position(i));
    for (int64_t j = i + 1; j < args.k; ++j) *args.total += chosen.distance(i, chosen.position(j));
  }
  *args.detour = detour(chosen, type);
}

constexpr DispersionKernels KERNELS{&farthest_pair, &max_min_swaps, &max_sum};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_dispersion<KERNELS>(m); }

}  // namespace protofast
