// The farthest pair: which pairs to look at, whatever the instruction set.
//
// Far-point searches find a pair that is nearly or truly the farthest, and a center from which all points are about as
// near as can be. Of two points that may be farther, the distances from the center add up to more: that leaves few
// pairs unless the points lie on a sphere about it. Points are kept in cells of near ones, farthest from the center
// first, so that whole cells and runs of points are passed over; what is left is for the tiles.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "farthest_plan.h"
#include "threads.h"

namespace protofast {

class FarthestSearch {
 public:
  FarthestSearch(const Cloud& cloud, const PairLoops& loops, bool bytes)
      : cloud_(cloud), loops_(loops), bytes_(bytes), width_(cloud.width()), center_(width_) {}

  // The positions in ascending order, and the value. Of one point, twice that.
  std::pair<int64_t, int64_t> run(double& value) {
    value = 0;
    if (cloud_.count < 2) return {0, 0};
    approach();
    choose_center();
    value = best_.value();
    if (value == 0) return {0, 1};  // all points coincide
    if (value > 1e250 || value < 1e-250) {
      everything();
    } else {
      if (cloud_.cosine()) direction_of_zero();
      keep_near();
      const int64_t some = std::min<int64_t>(kept_.size(), 512);
      const auto farther = [&](int64_t a, int64_t b) { return Key{values_[a], a}.over({values_[b], b}); };
      std::nth_element(kept_.begin(), kept_.begin() + some, kept_.end(), farther);
      compare({kept_.begin(), kept_.begin() + some});
      if (some < std::ssize(kept_)) {
        std::sort(kept_.begin(), kept_.end());
        drop_near();
        drop_copies();
        if (kept_.size() > 1) search();
      }
    }
    value = best_.value();
    return best_.pair();
  }

 private:
  static constexpr int64_t CELL = 256;

  std::vector<double> coordinates(int64_t position) const {
    std::vector<double> to(width_);
    loops_.coordinates(cloud_, position, to.data());
    return to;
  }

  Key values(const double* center, double* to) const {
    Key best;
    std::mutex mutex;
    parallel(cloud_.count, std::max<int64_t>(256, (int64_t{1} << 16) / (cloud_.dim + 4)),
             [&](int64_t begin, int64_t end) {
               const Key found = loops_.values(cloud_, center, begin, end, to);
               const std::lock_guard lock(mutex);
               if (found.over(best)) best = found;
             });
    return best;
  }

  void approach() {
    const int64_t count = cloud_.count, sample = std::min<int64_t>(count, 4096);
    std::vector<double> center(width_);
    for (int64_t i = 0; i < sample; ++i) {
      const auto one = coordinates(count * i / sample);
      for (int64_t c = 0; c < width_; ++c) center[c] += one[c] / static_cast<double>(sample);
    }
    for (int step = 1; step <= 4; ++step) {  // the center moves toward its farthest point: Bădoiu and Clarkson 2003
      if (cloud_.cosine()) center[cloud_.dim] = 0;  // among the vectors that are not zero
      std::vector<double> values(count);
      const Key far = this->values(center.data(), values.data());
      views_.push_back({center, std::move(values), far.value});
      int64_t a = far.position;
      for (int tries = 0; tries < 10; ++tries) {
        const Key b = this->values(coordinates(a).data(), nullptr);
        const double before = best_.value();
        best_.offer(a, b.position, b.value);
        if (!(best_.value() > before)) break;
        a = b.position;
      }
      const auto [i, j] = best_.pair();
      const auto x = coordinates(step == 1 ? i : far.position), y = coordinates(j);
      for (int64_t c = 0; c < width_; ++c)
        center[c] = step == 1 ? x[c] / 2 + y[c] / 2 : center[c] + (x[c] - center[c]) / (step + 1);
    }
  }

  // Takes the center from which the fewest pairs of a sample may be far enough: the mean of points that gather, the
  // middle of those on a rim.
  void choose_center() {
    const double least = this->least();
    int64_t fewest = std::numeric_limits<int64_t>::max();
    for (View& view : views_) {
      const int64_t sample = std::min<int64_t>(cloud_.count, 1024);
      std::vector<double> lengths(sample);
      for (int64_t i = 0; i < sample; ++i) lengths[i] = cloud_.length(view.values[cloud_.count * i / sample]);
      std::sort(lengths.begin(), lengths.end());
      int64_t pairs = 0;
      for (int64_t i = 0, j = sample; i < sample; ++i) {
        while (j > 0 && lengths[i] + lengths[j - 1] >= least) --j;
        pairs += sample * (sample - j) + (lengths[i] + cloud_.length(view.radius) >= least);
      }
      if (pairs < fewest) fewest = pairs, center_ = view.center, values_.swap(view.values), radius_ = view.radius;
    }
    views_.clear();
  }

  double length_of_best() const { return cloud_.length(best_.value()); }

  // Whether a point may be one of the pair, by the center.
  bool may_be(int64_t position, double least) const {
    return cloud_.length(values_[position]) + cloud_.length(radius_) >= least;
  }

  double least() const { return length_of_best() * (1 - 1e-9); }

  void keep_near() {
    const double least = this->least();
    for (int64_t i = 0; i < cloud_.count; ++i)
      if (may_be(i, least) && !(cloud_.cosine() && cloud_.norms[i] == 0)) kept_.push_back(i);
  }

  void drop_near() {
    const double least = this->least();
    std::erase_if(kept_, [&](int64_t position) { return !may_be(position, least); });
  }

  // Zero vectors are one point, orthogonal to all others.
  void direction_of_zero() {
    for (int64_t i = 0; i < cloud_.count; ++i)
      if (cloud_.norms[i] == 0) {
        const Key far = values(coordinates(i).data(), nullptr);
        return best_.offer(i, far.position, far.value);
      }
  }

  // All pairs of a few.
  void compare(const std::vector<int64_t>& list) {
    const int64_t count = std::ssize(list);
    spread(count, [&](int64_t i) {
      const auto x = coordinates(list[i]);
      for (int64_t j = i + 1; j < count; ++j) best_.offer(list[i], list[j], loops_.value(cloud_, list[j], x.data()));
    });
  }

  // All pairs, where squares leave the range of float64 or nearly so, and bounds with them.
  void everything() {
    spread(cloud_.count, [&](int64_t i) {
      if (std::isinf(best_.value()) && i > best_.pair().first) return;  // nothing is farther, and equals come later
      const auto x = coordinates(i);
      for (int64_t j = i + 1; j < cloud_.count; ++j) best_.offer(i, j, loops_.value(cloud_, j, x.data()));
    });
  }

  template <class Use>
  static void spread(int64_t count, const Use& use) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min(thread_count(), count);
    parallel(threads, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next++) < count;) use(i);
    });
  }

  // Leaves the first of points that are equal.
  void drop_copies() {
    const int64_t count = std::ssize(kept_);
    std::vector<uint64_t> hashes(count);
    parallel(count, 1024, [&](int64_t begin, int64_t end) {
      std::vector<double> x(width_);
      for (int64_t i = begin; i < end; ++i) {
        loops_.coordinates(cloud_, kept_[i], x.data());
        uint64_t hash = 0;
        for (const double c : x) hash = std::rotl(hash, 23) * 0x9e3779b97f4a7c15 + std::bit_cast<uint64_t>(c + 0.0);
        hashes[i] = hash ^ hash >> 29;
      }
    });
    const uint64_t slots = std::bit_ceil(static_cast<uint64_t>(2 * count));
    std::vector<int64_t> table(slots, -1);
    std::vector<int64_t> left;
    left.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = kept_[i];
      uint64_t at = hashes[i] * 0x9e3779b97f4a7c15 >> 20 & (slots - 1);
      for (; table[at] >= 0; at = (at + 1) & (slots - 1))
        if (hashes[table[at]] == hashes[i] && loops_.value(cloud_, position, coordinates(kept_[table[at]]).data()) == 0)
          break;
      if (table[at] < 0) table[at] = i, left.push_back(position);
    }
    kept_ = std::move(left);
  }

  void search() {
    const PairPlan plan = prepare();
    std::atomic<int64_t> next{0};
    parallel(thread_count(), 1, [&](int64_t, int64_t) { loops_.search(cloud_, plan, best_, next); });
  }

  PairPlan prepare() const {
    const int64_t count = std::ssize(kept_);
    PairPlan plan{};
    plan.dim = cloud_.dim, plan.manhattan = cloud_.manhattan();
    plan.form = plan.dim <= 8                                        ? PairPlan::Form::exact
                : bytes_ && !plan.manhattan && plan.dim <= (1 << 15) ? PairPlan::Form::bytes
                                                                     : PairPlan::Form::floats;
    const int64_t multiple = plan.form == PairPlan::Form::bytes ? 64 : 16;
    plan.depth = (plan.dim + multiple - 1) / multiple * multiple;
    plan.panel = plan.form == PairPlan::Form::exact ? 8 : loops_.panel;
    plan.scale = std::ldexp(1, -std::ilogb(cloud_.length(radius_)) - 2);
    plan.shift.resize(std::max(plan.depth, width_));
    for (int64_t c = 0; c < plan.dim; ++c) plan.shift[c] = -center_[c] * plan.scale;

    std::vector<float> rows(count * plan.depth), missed(count), norms(count);
    parallel(count, 256, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        missed[i] = loops_.round(cloud_, plan, kept_[i], rows.data() + i * plan.depth);
        norms[i] = static_cast<float>(cloud_.length(values_[kept_[i]]) * plan.scale) * (1 + 1e-6F);
      }
    });
    auto groups = cut(rows, plan.depth);
    parallel(std::ssize(groups), 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        std::sort(groups[g].begin(), groups[g].end(), [&](int64_t a, int64_t b) { return norms[a] > norms[b]; });
    });
    std::sort(groups.begin(), groups.end(),
              [&](const auto& a, const auto& b) { return norms[a.front()] > norms[b.front()]; });

    int64_t slots = 0;
    for (const auto& group : groups) {
      plan.cells.push_back({slots, std::ssize(group), norms[group.front()], 0, 0, 0});
      slots += (std::ssize(group) + plan.panel - 1) / plan.panel * plan.panel;
    }
    plan.positions.assign(slots, -1), plan.norms.assign(slots, 0), plan.missed.assign(slots, 0);
    if (plan.form == PairPlan::Form::bytes)
      plan.steps.assign(slots, 1), plan.squares.assign(slots, 0), plan.starts.assign(slots, 0);
    const int64_t bytes = plan.form == PairPlan::Form::exact    ? slots * plan.dim * 8
                          : plan.form == PairPlan::Form::floats ? slots * plan.depth * 4
                                                                : slots * plan.depth;
    plan.data = {std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free};
    std::memset(plan.data.get(), 0, bytes);
    plan.middles.resize(std::ssize(groups) * plan.depth);
    std::vector<int64_t> row_of_slot(slots, -1);
    parallel(std::ssize(groups), 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        PairCell& cell = plan.cells[g];
        float* const middle = plan.middles.data() + g * plan.depth;
        for (int64_t i = 0; i < cell.count; ++i) {
          const int64_t row = groups[g][i], slot = cell.first + i;
          row_of_slot[slot] = row, plan.positions[slot] = kept_[row];
          plan.norms[slot] = norms[row], plan.missed[slot] = missed[row];
          for (int64_t c = 0; c < plan.depth; ++c)
            middle[c] += rows[row * plan.depth + c] / static_cast<float>(cell.count);
        }
        const float slack = 1 + static_cast<float>(plan.dim + 8) * 0x1p-23F;
        for (const int64_t row : groups[g]) {
          const float* const x = rows.data() + row * plan.depth;
          cell.reach = std::max(cell.reach, missed[row] + slack * loops_.gap(middle, x, plan.depth, plan.manhattan));
          if (plan.manhattan) continue;
          // What rounding turns a direction by is at most about its share of the length.
          const double turned = norms[row] > 1e-3F ? 2 * missed[row] / norms[row] : 4;
          cell.angle = std::max(cell.angle, loops_.angle(middle, x, plan.depth) + turned);
        }
        loops_.pack(cloud_, plan, cell, rows.data(), row_of_slot.data());
        for (int64_t i = 0; i < cell.count; ++i) cell.missed = std::max(cell.missed, plan.missed[cell.first + i]);
      }
    });
    return plan;
  }

  // Groups of near rows: halved along the widest axis until at most CELL remain.
  static std::vector<std::vector<int64_t>> cut(const std::vector<float>& rows, int64_t depth) {
    std::vector<std::vector<int64_t>> groups(1);
    groups[0].resize(std::ssize(rows) / depth);
    std::iota(groups[0].begin(), groups[0].end(), 0);
    while (std::ssize(groups[0]) > CELL) {  // all are as large, but for one
      const int64_t before = std::ssize(groups);
      groups.resize(2 * before);
      parallel(before, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> low(depth), high(depth);
        std::vector<std::pair<float, int64_t>> keys;
        for (int64_t g = begin; g < end; ++g) {
          auto& group = groups[g];
          const int64_t count = std::ssize(group), asked = std::min<int64_t>(count, 256);
          for (int64_t i = 0; i < asked; ++i) {
            const float* const x = rows.data() + group[count * i / asked] * depth;
            for (int64_t c = 0; c < depth; ++c) {
              low[c] = i ? std::min(low[c], x[c]) : x[c];
              high[c] = i ? std::max(high[c], x[c]) : x[c];
            }
          }
          int64_t axis = 0;
          for (int64_t c = 1; c < depth; ++c)
            if (high[c] - low[c] > high[axis] - low[axis]) axis = c;
          keys.resize(count);
          for (int64_t i = 0; i < count; ++i) keys[i] = {rows[group[i] * depth + axis], group[i]};
          const int64_t half = (count + 1) / 2;
          std::nth_element(keys.begin(), keys.begin() + half, keys.end());
          group.resize(half);
          for (int64_t i = 0; i < half; ++i) group[i] = keys[i].second;
          for (int64_t i = half; i < count; ++i) groups[before + g].push_back(keys[i].second);
        }
      });
    }
    return groups;
  }

  struct View {
    std::vector<double> center, values;  // values to it, by position
    double radius;                       // the largest of them
  };

  const Cloud& cloud_;
  const PairLoops& loops_;
  const bool bytes_;
  const int64_t width_;
  std::vector<View> views_;  // from all centers
  std::vector<double> center_, values_;
  double radius_ = 0;
  std::vector<int64_t> kept_;  // positions that may be of the pair
  BestPair best_;
};

}  // namespace protofast
