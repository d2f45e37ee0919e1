// The allowed points of a cloud, and results by position and by point.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "selection_plan.h"
#include "threads.h"

namespace protofast {

struct Allowed {
  // `norms` measures those of positions [begin, end), for cosine.
  Allowed(const PointClouds& points, Measure measure, int64_t number,
          void (*norms_of)(const Cloud&, double* norms, int64_t begin, int64_t end)) {
    cloud = {static_cast<const char*>(points.data) + number * points.cloud * int64_t(bytes(points.dtype)),
             points.row,
             points.column,
             points.count,
             points.dim,
             measure,
             nullptr,
             nullptr};
    if (const bool* const flags = points.allowed ? points.allowed + number * points.count : nullptr) {
      for (int64_t i = 0; i < points.count; ++i)
        if (flags[i]) rows.push_back(i);
      cloud.rows = rows.data(), cloud.count = std::ssize(rows);
    }
    if (cloud.cosine()) {
      norms.resize(cloud.count);
      parallel(cloud.count, 4096, [&](int64_t begin, int64_t end) { norms_of(cloud, norms.data(), begin, end); });
      cloud.norms = norms.data();
    }
  }
  Allowed(const Allowed&) = delete;

  int64_t position(int64_t index) const {
    const int64_t found = cloud.rows ? std::lower_bound(rows.begin(), rows.end(), index) - rows.begin() : index;
    STD_TORCH_CHECK(0 <= found && found < cloud.count && cloud.at(found) == index, "index ", index,
                    " is not that of an allowed point");
    return found;
  }

  // Results by position, as results by point, in place.
  template <class N>
  void spread(N* results, int64_t count, N absent) const {
    if (!cloud.rows) return;
    int64_t at = cloud.count - 1;
    for (int64_t i = count - 1; i >= 0; --i) results[i] = at >= 0 && rows[at] == i ? results[at--] : absent;
  }

  Cloud cloud;
  std::vector<int64_t> rows;
  std::vector<double> norms;
};

inline double distance(Measure measure, double value) {
  if (measure == Measure::euclidean) return std::sqrt(value);
  return measure == Measure::cosine ? value / 2 : value;
}

}  // namespace protofast
