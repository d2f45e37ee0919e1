// k-medoids on the CPU. Every sum that decides is taken as protofast/_ops/selection.py lays it down, to the bit, so
// which instruction set or number of threads runs never changes a result.
#include "../medoids_op.h"
#include "medoids_search.h"
#include "medoids_swaps.h"
#include "selection_allowed.h"
#include "selection_relax.h"

#define LOOPS "medoids_loops.h"
#include "each_isa.h"

namespace protofast {
namespace {

template <class T>
MedoidsLoops loops() {
  return {BEST(coordinates<T>), BEST(measure_norms<T>), BEST(fill_panel<T>), BEST(panel_values), BEST(panel_distances),
          BEST(panel_pull),     BEST(panel_slopes),     BEST(read_row<T>),   BEST(row_sum<T>),   BEST(add_terms),
          BEST(sum_lanes),      BEST(swap_gains),       BEST(tile_lengths),  BEST(most_gains),   BEST(sum_tiles),
          BEST(SUM_PANEL),      BEST(SUM_VECTOR),       BEST(SUM_ROWS)};
}

MedoidsLoops loops(Dtype dtype) {
  return with_type(dtype, []<class T>() { return loops<T>(); });
}

class VoronoiIteration {
 public:
  VoronoiIteration(const KMedoids& args, const Cloud& cloud, const MedoidsLoops& loops)
      : args_(args),
        cloud_(cloud),
        loops_(loops),
        values_(cloud.count),
        labels_(cloud.count, -1),
        before_(cloud.count),
        changed_(args.k) {}

  bool run() {
    std::vector<int64_t> next(args_.k);
    for (int64_t iteration = 0; iteration < args_.max_iter; ++iteration) {
      assign();
      std::copy_n(args_.indices, args_.k, next.begin());
      choose(next.data());
      if (std::equal(next.begin(), next.end(), args_.indices)) return true;
      std::copy(next.begin(), next.end(), args_.indices);
    }
    return false;
  }

 private:
  // Labels all points; of coincident medoids each keeps itself.
  void assign() {
    before_.swap(labels_);
    if (cloud_.measure == Measure::precomputed) {
      std::fill(labels_.begin(), labels_.end(), 0);
      parallel(cloud_.count, 1 << 12, [&](int64_t begin, int64_t end) {
        std::vector<double> row(end - begin);
        for (int64_t m = 0; m < args_.k; ++m) {
          loops_.row(cloud_, args_.indices[m], begin, end, row.data() - begin);
          for (int64_t i = begin; i < end; ++i)
            if (m == 0 || row[i - begin] < values_[i]) values_[i] = row[i - begin], labels_[i] = m;
        }
      });
    } else {
      meet();
    }
    for (int64_t m = 0; m < args_.k; ++m) labels_[args_.indices[m]] = m;
    std::fill(changed_.begin(), changed_.end(), false);
    for (int64_t i = 0; i < cloud_.count; ++i)
      if (labels_[i] != before_[i]) {
        changed_[labels_[i]] = true;
        if (before_[i] >= 0) changed_[before_[i]] = true;
      }
  }

  void meet() {
    const PointClouds& points = args_.points;
    const int64_t size = bytes(points.dtype);
    std::vector<char> rows(args_.k * points.dim * size + 1);
    for (int64_t m = 0; m < args_.k; ++m)
      for (int64_t c = 0; c < points.dim; ++c)
        std::memcpy(rows.data() + (m * points.dim + c) * size,
                    static_cast<const char*>(points.data) + (args_.indices[m] * points.row + c * points.column) * size,
                    size);
    Relax relax{};
    relax.points = points, relax.measure = args_.measure;
    relax.centers = {rows.data(), points.dtype, 1, args_.k, points.dim, 0, points.dim, 1, nullptr};
    relax.values = values_.data(), relax.labels = labels_.data();
    relax_points(relax);
    for (int64_t& label : labels_) label = std::max<int64_t>(label, 0);  // where no value is finite
  }

  // The medoids of clusters that have changed.
  void choose(int64_t* next) const {
    const int64_t k = args_.k, count = cloud_.count, threads = thread_count();
    std::vector<int64_t> ends(k + 1), members(count);
    for (const int64_t label : labels_) ++ends[label + 1];
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    std::vector<int64_t> at(ends.begin(), ends.end() - 1);
    for (int64_t i = 0; i < count; ++i) members[at[labels_[i]]++] = i;
    const auto size = [&](int64_t m) { return ends[m + 1] - ends[m]; };
    const auto find = [&](int64_t m) {
      next[m] = MedoidSearch(cloud_, loops_, members.data() + ends[m], size(m)).run();
    };
    // Threads share a large cluster; of small ones each takes its own.
    std::vector<int64_t> small;
    for (int64_t m = 0; m < k; ++m) {
      if (!changed_[m]) continue;
      if (threads == 1 || size(m) * 2 * threads > count)
        find(m);
      else
        small.push_back(m);
    }
    std::sort(small.begin(), small.end(), [&](int64_t a, int64_t b) { return size(a) > size(b); });
    std::atomic<int64_t> taken{0};
    const int64_t runs = count * count / k * cloud_.dim > (1 << 20) ? threads : 1;
    if (!small.empty())
      parallel(std::min<int64_t>(runs, std::ssize(small)), 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = taken++) < std::ssize(small);) find(small[i]);
      });
  }

  const KMedoids& args_;
  const Cloud& cloud_;
  const MedoidsLoops& loops_;
  std::vector<double> values_;
  std::vector<int64_t> labels_, before_;
  std::vector<char> changed_;
};

void k_medoids(const KMedoids& args) {
  const MedoidsLoops loops = protofast::loops(args.points.dtype);
  const Allowed allowed(args.points, args.measure, 0, loops.norms);
  *args.settled = VoronoiIteration(args, allowed.cloud, loops).run();
  if (args.refine && args.k > 1 && args.k < args.points.count)
    *args.settled = MedoidSwaps(allowed.cloud, loops, args.indices, args.k).run(args.max_iter);
}

constexpr MedoidsKernels KERNELS{&k_medoids};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(protofast, CPU, m) { register_medoids<KERNELS>(m); }

}  // namespace protofast
